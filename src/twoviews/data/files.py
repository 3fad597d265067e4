"""Picture files: which ones lie in a folder, and one of them as a uint8 canvas."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from twoviews.errors import BadInput

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 are the values that swap width and height


@dataclass(frozen=True)
class Tree:
    """The pictures below one folder, sorted by name; hidden files and folders are not looked at."""

    root: Path
    names: tuple[str, ...]  # relative to root, with "/" between the levels
    ignored: int  # files that are no pictures by their suffix

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[str]:
        """Path of every picture, in order."""
        return [f"{self.root}/{name}" for name in self.names]

    @cached_property
    def loose(self) -> int:
        """How many pictures lie directly in the root and so belong to no class folder."""
        return sum("/" not in name for name in self.names)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the folders directly below the root that hold pictures, sorted."""
        return tuple(sorted({name.split("/", 1)[0] for name in self.names if "/" in name}))


def tree(root: Path) -> Tree:
    """The pictures at any depth below `root`; links to folders are followed, each folder once.

    Raises:
        BadInput: the folder is missing or unreadable, or holds no picture.
    """
    found, ignored = [], 0
    try:
        for name in _walk(root):
            if Path(name).suffix.lower() in SUFFIXES:
                found.append(name)
            else:
                ignored += 1
    except OSError as error:
        raise BadInput(f"{error.filename or root} cannot be read: {error.strerror}.") from None
    if not found:
        others = f"only {ignored} other files" if ignored else "no file at all"
        raise BadInput(f"{root} holds no picture ({others}); pictures end in {' '.join(SUFFIXES)}.")
    return Tree(root, tuple(sorted(found)), ignored)


def _walk(root: Path) -> Iterator[str]:
    """The relative name of every file below `root` that is not hidden."""
    seen, waiting = set(), [("", root)]
    while waiting:
        prefix, folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up would never end
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((f"{prefix}{entry.name}/", Path(entry.path)))
                else:
                    yield prefix + entry.name


def shorter_side(path: str) -> int | None:
    """Shorter side of a picture in px, read from the head of the file; None when that is broken."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return min(image.size)
    except Exception:  # the decoding pass will say what is wrong with it
        return None


def decode(path: str, size: int, channels: int) -> tuple[UInt8[np.ndarray, "C S S"], tuple[int, int]]:
    """The whole picture resized to size x size px, and its own height and width in px, upright by EXIF.

    Transparent parts are put on white, 16-bit values 0..65535 become 0..255, of several frames the first counts.

    Raises:
        Exception: of many kinds, when the file is no sound picture; OSError with an errno when it cannot be read.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        width, height = image.size
        image.draft(None, (2 * size, 2 * size))  # JPEGs decode to 1/2, 1/4 or 1/8, not below twice the canvas
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation >= 5:
            width, height = height, width
        upright = image if orientation == 1 else ImageOps.exif_transpose(image)
        plain = _eight_bit(upright, "RGB" if channels == 3 else "L")
        if plain.size != (size, size):
            # Bicubic: the crop resamples the canvas once more, and two bilinear passes blur.
            plain = plain.resize((size, size), Image.Resampling.BICUBIC)
        canvas = np.asarray(plain)
    return canvas.reshape(size, size, channels).transpose(2, 0, 1), (height, width)


def _eight_bit(image, mode: str):
    """The PIL image in `mode`, RGB or L."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"has values {values.min()} to {values.max()}, outside 16 bits; use data=array for it")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("has floating-point values of unknown range; use data=array for it")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
