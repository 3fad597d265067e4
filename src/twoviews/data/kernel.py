"""The compiled form of the augmentation for CPUs: kernel.c. It agrees with views.py's tensors to some 1e-6."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twoviews import compiled

SOURCE = Path(__file__).with_name("kernel.c")


def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be built, for the `reason`."""
    return compiled.library(SOURCE)


def reason() -> str | None:
    """Why there is no compiled code; None where there is."""
    return compiled.reason(SOURCE)


def render(
    library: ctypes.CDLL,
    images: Tensor,
    sizes: Sequence[int],
    *arrays: Any,
    bleed: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Views [B, C, size, size], normalised, of images [B, C, S, S] uint8 on the CPU.

    Args:
        library: from `library`.
        images: the canvases.
        sizes: side of each view in px.
        arrays: the arguments of `render` in kernel.c from `start` to `std`, those up to `solarize` [V, B, ...].
        bleed: whether the resampling sees pixels beyond the boxes.
        dtype: of the views.
        memory_format: of the views.

    Raises:
        MemoryError: there is none left.
    """
    *drawn, solarize_from, mean, std = arrays
    images, made = images.contiguous(), []
    for view, size in enumerate(sizes):
        c_arguments = [images, *(array[view].contiguous() for array in drawn), solarize_from, mean, std]
        x = _view(library, size, c_arguments, bleed)
        made.append(x.to(dtype=dtype, memory_format=memory_format))
    return made


def _view(library: ctypes.CDLL, size: int, arrays: list[Any], bleed: bool) -> Tensor:
    count, channels, side, _ = arrays[0].shape
    out = torch.empty(count, channels, size, size)
    c_arguments = [
        compiled.address(argument) if isinstance(argument, Tensor) else ctypes.c_float(argument)
        for argument in [*arrays, out]
    ]
    sizes = [ctypes.c_int(number) for number in (channels, side, size, bleed)]
    if compiled.parallel_for(
        lambda first, last: library.render(c_arguments[0], first, last, *sizes, *c_arguments[1:]), count
    ):
        raise MemoryError("no memory is left for views; use a smaller batch_size.")
    return out
