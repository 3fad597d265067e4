"""Encoders in Python, without Hydra and MLflow.

    import twoviews
    encoder = twoviews.load("outputs/moco-cifar10-1a2b3c4d")
    x = encoder.features("photos")  # [N, F]

Shapes: N images, C channels, S px of a side, F features.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.console import progress_of
from twoviews.data.decoding import CHUNK_SIZE, Decoded, cores
from twoviews.data.images import ImageData, Images
from twoviews.data.picture_files import canvas
from twoviews.data.store import Chunk
from twoviews.encoders.loaded import LoadedEncoder, UnknownImages
from twoviews.encoders.opening import open_encoder
from twoviews.errors import BadInput
from twoviews.features import embed
from twoviews.protocols.user_images import MAX_SEQUENTIAL, image_paths

if TYPE_CHECKING:
    from PIL.Image import Image

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK_BYTES = 2**27  # of pixels that are prepared and encoded at a time

Path = Union[str, "os.PathLike[str]"]
Pictures = Union[
    Path, Sequence[Path], "Image", Sequence["Image"], np.ndarray, Tensor, Sequence[np.ndarray], Sequence[Tensor]
]


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
            "timm:<name>:pretrained", as `run=` of evaluate.py.
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
        data = partial(
            _data, Images(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64), None)
        )
        data = partial(data, channels=3, size=image_size, mean=tuple(mean), std=tuple(std))
    try:
        loaded = open_encoder(os.fspath(name), data, mean, std)
    except UnknownImages:
        raise BadInput(
            f"{name} does not say what images it takes; give image_size=, mean= and std=, such as image_size=224, "
            "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225) for most networks that were trained on ImageNet."
        ) from None
    return PretrainedEncoder(loaded, place)


def _data(images: Images, channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageData:
    """Images as a data set, which says how they are prepared."""
    facts = {"memory": None, "test": None, "classes": (), "digest": "", "notes": ()}
    return ImageData(name="images", train=images, channels=channels, size=size, mean=mean, std=std, **facts)


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder with the preparation of images that it was trained with; made by `load`."""

    loaded: LoadedEncoder
    device: torch.device

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()

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
        count, chunks = self._prepared(images)
        rows = [torch.empty(0, self.num_features, device=self.device)]
        with progress_of("Features", count if progress else 0, "images", at_end=progress) as advance:
            for chunk in chunks:
                rows.append(self._embedded(chunk, PRECISIONS[precision], batch_size))
                if progress:
                    advance(len(chunk))
        x = torch.cat(rows)
        return x if as_tensor else x.cpu().numpy()

    def paths(self, images: Path) -> list[str]:
        """The files that `features` reads for a folder or a pattern, in its order."""
        return image_paths(os.fspath(images))

    def _embedded(self, images: Images, dtype: torch.dtype, batch_size: int | None) -> Float[Tensor, "n F"]:
        wanted = self.loaded.preprocessing
        data = _data(images, wanted.channels, wanted.image_size, wanted.mean, wanted.std)
        return embed(
            self.loaded.encoder, images, data, self.device, dtype, self.device.type == "cuda", batch_size=batch_size
        )

    def _prepared(self, images: Pictures) -> tuple[int, Iterator[Images]]:
        """How many images there are, and some of them at a time as canvases of the encoder's size."""
        if isinstance(images, (str, os.PathLike)):
            return self._of_files(self.paths(images))
        if isinstance(images, np.ndarray):
            return self._of_array(images)
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise BadInput(
                    f"a tensor of shape {tuple(images.shape)} is not [N, C, H, W]; one image is tensor[None]."
                )
            return self._of_array(images.detach().movedim(1, -1).cpu().numpy())
        pictures: list[Any] = (
            [images] if hasattr(images, "getexif") or not isinstance(images, Sequence) else list(images)
        )
        if not pictures:
            raise BadInput("there are no images: the list is empty.")
        if all(isinstance(picture, (np.ndarray, Tensor)) for picture in pictures):
            return self._of_arrays(pictures)
        if all(isinstance(picture, (str, os.PathLike)) for picture in pictures):
            return self._of_files([os.fspath(picture) for picture in pictures])  # type: ignore[arg-type]
        if all(hasattr(picture, "getexif") for picture in pictures):
            return len(pictures), self._of_pil(pictures)
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise BadInput(
            f"images of type {', '.join(kinds)} are not understood; give files, PIL images, an array [N, H, W, C] or a tensor "
            "[N, C, H, W]."
        )

    def _of_files(self, paths: list[str]) -> tuple[int, Iterator[Images]]:
        workers = 0 if len(paths) <= MAX_SEQUENTIAL else cores()
        files = Decoded(paths, size=self.image_size, channels=self._picture_channels(), workers=workers)

        def chunks() -> Iterator[Images]:
            waiting: list[Chunk] = []
            for chunk in files.read(torch.arange(len(paths)).split(CHUNK_SIZE)):
                for number, reason in chunk.broken:
                    raise BadInput(f"{paths[number]} cannot be decoded ({reason}); leave it out.")
                waiting.append(chunk)
                if len(waiting) * CHUNK_SIZE >= self._at_a_time or chunk.rows[-1] + 1 == len(paths):
                    yield Images(
                        torch.cat([each.pixels for each in waiting]), torch.cat([each.sizes for each in waiting]), None
                    )
                    waiting.clear()

        return len(paths), chunks()

    def _of_pil(self, pictures: Sequence[Any]) -> Iterator[Images]:
        channels = self._picture_channels()
        for start in range(0, len(pictures), self._at_a_time):
            made = [canvas(picture, self.image_size, channels) for picture in pictures[start : start + self._at_a_time]]
            pixels = torch.from_numpy(np.stack([pixels for pixels, _ in made]))
            yield Images(pixels, torch.tensor([size for _, size in made]), None)

    def _of_arrays(self, arrays: Sequence[np.ndarray | Tensor]) -> tuple[int, Iterator[Images]]:
        """Of one image each, which may have sizes of their own: arrays [H, W, C] or [H, W], tensors [C, H, W]."""
        batches = []
        for array in arrays:
            image = array if isinstance(array, np.ndarray) else array.detach().movedim(0, -1).cpu().numpy()
            batches.append(image[None] if image.ndim == 3 else image[None, ..., None])
        groups = [
            np.concatenate([*group]) for _, group in groupby(batches, key=lambda batch: (batch.shape, batch.dtype))
        ]
        return len(arrays), chain.from_iterable([self._of_array(group)[1] for group in groups])

    def _of_array(self, array: np.ndarray) -> tuple[int, Iterator[Images]]:
        given, array = array, array[..., None] if array.ndim == 3 else array
        if array.ndim != 4 or array.shape[-1] != self.channels:
            remedy = ""
            if given.ndim == 3 and given.shape[-1] == self.channels:
                remedy = "; one image is array[None]"
            elif given.ndim == 4 and given.shape[1] == self.channels:
                remedy = "; np.moveaxis(array, 1, -1) brings the channels to the end"
            raise BadInput(
                f"an array of shape {given.shape} is not [N, H, W, {self.channels}], which the encoder takes{remedy}."
            )
        if array.dtype != np.uint8:
            if array.dtype.kind != "f":
                raise BadInput(f"images of type {array.dtype} are not understood; give uint8, or floats in [0, 1].")
            if array.size and not (array.min() >= 0 and array.max() <= 1):  # also NaN
                raise BadInput(
                    f"float images have values {array.min():g} to {array.max():g}; give them in [0, 1], not normalized."
                )

        def chunks() -> Iterator[Images]:
            for start in range(0, len(array), self._at_a_time):
                part = array[start : start + self._at_a_time]
                if part.dtype != np.uint8:
                    part = np.round(part * 255).astype(np.uint8)
                pixels = torch.from_numpy(
                    np.array(np.moveaxis(part, -1, 1), order="C")
                )  # a copy, as it may be read-only
                sizes = torch.tensor([[*part.shape[1:3]]] * len(part))
                if not part.shape[1] == part.shape[2] == self.image_size:  # as data=array
                    side = (self.image_size, self.image_size)
                    resized = nnf.interpolate(pixels.float(), side, mode="bicubic", antialias=True)
                    pixels = resized.round().clamp(0, 255).to(torch.uint8)
                yield Images(pixels, sizes, None)

        return len(array), chunks()

    @property
    def _at_a_time(self) -> int:
        """Images that are prepared at a time."""
        return max(CHUNK_SIZE, CHUNK_BYTES // (self.channels * self.image_size**2))

    def _picture_channels(self) -> int:
        if self.channels not in (1, 3):
            raise BadInput(f"the encoder takes {self.channels} channels, and pictures have 1 or 3; give an array.")
        return self.channels

    def to(self, device: str) -> "PretrainedEncoder":
        """The encoder on another device, such as "cpu"."""
        return replace(self, device=torch.device(device))
