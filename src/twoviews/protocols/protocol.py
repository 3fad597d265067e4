"""A protocol evaluates an encoder. train.py records its values and notes; evaluate.py uses the whole result.

`protocol=` is its name on the command line and in conf/. It gets an `EvaluationContext` and returns an `EvaluationResult`.
Shapes: N bank images, M test images, F features, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews import distributed, process_group
from twoviews.backbones import Encoder
from twoviews.classifier_file import Head
from twoviews.config.building import build
from twoviews.config.parameter_names import protocol_keys, qualified_errors, qualify
from twoviews.config.values import plain
from twoviews.console import ROWS
from twoviews.data.images import ImageData, Images, UnlabelledImages
from twoviews.errors import BadInput, mistakes, refuse_former_names
from twoviews.features import Features, embed

if TYPE_CHECKING:
    from omegaconf import DictConfig

TableRow = dict[str, float | int | str]


@dataclass(eq=False)
class EvaluationContext:
    """An encoder, the images it is evaluated on, and how to compute; features are computed when first asked for.

    Args:
        encoder: in train or eval mode; protocols leave the mode as it is.
        data: images in the size and with the channel statistics that the encoder takes.
        device: where to compute.
        dtype: number format of the forward pass.
        channels_last: memory format of the images.
        folder: where protocols put their files; None: they write none.
        shared: all processes compute the features together, so all must ask for them; otherwise each computes alone.
        head: a classifier of the features that belongs to the encoder, as to a fine-tuned one.
        title: what is evaluated, for the titles of pictures.
    """

    encoder: Encoder
    data: ImageData
    device: torch.device
    dtype: torch.dtype
    channels_last: bool = False
    folder: Path | None = None
    shared: bool = False
    head: Head | None = None
    title: str = "encoder"

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the images, as torch calls it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @cached_property
    def memory(self) -> Features:
        """Features and classes of the memory images: kNN votes with them, and linear classifiers learn from them."""
        return self._labelled_features(self.data.memory)

    @cached_property
    def test(self) -> Features:
        """Features and classes of the test images."""
        return self._labelled_features(self.data.test)

    def embed(self, images: Images, shared: bool = False) -> Float[Tensor, "N F"]:
        """Features of images that have the size of `data`, as `twoviews.features.embed` computes them.

        They are computed by this process alone, whatever the context's `shared`, unless `shared` is set here.
        """
        title = f"features of {self.data.name}"
        return embed(self.encoder, images, self.data, self.device, self.dtype, self.channels_last, shared, title=title)

    def images(self, split: str) -> Images:
        """The images of a split: train, memory or test.

        Raises:
            BadInput: the data have no such split.
        """
        images = getattr(self.data, split)
        if images is None:
            raise BadInput(f"{self.data.name} has no labelled images, so no {split} images; use split=train.")
        return images

    def split(self, name: str) -> tuple[Images, Float[Tensor, "N F"]]:
        """The images of a split and their features; those of memory and test are computed once.

        Raises:
            BadInput: the data have no such split.
        """
        images = self.images(name)
        for labelled in ("memory", "test"):
            if images is getattr(self.data, labelled):
                return images, getattr(self, labelled).x
        return images, self.embed(images)

    def _labelled_features(self, images: Images | None) -> Features:
        if images is None or images.labels is None:
            raise UnlabelledImages(self.data.name)
        return Features(self.embed(images, self.shared), images.labels.to(self.device).long())


@dataclass(frozen=True)
class EvaluationResult:
    """What a protocol measured, and what it shows beside the numbers."""

    values: dict[str, float]  # by name, accuracies in percent; the one named top1 is the headline
    probabilities: Float[Tensor, "M C"] | None = None  # of the test images, in their order; None: it classifies none
    # Rows with equal keys, by the name of the table. evaluate.py writes <protocol>_<table>.csv, or <table>.csv if the name
    # of the table begins with the protocol's.
    tables: dict[str, list[TableRow]] = field(default_factory=dict)
    rows_shown: int = ROWS  # of each table by evaluate.py; the file has all
    notes: list[str] = field(default_factory=list)  # sentences that the user should read beside the numbers
    advice: str = ""  # what is wrong with the encoder by these numbers, and what to do; shown below them


class Protocol:
    """Abstract: evaluates an encoder.

    Args:
        every_epochs: how often it is run in training; 0 is at the end only.
    """

    every_epochs: int
    needs_labels: bool = True  # whether the images must be labelled; a training without labels leaves it out
    on_all_processes: bool = False  # True: every process runs it; False: only the first

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_former_names(cls, {"together": "on_all_processes"})

    def notes(self, data: ImageData) -> list[str]:
        """Sentences that the user should read before these images are evaluated."""
        return []

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that evaluate.py takes from the configuration of the run, such as those of its linear probe."""
        return {}

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Evaluate the encoder, which is left as it was."""
        raise NotImplementedError


class NamedProtocol(Protocol):
    """A protocol of a configuration, whose messages name parameters as they are typed there, as protocol.finetune.lr=0.1.

    Args:
        name: of the protocol.
        node: its configuration.

    Raises:
        BadInput: as `build`.
    """

    def __init__(self, name: str, node: "DictConfig | dict[str, Any]"):
        self._keys = protocol_keys(name, plain(node)) if isinstance(node, Mapping) else {}
        with qualified_errors(keys=self._keys):
            self.protocol: Protocol = build(node, _key_=f"protocol.{name}")
        self.every_epochs, self.needs_labels = self.protocol.every_epochs, self.protocol.needs_labels
        self.on_all_processes = self.protocol.on_all_processes

    def notes(self, data: ImageData) -> list[str]:
        """Sentences that the user should read before these images are evaluated, with parameters as they are typed."""
        return [qualify(note, keys=self._keys) for note in self.protocol.notes(data)]

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of this protocol that evaluate.py takes from the configuration of the run, by parameter."""
        return self.protocol.settings_from_run(config)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Evaluate the encoder by the protocol.

        Raises:
            BadInput: as the protocol does, or it returned something else than its result.
        """
        with qualified_errors(keys=self._keys):
            result = self.protocol(context)
        if not isinstance(result, EvaluationResult):
            name = f"{type(self.protocol).__module__}.{type(self.protocol).__name__}"
            raise BadInput(
                f"{name} returned {type(result).__name__}, and a protocol returns EvaluationResult(values, …) of "
                "twoviews.protocols.protocol."
            )
        return replace(result, notes=[qualify(note, keys=self._keys) for note in result.notes])


def named_protocols(nodes: Mapping[Any, Any]) -> dict[str, NamedProtocol]:
    """The protocols of a configuration by name.

    Raises:
        BadInput: as `NamedProtocol`, with the mistakes of all of them.
    """
    protocols: dict[str, NamedProtocol] = {}

    def add(name: str, node: Any) -> None:
        protocols[name] = NamedProtocol(name, node)

    if problems := mistakes(*(partial(add, str(name), node) for name, node in nodes.items())):
        raise BadInput(*problems)
    return protocols


def run_protocols(protocols: Mapping[str, Protocol], context: EvaluationContext) -> dict[str, EvaluationResult]:
    """The result of each protocol on process 0; the other processes help to compute features and get an empty dictionary.

    Protocols of the first process alone come last, and from then on the context is no longer `shared`.
    """
    if any(protocol.needs_labels for protocol in protocols.values()):
        _ = context.memory, context.test  # by all processes, where they are shared
    results = {name: protocol(context) for name, protocol in protocols.items() if protocol.on_all_processes}
    if distributed.rank() == 0:
        context.shared = False  # the other processes do not take part in what follows
        results |= {name: protocol(context) for name, protocol in protocols.items() if not protocol.on_all_processes}
    process_group.wait_for_first()
    return results if distributed.rank() == 0 else {}
