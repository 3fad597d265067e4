"""What functions of data sets return is checked once, where the data are loaded."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from twoviews.config import building
from twoviews.data import sources
from twoviews.data.decoding import Decoded
from twoviews.data.images import ImageData
from twoviews.errors import BadInput

digits = cache(sources.digits)


def changed(where: str, value: object) -> ImageData:
    """Digits with another value, which the types that tests check would not let through the constructor."""
    data = copy.copy(digits())
    name, _, field = where.partition(".")
    owner: object = data
    if field:
        owner = copy.copy(getattr(data, name))
        object.__setattr__(data, name, owner)
    object.__setattr__(owner, field or name, value)
    return data


PIXELS, LABELS = digits().train.pixels, digits().train.labels
assert isinstance(PIXELS, torch.Tensor) and LABELS is not None

WRONG = [
    ("train.pixels", PIXELS / 255, "train.pixels is a tensor of float32, and has to be uint8"),
    ("train.pixels", PIXELS.numpy(), "train.pixels is an object of type ndarray"),
    ("train.pixels", PIXELS[:, 0], "train.pixels has the shape [1437, 32, 32], and has to be [N, 1, 32, 32]"),
    ("test.pixels", torch.zeros(360, 32, 32, 1, dtype=torch.uint8), "use pixels.permute(0, 3, 1, 2)"),
    ("train.pixels", PIXELS[..., :24], "resize or pad the images to squares"),
    ("train.pixels", PIXELS[:0], "train has no images"),
    ("size", 28, "has to be [N, 1, 28, 28] by channels and size"),
    ("train.sizes", torch.full((1437,), 32), "train.sizes has the shape [1437] for 1437 images"),
    ("memory.labels", LABELS[:-1], "memory.labels has the shape [1436] for 1437 images; give one label for each"),
    ("train.labels", LABELS + 1, "train.labels has 10, and classes has 10 names; labels count from 0 to 9"),
    ("train.labels", LABELS - 1, "train.labels has -1, and classes has 10 names"),
    ("train.labels", LABELS.float(), "train.labels is a tensor of float32"),
    ("train.labels", LABELS.tolist(), "train.labels is an object of type list"),
    ("test.labels", None, "test has no labels"),
    ("classes", (), "train has labels, and classes is empty"),
    ("memory", None, "it has test images and no memory images"),
    ("train", None, "train is None"),
    ("train", PIXELS, "train is a tensor of uint8, and has to be Images"),
    ("mean", (0.5, 0.5, 0.5), "mean is (0.5, 0.5, 0.5), and has to be a tuple of 1 numbers"),
    ("std", (0.0,), "std is (0.0,), and has to be finite numbers and above 0"),
    ("mean", ("0.5",), "mean is ('0.5',), and has to be finite numbers"),
    ("train.labels", (LABELS + 1).to(torch.uint16), "train.labels has 10, and classes has 10 names"),
    ("train.pixels", Decoded(["a.png"] * 1437, size=64, channels=3, workers=1), "decoded as 3 channels of 64 px"),
    ("train.pixels", Decoded([], size=32, channels=1, workers=1), "train has no images"),
]


@pytest.mark.parametrize(
    ("where", "value", "sentence"), WRONG, ids=[f"{where}-{n}" for n, (where, *_) in enumerate(WRONG)]
)
def test_what_a_training_cannot_use_is_said_in_a_sentence(where, value, sentence, monkeypatch) -> None:
    monkeypatch.setattr(sources, "digits", lambda **_: changed(where, value))
    with pytest.raises(BadInput) as error:
        building.build_data({"_target_": "twoviews.data.sources.digits"})
    assert str(error.value).startswith("twoviews.data.sources.digits: ") and sentence in str(error.value)
    assert len(error.value.messages) == 1


def test_a_function_that_returns_something_else(monkeypatch) -> None:
    monkeypatch.setattr(sources, "digits", lambda **_: None)
    with pytest.raises(BadInput, match="digits: it returned an object of type NoneType, and has to return ImageData"):
        building.build_data({"_target_": "twoviews.data.sources.digits"})


def test_images_without_labels_are_allowed(monkeypatch) -> None:
    data = replace(changed("train.labels", None), memory=None, test=None, classes=())
    monkeypatch.setattr(sources, "digits", lambda **_: data)
    assert building.build_data({"_target_": "twoviews.data.sources.digits"}).train.labels is None
