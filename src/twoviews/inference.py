"""Networks where nothing learns: without batch norms, and on a CPU without passes of their own for ReLUs and shortcuts."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from twoviews.backbones import BasicBlock, Bottleneck, ResNet


def folded(module: nn.Module, fuse: bool = False) -> nn.Module:
    """A copy for inference, in which the batch norms of `ResNet`s are part of the convolutions before them.

    The running statistics are constants then, and a pass over every map is saved.

    Args:
        module: in whatever mode.
        fuse: let convolutions add shortcuts and take ReLUs, too; for float32 on a CPU.
    """
    module = copy.deepcopy(module).eval()
    for part in list(module.modules()):
        if isinstance(part, (ResNet, BasicBlock, Bottleneck)):
            for number in (1, 2, 3):
                _fold(part, f"conv{number}", f"bn{number}")
            if isinstance(shortcut := getattr(part, "downsample", None), nn.Sequential):
                _fold(shortcut, "0", "1")
    # A fused ReLU makes 0 of what is no number, and what is broken has to be seen.
    if fuse and _can_fuse() and all(parameter.isfinite().all() for parameter in module.parameters()):
        for part in list(module.modules()):
            if isinstance(part, ResNet):
                part.add_module("conv1", _Rectified(part.conv1))
                part.add_module("relu", nn.Identity())
                for stage in range(part.stages):
                    blocks = getattr(part, f"layer{stage + 1}")
                    setattr(part, f"layer{stage + 1}", nn.Sequential(*map(_Block, blocks)))
    return module


def _fold(part: nn.Module, convolution: str, norm: str) -> None:
    before, after = getattr(part, convolution, None), getattr(part, norm, None)
    if isinstance(before, nn.Conv2d) and isinstance(after, nn.modules.batchnorm._BatchNorm):
        setattr(part, convolution, fuse_conv_bn_eval(before, after))
        setattr(part, norm, nn.Identity())


def _can_fuse() -> bool:
    """Whether torch has the operators that torch.compile, too, makes of a convolution and what follows it on a CPU."""
    enabled = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return enabled and all(hasattr(torch.ops.mkldnn, f"_convolution_pointwise{end}") for end in ("", "_"))


def _settings(convolution: nn.Conv2d) -> tuple:
    c = convolution
    return c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups


class _Rectified(nn.Module):
    """A convolution and the ReLU behind it."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D _ _"]:
        """Nothing below zero."""
        return torch.ops.mkldnn._convolution_pointwise(x, *_settings(self.convolution), "relu", [], "")


class _Block(nn.Module):
    """A block of a ResNet after folding; the last convolution adds to the shortcut, in its memory."""

    def __init__(self, block: BasicBlock | Bottleneck):
        super().__init__()
        convolutions = [getattr(block, f"conv{number}") for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
        self.first, self.last = nn.Sequential(*map(_Rectified, convolutions[:-1])), convolutions[-1]
        self.downsample: nn.Module | None = block.downsample

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D _ _"]:
        """What the block makes of x, whose memory may be written."""
        y = self.first(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        return add(shortcut, y, *_settings(self.last), "add", 1.0, "relu", [], "")
