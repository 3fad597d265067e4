"""Image files that a user names by `images=`, decoded like those of data=folder, and their features.

Shapes: P files, n of them readable, F features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.decoding import CHUNK_SIZE, Decoded, cores
from twoviews.data.images import ImageData, Images
from twoviews.data.picture_files import SUFFIXES, tree
from twoviews.errors import BadInput, nearest
from twoviews.foreign import check_regular
from twoviews.protocols.protocol import EvaluationContext

MAX_SEQUENTIAL = 4 * CHUNK_SIZE  # files that are decoded before worker processes would have started


@dataclass(frozen=True)
class UserImages:
    """Image files, and the features of those that can be decoded."""

    paths: list[str]  # [P]
    broken: dict[int, str]  # position in `paths` of a file that cannot be decoded: the reason
    images: Images  # the others, n, decoded when they are asked for
    positions: Int[Tensor, " n"]  # of `images` in `paths`
    x: Float[Tensor, "n F"]  # features of `images`, on the device


def check_images(images: str | None) -> Path:
    """The path or pattern in `images`; refuses what names neither a file nor a folder nor a pattern, without looking further.

    Raises:
        BadInput: it does not.
    """
    if not images:
        raise BadInput("images= names no pictures; give a file, a folder or a pattern such as photos/*.jpg.")
    place = Path(images).expanduser()
    if not place.is_dir():
        check_regular(place)
        if not place.is_file() and not any(sign in images for sign in "*?["):
            siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
            raise BadInput(f"images={images}: there is no such file or folder.{nearest(place.name, siblings)}")
    return place


def image_paths(images: str | None) -> list[str]:
    """The files that `images` names: a file, all images below a folder, or those that match a pattern; sorted.

    Raises:
        BadInput: there are none, or it names something that is not a regular file.
    """
    place = check_images(images)
    if place.is_dir():
        return tree(place).paths
    if place.is_file():
        return [str(place)]
    matching = Path(place.anchor or ".").glob(str(place.relative_to(place.anchor)))
    paths = sorted(str(path) for path in matching if not path.is_dir() and path.suffix.lower() in SUFFIXES)
    if not paths:
        raise BadInput(f"images={images} fits no picture; pictures end in {' '.join(SUFFIXES)}.")
    return paths


def grey_notes(images: str | None, data: ImageData) -> list[str]:
    """A sentence for the user if colour images are converted to grey, because the encoder takes one channel."""
    return ["the encoder takes grey images, so colour pictures are made grey."] if images and data.channels == 1 else []


def embed_user_images(paths: list[str], context: EvaluationContext) -> UserImages:
    """Decode image files as data=folder does, and compute their features; a file that cannot be decoded is not an error.

    Raises:
        BadInput: the encoder takes neither grey nor RGB images, or a file may not be read.
    """
    data = context.data
    if data.channels not in (1, 3):
        raise BadInput(f"the encoder takes images of {data.channels} channels, and picture files have 1 or 3.")
    workers = 0 if len(paths) <= MAX_SEQUENTIAL else cores()
    files = Decoded(paths, size=data.size, channels=data.channels, workers=workers)
    broken, positions, sizes = {}, [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 2, dtype=torch.int64)]
    x = [torch.empty(0, context.encoder.out_dim, device=context.device)]
    for chunk in files.read(torch.arange(len(paths)).split(CHUNK_SIZE)):
        broken.update(chunk.broken)
        if len(chunk.rows):
            x.append(context.embed(Images(chunk.pixels, chunk.sizes, None)))
            positions.append(chunk.rows)
            sizes.append(chunk.sizes)
    readable = torch.cat(positions)
    images = Images(files.subset(readable), torch.cat(sizes), None, [paths[row] for row in readable.tolist()])
    return UserImages(paths, broken, images, readable, torch.cat(x))
