"""The passes of fused_norm.py on a CPU: norm.c, for activations in float32 and bfloat16."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from twoviews import compiled

SOURCE = Path(__file__).with_name("norm.c")
TASKS = 32  # that a pass which adds up is divided into: a number of its own, so that sums do not depend on threads


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("images", "size", "channels", "parts", "chunks", "bf16")]


def _layer(x: Tensor, parts: int) -> _Layer:
    images, size = x.shape[0] // parts, x.shape[2] * x.shape[3]
    return _Layer(images, size, x.shape[1], parts, min(images, max(1, TASKS // parts)), x.dtype == torch.bfloat16)


def _partial(layer: _Layer) -> Tensor:
    return torch.empty(2, layer.parts, layer.chunks, layer.channels)


class Compiled:
    """Of a compiled norm.c; the methods are the passes, as `Triton` of fused_norm.py has them."""

    dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _run(self, name: str, layer: _Layer, *arguments: Tensor | float | None) -> None:
        given = [ctypes.byref(layer)]
        for one in arguments:
            given.append(
                compiled.address(one)
                if isinstance(one, Tensor)
                else ctypes.c_float(one)
                if isinstance(one, float)
                else one
            )
        function = getattr(self.library, name)
        if name.startswith("finish"):
            function(*given)
        else:
            count = layer.parts * layer.chunks if name in ("statistics", "sums") else layer.images
            compiled.in_shares(lambda first, last: function(first, last, *given), count)

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
        layer, moments = _layer(x, parts), torch.empty(2, parts, x.shape[1])
        partial = _partial(layer)
        self._run("statistics", layer, x, partial)
        self._run("finish_statistics", layer, partial, moments, running_mean, running_var, momentum, eps)
        if tracked is not None:
            tracked.add_(1)
        return moments

    def normalise(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor, relu: bool
    ) -> Tensor:
        """The normalised rows, scaled, with offset, residual and ReLU."""
        y = torch.empty_like(x)
        self._run("normalise", _layer(x, moments.shape[1]), x, residual, y, weight, bias, moments, relu)
        return y

    def sums(
        self,
        x: Tensor,
        grad: Tensor,
        y: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        moments: Tensor,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient below the residual's ReLU, factors of `input_gradient`, and gradients of weight and bias."""
        layer = _layer(x, moments.shape[1])
        partial, masked = _partial(layer), None if y is None else torch.empty_like(x)
        self._run("sums", layer, x, grad, y, masked, weight, bias, moments, partial, relu)
        factors, weight_grad, bias_grad = (torch.empty_like(t) for t in (moments, weight, bias))
        self._run("finish_sums", layer, partial, moments, weight, factors, weight_grad, bias_grad)
        return grad if masked is None else masked, factors, weight_grad, bias_grad

    def input_gradient(
        self, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, factors: Tensor, relu: bool
    ) -> Tensor:
        """The gradient of x; relu: `grad` is that of the output of a ReLU that the input says is open or not."""
        x_grad = torch.empty_like(x)
        layer = _layer(x, moments.shape[1])
        self._run("input_gradient", layer, x, grad, x_grad, weight, bias, moments, factors, relu)
        return x_grad
