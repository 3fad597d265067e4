"""encoder.safetensors and encoder.json: an encoder's weights, and beside them what is needed to build and use the network."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from twoviews import foreign
from twoviews.backbones import Encoder
from twoviews.data.images import ImageData
from twoviews.errors import BadInput, system_reason
from twoviews.files import write_atomic

WEIGHTS_FILE, DESCRIPTION_FILE = "encoder.safetensors", "encoder.json"


def save_encoder(folder: Path, encoder: Encoder, description: Mapping[str, Any]) -> None:
    """Write both files; `description` has the backbone's configuration, image_size, channels, mean, std and more."""
    write(folder / WEIGHTS_FILE, encoder.state_dict(), {**description, "features": encoder.out_dim})


def write(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write weights as a .safetensors file, and beside it their description as a JSON file of the same name."""
    write_atomic(path, weight_file(weights))
    write_atomic(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")


def load_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a weight file with encoder.json beside it, and the content of encoder.json.

    Raises:
        BadInput: the two files do not make an encoder.
    """
    description = foreign.load(path.with_name(DESCRIPTION_FILE), needed=True)
    remedy = (
        "the run wrote, or delete both and result.json, and the same train.py command writes them again from its last "
    )
    with loading(path, f"{DESCRIPTION_FILE} beside it do not make an encoder", f"{remedy}checkpoint"):
        return encoder_of(description, read_weights(path)), description


@contextmanager
def loading(path: Path, mismatch: str, remedy: str) -> Iterator[None]:
    """Turn what files raise that do not fit together into a sentence."""
    foreign.check_regular(path)
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({system_reason(error)}); make it readable.") from error
    except (BadInput, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = foreign.short(error)
        raise BadInput(f"{path} and {mismatch}: {reason}; put the files back that {remedy}.") from error


def encoder_of(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Encoder:
    """The encoder that a description, see `describe`, says how to build, with these weights.

    Raises:
        BadInput, RuntimeError, KeyError, TypeError, ValueError: they do not fit, or a weight is not finite.
    """
    from twoviews.config.building import build  # which importing this file does not need

    sizes = {"channels": description["channels"], "image_size": description["image_size"]}
    encoder = build(description["backbone"], **sizes)
    if not isinstance(encoder, Encoder):
        raise TypeError("the backbone is not an encoder")
    encoder.load_state_dict(weights)
    if not len(description["mean"]) == len(description["std"]) == description["channels"]:
        raise TypeError("mean and std do not have a number for each channel")
    check_finite(weights)
    return encoder


def is_buildable(encoder: Encoder) -> bool:
    """Whether the encoder's recipe builds all of it, not only the network inside it, as in front of a projector."""
    cls = type(encoder)
    return getattr(encoder, "recipe", {}).get("_target_") == f"{cls.__module__}.{cls.__qualname__}"


def describe(encoder: Encoder, data: ImageData) -> dict[str, Any]:
    """How to build an encoder and to prepare its images, as plain values."""
    return {**describe_backbone(encoder.recipe, data), "features": encoder.out_dim}


def describe_backbone(backbone: Any, data: ImageData) -> dict[str, Any]:
    """The same of a network that need not be built, by its node of a configuration as plain values."""
    return {
        "backbone": backbone,
        "channels": data.channels,
        "image_size": data.size,
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.classes),
        "data": data.name,
    }


def weight_file(weights: Mapping[str, Tensor]) -> bytes:
    """The content of a .safetensors file; safetensors' own `save_file` makes files that only their owner may read."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in weights.items()})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        SafetensorError, OSError: the file is damaged or cannot be read.
    """
    from safetensors.torch import load, load_file

    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors does not open names that are not UTF-8
        return load(path.read_bytes())
    return load_file(path)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot make features.

    Raises:
        ValueError: a number is NaN or infinite, or a variance is negative.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
        if name.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{name} holds negative variances")
