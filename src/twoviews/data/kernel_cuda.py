"""The compiled form of the augmentation for GPUs: kernel.cu. It agrees with views.py's tensors to some 1e-6."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cu")
THREADS = 512  # of a block; kernel.cu is right with any number up to this one, which its __launch_bounds__ names too
SHARED = 48 * 1024  # bytes: less than this a block gets on every GPU without asking
Kernel = Callable[..., None]  # called with grid, block, args and shared_mem, as what torch compiles


def build(device: torch.device) -> Kernel | None:
    """The kernel for a GPU, by NVRTC, which comes with torch; None where it cannot be built."""
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        return None
    try:
        from torch.utils import cpp_extension

        home = cpp_extension.CUDA_HOME
        try:
            # Without a folder of CUDA's headers torch gives up; kernel.cu needs none of them.
            cpp_extension.CUDA_HOME = home or os.devnull
            with torch.cuda.device(device):
                return torch.cuda._compile_kernel(SOURCE.read_text(), "render")
        finally:
            cpp_extension.CUDA_HOME = home
    except Exception:  # a private function, which other versions of torch may lack or have in another form
        return None


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
    size: int,
    start: Float[Tensor, "B 2"],
    extent: Float[Tensor, "B 2"],
    flip: Tensor,
    order: Tensor,
    factors: Tensor,
    grayscale: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    solarize_from: float,
    mean: Float[Tensor, "C"],
    std: Float[Tensor, "C"],
    bleed: bool = False,
) -> Float[Tensor, "B C {size} {size}"] | None:
    """Views on the device of the images, normalised; None where a block has too little shared memory for them.

    All but the images is on the CPU and goes to the device in one copy, which nobody waits for.

    Args:
        kernel: from `build`.
        images: the canvases.
        size: side of the view in px.
        start: this and all to `std` as `render` in kernel.c has it.
        bleed: whether the resampling sees pixels beyond the boxes.
    """
    count, channels, side, _ = images.shape
    out = torch.empty(count, channels, size, size, device=images.device)
    if not count:
        return out
    needed = shared_bytes(side, size, max(side, float(extent.max())))  # the same whatever is drawn
    if needed >= SHARED:
        return None
    rows = [start, extent, order, factors, *(one[:, None] for one in (flip, grayscale, sigma, solarize))]
    drawn = torch.cat([*(one.float() for one in rows), *(one.expand(count, channels) for one in (mean, std))], dim=1)
    if images.is_cuda:
        drawn = drawn.pin_memory().to(images.device, non_blocking=True)
    other = torch.empty_like(out) if (sigma > 0).any() else out
    arguments = [images.contiguous(), drawn, channels, side, size, int(bleed), solarize_from, other, out]
    with torch.cuda.device_of(images):
        kernel(grid=(count, 1, 1), block=(THREADS, 1, 1), args=arguments, shared_mem=needed)
    return out
