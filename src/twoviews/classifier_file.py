"""Classifiers in files: classifier.safetensors, a network and the linear layer on its features, and linear_head.safetensors,
such a layer alone; the JSON file beside each has the names of the classes.

Both are written into the folder of an evaluation, the first by protocol=finetune, the second by protocol=linear.
Shapes: N images, F features, C classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twoviews import foreign
from twoviews.backbones import Encoder
from twoviews.encoder_file import check_finite, encoder_of, loading, read_weights, write

CLASSIFIER_FILE, HEAD_FILE = "classifier.safetensors", "linear_head.safetensors"
_REFERENCE = ("bank", "test_distances")  # names of tensors, see `Head`
EVALUATIONS = "evaluation"  # the folder of a run's evaluations


@dataclass(frozen=True)
class Head:
    """A linear classifier of features."""

    linear: nn.Linear  # [C, F]; the softmax of its outputs are the probabilities
    classes: tuple[str, ...]  # names by output, C
    # [B, F] features of some of the images that it learnt from, and [M] distances of test images from these, see
    # protocols/distance.py; None in older files.
    reference: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it, by name."""
        return self.linear.state_dict() | dict(zip(_REFERENCE, self.reference or (), strict=False))


def as_head(weight: Tensor, bias: Tensor, classes: Sequence[str]) -> Head:
    """A head with these weights [C, F] and biases [C], which are not trained further."""
    return Head(as_linear(weight, bias), tuple(classes))


def as_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with copies of these weights [C, F] and biases [C], which are not trained further."""
    # On meta first: torch's own initialisation would draw from the global generator.
    linear = nn.Linear(weight.shape[1], len(weight), device="meta").to_empty(device=weight.device)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear.requires_grad_(False)


def save_classifier(folder: Path, encoder: Encoder, head: Head, description: Mapping[str, Any]) -> None:
    """Write classifier.safetensors and classifier.json; `description` is as `encoder_file.describe` gives it."""
    parts = {"encoder": encoder.state_dict(), "head": head.tensors()}
    weights = {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
    write(folder / CLASSIFIER_FILE, weights, {**description, "classes": list(head.classes)})


def load_classifier(path: Path) -> tuple[Encoder, Head, dict[str, Any]]:
    """The network and the head of a classifier.safetensors, and the content of classifier.json beside it.

    Raises:
        BadInput: the two files do not make a classifier.
    """
    description, weights = foreign.load(path.with_suffix(".json"), needed=True), {"encoder": {}, "head": {}}
    with _loading(path, "a classifier"):
        for name, value in read_weights(path).items():
            part, _, rest = name.partition(".")
            if part not in weights:
                raise ValueError(f"its tensor {name} belongs neither to an encoder nor to a head")
            weights[part][rest] = value
        encoder = encoder_of(description, weights["encoder"])
        return encoder, _head_of(description, weights["head"], encoder.out_dim), description


def newest_classifier(folder: Path) -> Path | None:
    """The classifier.safetensors that was written last by an evaluation of the encoder in this folder; None: there is none."""
    return next(iter(_newest(folder, CLASSIFIER_FILE)), None)


def save_head(folder: Path, head: Head, encoder: Encoder, size: int, statistics: Sequence[Sequence[float]]) -> None:
    """Write linear_head.safetensors and linear_head.json, which says by a digest whose features they classify.

    They are those of images of `size` px that are normalised with `statistics`: mean and std, per channel.
    """
    description = {"encoder": _digest(encoder, size, statistics), "classes": list(head.classes)}
    write(folder / HEAD_FILE, head.tensors(), description)


def find_head(folder: Path, encoder: Encoder, size: int, statistics: Sequence[Sequence[float]]) -> Head | None:
    """The head that an evaluation has written last below a folder, see `save_head`; None: there is none of these features.

    Raises:
        BadInput: the files of a head are damaged.
    """
    paths = _newest(folder, HEAD_FILE)
    digest = _digest(encoder, size, statistics) if paths else None
    for path in paths:
        description = foreign.load(path.with_suffix(".json"))
        if description.get("encoder") == digest:
            with _loading(path, "a linear classifier"):
                return _head_of(description, read_weights(path), encoder.out_dim)
    return None


def _loading(path: Path, what: str) -> AbstractContextManager[None]:
    mismatch = f"{path.with_suffix('.json').name} beside it do not make {what}"
    return loading(path, mismatch, "evaluate.py wrote, or delete both and run the evaluation again, which writes them")


def _newest(folder: Path, name: str) -> list[Path]:
    paths = [path for path in folder.glob(f"{EVALUATIONS}/*/{name}") if path.with_suffix(".json").exists()]
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _head_of(description: Mapping[str, Any], weights: Mapping[str, Tensor], features: int) -> Head:
    classes = description["classes"]
    if weights["weight"].shape != (len(classes), features) or weights["bias"].shape != (len(classes),):
        raise ValueError(f"the head is not one of {features} features and {len(classes)} classes")
    check_finite(weights := {name: value.float() for name, value in weights.items()})
    reference = None
    if not weights.keys().isdisjoint(_REFERENCE):
        bank, distances = (weights[name] for name in _REFERENCE)
        if bank.ndim != 2 or not len(bank) or bank.shape[1] != features or distances.ndim != 1 or not len(distances):
            raise ValueError(f"the head has no bank of {features} features with distances of test images")
        reference = bank, distances
    return replace(as_head(weights["weight"], weights["bias"], classes), reference=reference)


def _digest(encoder: Encoder, size: int, statistics: Sequence[Sequence[float]]) -> str:
    content = hashlib.blake2b(f"{size} {[[*map(float, each)] for each in statistics]}".encode(), digest_size=16)
    for name, value in encoder.state_dict().items():
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().numpy().data)
    return content.hexdigest()
