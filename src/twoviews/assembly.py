"""From a checked configuration to the parts of a run, checked against each other."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from twoviews import distributed, process_group
from twoviews.backbones import Encoder
from twoviews.batch_norms import BatchNorm, sync_batch_norms
from twoviews.clusters.kmeans import Clustered
from twoviews.clusters.scores import clustering_scores
from twoviews.code import code_state
from twoviews.config.building import build, build_data
from twoviews.config.parameter_names import qualified_errors, qualify
from twoviews.data.images import ImageData, Images
from twoviews.data.loader import Loader, SmallViews
from twoviews.data.views import Views
from twoviews.encoder_file import describe_backbone
from twoviews.errors import BadInput, mistakes
from twoviews.features import embed
from twoviews.memory import check_networks, check_views
from twoviews.methods.method import Method
from twoviews.protocols.protocol import EvaluationContext, named_protocols
from twoviews.randomness import seed_of
from twoviews.ranges import Repeats, Size
from twoviews.runtime import Runtime
from twoviews.signatures import signature
from twoviews.tracking import uris
from twoviews.unseen_pixels import unseen_pixels_note


@dataclass
class Parts:
    """Everything a training is made of, built and checked against each other."""

    runtime: Runtime
    device: torch.device
    data: ImageData
    views: Views
    method: Method
    loader: Loader
    optimizer: torch.optim.Optimizer
    schedule: Any
    protocols: dict[str, Any]
    notes: list[str]  # what the method and the protocols say about their fit to the data

    def evaluation_context(self, encoder: Encoder) -> EvaluationContext:
        """An encoder with the labelled images of the data, whose features all processes compute together."""
        dtype = self.runtime.dtype(self.device)
        return EvaluationContext(encoder, self.data, self.device, dtype, self.runtime.channels_last, shared=True)

    def embed(self, module: nn.Module) -> Float[Tensor, "N F"]:
        """Outputs of a module for all training images, at the size of the views, as PCL's code does with its 224 px."""
        dtype, data = self.runtime.dtype(self.device), replace(self.data, size=max(self.views.sizes))
        title = f"features of {data.name} for the E-step"
        return embed(module, data.train, data, self.device, dtype, self.runtime.channels_last, True, title=title)

    def score_clusters(self, clustered: Clustered) -> dict[str, float]:
        """How clusterings of the training images agree with their labels and with the epoch before."""
        labels, index, scores = self.data.train.labels, clustered.index, {}
        if labels is not None and index is not None:
            labels = labels[index.to(labels.device)]
        for name, clusters in clustered.clusters.items():
            previous = clustered.previous.get(name)
            values = clustering_scores(clustered.x, clusters, labels=labels, previous=previous, seed=self.loader.seed)
            scores.update({f"e_step/{name}/{key}": value for key, value in values.items()})
        return scores


def check_without_data(cfg: DictConfig, runtime: Runtime, device: torch.device) -> None:
    """Build what needs no images, so that mistakes in it are said together and before any image is decoded.

    Raises:
        BadInput: with all of them.
    """
    groups = [{"params": [nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))]}]
    any_images = {"size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}  # any will do
    problems = mistakes(
        lambda: runtime.dtype(device),
        lambda: check_batch(cfg, runtime),
        lambda: build(cfg.optimizer, batch_size=cfg.batch_size, param_groups=groups),
        lambda: build(cfg.schedule),
        lambda: build(cfg.augmentation, **any_images),
        lambda: uris.resolve(build(cfg.tracking).uri),
        lambda: named_protocols(cfg.get("protocol") or {}),
        *([lambda: build(cfg.data)] if "root" in cfg.data and cfg.data.root is None else []),
    )
    if problems:
        raise BadInput(*problems)


def load_data(cfg: DictConfig) -> ImageData:
    """The data set of a configuration; with several processes one prepares it and the others wait."""
    if distributed.rank() > 0:
        process_group.wait_for_first()
    data = build_data(cfg.data)
    if distributed.rank() == 0:
        process_group.wait_for_first()
    return data


def make_views(cfg: DictConfig, data: ImageData) -> Views:
    """The augmentation of a configuration for these images."""
    return build(cfg.augmentation, size=data.size, channels=data.channels, mean=data.mean, std=data.std)


def make_parts(cfg: DictConfig, data: ImageData, views: Views, runtime: Runtime, device: torch.device) -> Parts:
    """Build loader, method, optimizer, schedule and protocols, and check that they fit together.

    Raises:
        BadInput: they do not, with the value to change.
    """
    runtime.configure(device)
    label_arguments: dict[str, Any] = {}
    if "labels" in signature(cfg.method._target_):
        if data.train.labels is None:
            raise BadInput(
                f"this method learns from labels, and the training images of {data.name} have none; choose another method."
            )
        label_arguments = {"labels": data.train.labels, "classes": len(data.classes)}
    loader = _loader(cfg, data.train, views, runtime, device)
    check_batch(cfg, runtime)
    check_networks(lambda: _method(cfg, data, len(views), label_arguments, _encoder(cfg, data))[0], device, _sizes(cfg))
    check_views(views, cfg.batch_size // distributed.processes(), data.channels, device)
    torch.manual_seed(seed_of(cfg.seed, "initialisation"))
    encoder = _encoder(cfg, data)
    sizes = {data.size, *views.sizes, *(views.scaled_sizes(loader.small_scale) if loader.small_epochs else ())}
    unseen = [note for size in sorted(sizes) if (note := unseen_pixels_note(encoder, data.channels, size))]
    method, notes = _method(cfg, data, len(views), label_arguments, encoder)
    notes += _micro_batch_notes(method, cfg.batch_size, cfg.batch_size // runtime.accumulate)
    if distributed.processes() > 1:
        sync_batch_norms(method, device)
    method.to(device, memory_format=torch.channels_last if runtime.channels_last else torch.contiguous_format)
    protocols = named_protocols(cfg.get("protocol") or {})
    protocols = {name: protocol for name, protocol in protocols.items() if data.test or not protocol.needs_labels}
    optimizer = build(cfg.optimizer, batch_size=cfg.batch_size, param_groups=method.param_groups())
    return Parts(
        runtime=runtime,
        device=device,
        data=data,
        views=views,
        method=method,
        loader=loader,
        optimizer=optimizer,
        schedule=build(cfg.schedule),
        protocols=protocols,
        notes=[
            *(qualify(note, "backbone") for note in unseen),
            *notes,
            *(note for protocol in protocols.values() for note in protocol.notes(data)),
        ],
    )


def _loader(cfg: DictConfig, images: Images, views: Views, runtime: Runtime, device: torch.device) -> Loader:
    small = SmallViews(**cfg.get("small_views", {}))
    return Loader(
        images,
        views,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        device=device,
        rank=distributed.rank(),
        processes=distributed.processes(),
        # What autocast and the first convolution would make of them; CPUs do so themselves.
        dtype=runtime.dtype(device) if device.type == "cuda" else torch.float32,
        channels_last=runtime.channels_last and device.type == "cuda",
        small_epochs=math.ceil(small.share * cfg.epochs - 1e-9),  # 0.07 * 100 is 7.000000000000001
        small_scale=small.scale,
    )


def _micro_batch_notes(method: Method, batch_size: int, micro_batch: int) -> list[str]:
    """A note on what is computed per micro-batch instead of per batch; none if nothing is."""
    norms = any(isinstance(part, BatchNorm) for part in method.modules())
    parts = [part for part in (method.batch_dependence, "batch-norm statistics" if norms else None) if part]
    if micro_batch == batch_size or not parts:
        return []
    return [
        f"runtime.accumulate={batch_size // micro_batch}: {' and '.join(parts)} come from the {micro_batch} images of a "
        f"micro-batch, not from all {batch_size} of a step."
    ]


def check_batch(cfg: DictConfig, runtime: Runtime) -> None:
    """Check that a batch can be cut into micro-batches of which batch norm can take statistics.

    Raises:
        BadInput: it cannot.
    """
    parts = runtime.accumulate * distributed.processes()
    if cfg.batch_size % parts:
        raise BadInput(
            f"batch_size={cfg.batch_size} does not divide into runtime.accumulate={runtime.accumulate} micro-batches on "
            f"{distributed.processes()} process(es); use a multiple of {parts}."
        )
    if cfg.batch_size // runtime.accumulate < 2:
        raise BadInput(
            f"a batch of {cfg.batch_size // runtime.accumulate} image has no statistics for batch norm; use "
            f"batch_size={2 * runtime.accumulate} or more."
        )


def _encoder(cfg: DictConfig, data: ImageData) -> Encoder:
    return build(cfg.backbone, channels=data.channels, image_size=data.size)


def _method(
    cfg: DictConfig, data: ImageData, views: int, label_arguments: dict[str, Any], encoder: Encoder
) -> tuple[Any, list[str]]:
    """The method around its encoder, prepared for the data, and its sentences for the user."""
    method = build(cfg.method, encoder=encoder, **label_arguments)
    if method.views not in (None, views):
        raise BadInput(
            f"this method takes {method.views} views of an image and the augmentation makes {views}; "
            "choose another with augmentation=."
        )
    micro_batch = cfg.batch_size // cfg.runtime.accumulate
    with qualified_errors("method"):
        notes = method.prepare(cfg.batch_size, micro_batch, len(data.train), distributed.processes())
    return method, [qualify(note, "method") for note in notes]


def _sizes(cfg: DictConfig) -> str:
    """The values of backbone and method that memory is needed for, the largest first."""
    sizes: dict[str, int] = {}
    for group in ("backbone", "method"):
        parameters = signature(cfg[group]._target_)
        sizes |= {
            f"{group}.{key}": value
            for key, value in cfg[group].items()
            if isinstance(value, int) and parameters[key].annotation in (Size, Repeats)
        }
    return ", ".join(f"{key}={sizes[key]}" for key in sorted(sizes, key=sizes.__getitem__, reverse=True)[:3])


def describe_encoder(cfg: DictConfig, data: ImageData) -> dict[str, Any]:
    """What encoder.json says beside the weights: how to build the network and how to feed it."""
    backbone = OmegaConf.to_container(cfg.backbone, resolve=True)
    return {**describe_backbone(backbone, data), "commit": code_state()[0]}


def describe_data(data: ImageData) -> dict[str, Any]:
    """What data.json says: which images, and how many of each split."""
    counts = {name: len(split) for name in ("train", "memory", "test") if (split := getattr(data, name))}
    return {
        "name": data.name,
        "digest": data.digest,
        "images": counts,
        "classes": list(data.classes),
        "notes": list(data.notes),
    }
