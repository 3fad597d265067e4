"""Batch norm, the residual behind it and ReLU in one pass, for whole batches and for the parts of SplitBatchNorm.

Activations in channels_last are rows of channels, and the number of a row's image says its part, so nothing is
re-ordered. Forward: statistics, a small kernel that finishes them, and one pass over the activations; backward the same.
On GPUs the kernels are Triton's (fused_norm_kernels.py), which comes with CUDA builds of torch; on CPUs they are C (norm.c),
for which a C compiler is needed. Plain modules remain wherever `reason_for_plain` or `_fusable` says so: in eval mode, for
other norms and other memory formats, within torch.compile, and with TWOVIEWS_KERNEL=0 in the environment, which turns off
all compiled code of this project.
"""

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from twoviews import compiled, distributed
from twoviews.fused_norm_cpu import SOURCE, Compiled
from twoviews.layers import SplitBatchNorm

if TYPE_CHECKING:
    from types import ModuleType

DEVICES = {"cuda"}  # types whose tensors Triton's kernels are given; tests add "cpu", for Triton's interpreter
LARGEST = 2**30  # rows of an activation; numbers of rows are int32


@dataclass(frozen=True)
class Blocks:
    """How a pass over the activations is divided among programs.

    Args:
        tile: bytes of an activation that a program takes at once.
        warps: of a program.
        programs: about so many for each multiprocessor of the GPU.
        stages: tiles that are on their way at once (software pipelining); 1 for programs that take one or two.
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


def batch_norm_act(
    norm: nn.Module, x: Tensor, act: nn.Module | None = None, residual: Tensor | None = None
) -> Float[Tensor, "B C H W"]:
    """act(norm(x) + residual), by fused kernels where they serve, else by the modules themselves.

    Args:
        norm: whose running statistics are updated, as it would.
        x: [B, C, H, W].
        act: the fused kernels know nn.ReLU; None is none.
        residual: added before `act`, as x.
    """
    if _fusable(norm, x, act, residual):
        return _fused(norm, x, residual, act is not None)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def reason_for_plain(device: torch.device) -> str | None:
    """Why plain batch norms run on a device; None where fused ones do, after they were seen to be right there.

    The first call for a device builds the kernels and tries them, which takes seconds, and on GPUs waits for the device.
    """
    if device.type not in {*DEVICES, "cpu"}:
        return f"no kernels for {device.type}"
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        return "TWOVIEWS_KERNEL=0"
    if _passes(device) is None:
        return compiled.reason(SOURCE)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return _checked(device)


def _fusable(norm: nn.Module, x: Tensor, act: nn.Module | None, residual: Tensor | None) -> TypeGuard[nn.BatchNorm2d]:
    if torch.compiler.is_compiling() or not norm.training:
        return False
    if type(norm) not in (nn.BatchNorm2d, SplitBatchNorm) or type(act) not in (type(None), nn.ReLU):
        return False
    parts = _parts(norm)
    return (
        x.ndim == 4
        and x.shape[1] == norm.num_features
        and x.is_contiguous(memory_format=torch.channels_last)
        and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape))
        and parts > 0
        and x.shape[0] % parts == 0  # what cannot be divided, or has one value for each channel, is left to the
        and LARGEST > x.numel() // x.shape[1] > parts  # modules to refuse
        and norm.momentum is not None
        and all(
            isinstance(t, Tensor) and t.dtype == torch.float32 and t.device == x.device and t.is_contiguous()
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        and not any(map(_changed, (norm, act)))
        and reason_for_plain(x.device) is None
        and (passes := _passes(x.device)) is not None
        and x.dtype in passes.dtypes
    )


def _changed(module: nn.Module | None) -> bool:
    """Whether more is to happen than its class does: hooks, or a forward of its own."""
    if module is None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _parts(norm: nn.Module) -> int:
    """Of the batch of this process."""
    return norm.splits // distributed.processes() if isinstance(norm, SplitBatchNorm) else 1


def _fused(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    parts, processes = _parts(norm), distributed.processes()
    split = isinstance(norm, SplitBatchNorm) and parts * processes > 1  # else an ordinary one, which counts batches
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = _BatchNormAct.apply(
        *(x, residual, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *(None if split else norm.num_batches_tracked, parts, float(norm.momentum or 0), float(norm.eps), relu),
    )
    if isinstance(norm, SplitBatchNorm) and processes > 1:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.mean(statistic))
    return y


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        tracked: Tensor | None,
        parts: int,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        passes = _passes(x.device)
        assert passes is not None
        moments = passes.statistics(x, running_mean, running_var, tracked, parts, momentum, eps)
        y = passes.normalise(x, residual, weight, bias, moments, relu)
        ctx.passes, ctx.relu, ctx.residual = passes, relu, residual is not None
        ctx.save_for_backward(x, weight, bias, moments, y if relu and residual is not None else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments, y = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        masked, factors, weight_grad, bias_grad = ctx.passes.sums(x, grad, y, weight, bias, moments, ctx.relu)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ctx.passes.input_gradient(x, masked, weight, bias, moments, factors, ctx.relu and y is None)
        return x_grad, masked if ctx.residual else None, weight_grad, bias_grad, *[None] * 7


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
        grid, _, tile, warps = _plan("statistics", rows, channels, parts, x.itemsize, x.device)
        partial = x.new_empty((2, parts, grid[2], channels), dtype=torch.float32)
        _launch("statistics", grid, (x, partial, rows, channels, *sizes), warps, **tile)

        moments, height = x.new_empty((2, parts, channels), dtype=torch.float32), tile["ROWS"]
        blocks, tile, warps = _finish(parts, grid[2], channels)
        _launch(
            *("finish_statistics", blocks),
            (partial, moments, running_mean, running_var, moments if tracked is None else tracked)
            + (rows, height, grid[2], channels, parts, momentum, eps),
            warps,
            TRACKED=tracked is not None,
            **tile,
        )
        return moments

    def normalise(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor, relu: bool
    ) -> Tensor:
        """The normalised rows, scaled, with offset, residual and ReLU."""
        rows, channels, sizes = _sizes(x, moments.shape[1])
        grid, chunk, tile, warps = _plan("normalise", rows, channels, moments.shape[1], x.itemsize, x.device)
        y = torch.empty_like(x)
        arguments = (x, x if residual is None else residual, y, weight, bias, moments, rows, chunk, channels, *sizes)
        _launch("normalise", grid, arguments, warps, RELU=relu, RESIDUAL=residual is not None, **tile)
        return y

    def sums(
        self, x: Tensor, grad: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient below the ReLU behind a residual, factors for `input_gradient`, gradients of weight and bias.

        `y` is the output where there are both, else None.
        """
        parts = moments.shape[1]
        rows, channels, sizes = _sizes(x, parts)
        grid, _, tile, warps = _plan("sums", rows, channels, parts, x.itemsize, x.device)
        partial = x.new_empty((2, parts, grid[2], channels), dtype=torch.float32)
        masked = grad if y is None else torch.empty_like(x)
        arguments = (x, grad, masked if y is None else y, masked, weight, bias, moments, partial)
        arguments += (rows, channels, *sizes)
        _launch("sums", grid, arguments, warps, RELU=relu, RESIDUAL=y is not None, **tile)

        factors, weight_grad, bias_grad = (torch.empty_like(t) for t in (moments, weight, bias))
        blocks, tile, warps = _finish(parts, grid[2], channels)
        arguments = (partial, moments, weight, factors, weight_grad, bias_grad, rows, grid[2], channels, parts)
        _launch("finish_sums", blocks, arguments, warps, **tile)
        return masked, factors, weight_grad, bias_grad

    def input_gradient(
        self, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, factors: Tensor, relu: bool
    ) -> Tensor:
        """The gradient of x; relu: `grad` is that of the output of a ReLU that the input says is open or not."""
        rows, channels, sizes = _sizes(x, moments.shape[1])
        x_grad = torch.empty_like(x)
        grid, chunk, tile, warps = _plan("input_gradient", rows, channels, moments.shape[1], x.itemsize, x.device)
        arguments = (x, grad, x_grad, weight, bias, moments, factors, rows, chunk, channels, *sizes)
        _launch("input_gradient", grid, arguments, warps, RELU=relu, **tile)
        return x_grad


TRITON = Triton()


@functools.cache
def _compiled() -> Compiled | None:
    library = compiled.library(SOURCE)
    return None if library is None else Compiled(library)


def _passes(device: torch.device) -> Triton | Compiled | None:
    """Who makes them on a device."""
    if device.type in DEVICES:
        return TRITON
    return _compiled() if device.type == "cpu" else None


def _sizes(x: Tensor, parts: int) -> tuple[int, int, tuple[int, ...]]:
    """Rows of a part, channels, and how rows of a part are found in memory."""
    return x.numel() // (x.shape[1] * parts), x.shape[1], (parts, *_division(parts, x.shape[2] * x.shape[3]))


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
        grid, chunk, tile, warps = _plan("normalise", rows, channels, 1, x.itemsize, x.device)
        arguments = (x, residual, x, self.weight, self.bias, self.moments, rows, chunk, channels, 1, *_division(1, 1))
        _launch("normalise", grid, arguments, warps, RELU=True, RESIDUAL=residual is not x, **tile)
        return x


def _launch(kernel: str, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        getattr(_kernels(), kernel)[grid](*arguments, num_warps=warps, **constants)


@functools.cache
def _kernels() -> "ModuleType":
    from twoviews import fused_norm_kernels

    return fused_norm_kernels


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _division(parts: int, size: int) -> tuple[int, int, int]:
    """(size, multiplier, shift), so that r * multiplier >> shift is r // size for 0 <= r < 2^31, or 0 with one part."""
    if parts == 1:
        return 1, 2**31, 62  # rows are where they are
    bits = (size - 1).bit_length()
    return size, -(-(2 ** (31 + bits)) // size), 31 + bits  # Granlund and Montgomery, 1994, theorem 4.2


@functools.cache
def _plan(name: str, rows: int, channels: int, parts: int, itemsize: int, device: torch.device) -> tuple:
    """Of a pass over `parts` times `rows`: the grid (channels, parts, chunks), rows of a chunk if they adjoin, tile, warps."""
    blocks = BLOCKS[name]
    width = min(WIDTH, _power_of_2(channels))
    height, columns = blocks.tile // (itemsize * width), -(-channels // width)
    tiles = -(-rows // height)
    chunks = max(1, min(tiles, _processors(device) * blocks.programs // (columns * parts)))
    of_a_chunk = -(-tiles // chunks)
    grid = (columns, parts, -(-tiles // of_a_chunk))
    return grid, of_a_chunk * height, {"ROWS": height, "CHANNELS": width, "STAGES": blocks.stages}, blocks.warps


@functools.cache
def _finish(parts: int, chunks: int, channels: int) -> tuple:
    """Of a kernel that combines the chunks of all parts: the grid, tile, warps."""
    power_of_4 = 4 ** (((chunks - 1).bit_length() + 1) // 2)  # so that fewer kernels are compiled
    tile = {"PARTS": _power_of_2(parts), "CHUNKS": power_of_4, "CHANNELS": FINISH_CHANNELS}
    warps = max(1, min(8, tile["PARTS"] * tile["CHUNKS"] * FINISH_CHANNELS // 512))
    return (-(-channels // FINISH_CHANNELS),), tile, warps


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


# --------------------------------------------------------------------------------------------------------- trying it out


@functools.cache
def _checked(device: torch.device) -> str | None:
    """What the kernels do not get right on a device."""
    try:
        # Whatever the first call is made within.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return _disagreement(device)
    except Exception as error:  # no Triton, no compiler, a GPU that it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]


# B, C, H, W, parts, whether with ReLU and with a residual, dtype; few and alike, because each kind has to be compiled.
CASES = (
    ((64, 64, 8, 8), 8, True, True, torch.bfloat16),
    ((16, 64, 8, 8), 1, True, False, torch.bfloat16),
    ((64, 128, 7, 5), 8, False, False, torch.bfloat16),
    ((8, 64, 7, 5), 1, False, True, torch.bfloat16),
    ((48, 70, 9, 7), 8, True, False, torch.bfloat16),
    ((16, 64, 16, 16), 8, True, True, torch.float32),
)
# Nothing is compiled for them, so that they can be small: with whole vectors and less, in several blocks and chunks.
CPU_CASES = (
    ((16, 118, 3, 3), 8, True, True, torch.bfloat16),
    ((6, 49, 5, 3), 1, True, False, torch.bfloat16),
    ((6, 17, 9, 9), 2, False, False, torch.bfloat16),
    ((34, 8, 3, 2), 1, False, True, torch.float32),
    ((8, 118, 3, 3), 4, True, True, torch.float32),
    ((6, 33, 4, 4), 1, True, False, torch.float32),
)
NAMES = ("output", "running mean", "running variance", "gradient", "weight's gradient", "bias's gradient", "residual's")


def _disagreement(device: torch.device) -> str | None:
    """The first result that is not that of float64 on the CPU."""
    random = torch.Generator().manual_seed(0)
    for case in CASES if device.type in DEVICES else CPU_CASES:
        shape, parts, relu, _, dtype = case
        found, expected = _both(device, random, *case)
        # What has the activations' dtype is as exact as that.
        coarse = {torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]
        for name, one, other in zip(NAMES, found, expected, strict=False):
            close = coarse if one.dtype == dtype else 1e-4
            apart = (one.double().cpu() - other).abs()
            if not (apart <= close * (other.abs() + other.std())).all():  # nan is not
                return f"wrong {name} of {list(shape)}, {parts} part(s){', ReLU' if relu else ''}"
    return None


def _both(
    device: torch.device,
    random: torch.Generator,
    shape: tuple[int, ...],
    parts: int,
    relu: bool,
    with_residual: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Output, running statistics, and gradients of x, weight, bias and residual: there, and in float64 on the CPU."""
    channels, momentum, eps = shape[1], 0.1, 1e-5
    # Images with statistics of their own, so that it is seen who is in which part.
    x = 3 + torch.randn(shape, generator=random) * torch.linspace(0.5, 2, shape[0])[:, None, None, None]
    x, residual, grad = (t.to(dtype) for t in (x, *torch.randn((2, *shape), generator=random)))
    weight, bias, mean, var = 0.5 + torch.rand((4, channels), generator=random)
    inputs = [x, weight, bias, *([residual] if with_residual else [])]

    exact = [t.double().requires_grad_() for t in inputs]
    statistics = [t.double().expand(parts, channels).clone() for t in (mean, var)]
    y = torch.empty(shape, dtype=torch.float64)
    for part in range(parts):
        mine, its_mean, its_var = exact[0][part::parts], statistics[0][part], statistics[1][part]
        y[part::parts] = nnf.batch_norm(mine, its_mean, its_var, exact[1], exact[2], True, momentum, eps)
    if with_residual:
        y = y + exact[3]
    if relu:
        grad = grad.where(y.detach().abs() > 1e-3, 0)  # on either side of the kink, rounding decides
        y = y.relu()
    y.backward(grad.double())
    expected = [y.detach(), *(t.mean(0) for t in statistics), *(t.grad for t in exact if t.grad is not None)]

    def there(t: Tensor) -> Tensor:
        form = torch.channels_last if t.ndim == 4 else torch.contiguous_format
        return t.to(device).contiguous(memory_format=form)

    leaves = [there(t).detach().requires_grad_() for t in inputs]
    running = [there(t).clone() for t in (mean, var)]
    tracked = there(torch.zeros((), dtype=torch.long)) if parts == 1 else None
    with torch.enable_grad():
        y = _BatchNormAct.apply(
            *(leaves[0], leaves[3] if with_residual else None, leaves[1], leaves[2], *running),
            *(tracked, parts, momentum, eps, relu),
        )
        y.backward(there(grad))
    if tracked is not None:
        running[0] = running[0].where(tracked == 1, float("nan"))
    return [y.detach(), *running, *(t.grad for t in leaves if t.grad is not None)], expected
