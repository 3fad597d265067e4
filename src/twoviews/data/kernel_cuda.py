"""The compiled form of the augmentation for GPUs: kernel.cu. It agrees with views.py's tensors to some 1e-6."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twoviews.data.images import sent

SOURCE = Path(__file__).with_name("kernel.cu")
THREADS = 512  # of a block; kernel.cu is right with any number up to this one, which its __launch_bounds__ names too
SHARED = 48 * 1024  # bytes: less than this a block gets on every GPU without asking
FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `form` in kernel.cu
Kernel = Callable[..., None]  # called with grid, block, args and shared_mem, as what torch compiles


def build(device: torch.device) -> Kernel:
    """The kernel for a GPU, by NVRTC, which comes with torch.

    Raises:
        Exception: it cannot be built: by a private function, which other versions of torch may lack or have in another form.
    """
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    try:
        # Without a folder of CUDA's headers torch gives up; kernel.cu needs none of them.
        cpp_extension.CUDA_HOME = home or os.devnull
        with torch.cuda.device(device):
            return torch.cuda._compile_kernel(SOURCE.read_text(), "render")
    finally:
        cpp_extension.CUDA_HOME = home


def shared_bytes(side: int, size: int, widest: float) -> int:
    """Shared memory that a block needs.

    Args:
        side: of the canvas in px.
        size: of the view in px.
        widest: the longest side of a box in px of the canvas.
    """
    taps = min(side, math.ceil(2 * max(1.0, widest / size)) + 1)  # of an output px; one more for rounding
    return 8 * THREADS + 4 * (max(1, size // 20) + 1) + 4 * (2 * size + 2 * size * taps)


def render(
    kernel: Kernel,
    images: UInt8[Tensor, "B C S S"],
    sizes: Sequence[int],
    start: Float[Tensor, "V B 2"],
    extent: Float[Tensor, "V B 2"],
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    grayscale: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    solarize_from: float,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
    bleed: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Float[Tensor, "B C _ _"]] | None:
    """Views on the device of the images, normalised; None where a block has too little shared memory for them.

    All but the images is on the CPU and goes to the device in one copy, which nobody waits for. Views of one size that
    follow each other are made by one launch.

    Args:
        kernel: from `build`.
        images: the canvases.
        sizes: side of each view in px.
        start: this and all to `std` as `render` in kernel.c has it.
        bleed: whether the resampling sees pixels beyond the boxes.
        dtype: float32, bfloat16 or float16.
        memory_format: of the views, channels_last or contiguous.
    """
    count, channels, side, _ = images.shape
    plain = dtype == torch.float32 and memory_format == torch.contiguous_format
    given = {"dtype": dtype, "device": images.device, "memory_format": memory_format}
    if not count:
        return [torch.empty(0, channels, size, size, **given) for size in sizes]
    widest = max(side, float(extent.max()))  # the same whatever is drawn
    if any(shared_bytes(side, size, widest) >= SHARED for size in sizes):
        return None
    rows = [start, extent, order, factors, *(numbers[..., None] for numbers in (flip, grayscale, sigma, solarize))]
    statistics = (statistic.expand(*sigma.shape, channels) for statistic in (mean, std))
    drawn = sent(torch.cat([*(numbers.float() for numbers in rows), *statistics], dim=2), images.device)
    images, blurred, made, first = images.contiguous(), bool((sigma > 0).any()), [], 0
    for size, group in itertools.groupby(sizes):
        views = len(list(group))
        blocks = views * count
        out = torch.empty(blocks, channels, size, size, **given)
        x = out if plain else torch.empty(blocks, channels, size, size, device=images.device)
        other = torch.empty_like(x) if blurred else x
        form = [FORMS[dtype], int(memory_format == torch.channels_last)]
        shape = [count, channels, side, size, int(bleed), solarize_from]
        arguments = [images, drawn[first:], *shape, *form, other, x, out]
        with torch.cuda.device_of(images):
            shared_mem = shared_bytes(side, size, widest)
            kernel(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=arguments, shared_mem=shared_mem)
        made += out.split(count)
        first += views
    return made
