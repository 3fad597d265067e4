"""What a function of a data set has to return, checked where the data set is loaded."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from twoviews.data.decoding import Decoded
from twoviews.data.images import ImageData, Images
from twoviews.errors import BadInput


def check_image_data(data: Any, function: str) -> None:
    """Whether a training can use these images; takes no copy of them, and looks at labels and sizes only.

    Args:
        data: what the function of a data set returned.
        function: its dotted path.

    Raises:
        BadInput: there is something else than ImageData promises, with the value, the limit and the remedy.
    """
    if wrong := next(_mistakes(data), None):
        raise BadInput(f"{function}: {wrong}.")


def _mistakes(data: Any) -> Iterator[str]:
    """The end of a sentence for each mistake; every one relies on those before it being absent."""
    if not isinstance(data, ImageData):
        yield f"it returned {_kind(data)}, and has to return ImageData"
    for name, values in (("mean", data.mean), ("std", data.std)):
        if not isinstance(values, (tuple, list)) or len(values) != data.channels:
            yield f"{name} is {values}, and has to be a tuple of {data.channels} numbers, one for each of the channels"
        limit = "finite numbers and above 0" if name == "std" else "finite numbers"
        finite = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        if not finite or (name == "std" and min(values) <= 0):
            yield f"{name} is {values}, and has to be {limit}; use statistics(pixels)"
    if data.train is None:
        yield "train is None, and has to hold images"
    if (data.memory is None) != (data.test is None):
        one, other = ("memory", "test") if data.test is None else ("test", "memory")
        yield f"it has {one} images and no {other} images; return both, or None for both"
    for name in ("train", "memory", "test"):
        if (images := getattr(data, name)) is not None:
            if not isinstance(images, Images):
                yield f"{name} is {_kind(images)}, and has to be Images"
            yield from _mistakes_of_pixels(name, images, data)
            yield from _mistakes_of_labels(name, images, data)


def _mistakes_of_pixels(name: str, images: Images, data: ImageData) -> Iterator[str]:
    pixels, expected = images.pixels, f"[N, {data.channels}, {data.size}, {data.size}]"
    if not isinstance(pixels, (Tensor, Decoded)):
        yield f"{name}.pixels is {_kind(pixels)}, and has to be a tensor of uint8 {expected}; use torch.from_numpy or torch.stack"
    if not len(pixels):
        yield f"{name} has no images; return at least one"
    if isinstance(pixels, Decoded):
        if (pixels.channels, pixels.size) != (data.channels, data.size):
            yield (
                f"{name}.pixels are decoded as {pixels.channels} channels of {pixels.size} px, and channels and size are "
                f"{data.channels} and {data.size}; give the same values"
            )
        return
    if pixels.dtype != torch.uint8:
        yield (
            f"{name}.pixels is {_kind(pixels)}, and has to be uint8, 0 to 255; of values in [0, 1], give "
            "(pixels * 255).round().to(torch.uint8)"
        )
    shape = list(pixels.shape)
    if pixels.ndim == 4 and shape[1] != data.channels and shape[3] == data.channels:
        yield f"{name}.pixels has the shape {shape}, and has to be {expected}; use pixels.permute(0, 3, 1, 2)"
    if shape[1:] != [data.channels, data.size, data.size]:
        yield (
            f"{name}.pixels has the shape {shape}, and has to be {expected} by channels and size; "
            "resize or pad the images to squares of that size, or change these"
        )


def _mistakes_of_labels(name: str, images: Images, data: ImageData) -> Iterator[str]:
    count = len(images.pixels)
    if not isinstance(images.sizes, Tensor) or list(images.sizes.shape) != [count, 2]:
        shape = list(getattr(images.sizes, "shape", ()))
        yield (
            f"{name}.sizes has the shape {shape} for {count} images, and has to be [{count}, 2], the height "
            "and width of each original; of images that are not resized, give torch.full((N, 2), size)"
        )
    labels = images.labels
    if labels is None:
        if name != "train":
            yield f"{name} has no labels; give them, or return None for memory and test"
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        yield f"{name}.labels is {_kind(labels)}, and has to be a tensor of whole numbers; use labels.long()"
    if list(labels.shape) != [count]:
        yield f"{name}.labels has the shape {list(labels.shape)} for {count} images; give one label for each image"
    if not data.classes:
        yield f"{name} has labels, and classes is empty; give the classes their names"
    lowest, highest = (int(value) for value in labels.long().aminmax())  # torch has none for uint16
    if lowest < 0 or highest >= len(data.classes):
        wrong = lowest if lowest < 0 else highest
        yield (
            f"{name}.labels has {wrong}, and classes has {len(data.classes)} names; labels count from 0 to "
            f"{len(data.classes) - 1}, and splits without labels have None"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    return f"an object of type {type(value).__name__}"
