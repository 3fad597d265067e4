"""The compiled form of the augmentation for CPUs: kernel.c. It agrees with views.py's tensors to some 1e-6."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from twoviews import compiled

SOURCE = Path(__file__).with_name("kernel.c")


def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be built."""
    return compiled.library(SOURCE)


def render(library: ctypes.CDLL, images: Tensor, size: int, *arrays: Tensor | float, bleed: bool = False) -> Tensor:
    """[B, C, size, size] float32, normalised, of images [B, C, S, S] uint8 on the CPU.

    Args:
        library: from `library`.
        images: the canvases.
        size: side of the view in px.
        arrays: the arguments of `render` in kernel.c from `start` to `std`.
        bleed: whether the resampling sees pixels beyond the boxes.

    Raises:
        MemoryError: there is none left.
    """
    count, channels, side, _ = images.shape
    out = torch.empty(count, channels, size, size)
    whole = [images.contiguous(), *(one.contiguous() if isinstance(one, Tensor) else one for one in arrays), out]
    given = [compiled.address(one) if isinstance(one, Tensor) else ctypes.c_float(one) for one in whole]
    sizes = [ctypes.c_int(number) for number in (channels, side, size, bleed)]
    if compiled.in_shares(lambda first, last: library.render(given[0], first, last, *sizes, *given[1:]), count):
        raise MemoryError("no memory is left for views; use a smaller batch_size.")
    return out
