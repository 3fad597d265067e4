"""Faster copies of networks for inference: batch norms are folded into convolutions, ReLUs and shortcuts fused with them.

A convolution, the addition of a shortcut and the ReLU are one operator of mkldnn on a CPU and of cuDNN on a GPU; "triton"
is a plain convolution there, and one pass of the fused batch norms' kernel for all that follows it.
"""

import copy
import os
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils.fusion import fuse_conv_bn_eval

from twoviews import fused_norm_triton
from twoviews.backbones import BasicBlock, Bottleneck, ResNet
from twoviews.batch_norms import BatchNorm

# By type of device, the first that serves is used.
PREFERRED_BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("mkldnn",), "cuda": ("cudnn", "triton")}
CHANNEL_MULTIPLE = 8  # on a GPU, images are padded to such a number of channels: tensor cores load 16 bytes of bf16


def fold_batchnorm(module: nn.Module, backend: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy for inference, in which the batch norms of `ResNet`s are folded into the convolutions before them.

    The running statistics are constants in eval mode, so this saves a pass over every feature map. With a backend, one of
    `PREFERRED_BACKENDS`, ReLUs and shortcuts are fused, too, and the `ResNet`s get the number format `dtype`.
    """
    module = copy.deepcopy(module).eval()
    for part in list(module.modules()):
        if isinstance(part, (ResNet, BasicBlock, Bottleneck)):
            for number in (1, 2, 3):
                _fold(part, f"conv{number}", f"bn{number}")
            if isinstance(shortcut := getattr(part, "downsample", None), nn.Sequential):
                _fold(shortcut, "0", "1")
    # Whether all parameters are finite, and so are their squares, waits for the device once.
    if backend is not None and (
        backend not in FUSED_RELU_BACKENDS or nn.utils.get_total_norm(list(module.parameters())).isfinite()
    ):
        for part in _resnets(module):
            _fuse(part, backend, dtype)
    return module


def choose_backend(
    module: nn.Module, device: torch.device, dtype: torch.dtype, image_size: int, batch: int
) -> str | None:
    """The first of `PREFERRED_BACKENDS` that works for a module on a device; None: there is none, or nothing to fuse.

    On a GPU each is tried before its first use for networks of one form, on random weights and images, which waits for
    the device. TWOVIEWS_KERNEL=0 turns them off there.
    """
    networks = _resnets(module)
    if not networks:
        return None
    if device.type == "cpu":
        return next(iter(PREFERRED_BACKENDS["cpu"]), None) if convolutions_fuse(dtype) else None
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        return None
    reasons = []
    for backend in PREFERRED_BACKENDS[device.type]:
        if backend == "cudnn" and (dtype == torch.float16 or torch.are_deterministic_algorithms_enabled()):
            # fp16 may overflow, which a ReLU that makes 0 of NaN would hide; and the operator knows no deterministic mode.
            continue
        found = (reason_against(backend, network, device, dtype, image_size, batch) for network in networks)
        if (reason := next(filter(None, found), None)) is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    if reasons and (key := (device, dtype)) not in _warned:
        _warned.add(key)
        warnings.warn(
            f"fused convolutions are of no use on {device} ({'; '.join(reasons)}): plain ones run there, more slowly.",
            stacklevel=3,
        )
    return None


def _resnets(module: nn.Module) -> list[ResNet]:
    return [part for part in module.modules() if isinstance(part, ResNet)]


def _fold(part: nn.Module, convolution: str, norm: str) -> None:
    before, after = getattr(part, convolution, None), getattr(part, norm, None)
    if isinstance(before, nn.Conv2d) and isinstance(after, BatchNorm):
        setattr(part, convolution, fuse_conv_bn_eval(before, after))
        setattr(part, norm, nn.Identity())


def _fuse(network: ResNet, backend: str, dtype: torch.dtype) -> None:
    """Replace the blocks of a network whose batch norms are folded by fused ones."""
    kind = {"mkldnn": _Mkldnn, "cudnn": _Cudnn, "triton": _Triton}[backend]
    first = network.conv1
    missing = 0 if backend == "mkldnn" else -first.in_channels % CHANNEL_MULTIPLE
    first.weight = nn.Parameter(nnf.pad(first.weight.detach(), (0, 0, 0, 0, 0, missing)))
    first.in_channels += missing
    network.add_module("conv1", nn.Sequential(_Input(first.in_channels, dtype), kind(first)))
    network.add_module("relu", nn.Identity())
    for stage in range(network.stages):
        blocks = getattr(network, f"layer{stage + 1}")
        setattr(network, f"layer{stage + 1}", nn.Sequential(*(_Block(block, kind) for block in blocks)))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def convolutions_fuse(dtype: torch.dtype) -> bool:
    """Whether torch has the operators that torch.compile, too, makes on a CPU of a convolution and what follows it."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not all(hasattr(torch.ops.mkldnn, f"_convolution_pointwise{end}") for end in ("", "_")):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Input(nn.Module):
    """Converts images to a number format and channels_last, and pads them with channels of zeros."""

    def __init__(self, channels: int, dtype: torch.dtype):
        super().__init__()
        self.channels, self.dtype = channels, dtype

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """Images in the number format of the network, padded with zeros to its D channels."""
        x = images.to(dtype=self.dtype, memory_format=torch.channels_last)
        missing = self.channels - x.shape[1]
        return nnf.pad(x, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last) if missing else x


class _Rectified(nn.Module):
    """Abstract: a convolution, the shortcut that is added to its output, and a ReLU."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Float[Tensor, "B C H W"], shortcut: Tensor | None = None) -> Float[Tensor, "B D _ _"]:
        """relu(convolution(x) + shortcut); the shortcut may be overwritten."""
        raise NotImplementedError


class _Mkldnn(_Rectified):
    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        c = self.convolution
        settings = c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups
        if shortcut is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *settings, "relu", [], "")
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        return add(shortcut, x, *settings, "add", 1.0, "relu", [], "")


class _Cudnn(_Rectified):
    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        c = self.convolution
        settings: tuple[Any, ...] = c.bias, c.stride, c.padding, c.dilation, c.groups
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, c.weight, *settings)
        return torch.cudnn_convolution_add_relu(x, c.weight, shortcut, 1.0, *settings)


class _Triton(_Rectified):
    def __init__(self, convolution: nn.Conv2d):
        super().__init__(convolution)
        assert convolution.bias is not None
        self.offset = fused_norm_triton.Offset(convolution.bias.detach().float())
        convolution.register_parameter("bias", None)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return self.offset(self.convolution(x), shortcut)


# In these a fused ReLU may turn NaN into 0, which would hide a diverged network.
FUSED_RELU_BACKENDS = ("mkldnn", "cudnn")


class _Block(nn.Module):
    """A block of a ResNet after folding; the last convolution adds the shortcut."""

    def __init__(self, block: BasicBlock | Bottleneck, kind: type[_Rectified]):
        super().__init__()
        convolutions = [getattr(block, f"conv{number}") for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
        self.downsample: nn.Module | None = None
        if block.downsample is not None:
            # Both are added, so one takes the offset of the other, which would be a pass of its own.
            self.downsample = block.downsample[0]
            convolutions[-1].bias = nn.Parameter((convolutions[-1].bias + self.downsample.bias).detach())
            self.downsample.register_parameter("bias", None)
        self.first, self.last = nn.Sequential(*map(kind, convolutions[:-1])), kind(convolutions[-1])

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D _ _"]:
        """The block's output; x may be overwritten."""
        return self.last(self.first(x), x if self.downsample is None else self.downsample(x))


# ---------------------------------------------------------------------------------- comparison with plain convolutions

TRIAL_IMAGES = 32  # different images of the trial batch, which repeats them
# Largest relative errors, against float32: some times those of the number format, and less than TF32's where fp32 is meant.
MAX_ERROR = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
MAX_ERROR_TF32 = 1e-3
_reasons: dict[tuple, str | None] = {}
_warned: set[tuple] = set()


def reason_against(
    backend: str, network: ResNet, device: torch.device, dtype: torch.dtype, image_size: int, batch: int
) -> str | None:
    """Why a backend cannot be used for networks of this form on a GPU; None: its results were compared there."""
    form = tuple((*part.weight.shape, *part.stride) for part in network.modules() if isinstance(part, nn.Conv2d))
    settings = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    key = backend, device, dtype, image_size, batch, *settings, type(network.maxpool), form
    if key not in _reasons:
        try:
            error = _error(backend, network, device, dtype, image_size, batch)
            largest = MAX_ERROR_TF32 if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else MAX_ERROR[dtype]
            _reasons[key] = None if error <= largest else f"an error of {error:.1g}"  # nan is not
        except Exception as error:  # of cuDNN, Triton, a driver
            _reasons[key] = f"{type(error).__name__}: {error}".splitlines()[0]
    return _reasons[key]


@torch.no_grad()
def _error(
    backend: str, network: ResNet, device: torch.device, dtype: torch.dtype, image_size: int, batch: int
) -> float:
    """Relative error of the features of random images by a network of this form with random weights."""
    random = torch.Generator().manual_seed(0)
    plain = fold_batchnorm(network).float()
    for part in plain.modules():
        if isinstance(part, nn.Conv2d):
            # A quarter of the variance that He et al. give weights: blocks add to their shortcut little by little.
            std = (0.5 / part.weight[0].numel()) ** 0.5
            part.weight.copy_(torch.randn(part.weight.shape, generator=random) * std)
            if part.bias is not None:
                part.bias.copy_(torch.randn(part.bias.shape, generator=random) * 0.2)
    images = torch.randn(TRIAL_IMAGES, network.conv1.in_channels, image_size, image_size, generator=random).to(device)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # not for this size of a batch
    try:
        expected = plain(images)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    times = -(-batch // TRIAL_IMAGES)
    fused = fold_batchnorm(plain, backend, dtype)(images.repeat(times, 1, 1, 1)[:batch])
    expected = expected.repeat(times, 1)[:batch]
    return ((fused.double() - expected.double()).norm() / expected.double().norm()).item()
