"""Encoders: images [B, C, H, W] in, features [B, F] out.

ResNets after He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, with the parameter names of
torchvision, so that weights can be exchanged with it; any other architecture comes from timm by name.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.batch_norms import BatchNorm
from twoviews.errors import BadInput, nearest
from twoviews.fused_norm import batch_norm_act
from twoviews.ranges import Count, Range, Repeats, Size


class Encoder(nn.Module):
    """Abstract: images [B, C, H, W] to features [B, out_dim]."""

    out_dim: int
    recipe: dict[str, Any]  # the node of a configuration that builds it again, for other images too

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features before any projection head."""
        raise NotImplementedError


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class _Conv1x1(nn.Conv2d):
    """A 1x1 convolution without padding.

    On a CPU with AVX2, oneDNN 3.13 writes beyond its memory in the backward pass of one with a stride and fewer than 8 input
    channels in channels_last (uxlfoundation/oneDNN, issue 6035), so the pixels that such a one reads are selected before.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.in_channels < 8 and input.device.type == "cpu":
            rows, columns = self.stride
            return nnf.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)  # a folded norm has a bias
        return super().forward(input)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_Conv1x1(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _shortcut_of(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    convolution, norm = downsample
    return batch_norm_act(norm, convolution(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)
        self.last_norm = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, width, H / stride, W / stride]."""
        y = batch_norm_act(self.bn1, self.conv1(x), self.relu)
        return batch_norm_act(self.bn2, self.conv2(y), self.relu, _shortcut_of(self.downsample, x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride is on the 3x3, as torchvision has it (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.last_norm = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 4 * width, H / stride, W / stride]."""
        y = batch_norm_act(self.bn1, self.conv1(x), self.relu)
        y = batch_norm_act(self.bn2, self.conv2(y), self.relu)
        return batch_norm_act(self.bn3, self.conv3(y), self.relu, _shortcut_of(self.downsample, x))


class ResNet(Encoder):
    """A ResNet without its classifier; features are the average-pooled last map.

    Args:
        channels: C of the images.
        image_size: H = W in px; only used to refuse a stem that would shrink the image to nothing.
        block: "basic" or "bottleneck".
        depths: blocks in each of the stages; the first keeps the resolution, each other one halves it.
        width: channels of the first stage; each stage doubles them.
        stem: "cifar" is a 3x3 convolution of stride 1 without pooling, whose weights are drawn as torch draws them (std 0.11
            for RGB; MoCo's CIFAR demo, solo-learn and lightly put it in place of an initialised one); "strided" the same
            with stride 2, drawn as the other convolutions (std 0.06 for a width of 64); "imagenet" a 7x7 convolution of
            stride 2 and a max-pool.
        zero_init_residual: the last norm of each block starts at zero, so each block starts as its shortcut.

    Raises:
        BadInput: the last map would be a single pixel.
    """

    def __init__(
        self,
        channels: Count,
        image_size: Count,
        block: Literal["basic", "bottleneck"],
        depths: Sequence[Repeats],
        width: Size = 64,
        stem: Literal["cifar", "strided", "imagenet"] = "cifar",
        zero_init_residual: bool = False,
    ):
        super().__init__()
        self.recipe = {
            "_target_": "twoviews.backbones.ResNet",
            "block": block,
            "depths": list(depths),
            "width": width,
            "stem": stem,
            "zero_init_residual": zero_init_residual,
        }
        stride = {"cifar": 1, "strided": 2, "imagenet": 4}[stem] * 2 ** (len(depths) - 1)
        if image_size <= stride:
            remedy = (
                "a backbone with the CIFAR stem, such as backbone=resnet18_cifar"
                if stem == "imagenet"
                else f"images of at least {2 * stride} px (size=)"
            )
            raise BadInput(
                f"stem={stem} shrinks {image_size}x{image_size} images {stride}-fold, to a single pixel; use {remedy}."
            )
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        else:
            self.conv1 = _conv3x3(channels, width, 2 if stem == "strided" else 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
        inputs = width
        self.stages = len(depths)
        for stage, depth in enumerate(depths):
            stage_width = width * 2**stage
            blocks = []
            for number in range(depth):
                blocks.append(kind(inputs, stage_width, 2 if stage > 0 and number == 0 else 1))
                inputs = stage_width * kind.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.out_dim = inputs
        self._initialise(stem, zero_init_residual)

    def _initialise(self, stem: str, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not (module is self.conv1 and stem == "cifar"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    nn.init.zeros_(getattr(module, module.last_norm).weight)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Average-pooled last map."""
        x = self.maxpool(batch_norm_act(self.bn1, self.conv1(images), self.relu))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        # Over rows of channels, as they lie in channels_last: the gradient of mean((2, 3)) is neither, and is copied.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def all_norms_in_blocks(network: ResNet) -> bool:
    """Whether all batch norms are where `batch_norm_act` gets them, and none in a part that somebody has put in."""
    known = set()
    for name, part in network.named_modules():
        if type(part) in (ResNet, BasicBlock, Bottleneck):
            known |= {f"{name}.{norm}".lstrip(".") for norm in ("bn1", "bn2", "bn3", "downsample.1")}
    return all(name in known for name, part in network.named_modules() if isinstance(part, BatchNorm))


class Timm(Encoder):
    """Any image model of timm, without its classifier.

    Args:
        channels: C of the images.
        image_size: H = W in px; given to the models that are built for one size (vision transformers).
        name: as timm.list_models() has it, such as "vit_small_patch16_224".
        drop_path_rate: stochastic depth, where the model has it.

    Raises:
        BadInput: timm has no such model, or it cannot work at this image size.
    """

    def __init__(
        self,
        channels: Count,
        image_size: Count,
        name: str,
        drop_path_rate: Annotated[float, Range(at_least=0, below=1)] = 0.0,
    ):
        super().__init__()
        import timm

        self.recipe = {"_target_": "twoviews.backbones.Timm", "name": name, "drop_path_rate": drop_path_rate}
        if name not in timm.list_models():
            raise BadInput(f"name={name} is not a model of timm {timm.__version__}.{nearest(name, timm.list_models())}")
        options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "pretrained": False}
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        try:
            self.model, size = _timm_model(name, image_size, options)
            with torch.no_grad():
                features = self.model.eval()(torch.zeros(1, channels, image_size, image_size))
        except TypeError as error:
            raise BadInput(
                f"drop_path_rate={drop_path_rate} is not for {name}, which has no stochastic depth; use 0."
            ) from error
        except (RuntimeError, AssertionError, ValueError) as error:
            raise BadInput(
                f"name={name} cannot take {image_size}x{image_size} images ({first_line(error)}); choose another "
                "model or size=."
            ) from error
        self.model.train()
        # For timm.create_model, beside the name.
        self.options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, **size}
        if features.ndim != 2:
            raise BadInput(f"name={name} gives features of shape {tuple(features.shape)}, not one vector an image.")
        self.out_dim = features.shape[1]

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The pooled features that timm's classifier would see.

        Raises:
            BadInput: the model is built for images of one size, and these have another.
        """
        try:
            return self.model(images)
        except AssertionError as error:
            height, width = images.shape[2:]
            raise BadInput(
                f"name={self.recipe['name']} cannot take views of {height}x{width} px ({error}); give them the images' "
                "size with views.<name>.size=null, or choose a model for any size."
            ) from error


def _timm_model(name: str, image_size: int, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model for images of this size, and the options that say so.

    Vision transformers resize their position embeddings to crops of other sizes if images consist of whole patches.
    """
    import timm

    for size in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}):
        try:
            model = timm.create_model(name, **size, **options)
        except TypeError:
            continue
        if "dynamic_img_size" not in size or image_size % cast(Any, model).patch_embed.patch_size[0] == 0:
            return model, size
    return timm.create_model(name, **options), {}  # convolutional models take images of any size, and no `img_size`


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)
