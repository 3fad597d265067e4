"""Encoders in Python, without Hydra and MLflow.

    import twoviews
    encoder = twoviews.load("outputs/moco-cifar10-1a2b3c4d")
    x = encoder.features("photos")  # [N, F]
    names, probabilities = encoder.classify("photos")  # after evaluate.py with protocol=linear or finetune

Shapes: N images, C channels, S px of a side, F features, K classes.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from twoviews.classifier_file import Head, find_head
from twoviews.console import progress_of
from twoviews.data.images import ImageData, Images
from twoviews.encoders.loaded import LoadedEncoder, Preprocessing, UnknownImages
from twoviews.encoders.opening import open_encoder
from twoviews.encoders.run_names import LATEST
from twoviews.errors import BadInput, counted
from twoviews.features import embed
from twoviews.prepared_images import ImagePreparation, Path, Pictures, picture_files
from twoviews.protocols.distance import distances, far_notes, percentiles

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name: Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> "PretrainedEncoder":
    """An encoder of a run, of a file of weights, of torchvision or of timm.

    Args:
        name: a run folder, its name, "latest", MLflow's id of a run, a file of weights, "torchvision:<name>:pretrained" or
            "timm:<name>:pretrained", as `run=` of evaluate.py. With ":finetune" behind the run it is the encoder that
            protocol=finetune has trained further, with its classifier.
        device: where to compute; "auto" is the GPU if there is one.
        image_size: side of the images in px, for weights that do not say it; such weights are of RGB images.
        mean: per channel, of pixels in [0, 1], for an encoder that is not a run's; None: those that belong to its weights.
        std: as `mean`.

    Raises:
        ValueError: there is no such encoder, it is damaged, or it is not known what images it takes; or there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput('device="cuda", but torch finds no GPU; use device="cpu".')
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    data = None
    if image_size is not None:
        if mean is None or std is None:
            raise BadInput(
                f"image_size={image_size} is for weights that do not say what they take; give mean= and std=, too."
            )
        none = Images(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64), None)
        data = partial(_data, none, Preprocessing(3, image_size, tuple(mean), tuple(std)))
    try:
        loaded = open_encoder(os.fspath(name), data, mean, std)
    except UnknownImages:
        raise BadInput(
            f"{name} does not say what images it takes; give image_size=, mean= and std=, such as image_size=224, "
            "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225) for most networks that were trained on ImageNet."
        ) from None
    name = os.fspath(name)
    if loaded.run and name.partition(":")[0] == LATEST:  # which is another one after the next training
        name = f"{loaded.run.folder}{name.removeprefix(LATEST)}"
    return PretrainedEncoder(loaded, place, name)


def _data(images: Images, prepared: Preprocessing) -> ImageData:
    """Images as a data set, which says how they are prepared."""
    statistics = {
        "channels": prepared.channels,
        "size": prepared.image_size,
        "mean": prepared.mean,
        "std": prepared.std,
    }
    return ImageData("images", images, memory=None, test=None, classes=(), digest="", notes=(), **statistics)


class Predictions(NamedTuple):
    """Classes of images."""

    names: list[str]  # of the most probable class of each image, N
    # [N, K] float32, columns in the order of the encoder's `classes`; an array, or a tensor on the device.
    probabilities: Any


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder with the preparation of images that it was trained with; made by `load`."""

    loaded: LoadedEncoder
    device: torch.device
    name: str  # as it was given to `load`; the folder for "latest"

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()

    def __repr__(self) -> str:
        return (
            f"PretrainedEncoder({self.name!r}: {type(self.model).__name__}, {counted(self.num_features, 'feature')}, images of "
            f"{counted(self.channels, 'channel')} and {self.image_size}x{self.image_size} px, on {self.device})"
        )

    @cached_property
    def _head(self) -> Head | None:
        """The classifier of its features: of the fine-tuning, or of the newest linear evaluation of this encoder."""
        if self.loaded.head is not None:
            return self.loaded.head
        return find_head(self.loaded.folder, self.loaded.encoder, self.image_size, (self.mean, self.std))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that `classify` tells apart; empty without a classifier."""
        return () if self._head is None else self._head.classes

    @property
    def classifier(self) -> nn.Linear | None:
        """The layer [K, F] that makes logits of features; None without a classifier."""
        return None if self._head is None else self._head.linear.to(self.device)

    @property
    def model(self) -> nn.Module:
        """The network in eval mode: normalized images [N, C, S, S] -> [N, F]."""
        return self.loaded.encoder

    @property
    def num_features(self) -> int:
        """Features per image, F."""
        return self.loaded.encoder.out_dim

    @property
    def channels(self) -> int:
        """Channels of the images that the network takes, C."""
        return self.loaded.preprocessing.channels

    @property
    def image_size(self) -> int:
        """Side in px of the images that the network takes, S: each is resized, and its central square is taken."""
        return self.loaded.preprocessing.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixels in [0, 1], per channel, that is subtracted from the images."""
        return self.loaded.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of pixels in [0, 1], per channel, by which the images are divided."""
        return self.loaded.preprocessing.std

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the encoder that a user should read, such as which of several in a file it is."""
        return self.loaded.notes

    def features(
        self,
        images: Pictures,
        *,
        batch_size: int | None = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        progress: bool = True,
        as_tensor: bool = False,
    ) -> Any:
        """Features of images, resized and normalized as in the training.

        Args:
            images: a picture file, a folder (all pictures below it, sorted by path) or a pattern such as "photos/*.jpg"; a
                list of files; a PIL image or a list of them; an array [N, H, W, C] or [N, H, W], a tensor [N, C, H, W], or a
                list of arrays [H, W, C] or tensors [C, H, W] of any sizes; of uint8 or of floats in [0, 1].
            batch_size: images per forward pass; None: 128 on a CPU, 1024 on a GPU.
            precision: number format of the forward pass; the features are in float32.
            progress: show it on standard error.
            as_tensor: return a tensor on the device in place of an array.

        Returns:
            features: [N, F], float32, in the order of the images.

        Raises:
            ValueError: there are no images, one cannot be read, or they have other channels than the encoder; or fp16 is
                asked for on a CPU.
        """
        if precision not in PRECISIONS:
            raise BadInput(f"precision={precision!r} is none of {', '.join(map(repr, PRECISIONS))}.")
        if precision == "fp16" and self.device.type == "cpu":
            raise BadInput('precision="fp16" needs a GPU; use "bf16" or "fp32".')
        if batch_size is not None and batch_size < 1:
            raise BadInput(f"batch_size={batch_size} is out of range: it must be at least 1.")
        count, chunks = ImagePreparation(self.image_size, self.channels).of(images)
        dtype, channels_last = PRECISIONS[precision], self.device.type == "cuda"
        rows = [torch.empty(0, self.num_features, device=self.device)]
        with progress_of("Features", count if progress else 0, "images", at_end=progress) as advance:
            for chunk in chunks:
                data = _data(chunk, self.loaded.preprocessing)
                rows.append(embed(self.model, chunk, data, self.device, dtype, channels_last, batch_size=batch_size))
                if progress:
                    advance(len(chunk))
        x = torch.cat(rows)
        return x if as_tensor else x.cpu().numpy()

    def classify(
        self,
        images: Pictures,
        *,
        batch_size: int | None = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        progress: bool = True,
        as_tensor: bool = False,
    ) -> Predictions:
        """The most probable class of each image, and the probabilities of all classes.

        They come from the classifier of protocol=finetune, if the encoder was loaded with ":finetune", otherwise from the
        newest linear probe (protocol=linear) of this encoder, whichever data set that was of. They are calibrated on images
        that were held out, and hold for images like those; an image of something else gets one of these classes, too. A
        warning says how many images are farther from those that the classifier learnt from than almost all test images.

        Args:
            images: as in `features`, and likewise the others.
            batch_size: images per forward pass.
            precision: number format of the forward pass.
            progress: show it on standard error.
            as_tensor: probabilities as a tensor on the device in place of an array.

        Returns:
            names: [N], of the most probable classes.
            probabilities: [N, K], float32, rows sum to 1; columns in the order of `classes`.

        Raises:
            ValueError: the encoder has no classifier; or as in `features`.
        """
        if (layer := self.classifier) is None:
            data = "" if self.loaded.run else " data=<labelled images>"
            finetune = f' With protocol=finetune, load "{self.name}:finetune" afterwards.' if self.loaded.run else ""
            raise BadInput(
                f"{self.name} has no classifier yet; train one by `python evaluate.py run={self.name}{data} "
                f"protocol=linear`.{finetune}"
            )
        x = self.features(images, batch_size=batch_size, precision=precision, progress=progress, as_tensor=True)
        with torch.no_grad():
            probabilities = layer(x).softmax(1)
        if self._head is not None and self._head.reference is not None:
            bank, test = (tensor.to(x.device) for tensor in self._head.reference)
            for note in far_notes(percentiles(distances(x, bank), test), len(test)):
                warnings.warn(note, stacklevel=2)
        names = [self.classes[number] for number in probabilities.argmax(1).tolist()]
        return Predictions(names, probabilities if as_tensor else probabilities.cpu().numpy())

    def paths(self, images: Path) -> list[str]:
        """The files that `features` reads for a folder or a pattern, in its order."""
        return picture_files(images)

    def to(self, device: str) -> "PretrainedEncoder":
        """The encoder on another device, such as "cpu"."""
        return replace(self, device=torch.device(device))
