"""An encoder that was loaded from a run, a file of weights, torchvision or timm, and how its images are prepared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from twoviews.backbones import Encoder
from twoviews.classifier_file import Head
from twoviews.config.building import build_data
from twoviews.data.images import ImageData, UnlabelledImages
from twoviews.errors import BadInput
from twoviews.foreign import errors_naming
from twoviews.run import Run


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized and normalized for an encoder."""

    channels: int
    image_size: int  # px, side of the central square after resizing
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    statistics_source: str | None = None  # of mean and std, as the user is told; None: encoder.json of the run

    @classmethod
    def of_images(cls, data: ImageData) -> "Preprocessing":
        """The preprocessing that leaves these images as they are: their own size, mean and std."""
        return cls(data.channels, data.size, data.mean, data.std, f"those of {data.name}")

    @classmethod
    def of_description(cls, description: dict[str, Any], statistics_source: str | None = None) -> "Preprocessing":
        """The preprocessing that an encoder.json describes."""
        mean, std = tuple(description["mean"]), tuple(description["std"])
        return cls(description["channels"], description["image_size"], mean, std, statistics_source)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, how its images are prepared, and where it came from."""

    encoder: Encoder
    preprocessing: Preprocessing
    name: str  # in tables and pictures
    folder: Path  # for results: the run's, or one that need not exist yet
    run: Run | None = None  # that it is from, also if one file of the run was named; None: from elsewhere
    notes: tuple[str, ...] = ()  # sentences that the user should read
    head: Head | None = None  # the classifier of its features, of a fine-tuned one

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's configuration; empty without a run."""
        return self.run.config() if self.run else {}

    @cached_property
    def title(self) -> str:
        """Method, data and epochs of the run; without one, the name."""
        return self.run.title() if self.run else self.name

    @property
    def in_run_folder(self) -> bool:
        """Whether results go into the folder of the run, and to MLflow with it."""
        return self.run is not None and self.run.folder == self.folder

    @property
    def config_path(self) -> Path:
        """Where the run's configuration is; without a run there is no such file."""
        return (self.run.folder if self.run else self.folder) / "config.yaml"

    def load_data(self, load_chosen: Callable[[], ImageData] | None = None) -> ImageData:
        """Images as the encoder takes them: what `load_chosen` loads or, without it, those of the run.

        Raises:
            BadInput: they have another number of channels or cannot be loaded, or there is neither a run nor `load_chosen`.
        """
        if load_chosen is not None:
            return self.prepare(load_chosen())
        if self.run is None:
            raise UnknownImages(self.name)
        with errors_naming(self.config_path):
            return self.prepare(build_data(self.config["data"]))

    def check_images(self, load_chosen: Callable[[], ImageData] | None, labelled: bool) -> None:
        """Refuse what `load_data` refuses and, if they are to be `labelled`, images without labels.

        Raises:
            BadInput: the images are not those that are needed.
        """
        data = self.load_data(load_chosen)
        if labelled and data.test is None:
            raise UnlabelledImages(f"{self.name}: {data.name}")

    def prepare(self, data: ImageData) -> ImageData:
        """The same images in the size and with the channel statistics that the encoder takes.

        Raises:
            BadInput: they have another number of channels.
        """
        wanted = self.preprocessing
        if data.channels != wanted.channels:
            raise BadInput(
                f"the encoder {self.name} takes images of {wanted.channels} channel(s), and those of {data.name} have "
                f"{data.channels}; choose others (for picture files, data.channels=1 and 3 are possible)."
            )
        return replace(data, size=wanted.image_size, mean=wanted.mean, std=wanted.std)

    def trained_on(self, data: ImageData) -> bool:
        """Whether these are the images of the run, by the digest of their content; False without a run."""
        return self.run is not None and data.digest == self.run.read("data.json", needed=True)["digest"]


class UnknownImages(BadInput):
    """It is not known what images an encoder takes that is not of a run; `run` is its name."""

    def __init__(self, run: Path | str):
        super().__init__(
            f"{run} is not the folder of a run, so its images are not known; name them: data=cifar10, or data=folder "
            "data.root=<pictures>."
        )
