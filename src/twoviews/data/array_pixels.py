"""Pixels of image arrays: some rows of an array, and their way to 8-bit canvases."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.data.store import Chunk
from twoviews.errors import BadInput

CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Split:
    """Some images of an array and their labels, as stored in the file."""

    images: np.ndarray  # [N, H, W, C]
    labels: np.ndarray | None  # [n], of the rows
    rows: Int[np.ndarray, " n"]
    labelled: int = 0  # rows before those whose label is -1, which means that they have none

    def chunks(self) -> Iterator[np.ndarray]:
        """The images, some megabytes at a time."""
        step = max(1, CHUNK_BYTES // (self.images[0].size * 8))
        for start in range(0, len(self.rows), step):
            yield self.images[self.rows[start : start + step]]

    @cached_property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value of each channel.

        Raises:
            BadInput: a value is NaN or infinite.
        """
        low, high, seen = [], [], 0
        for chunk in self.chunks():
            finite = np.isfinite(chunk).all(axis=(1, 2, 3))
            if not finite.all():
                first = self.rows[seen + int(np.argmin(finite))]
                raise BadInput(f"Image {first} (counted from 0) holds NaN or infinite values: replace or remove them.")
            low.append(chunk.min(axis=(0, 1, 2)))
            high.append(chunk.max(axis=(0, 1, 2)))
            seen += len(chunk)
        return np.min(low, axis=0).astype(np.float64), np.max(high, axis=0).astype(np.float64)


@dataclass(frozen=True)
class Scale:
    """Maps the values in the file to 0..255, by the range of the training images."""

    low: Float[np.ndarray, " C"]
    high: Float[np.ndarray, " C"]

    @staticmethod
    def of(train: Split, test: Split | None, notes: list[str]) -> "Scale":
        """The scale of a data set, with sentences for the user appended to `notes`.

        Raises:
            BadInput: all values are equal, or one is NaN or infinite.
        """
        kind = train.images.dtype
        channels = train.images.shape[-1]
        if kind == np.uint8:
            return Scale(np.zeros(channels), np.full(channels, 255.0))
        low, high = train.range
        if channels == 3:  # colours keep their balance; measurements of different kinds keep their precision
            low, high = np.full(3, low.min()), np.full(3, high.max())
        if (low == high).all():
            raise BadInput(f"All values of the training images are {low[0]:g}: there is nothing to learn from.")
        same = (low == low[0]).all() and (high == high[0]).all()
        ranges = [f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True)]
        shown = ranges[0] if same else f"{', '.join(ranges[:5])}{' ...' if channels > 5 else ''} by channel"
        notes.append(f"Values {shown} of the training images ({kind}) become 0 to 255.")
        if test is not None:
            outside = sum(int(((chunk < low) | (chunk > high)).sum()) for chunk in test.chunks())
            if outside:
                notes.append(f"Values of the test images outside that range are set to its ends ({outside:,} of them).")
            _ = test.range  # refuses NaN
        return Scale(low, high)

    def __call__(self, chunk: np.ndarray) -> UInt8[Tensor, "b C H W"]:
        """Images [b, H, W, C] of the file as bytes."""
        if chunk.dtype != np.uint8:
            width = np.where(self.high > self.low, self.high - self.low, 1)
            chunk = np.round(np.clip((chunk - self.low) / width, 0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(chunk.transpose(0, 3, 1, 2)))


def chunks_of(splits: list[Split], scale: Scale, side: int) -> Iterator[Chunk]:
    """The images of all splits, one after the other, as canvases of `side` px."""
    done = 0
    for split in splits:
        for chunk in split.chunks():
            pixels = scale(chunk)
            count, _, height, width = pixels.shape
            if not height == width == side:
                large = nnf.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
                pixels = large.round().clamp(0, 255).to(torch.uint8)
            yield Chunk(torch.arange(done, done + count), pixels, torch.tensor([[height, width]] * count))
            done += count
