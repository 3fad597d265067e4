"""Batch norm, the residual behind it and ReLU in one pass, for whole batches, several views and the parts of SplitBatchNorm.

Activations in channels_last are rows of channels, and the number of a row's image says its part, so nothing is
re-ordered. Forward: statistics, a small kernel that finishes them, and one pass over the activations; backward the same.
On GPUs the kernels are Triton's (fused_norm_kernels.py), which comes with CUDA builds of torch; on CPUs they are C (norm.c),
for which a C compiler is needed. Plain modules remain wherever `reason_for_plain` or `_fusable` says so: in eval mode, for
other norms and other memory formats, within torch.compile, and with TWOVIEWS_KERNEL=0 in the environment, which turns off
all compiled code of this project.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twoviews import compiled, distributed
from twoviews.batch_norms import SplitBatchNorm
from twoviews.fused_norm_check import disagreement
from twoviews.fused_norm_cpu import SOURCE, Compiled
from twoviews.fused_norm_triton import Triton

DEVICES = {"cuda"}  # types whose tensors Triton's kernels are given; tests add "cpu", for Triton's interpreter
LARGEST = 2**30  # rows of an activation; numbers of rows are int32
_views = ContextVar("views", default=1)  # in a batch


@contextlib.contextmanager
def separate_views(count: int) -> Iterator[None]:
    """Within it, `batch_norm_act` takes a batch for so many views, one after another, each with statistics of its own."""
    token = _views.set(count)
    try:
        yield
    finally:
        _views.reset(token)


def batch_norm_act(
    norm: nn.Module, x: Tensor, act: nn.Module | None = None, residual: Tensor | None = None
) -> Float[Tensor, "B C H W"]:
    """act(norm(x) + residual), by fused kernels where they serve, else by the modules themselves, once for each view.

    Args:
        norm: whose running statistics are updated, as it would.
        x: [B, C, H, W].
        act: the fused kernels know nn.ReLU; None is none.
        residual: added before `act`, as x.
    """
    if _fusable(norm, x, act, residual):
        return _fused(norm, x, residual, act is not None)
    views = _views.get()
    y = norm(x) if views == 1 else torch.cat([norm(view) for view in x.chunk(views)])
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def reason_for_plain(device: torch.device) -> str | None:
    """Why plain batch norms run on a device; None if fused ones do, whose results there were found to be correct.

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
    parts, views = _parts(norm), _views.get()
    return (
        x.ndim == 4
        and x.shape[1] == norm.num_features
        and x.is_contiguous(memory_format=torch.channels_last)
        and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape))
        and parts > 0
        and x.shape[0] % (views * parts) == 0  # what cannot be divided, or has one value for each channel, is left
        and LARGEST > x.numel() // x.shape[1] > views * parts  # to the modules to refuse
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
    """Whether a module does more than its class: it has hooks, or a forward of its own."""
    if module is None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _parts(norm: nn.Module) -> int:
    """Number of parts into which a norm divides a view's batch of this process."""
    return norm.splits // distributed.processes() if isinstance(norm, SplitBatchNorm) else 1


def _fused(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    parts, processes = _parts(norm), distributed.processes()
    split = isinstance(norm, SplitBatchNorm) and parts * processes > 1  # else an ordinary one, which counts batches
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = _BatchNormAct.apply(
        *(x, residual, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *(
            None if split else norm.num_batches_tracked,
            parts,
            float(norm.momentum or 0),
            float(norm.eps),
            relu,
            _views.get(),
        ),
    )
    if isinstance(norm, SplitBatchNorm) and processes > 1:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(distributed.mean_over_processes(statistic))
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
        views: int,
    ) -> Tensor:
        passes = _passes(x.device)
        assert passes is not None
        y, moments = torch.empty_like(x), []
        for x_v, residual_v, y_v in _by_view(views, x, residual, y):
            moments.append(passes.statistics(x_v, running_mean, running_var, tracked, parts, momentum, eps))
            passes.normalise(x_v, residual_v, y_v, weight, bias, moments[-1], relu)
        ctx.passes, ctx.relu, ctx.residual = passes, relu, residual is not None
        ctx.save_for_backward(x, weight, bias, y if relu and residual is not None else None, *moments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, *moments = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        below = grad if y is None else torch.empty_like(x)  # the gradient below the ReLU behind a residual
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        open_by_input, of_parameters = ctx.relu and y is None, []
        for v, (x_v, grad_v, y_v, below_v, x_grad_v) in enumerate(_by_view(len(moments), x, grad, y, below, x_grad)):
            factors, *grads = ctx.passes.sums(x_v, grad_v, y_v, below_v, weight, bias, moments[v], ctx.relu)
            of_parameters.append(grads)
            if x_grad is not None:
                ctx.passes.input_gradient(x_v, below_v, x_grad_v, weight, bias, moments[v], factors, open_by_input)
        weight_grad, bias_grad = (functools.reduce(torch.add, grads) for grads in zip(*of_parameters, strict=True))
        return x_grad, below if ctx.residual else None, weight_grad, bias_grad, *[None] * 8


def _by_view(views: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The rows of each view of some tensors; None for those that are None."""
    if views == 1:
        return iter([tensors])
    return zip(*([None] * views if t is None else t.chunk(views) for t in tensors), strict=True)


TRITON = Triton()


@functools.cache
def _compiled() -> Compiled | None:
    library = compiled.library(SOURCE)
    return None if library is None else Compiled(library)


def _passes(device: torch.device) -> Triton | Compiled | None:
    """The implementation of the passes for a device; None if there is none."""
    if device.type in DEVICES:
        return TRITON
    return _compiled() if device.type == "cpu" else None


@functools.cache
def _checked(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device; None if their results agree with float64."""
    try:
        # Whatever the first call is made within.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return disagreement(_BatchNormAct.apply, device, triton=device.type in DEVICES)
    except Exception as error:  # no Triton, no compiler, a GPU that it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]
