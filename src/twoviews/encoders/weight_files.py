"""Files of weights, the encoders in them, and networks built from their architecture, with those weights or random ones."""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.checkpoints import refuse_compressed
from twoviews.config.building import build
from twoviews.config.values import flat
from twoviews.encoder_file import check_finite, read_weights
from twoviews.encoders.loaded import Preprocessing
from twoviews.errors import BadInput
from twoviews.randomness import seed_of

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")  # of files of weights
RESNETS = {  # torchvision's and timm's names: kind and number of blocks
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
FIRST_BLOCK = "layer1.0.conv1.weight"  # every ResNet has this parameter, after some prefix
# Names of networks that are moving averages of another one, instead of learning from gradients.
MOVING_AVERAGES = re.compile(r"encoder_k|key_encoder|momentum|target|teacher|(?<![a-z])ema(?![a-z])|slow")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights by dotted name, however deeply they are nested; no code in the file is run.

    Raises:
        BadInput: the file does not hold weights, or holds objects whose loading could run code.
    """
    try:
        if path.suffix == ".safetensors":
            return read_weights(path)
        if zipfile.is_zipfile(path):
            refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):  # about unusual versions of pickle
            content = flat(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of many kinds; nothing in the file can have done more than fail to be read
        if isinstance(error, OSError) and error.errno:
            raise
        harmful = re.search(r"(?:GLOBAL|global|class) ([\w.]+\.[\w.]+)", str(error))
        what = f"holds {harmful[1]}, and reading that could run code" if harmful else "cannot be read as weights alone"
        raise BadInput(
            f"{path} {what}, so it is refused; ask for a file of weights alone, as torch.save(model.state_dict(), …) "
            "or safetensors write it."
        ) from None
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def choose_encoder(
    prefixes: Sequence[str], encoder: str | None, path: Path, default: str | None = None
) -> tuple[str, list[str]]:
    """Prefix of the names of one encoder's tensors, and a note for the user if the file holds several encoders.

    Of a student and its teacher that is the teacher, which DINO (arXiv:2104.14294) and its successors evaluate. Of other
    pairs (query and key, online and target, a network and its moving average) it is the one that learns from gradients.

    Args:
        prefixes: one for each encoder in the file; at least one.
        encoder: the one to take, by its name in the note or by its prefix; None: by the rule above.
        path: of the file.
        default: prefix of the encoder to take in place of the rule above.

    Raises:
        BadInput: there is no such encoder, or the rule leaves several.
    """
    names = _short([prefix.strip(".") for prefix in prefixes])
    prefix_by_name = dict(zip(names, prefixes, strict=True))
    listed, learning = ", ".join(name or "one without a prefix" for name in names), "which learns from gradients"
    if encoder is not None:
        chosen = [prefix for name, prefix in prefix_by_name.items() if encoder in (name, prefix.strip("."))]
        if not chosen:
            raise BadInput(f"run={path}:{encoder}: {path.name} holds no encoder {encoder}, but these: {listed}.")
        why = "as the command says"
    elif default is not None:
        chosen, why = [default], learning
    else:
        teachers = [prefix for prefix in prefixes if "teacher" in prefix]
        if teachers and any("student" in prefix for prefix in prefixes):
            chosen, why = teachers, "as DINO evaluates it"
        else:
            chosen, why = [prefix for prefix in prefixes if not MOVING_AVERAGES.search(prefix)], learning
        chosen = chosen or list(prefixes)
    if len(chosen) > 1:
        ways = " or ".join(f"run={path}:{name}" for name, prefix in prefix_by_name.items() if prefix in chosen)
        raise BadInput(f"{path} holds {len(prefixes)} ResNets ({listed}); choose one: {ways}.")
    if len(prefixes) == 1:
        return chosen[0], []
    used = next(name for name, prefix in prefix_by_name.items() if prefix == chosen[0])
    others = " or ".join(f"run={path}:{name}" for name in names if name != used)
    evaluated = f"Evaluated is {used or 'the one without a prefix'}, {why}; {others} is another."
    return chosen[0], [f"{path.name} holds {len(prefixes)} encoders: {listed}. {evaluated}"]


def _short(labels: Sequence[str]) -> list[str]:
    """The first part of each dotted label that no other label has; the whole label if there is none."""
    counts = Counter(part for label in labels for part in {*label.split(".")})
    return [next((part for part in label.split(".") if counts[part] == 1), label) for label in labels]


def resnet_weights(
    weights: dict[str, Tensor], path: Path, encoder: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], int, list[str]]:
    """Weights of a ResNet with torchvision's parameter names, its recipe (see `random_network`), channels, and notes.

    `weights` are all tensors of the file; `encoder` is one of several, see `choose_encoder`.

    Raises:
        BadInput: there is no such ResNet, several are equally likely, or its first convolution is neither 3x3 nor 7x7.
    """
    prefixes = [name.removesuffix(FIRST_BLOCK) for name in weights if f".{name}".endswith(f".{FIRST_BLOCK}")]
    if not prefixes:
        raise BadInput(
            f"{path} holds no ResNet with torchvision's names (no {FIRST_BLOCK} among its {len(weights)} tensors); "
            "only those can be recognised without the code that made them."
        )
    prefix, notes = choose_encoder(prefixes, encoder, path)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    stem = own.get("conv1.weight", torch.empty(0))
    side = stem.shape[-1] if stem.ndim == 4 else 0
    if side not in (3, 7):
        raise BadInput(f"{path}: the ResNet begins with no 3x3 or 7x7 convolution conv1, so its stem is not known.")
    depths: list[int] = []
    while depth := len({name.split(".")[1] for name in own if name.startswith(f"layer{len(depths) + 1}.")}):
        depths.append(depth)
    recipe = {
        "_target_": "twoviews.backbones.ResNet",
        "block": "bottleneck" if "layer1.0.conv3.weight" in own else "basic",
        "depths": depths,
        "width": stem.shape[0],
        "stem": "imagenet" if side == 7 else "cifar",
    }
    inner = {name: value for name, value in own.items() if re.match(r"(conv1|bn1|layer\d+)\.", name)}
    note = f"{path.name}: ResNet with {'-'.join(map(str, depths))} {recipe['block']} blocks of width {stem.shape[0]}"
    small = "; its conv1 is 3x3, so stride 1 and no max-pool are taken for granted."
    return inner, recipe, stem.shape[1], [*notes, note + (small if side == 3 else " and ImageNet's stem.")]


def checkpoint_weights(
    weights: dict[str, Tensor], wanted: Sequence[str], path: Path, encoder: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's weights in a checkpoint of a run, and a note if the checkpoint has a moving average of it too.

    `wanted` are the names of the encoder's tensors; without `encoder` it is the one that the training itself evaluates.

    Raises:
        BadInput: there is no such encoder.
    """
    default = "method.encoder."
    ends = (name.removesuffix(wanted[0]) for name in weights if name.endswith(f".{wanted[0]}"))
    others = [prefix for prefix in ends if prefix != default and all(prefix + name in weights for name in wanted)]
    prefix, notes = choose_encoder([default, *others], encoder, path, default)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, notes


def random_network(recipe: dict[str, Any], channels: int, image_size: int) -> Encoder:
    """A network with random weights, the same ones every time; `recipe` is as a file of conf/backbone/."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained"))
        return build(recipe, channels=channels, image_size=image_size)


def resnet_network(
    recipe: dict[str, Any], preprocessing: Preprocessing, weights: dict[str, Tensor] | None, where: Path | str
) -> tuple[Encoder, Preprocessing, list[str]]:
    """A ResNet with these weights or, without any, random ones; how its images are prepared, and notes for the user.

    Images that would shrink to a single pixel are enlarged.

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
    """Load weights, which messages name by `where`, into a network; each of its tensors must be there, and no others.

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
