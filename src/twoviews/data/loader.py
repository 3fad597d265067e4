"""Loader: batches of views whose order and random numbers are a function of (seed, epoch, step)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.images import Images, sent
from twoviews.data.views import Views
from twoviews.errors import BadInput
from twoviews.randomness import generator
from twoviews.ranges import Fraction, Range


@dataclass(frozen=True)
class Batch:
    """What a method sees of one step: no labels, so that labels cannot leak."""

    views: tuple[Float[Tensor, "B C _h _w"], ...]
    index: Int[Tensor, " B"]  # rows of the training images


@dataclass(frozen=True)
class SmallViews:
    """Smaller views in the first epochs, whose steps are quicker: progressive resizing.

    Args:
        share: of the epochs of a training, rounded up to whole ones; 0: all views have their own size from the start.
        scale: of the sides of these epochs' views.
    """

    share: Fraction = 0.0
    scale: Annotated[float, Range(at_least=0.25, at_most=1)] = 0.75


class Loader:
    """One epoch of batches for one process, on the device.

    Args:
        images: the training images.
        views: draws and makes the views of a batch.
        batch_size: images a step, over all processes.
        seed: of the order and of the views.
        device: where the batches lie.
        rank: number of this process among `processes`.
        dtype: of the views.
        channels_last: memory format of the views.
        small_epochs: number of epochs at the beginning with smaller views.
        small_scale: of the sides of these views.

    The global batch of a step and its views are the same whatever the number of processes: process r takes the rows
    r, r + processes, ... of it. The images that do not fill a last batch (`left_over`) sit out the epoch, other ones
    each time: contrastive losses need batches of one size.

    Raises:
        BadInput: the batch is larger than the data or cannot be shared out evenly.
    """

    def __init__(
        self,
        images: Images,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        processes: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        small_epochs: int = 0,
        small_scale: float = 1.0,
    ):
        if batch_size > len(images):
            raise BadInput(
                f"batch_size={batch_size} is larger than the {len(images)} training images: use at most that."
            )
        if batch_size % processes:
            lower = batch_size // processes * processes
            sizes = f"{lower} or {lower + processes}" if lower else f"{processes}"
            raise BadInput(f"batch_size={batch_size} is not a multiple of {processes} processes: use {sizes}.")
        self.images, self.views, self.batch_size, self.seed = images, views, batch_size, seed
        self.device, self.rank, self.processes = torch.device(device), rank, processes
        self.dtype, self.channels_last = dtype, channels_last
        self.small_epochs, self.small_scale = small_epochs, small_scale
        self.left_over = len(images) % batch_size
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to iterate over, and its first step; nothing before that step is read or drawn."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", self.epoch))
        steps = order[: len(self) * self.batch_size].view(len(self), self.batch_size)[self.start :]
        own = steps[:, self.rank :: self.processes].contiguous()
        own_on_device = sent(own, self.device)
        scale = self.small_scale if self.epoch < self.small_epochs else 1.0
        for i, (pixels, sizes, _) in enumerate(self.images.batches(own.shape[1], own.flatten())):
            random = generator(self.seed, "views", self.epoch, self.start + i)
            draws = self.views.draw(sizes, random, rank=self.rank, processes=self.processes)
            pixels = sent(pixels, self.device)
            views = self.views(pixels, draws, scale=scale, dtype=self.dtype, channels_last=self.channels_last)
            yield Batch(views, own_on_device[i])
