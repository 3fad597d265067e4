"""Pictures that are named on the command line, decoded and fed like those of data=folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.decoding import CHUNK_SIZE, Decoded, cores
from twoviews.data.images import ImageData, Images
from twoviews.data.picture_files import SUFFIXES, tree
from twoviews.errors import BadInput, nearest
from twoviews.features import Judged, embed
from twoviews.foreign import regular

FEW = 4 * CHUNK_SIZE  # pictures that are decoded before worker processes would have started


@dataclass(frozen=True)
class Given:
    """Pictures and what the encoder makes of those that are sound."""

    paths: list[str]  # all of them, in order
    broken: dict[int, str]  # what is wrong with which of them
    images: Images  # the sound ones, decoded when they are asked for
    rows: Int[Tensor, " n"]  # which ones these are
    x: Float[Tensor, "n F"]  # their features, on the device


def pictures(images: str | None) -> list[str]:
    """The files that `images=` names: a file, all pictures below a folder, or those that a pattern fits; sorted.

    Raises:
        BadInput: there are none, or one that is named is no regular file.
    """
    if not images:
        raise BadInput("images= names no pictures; give a file, a folder or a pattern, such as images=photo.jpg.")
    place = Path(images).expanduser()
    if place.is_dir():
        return tree(place).paths
    if place.is_file():
        return [str(place)]
    regular(place)
    if not any(sign in images for sign in "*?["):
        there = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
        raise BadInput(f"images={images}: there is no such file or folder.{nearest(place.name, there)}")
    found = Path(place.anchor or ".").glob(str(place.relative_to(place.anchor)))
    paths = sorted(str(path) for path in found if not path.is_dir() and path.suffix.lower() in SUFFIXES)
    if not paths:
        raise BadInput(f"images={images} fits no picture; pictures end in {' '.join(SUFFIXES)}.")
    return paths


def made_grey(images: str | None, data: ImageData) -> list[str]:
    """A sentence where pictures lose their colours, because the encoder was trained without."""
    return ["the encoder takes grey images, so colour pictures are made grey."] if images and data.channels == 1 else []


def embed_given(paths: list[str], judged: Judged) -> Given:
    """Decode the pictures as data=folder does and embed them; broken files are named, not raised.

    Raises:
        BadInput: the encoder takes images that picture files cannot be, or a file may not be read.
    """
    data = judged.data
    if data.channels not in (1, 3):
        raise BadInput(f"the encoder takes images of {data.channels} channels, and picture files have 1 or 3.")
    workers = 0 if len(paths) <= FEW else cores()
    files = Decoded(paths, size=data.size, channels=data.channels, workers=workers)
    broken, rows, sizes = {}, [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 2, dtype=torch.int64)]
    x = [torch.empty(0, judged.encoder.out_dim, device=judged.device)]
    for read in files.read(torch.arange(len(paths)).split(CHUNK_SIZE)):
        broken.update(read.broken)
        if len(read.rows):
            part = Images(read.pixels, read.sizes, None)
            x.append(embed(judged.encoder, part, data, judged.device, judged.dtype, judged.channels_last))
            rows.append(read.rows)
            sizes.append(read.sizes)
    sound = torch.cat(rows)
    images = Images(files.subset(sound), torch.cat(sizes), None, [paths[row] for row in sound.tolist()])
    return Given(paths, broken, images, sound, torch.cat(x))


def split(judged: Judged, name: str) -> tuple[Images, Float[Tensor, "N F"]]:
    """The images of a split and their features, those that other protocols look at too computed once.

    Raises:
        BadInput: the data have no such split.
    """
    data = judged.data
    images = getattr(data, name)
    if images is None:
        raise BadInput(f"{data.name} has no labelled images, so no {name} images; use train.")
    for kept in ("memory", "test"):
        if images is getattr(data, kept):
            return images, getattr(judged, kept).x
    return images, embed(judged.encoder, images, data, judged.device, judged.dtype, judged.channels_last)
