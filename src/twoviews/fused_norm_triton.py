"""The passes of fused batch norms by Triton's kernels (fused_norm_kernels.py), and how each is divided among programs."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Blocks:
    """How a pass over the activations is divided among programs.

    Args:
        tile: bytes of an activation that a program loads at once.
        warps: number of warps of a program.
        programs: approximate number of programs for each multiprocessor of the GPU.
        stages: tiles that are loaded at the same time (software pipelining); 1 for programs that load one or two.
    """

    tile: int
    warps: int
    programs: int
    stages: int


# The best of benchmarks/norms.py --tune on an H200. Passes that add up keep two float32 for each number of a tile, and make
# as many partial sums as they have programs.
BLOCKS = {
    "statistics": Blocks(4096, 4, 2, 4),
    "normalise": Blocks(16384, 8, 32, 1),
    "sums": Blocks(4096, 4, 2, 4),
    "input_gradient": Blocks(4096, 4, 4, 3),
}
WIDTH = 64  # channels of a tile: 128 bytes of bf16, a line of the cache
FINISH_CHANNELS = 8  # of a program that finishes sums: 32 bytes


class Triton:
    """The passes by fused_norm_kernels.py."""

    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def statistics(
        self,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        tracked: Tensor | None,
        parts: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Mean and 1 / sqrt(variance + eps) of each part, [2, parts, C]; updates the running statistics."""
        rows, channels, sizes = _sizes(x, parts)
        grid, _, tile, warps = plan("statistics", rows, channels, parts, x.itemsize, x.device)
        partial = x.new_empty((2, parts, grid[2], channels), dtype=torch.float32)
        launch("statistics", grid, (x, partial, rows, channels, *sizes), warps, **tile)

        moments, height = x.new_empty((2, parts, channels), dtype=torch.float32), tile["ROWS"]
        blocks, tile, warps = _finish(parts, grid[2], channels)
        launch(
            *("finish_statistics", blocks),
            (partial, moments, running_mean, running_var, moments if tracked is None else tracked)
            + (rows, height, grid[2], channels, parts, momentum, eps),
            warps,
            TRACKED=tracked is not None,
            **tile,
        )
        return moments

    def normalise(
        self, x: Tensor, residual: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, relu: bool
    ) -> None:
        """Into y: the normalised rows, scaled, with offset, residual and ReLU."""
        rows, channels, sizes = _sizes(x, moments.shape[1])
        grid, chunk, tile, warps = plan("normalise", rows, channels, moments.shape[1], x.itemsize, x.device)
        arguments = (x, x if residual is None else residual, y, weight, bias, moments, rows, chunk, channels, *sizes)
        launch("normalise", grid, arguments, warps, RELU=relu, RESIDUAL=residual is not None, **tile)

    def sums(
        self,
        x: Tensor,
        grad: Tensor,
        y: Tensor | None,
        masked: Tensor,
        weight: Tensor,
        bias: Tensor,
        moments: Tensor,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factors for `input_gradient`, gradients of weight and bias.

        Where there are a residual and ReLU, `y` is the output, and the gradient below the ReLU is written to `masked`.
        """
        parts = moments.shape[1]
        rows, channels, sizes = _sizes(x, parts)
        grid, _, tile, warps = plan("sums", rows, channels, parts, x.itemsize, x.device)
        partial = x.new_empty((2, parts, grid[2], channels), dtype=torch.float32)
        arguments = (x, grad, grad if y is None else y, masked, weight, bias, moments, partial)
        arguments += (rows, channels, *sizes)
        launch("sums", grid, arguments, warps, RELU=relu, RESIDUAL=y is not None, **tile)

        factors, weight_grad, bias_grad = (torch.empty_like(t) for t in (moments, weight, bias))
        blocks, tile, warps = _finish(parts, grid[2], channels)
        arguments = (partial, moments, weight, factors, weight_grad, bias_grad, rows, grid[2], channels, parts)
        launch("finish_sums", blocks, arguments, warps, **tile)
        return factors, weight_grad, bias_grad

    def input_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        x_grad: Tensor,
        weight: Tensor,
        bias: Tensor,
        moments: Tensor,
        factors: Tensor,
        relu: bool,
    ) -> None:
        """Into x_grad: the gradient of x; relu: `grad` is that of the output of a ReLU that the input says is open or not."""
        rows, channels, sizes = _sizes(x, moments.shape[1])
        grid, chunk, tile, warps = plan("input_gradient", rows, channels, moments.shape[1], x.itemsize, x.device)
        arguments = (x, grad, x_grad, weight, bias, moments, factors, rows, chunk, channels, *sizes)
        launch("input_gradient", grid, arguments, warps, RELU=relu, **tile)


def _sizes(x: Tensor, parts: int) -> tuple[int, int, tuple[int, ...]]:
    """Rows of a part, channels, and the numbers from which a kernel computes where the rows of a part are in memory."""
    return x.numel() // (x.shape[1] * parts), x.shape[1], (parts, *division(parts, x.shape[2] * x.shape[3]))


class Offset(nn.Module):
    """ReLU of activations with a bias and a residual, in one pass over them, where no gradients are needed.

    Args:
        bias: of each channel, in float32.
    """

    bias: Tensor
    weight: Tensor
    moments: Tensor

    def __init__(self, bias: Float[Tensor, " C"]):
        super().__init__()
        self.register_buffer("bias", bias)
        self.register_buffer("weight", torch.ones_like(bias))
        self.register_buffer("moments", torch.stack((torch.zeros_like(bias), self.weight))[:, None])

    def forward(self, x: Float[Tensor, "B C H W"], residual: Tensor | None = None) -> Float[Tensor, "B C H W"]:
        """In channels_last; x is overwritten if it is so already."""
        x = x.contiguous(memory_format=torch.channels_last)
        residual = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        rows = x.numel() // channels
        grid, chunk, tile, warps = plan("normalise", rows, channels, 1, x.itemsize, x.device)
        arguments = (x, residual, x, self.weight, self.bias, self.moments, rows, chunk, channels, 1, *division(1, 1))
        launch("normalise", grid, arguments, warps, RELU=True, RESIDUAL=residual is not x, **tile)
        return x


def launch(kernel: str, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int, **constants: Any) -> None:
    """Run a kernel of fused_norm_kernels.py on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        getattr(kernels(), kernel)[grid](*arguments, num_warps=warps, **constants)


@functools.cache
def kernels() -> "ModuleType":
    """fused_norm_kernels.py, whose import needs Triton."""
    from twoviews import fused_norm_kernels

    return fused_norm_kernels


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def division(parts: int, size: int) -> tuple[int, int, int]:
    """(size, multiplier, shift), so that r * multiplier >> shift is r // size for 0 <= r < 2^31, or 0 with one part."""
    if parts == 1:
        return 1, 2**31, 62  # rows are where they are
    bits = (size - 1).bit_length()
    return size, -(-(2 ** (31 + bits)) // size), 31 + bits  # Granlund and Montgomery, 1994, theorem 4.2


@functools.cache
def plan(name: str, rows: int, channels: int, parts: int, itemsize: int, device: torch.device) -> tuple:
    """Grid (channels, parts, chunks), rows of a chunk if they are adjacent, tile and warps of a pass over `parts` * `rows`."""
    blocks = BLOCKS[name]
    width = min(WIDTH, _power_of_2(channels))
    height, columns = blocks.tile // (itemsize * width), -(-channels // width)
    tiles = -(-rows // height)
    chunks = max(1, min(tiles, processors(device) * blocks.programs // (columns * parts)))
    tiles_per_chunk = -(-tiles // chunks)
    grid = (columns, parts, -(-tiles // tiles_per_chunk))
    return grid, tiles_per_chunk * height, {"ROWS": height, "CHANNELS": width, "STAGES": blocks.stages}, blocks.warps


@functools.cache
def _finish(parts: int, chunks: int, channels: int) -> tuple:
    """Grid, tile and warps of a kernel that combines the chunks of all parts."""
    power_of_4 = 4 ** (((chunks - 1).bit_length() + 1) // 2)  # so that fewer kernels are compiled
    tile = {"PARTS": _power_of_2(parts), "CHUNKS": power_of_4, "CHANNELS": FINISH_CHANNELS}
    warps = max(1, min(8, tile["PARTS"] * tile["CHUNKS"] * FINISH_CHANNELS // 512))
    return (-(-channels // FINISH_CHANNELS),), tile, warps


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
