"""Picture files: which ones lie in a folder, and one of them as a uint8 canvas."""

import errno
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from twoviews.errors import BadInput, printable

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (  # of formats that every Pillow reads
    *(".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif"),
    *(".tiff", ".webp"),
)
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 are the values that swap width and height
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # what turns each upright, as PIL.Image.Transpose numbers it
TWELVE_BITS = 2**12  # values; cameras and microscopes keep them in files of 16 bits
LOOKED_AT = 20  # files that are decoded to find out


@dataclass(frozen=True)
class Tree:
    """The pictures below one folder, sorted by name; hidden files and folders are not looked at."""

    root: Path
    names: tuple[str, ...]  # relative to root, with "/" between the levels
    ignored: tuple[tuple[str, int], ...]  # suffixes of the other files, and how many have them

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[str]:
        """Path of every picture, in order."""
        return [f"{self.root}/{name}" for name in self.names]

    @property
    def others(self) -> str:
        """The files that are not taken for pictures, by suffix; empty if there are none."""
        return _counted(self.ignored)

    @cached_property
    def loose(self) -> int:
        """How many pictures lie directly in the root and so belong to no class folder."""
        return sum("/" not in name for name in self.names)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the folders directly below the root that hold pictures, sorted."""
        return tuple(sorted({class_of(name) for name in self.names if "/" in name}))


def class_of(name: str) -> str:
    """The class folder of a picture, printable, in Unicode's composed form: some systems and archives take ü apart."""
    return unicodedata.normalize("NFC", printable(name.split("/", 1)[0]))


def tree(root: Path) -> Tree:
    """The pictures at any depth below `root`; links to folders are followed, each folder once.

    Raises:
        BadInput: the folder is missing or unreadable, or holds no picture.
    """
    pictures, ignored = [], Counter()
    try:
        for name in _walk(root):
            if Path(name).suffix.lower() in SUFFIXES:
                pictures.append(name)
            else:
                ignored[Path(name).suffix.lower() or Path(name).name] += 1
    except OSError as error:
        raise BadInput(f"{error.filename or root} cannot be read: {error.strerror}.") from None
    others = tuple(sorted(ignored.items()))
    if not pictures:
        others = f"only {ignored.total()} other files: {_counted(others)}" if others else "no file at all"
        raise BadInput(f"{root} holds no picture ({others}); pictures end in {' '.join(SUFFIXES)}.")
    return Tree(root, tuple(sorted(pictures)), others)


def _counted(suffixes: Sequence[tuple[str, int]]) -> str:
    most = sorted(suffixes, key=lambda item: -item[1])
    return ", ".join(f"{count} {suffix}" for suffix, count in most[:5]) + (" ..." if len(most) > 5 else "")


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
                if _leads_to_itself(entry):
                    yield prefix + entry.name
                elif entry.is_dir():
                    waiting.append((f"{prefix}{entry.name}/", Path(entry.path)))
                else:  # what is no file, as a pipe or a link that leads nowhere, counts as a broken one
                    yield prefix + entry.name


def _leads_to_itself(entry: os.DirEntry) -> bool:
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True
    return False


@contextmanager
def _opened(path: str) -> Iterator["Image.Image"]:
    """A picture file, of which only the head is read.

    Raises:
        Exception: of many kinds, when it is none; ValueError for pipes and devices, which Pillow would wait for or never end
            to read.
    """
    from PIL import Image

    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        raise ValueError("is no regular file")
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        yield image


def shorter_side(path: str) -> int | None:
    """Shorter side of a picture in px, read from the head of the file; None when that is broken."""
    try:
        with _opened(path) as image:
            return min(image.size)
    except Exception:  # the decoding pass will say what is wrong with it
        return None


def decode(path: str, size: int, channels: int) -> tuple[UInt8[np.ndarray, "C S S"], tuple[int, int]]:
    """The whole picture resized to size x size px, and its own height and width in px, upright by EXIF.

    Transparent parts are put on white, 16-bit values 0..65535 become 0..255, of several frames the first counts.

    Raises:
        Exception: of many kinds, when the file is no sound picture; OSError with an errno when it cannot be read.
    """
    with _opened(path) as image:
        original = image.size
        image.draft(None, (2 * size, 2 * size))  # JPEGs decode to 1/2, 1/4 or 1/8, not below twice the canvas
        return canvas(image, size, channels, original)


def canvas(
    image: "Image.Image", size: int, channels: int, original: tuple[int, int] | None = None
) -> tuple[UInt8[np.ndarray, "C S S"], tuple[int, int]]:
    """A PIL image as `decode` returns those of files.

    Args:
        image: of any mode that Pillow converts, turned upright by its EXIF data.
        size: side of the canvas in px.
        channels: 1 or 3.
        original: its width and height in px, if it is decoded at a smaller size.

    Raises:
        Exception: of many kinds, when it cannot be decoded or converted.
    """
    from PIL import Image

    width, height = original or image.size
    image.load()  # of TIFF, Pillow turns the pixels then, and has told the size of the upright picture before
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    upright = image if orientation == 1 else image.transpose(Image.Transpose(TURNS[orientation]))
    plain = _eight_bit(upright, "RGB" if channels == 3 else "L")
    if plain.size != (size, size):
        # Bicubic: the crop resamples the canvas once more, and two bilinear passes blur.
        plain = plain.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(plain).reshape(size, size, channels).transpose(2, 0, 1), (height, width)


def _orientation(image) -> int:
    """The EXIF orientation of a PIL image that is loaded, 1 to 8; 1, upright, where the tag means nothing."""
    try:
        exif = image.getexif()
        with warnings.catch_warnings(action="error"):  # which Pillow gives where it takes the first of several values
            orientation = exif.get(ORIENTATION)
    except Exception:  # of many kinds: pixels may be sound where EXIF is not
        return 1
    return orientation if type(orientation) is int and 1 <= orientation <= 8 else 1


def dark(paths: Sequence[str]) -> list[str]:
    """A sentence where pictures of 16 bits have no values beyond 12 bits, and so are nearly black."""
    largest = 0
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        try:
            with _opened(path) as image:
                if not image.mode.startswith("I"):
                    return []
                largest = max(largest, int(np.asarray(image).max()))
        except Exception:  # the decoding pass says what is wrong with it
            continue
    if not 0 < largest < TWELVE_BITS:
        return []
    return [
        f"warning: these pictures have 16 bits, and no value of those looked at is above {largest}: they are taken as nearly "
        f"black. Multiply them by {65535 // largest}, or use data=array, which takes the range of the images."
    ]


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
