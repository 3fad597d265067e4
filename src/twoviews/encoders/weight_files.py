"""Files of weights: reading them, choosing one of several encoders in a file, and recognising its architecture."""

import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twoviews.checkpoints import refuse_compressed
from twoviews.config.digest import flat
from twoviews.encoder_file import read_weights
from twoviews.errors import BadInput

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")  # of files of weights
FIRST_BLOCK = "layer1.0.conv1.weight"  # every ResNet has this parameter, after some prefix
# Names of networks that are moving averages of another one, instead of learning from gradients.
MOVING_AVERAGES = re.compile(r"encoder_k|key_encoder|momentum|target|teacher|(?<![a-z])ema(?![a-z])|slow")


def split_name(run: str) -> tuple[Path, str | None]:
    """Path and encoder of "<file>:<encoder>"; the encoder is None where only a file is named."""
    file, colon, encoder = run.rpartition(":")
    if colon and not Path(run).expanduser().is_file() and Path(file).suffix in SUFFIXES:
        return Path(file).expanduser(), encoder
    return Path(run).expanduser(), None


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
    listed = ", ".join(name or "one without a prefix" for name in names)
    if encoder is not None:
        chosen = [prefix for name, prefix in prefix_by_name.items() if encoder in (name, prefix.strip("."))]
        if not chosen:
            raise BadInput(f"run={path}:{encoder}: {path.name} holds no encoder {encoder}, but these: {listed}.")
        why = "as the command says"
    elif default is not None:
        chosen, why = [default], "which learns from gradients"
    else:
        teachers = [prefix for prefix in prefixes if "teacher" in prefix]
        if teachers and any("student" in prefix for prefix in prefixes):
            chosen, why = teachers, "as DINO evaluates it"
        else:
            chosen, why = (
                [prefix for prefix in prefixes if not MOVING_AVERAGES.search(prefix)],
                "which learns from gradients",
            )
        chosen = chosen or list(prefixes)
    if len(chosen) > 1:
        ways = " or ".join(f"run={path}:{name}" for name, prefix in prefix_by_name.items() if prefix in chosen)
        raise BadInput(f"{path} holds {len(prefixes)} ResNets ({listed}); choose one: {ways}.")
    if len(prefixes) == 1:
        return chosen[0], []
    used = next(name for name, prefix in prefix_by_name.items() if prefix == chosen[0])
    others = " or ".join(f"run={path}:{name}" for name in names if name != used)
    used = used or "the one without a prefix"
    return chosen[0], [
        f"{path.name} holds {len(prefixes)} encoders: {listed}. Evaluated is {used}, {why}; {others} is another."
    ]


def _short(labels: Sequence[str]) -> list[str]:
    """The first part of each dotted label that no other label has; the whole label if there is none."""
    parts = [label.split(".") for label in labels]
    names = []
    for number, label in enumerate(labels):
        others = {part for index, label_parts in enumerate(parts) if index != number for part in label_parts}
        names.append(next((part for part in parts[number] if part not in others), label))
    return names


def resnet_weights(
    weights: dict[str, Tensor], path: Path, encoder: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], int, tuple[str, ...]]:
    """Weights of a ResNet with torchvision's parameter names, its recipe (see `random_network`), channels, and notes.

    Args:
        weights: all tensors of the file, by dotted name.
        path: of the file.
        encoder: which of several, see `choose_encoder`.

    Raises:
        BadInput: there is no such ResNet, several are equally likely, or its first convolution is neither 3x3 nor 7x7.
    """
    prefixes = [
        name.removesuffix(FIRST_BLOCK) for name in weights if name == FIRST_BLOCK or name.endswith(f".{FIRST_BLOCK}")
    ]
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
    stages, depths = 0, []
    while depth := len({name.split(".")[1] for name in own if name.startswith(f"layer{stages + 1}.")}):
        stages, depths = stages + 1, [*depths, depth]
    recipe = {
        "_target_": "twoviews.backbones.ResNet",
        "block": "bottleneck" if "layer1.0.conv3.weight" in own else "basic",
        "depths": depths,
        "width": stem.shape[0],
        "stem": "imagenet" if side == 7 else "cifar",
    }
    inner = {name: value for name, value in own.items() if re.match(r"(conv1|bn1|layer\d+)\.", name)}
    note = f"{path.name}: ResNet with {'-'.join(map(str, depths))} {recipe['block']} blocks of width {stem.shape[0]}"
    stem_note = (
        "; its conv1 is 3x3, so stride 1 and no max-pool are taken for granted."
        if side == 3
        else " and ImageNet's stem."
    )
    return inner, recipe, stem.shape[1], (*notes, note + stem_note)


def checkpoint_weights(
    weights: dict[str, Tensor], wanted: Sequence[str], path: Path, encoder: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's weights in a checkpoint of a run, and a note if the checkpoint has a moving average of it too.

    Args:
        weights: all tensors of the checkpoint, by dotted name.
        wanted: names of the encoder's tensors.
        path: of the checkpoint.
        encoder: which of several, see `choose_encoder`; None: the one that the training itself evaluates.

    Raises:
        BadInput: there is no such encoder.
    """
    default = "method.encoder."
    ends = (name.removesuffix(wanted[0]) for name in weights if name.endswith(f".{wanted[0]}"))
    others = [prefix for prefix in ends if prefix != default and all(prefix + name in weights for name in wanted)]
    prefix, notes = choose_encoder([default, *others], encoder, path, default)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, notes
