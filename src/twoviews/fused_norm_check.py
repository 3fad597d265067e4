"""Fused batch norms compared with float64 on the CPU, before they are used on a device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnf

# B, C, H, W, views, parts of each, whether with ReLU and with a residual, dtype; few and alike, because each kind has to
# be compiled.
CASES = (
    ((64, 64, 8, 8), 1, 8, True, True, torch.bfloat16),
    ((32, 64, 8, 8), 2, 1, True, False, torch.bfloat16),
    ((64, 128, 7, 5), 1, 8, False, False, torch.bfloat16),
    ((8, 64, 7, 5), 1, 1, False, True, torch.bfloat16),
    ((48, 70, 9, 7), 1, 8, True, False, torch.bfloat16),
    ((16, 64, 16, 16), 1, 8, True, True, torch.float32),
)
# Nothing is compiled for them, so that they can be small: with whole vectors and less, in several blocks and chunks.
CPU_CASES = (
    ((16, 118, 3, 3), 1, 8, True, True, torch.bfloat16),
    ((6, 49, 5, 3), 1, 1, True, False, torch.bfloat16),
    ((12, 17, 9, 9), 2, 2, False, False, torch.bfloat16),
    ((34, 8, 3, 2), 1, 1, False, True, torch.float32),
    ((8, 118, 3, 3), 1, 4, True, True, torch.float32),
    ((18, 33, 4, 4), 3, 1, True, False, torch.float32),
)
NAMES = ("output", "running mean", "running variance", "gradient", "weight's gradient", "bias's gradient", "residual's")


def disagreement(function: Callable[..., Tensor], device: torch.device, triton: bool) -> str | None:
    """A description of the first result that differs from float64 on the CPU; None if all agree.

    Args:
        function: the fused batch norm, with gradients.
        device: where it is tried.
        triton: whether Triton's kernels run there, of which few and large cases are tried, as each has to be compiled.
    """
    random = torch.Generator().manual_seed(0)
    for case in CASES if triton else CPU_CASES:
        shape, views, parts, relu, _, dtype = case
        results, expected = _both(function, device, random, *case)
        # Results in the activations' dtype are no more exact than that.
        coarse = {torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]
        for name, result, exact in zip(NAMES, results, expected, strict=False):
            tolerance = coarse if result.dtype == dtype else 1e-4
            error = (result.double().cpu() - exact).abs()
            if not (error <= tolerance * (exact.abs() + exact.std())).all():  # NaN fails, too
                return f"wrong {name} of {list(shape)}, {views} view(s), {parts} part(s){', ReLU' if relu else ''}"
    return None


def _both(
    function: Callable[..., Tensor],
    device: torch.device,
    random: torch.Generator,
    shape: tuple[int, ...],
    views: int,
    parts: int,
    relu: bool,
    with_residual: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Output, running statistics, and gradients of x, weight, bias and residual: on the device, and in float64 on the CPU."""
    channels, momentum, eps = shape[1], 0.1, 1e-5
    # Each image has statistics of its own, so that an image in the wrong part changes the result.
    x = 3 + torch.randn(shape, generator=random) * torch.linspace(0.5, 2, shape[0])[:, None, None, None]
    x, residual, grad = (t.to(dtype) for t in (x, *torch.randn((2, *shape), generator=random)))
    weight, bias, mean, var = 0.5 + torch.rand((4, channels), generator=random)
    inputs = [x, weight, bias, *([residual] if with_residual else [])]

    exact = [t.double().requires_grad_() for t in inputs]
    statistics = [t.double().expand(parts, channels).clone() for t in (mean, var)]
    outputs = []
    for view in exact[0].chunk(views):
        outputs.append(torch.empty(view.shape, dtype=torch.float64))
        for part in range(parts):
            running = statistics[0][part], statistics[1][part]
            normalised = nnf.batch_norm(view[part::parts], *running, exact[1], exact[2], True, momentum, eps)
            outputs[-1][part::parts] = normalised
    y = torch.cat(outputs)
    if with_residual:
        y = y + exact[3]
    if relu:
        grad = grad.where(y.detach().abs() > 1e-3, 0)  # on either side of the kink, rounding decides
        y = y.relu()
    (y * grad).sum().backward()  # a call with a gradient would import torch.fx and sympy
    expected = [y.detach(), *(t.mean(0) for t in statistics), *(t.grad for t in exact if t.grad is not None)]

    def on_device(t: Tensor) -> Tensor:
        form = torch.channels_last if t.ndim == 4 else torch.contiguous_format
        return t.to(device).contiguous(memory_format=form)

    leaves = [on_device(t).detach().requires_grad_() for t in inputs]
    running = [on_device(t).clone() for t in (mean, var)]
    tracked = on_device(torch.zeros((), dtype=torch.long)) if parts == 1 else None
    with torch.enable_grad():
        y = function(
            *(leaves[0], leaves[3] if with_residual else None, leaves[1], leaves[2], *running),
            *(tracked, parts, momentum, eps, relu, views),
        )
        (y * on_device(grad)).sum().backward()
    if tracked is not None:
        running[0] = running[0].where(tracked == views, float("nan"))
    return [y.detach(), *running, *(t.grad for t in leaves if t.grad is not None)], expected
