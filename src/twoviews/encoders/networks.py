"""Networks built from their architecture, with random weights or those of a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.config.building import build
from twoviews.encoder_file import check_finite
from twoviews.encoders.loaded import Preprocessing
from twoviews.errors import BadInput
from twoviews.randomness import seed_of

RESNETS = {  # torchvision's and timm's names: kind and number of blocks
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}


def random_network(recipe: dict[str, Any], channels: int, image_size: int) -> Encoder:
    """A network with random weights, the same ones every time.

    Args:
        recipe: `_target_` and arguments of the encoder, as in conf/backbone/.
        channels: C of the images.
        image_size: H = W in px.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained"))
        return build(recipe, channels=channels, image_size=image_size)


def resnet_network(
    recipe: dict[str, Any], preprocessing: Preprocessing, weights: dict[str, Tensor] | None, where: Path | str
) -> tuple[Encoder, Preprocessing, list[str]]:
    """A ResNet, how its images are prepared, and notes for the user.

    Images that would shrink to a single pixel are enlarged.

    Args:
        recipe: of the ResNet, see `random_network`.
        preprocessing: of its images, before they are enlarged.
        weights: by name; None: random ones.
        where: the weights come from, for error messages.

    Raises:
        BadInput: the weights are those of another network.
    """
    stride, notes = {"cifar": 1, "imagenet": 4}[recipe["stem"]] * 2 ** (len(recipe["depths"]) - 1), []
    if preprocessing.image_size <= stride:
        notes.append(
            f"Images of {preprocessing.image_size} px are enlarged to {2 * stride} px, or one pixel would be left."
        )
        preprocessing = replace(preprocessing, image_size=2 * stride)
    encoder = random_network(recipe, preprocessing.channels, preprocessing.image_size)
    if weights is not None:
        fill(encoder, weights, where)
    return encoder, preprocessing, notes


def fill(network: nn.Module, weights: dict[str, Tensor], where: Path | str) -> None:
    """Load weights into a network; each of its tensors must be there, and no others.

    Args:
        network: that gets the weights.
        weights: by name.
        where: they come from, for error messages.

    Raises:
        BadInput: they are those of another network, or not finite.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise BadInput(f"{where} is no plain ResNet or not the network it was taken for: {reason[:200]}") from None
    try:
        check_finite(network.state_dict())
    except ValueError as error:
        raise BadInput(f"{where}: {error}; take a file of weights from before its training went wrong.") from None
