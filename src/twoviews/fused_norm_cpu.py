"""The passes of fused_norm.py on a CPU, by norm.c, for activations in float32 and bfloat16."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from twoviews import compiled

SOURCE = Path(__file__).with_name("norm.c")
TASKS = 32  # that a pass which adds up is divided into: a number of its own, so that threads do not change sums


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("images", "size", "channels", "parts", "chunks", "bf16")]


@functools.cache
def _layer(shape: torch.Size, parts: int, dtype: torch.dtype) -> _Layer:
    images, size = shape[0] // parts, shape[2] * shape[3]
    chunks = min(images, max(1, TASKS // parts))
    return _Layer(images, size, shape[1], parts, chunks, dtype == torch.bfloat16)


def _partial(layer: _Layer) -> Tensor:
    return torch.empty((2, layer.parts, layer.chunks, layer.channels), dtype=torch.float32)


class Compiled:
    """The passes by a compiled norm.c."""

    dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        for name, tensors, others in (
            ("statistics", 2, []),
            ("finish_statistics", 4, [ctypes.c_float] * 2),
            ("normalise", 6, [ctypes.c_int]),
            ("sums", 8, [ctypes.c_int]),
            ("finish_sums", 6, []),
            ("input_gradient", 7, [ctypes.c_int]),
        ):
            shares = [] if name.startswith("finish") else [ctypes.c_int64] * 2
            pointers = [ctypes.c_void_p] * tensors
            getattr(library, name).argtypes = [*shares, ctypes.POINTER(_Layer), *pointers, *others]

    def _run(self, name: str, layer: _Layer, *arguments: Tensor | float | None) -> None:
        given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        function = getattr(self.library, name)
        if name.startswith("finish"):
            function(layer, *given)
        else:
            count = layer.parts * layer.chunks if name in ("statistics", "sums") else layer.images
            compiled.parallel_for(lambda first, last: function(first, last, layer, *given), count)

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
        layer = _layer(x.shape, parts, x.dtype)
        moments = x.new_empty((2, parts, x.shape[1]), dtype=torch.float32)
        partial = _partial(layer)
        self._run("statistics", layer, x, partial)
        self._run("finish_statistics", layer, partial, moments, running_mean, running_var, momentum, eps)
        if tracked is not None:
            tracked.add_(1)
        return moments

    def normalise(
        self, x: Tensor, residual: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, relu: bool
    ) -> None:
        """Into y: the normalised rows, scaled, with offset, residual and ReLU."""
        self._run("normalise", _layer(x.shape, moments.shape[1], x.dtype), x, residual, y, weight, bias, moments, relu)

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
        layer = _layer(x.shape, moments.shape[1], x.dtype)
        partial = _partial(layer)
        self._run("sums", layer, x, grad, y, masked, weight, bias, moments, partial, relu)
        factors, weight_grad, bias_grad = (torch.empty_like(t) for t in (moments, weight, bias))
        self._run("finish_sums", layer, partial, moments, weight, factors, weight_grad, bias_grad)
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
        layer = _layer(x.shape, moments.shape[1], x.dtype)
        self._run("input_gradient", layer, x, grad, x_grad, weight, bias, moments, factors, relu)
