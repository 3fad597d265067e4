"""Images in all the forms that a user has them in, prepared for an encoder: files, PIL images, arrays and tensors.

Shapes: N images, C channels, H x W px.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.data.decoding import CHUNK_SIZE, Decoded, cores
from twoviews.data.images import Images
from twoviews.data.picture_files import canvas
from twoviews.data.store import Chunk
from twoviews.errors import BadInput
from twoviews.protocols.user_images import MAX_SEQUENTIAL, image_paths

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK_BYTES = 2**27  # of pixels that are prepared at a time

Path = Union[str, "os.PathLike[str]"]
Pictures = Union[
    Path, Sequence[Path], "Image", Sequence["Image"], np.ndarray, Tensor, Sequence[np.ndarray], Sequence[Tensor]
]


def picture_files(images: Path) -> list[str]:
    """The pictures that a path names: a file, all below a folder, or those that fit a pattern; sorted.

    Raises:
        BadInput: there are none.
    """
    name = os.fspath(images)
    try:
        return image_paths(name)
    except BadInput as error:
        reason = str(error).removeprefix(f"images={name}").lstrip(": ")
        where = "" if pathlib.Path(name).expanduser().is_absolute() else f" in {pathlib.Path.cwd()}"
        raise BadInput(
            f"{name!r}{where}: {reason} Images are a picture file, a folder, a pattern such as 'photos/*.jpg', a list of files, "
            "PIL images, an array or a tensor."
        ) from None


@dataclass(frozen=True)
class ImagePreparation:
    """Decodes and resizes images to what an encoder takes."""

    image_size: int  # px, of a side
    channels: int

    def of(self, images: Pictures) -> tuple[int, Iterator[Images]]:
        """How many images there are, and some of them at a time as canvases of the encoder's size.

        Raises:
            BadInput: there are no images, they have other channels than the encoder, or are not understood; or, from the
                iterator, one cannot be decoded.
        """
        if isinstance(images, (str, os.PathLike)):
            return self._of_files(picture_files(images))
        if isinstance(images, np.ndarray):
            return self._of_array(images)
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise BadInput(
                    f"a tensor of shape {tuple(images.shape)} is not [N, C, H, W]; one image is tensor[None]."
                )
            return self._of_array(images.detach().movedim(1, -1).cpu().numpy())
        pictures: list[Any] = (
            [images] if hasattr(images, "getexif") or not isinstance(images, Sequence) else list(images)
        )
        if not pictures:
            raise BadInput("there are no images: the list is empty.")
        if all(isinstance(picture, (np.ndarray, Tensor)) for picture in pictures):
            return self._of_arrays(pictures)
        if all(isinstance(picture, (str, os.PathLike)) for picture in pictures):
            return self._of_files([os.fspath(picture) for picture in pictures])  # type: ignore[arg-type]
        if all(hasattr(picture, "getexif") for picture in pictures):
            return len(pictures), self._of_pil(pictures)
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise BadInput(
            f"images of type {', '.join(kinds)} are not understood; give files, PIL images, an array [N, H, W, C] or a tensor "
            "[N, C, H, W]."
        )

    def _of_files(self, paths: list[str]) -> tuple[int, Iterator[Images]]:
        workers = 0 if len(paths) <= MAX_SEQUENTIAL else cores()
        files = Decoded(paths, size=self.image_size, channels=self._picture_channels(), workers=workers)

        def chunks() -> Iterator[Images]:
            waiting: list[Chunk] = []
            for chunk in files.read(torch.arange(len(paths)).split(CHUNK_SIZE)):
                for number, reason in chunk.broken:
                    raise BadInput(f"{paths[number]} cannot be decoded ({reason}); leave it out.")
                waiting.append(chunk)
                if len(waiting) * CHUNK_SIZE >= self._at_a_time or chunk.rows[-1] + 1 == len(paths):
                    yield Images(
                        torch.cat([each.pixels for each in waiting]), torch.cat([each.sizes for each in waiting]), None
                    )
                    waiting.clear()

        return len(paths), chunks()

    def _of_pil(self, pictures: Sequence[Any]) -> Iterator[Images]:
        channels = self._picture_channels()
        for start in range(0, len(pictures), self._at_a_time):
            made = [canvas(picture, self.image_size, channels) for picture in pictures[start : start + self._at_a_time]]
            pixels = torch.from_numpy(np.stack([pixels for pixels, _ in made]))
            yield Images(pixels, torch.tensor([size for _, size in made]), None)

    def _of_arrays(self, arrays: Sequence[np.ndarray | Tensor]) -> tuple[int, Iterator[Images]]:
        """Of one image each, which may have sizes of their own: arrays [H, W, C] or [H, W], tensors [C, H, W]."""
        batches = []
        for array in arrays:
            image = array if isinstance(array, np.ndarray) else array.detach().movedim(0, -1).cpu().numpy()
            batches.append(image[None] if image.ndim == 3 else image[None, ..., None])
        groups = [
            np.concatenate([*group]) for _, group in groupby(batches, key=lambda batch: (batch.shape, batch.dtype))
        ]
        return len(arrays), chain.from_iterable([self._of_array(group)[1] for group in groups])

    def _of_array(self, array: np.ndarray) -> tuple[int, Iterator[Images]]:
        given, array = array, array[..., None] if array.ndim == 3 else array
        if array.ndim != 4 or array.shape[-1] != self.channels:
            remedy = ""
            if given.ndim == 3 and given.shape[-1] == self.channels:
                remedy = "; one image is array[None]"
            elif given.ndim == 4 and given.shape[1] == self.channels:
                remedy = "; np.moveaxis(array, 1, -1) brings the channels to the end"
            raise BadInput(
                f"an array of shape {given.shape} is not [N, H, W, {self.channels}], which the encoder takes{remedy}."
            )
        if array.dtype != np.uint8:
            if array.dtype.kind != "f":
                raise BadInput(f"images of type {array.dtype} are not understood; give uint8, or floats in [0, 1].")
            if array.size and not (array.min() >= 0 and array.max() <= 1):  # also NaN
                raise BadInput(
                    f"float images have values {array.min():g} to {array.max():g}; give them in [0, 1], not normalized."
                )

        def chunks() -> Iterator[Images]:
            for start in range(0, len(array), self._at_a_time):
                part = array[start : start + self._at_a_time]
                if part.dtype != np.uint8:
                    part = np.round(part * 255).astype(np.uint8)
                pixels = torch.from_numpy(
                    np.array(np.moveaxis(part, -1, 1), order="C")
                )  # a copy, as it may be read-only
                sizes = torch.tensor([[*part.shape[1:3]]] * len(part))
                if not part.shape[1] == part.shape[2] == self.image_size:  # as data=array
                    side = (self.image_size, self.image_size)
                    resized = nnf.interpolate(pixels.float(), side, mode="bicubic", antialias=True)
                    pixels = resized.round().clamp(0, 255).to(torch.uint8)
                yield Images(pixels, sizes, None)

        return len(array), chunks()

    @property
    def _at_a_time(self) -> int:
        """Images that are prepared at a time."""
        return max(CHUNK_SIZE, CHUNK_BYTES // (self.channels * self.image_size**2))

    def _picture_channels(self) -> int:
        if self.channels not in (1, 3):
            raise BadInput(f"the encoder takes {self.channels} channels, and pictures have 1 or 3; give an array.")
        return self.channels
