"""What `run=` may be: a run, a file of weights, or a network of torchvision or timm; each an encoder and how to feed it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from twoviews.backbones import Encoder, Timm
from twoviews.config.building import build
from twoviews.config.digest import digest
from twoviews.data.images import ImageData
from twoviews.errors import BadInput, nearest, printable
from twoviews.evaluation.names import by_name
from twoviews.evaluation.weights import SUFFIXES, of_run, resnet, split, tensors
from twoviews.foreign import blamed, regular
from twoviews.randomness import seed_of
from twoviews.run import Run, check_finite, load_encoder

RESNETS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
Statistics = tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """An encoder, and what is needed to feed it and to keep what is found out about it."""

    encoder: Encoder
    name: str  # in tables and pictures
    folder: Path  # where results go; that of a run, or one that need not exist yet
    config: dict[str, Any] | None  # of the run; None: not a run, so that the images are named on the command line
    origin: Path | None  # the folder of the run, also where only one of its files was named
    channels: int  # C of the images
    image_size: int  # px, side of the square that the encoder is fed
    mean: Statistics  # per channel, of pixels in [0, 1]
    std: Statistics
    statistics: str | None = None  # where mean and std come from; None: encoder.json of the run, which knows them
    notes: tuple[str, ...] = ()  # sentences that the user should read

    def fed(self, data: ImageData) -> ImageData:
        """The same images in the size and with the channel statistics that the encoder takes.

        Raises:
            BadInput: they have another number of channels.
        """
        if data.channels != self.channels:
            raise BadInput(
                f"the encoder {self.name} takes images of {self.channels} channel(s), and those of {data.name} have "
                f"{data.channels}; choose others (for picture files, data.channels=1 and 3 are possible)."
            )
        return replace(data, size=self.image_size, mean=self.mean, std=self.std)


def open_source(
    run: str,
    data: Callable[[], ImageData] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """The encoder that `run=` names.

    Args:
        run: a run folder, "latest", MLflow's id of a run, a file of weights, or "torchvision:<name>" or "timm:<name>",
            with random weights or, with ":pretrained" behind, those that lie on this machine. Behind a file of several
            encoders, such as a student and its teacher, ":<name>" chooses one.
        data: loads the images of the command line, called once that much is known to be right; None: there are none.
        mean: per channel, of pixels in [0, 1], for an encoder that is not a run's; None: those that belong to its weights,
            or where that is not known those of the images.
        std: as `mean`.

    Raises:
        BadInput: there is no such thing, it is damaged or could run code, or it is no run and `data` is missing; or `mean`
            and `std` are not for it.
    """
    source = _opened(run, data)
    if (mean is None) != (std is None):
        raise BadInput("mean= and std= belong together; give both, one number a channel, or none.")
    if mean is not None and std is not None:
        if source.statistics is None:
            raise BadInput(
                f"mean= and std= are for other encoders; the run {run} knows those that it was trained with."
            )
        if {len(mean), len(std)} != {source.channels}:
            raise BadInput(
                f"mean={list(mean)} and std={list(std)} need {source.channels} number(s) each, as {source.name} takes images "
                f"of {source.channels} channel(s)."
            )
        source = replace(source, mean=tuple(mean), std=tuple(std), statistics="of the command")
    if source.statistics is None:
        return source
    numbers = (f"[{','.join(f'{value:.4g}' for value in values)}]" for values in (source.mean, source.std))
    fed = "images are normalised with mean={} and std={}".format(*numbers)
    return replace(source, notes=(*source.notes, f"{fed}, {source.statistics}; mean= and std= set others."))


def _opened(run: str, data: Callable[[], ImageData] | None) -> Source:
    library, colon, name = run.partition(":")
    if colon and library in ("torchvision", "timm"):
        name, _, pretrained = name.partition(":")
        if pretrained not in ("", "pretrained"):
            raise BadInput(
                f"run={run}: what follows the name can only be :pretrained, run={library}:{name}:pretrained."
            )
        return (_torchvision if library == "torchvision" else _timm)(name, bool(pretrained), data)
    path, chosen = split(run)
    if not path.is_dir():
        regular(path)
    if path.is_file():
        return _file(path, data, chosen)
    if (place := by_name(run)) is not None:
        path = place
    elif not path.exists():
        if path.suffix in SUFFIXES:
            there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
            raise BadInput(f"run={run}: there is no such file.{nearest(path.name, there)}")
        if close := nearest(library, ("torchvision", "timm")) if colon else "":
            raise BadInput(f"run={run}: networks come from torchvision: or timm:.{close}")
    opened = Run.existing(path)
    return Source(
        encoder=opened.encoder(),
        name=printable(path.resolve().name),
        folder=opened.folder,
        config=opened.config(),
        origin=opened.folder,
        **_feeding(opened.read("encoder.json")),
    )


# ------------------------------------------------------------------------------------------------------ files of weights


def _file(path: Path, data: Callable[[], ImageData] | None, chosen: str | None) -> Source:
    """Weights from anywhere; those in a run folder are built as its config.yaml says."""
    if path.suffix == ".safetensors" and path.with_name("encoder.json").exists():
        if chosen is not None:
            raise BadInput(f"run={path}:{chosen}: {path.name} holds one encoder; use run={path}.")
        encoder, description = load_encoder(path)
        _needed(path, data)
        return Source(encoder, **_elsewhere(path), **_feeding(description), statistics="of encoder.json beside it")
    weights = tensors(path)
    if any(name.startswith("method.encoder.") for name in weights) and path.with_name("config.yaml").exists():
        config = Run.existing(path.parent).config()
        with blamed(path.with_name("config.yaml")):
            images = data() if data else build(DictConfig(config["data"]))
            encoder = build(DictConfig(config["backbone"]), channels=images.channels, image_size=images.size)
        own, notes = of_run(weights, list(encoder.state_dict()), path, chosen)
        _fill(encoder, own, path)
        place = {**_elsewhere(path, chosen), "config": config, "origin": path.parent}
        return Source(encoder, **place, channels=images.channels, **_like(images), notes=tuple(notes))
    own, recipe, channels, notes = resnet(weights, path, chosen)
    images = _needed(path, data)()
    return _network(recipe, channels, images, own, _elsewhere(path, chosen), notes)


def _network(
    recipe: dict[str, Any],
    channels: int,
    images: ImageData,
    weights: dict[str, Tensor] | None,
    own: dict[str, Any],
    notes: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
) -> Source:
    """A ResNet that is fed as `facts` say, or like the images: enlarged, where they would shrink to a single pixel."""
    shrinks = {"cifar": 1, "imagenet": 4}[recipe["stem"]] * 2 ** (len(recipe["depths"]) - 1)
    facts = {**_like(images), **(facts or {})}
    if facts["image_size"] <= shrinks:
        notes = (
            *notes,
            f"Images of {facts['image_size']} px are enlarged to {2 * shrinks} px, or one pixel would be left.",
        )
        facts["image_size"] = 2 * shrinks
    encoder = _random(recipe, channels, facts["image_size"])
    if weights is not None:
        _fill(encoder, weights, own["name"])
    return Source(encoder, **own, channels=channels, **facts, notes=notes)


def _fill(encoder: Encoder | torch.nn.Module, weights: dict[str, Tensor], where: Path | str) -> None:
    """Load the weights, each of them and no others.

    Raises:
        BadInput: they are of another network.
    """
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise BadInput(f"{where} is no plain ResNet or not the network it was taken for: {reason[:200]}") from None
    try:
        check_finite(encoder.state_dict())
    except ValueError as error:
        raise BadInput(f"{where}: {error}; take a file of weights from before its training went wrong.") from None


# ------------------------------------------------------------------------------------------------- networks of libraries


def _torchvision(name: str, pretrained: bool, data: Callable[[], ImageData] | None) -> Source:
    from torchvision.models import get_model_weights, list_models

    run = f"torchvision:{name}"
    if name not in RESNETS:
        other = f" It is no ResNet; timm has more networks, run=timm:{name}." if name in list_models() else ""
        raise BadInput(
            f"run={run}: of torchvision the ResNets can be evaluated: {', '.join(RESNETS)}.{other or nearest(name, RESNETS)}"
        )
    block, depths = RESNETS[name]
    recipe = {
        "_target_": "twoviews.backbones.ResNet",
        "block": block,
        "depths": depths,
        "width": 64,
        "stem": "imagenet",
    }
    if not pretrained:
        images = _needed(run, data)()
        return _network(recipe, images.channels, images, None, _elsewhere(f"torchvision-{name}"))
    known = {
        one: _hub() / one.url.rpartition("/")[2] for one in reversed(get_model_weights(name))
    }  # the best ones first
    found = next((one for one, path in known.items() if path.is_file()), None)
    if found is None:
        best, path = next(iter(known.items()))
        raise _absent(run, path, best.url)
    weights, _, channels, notes = resnet(tensors(known[found]), known[found])
    transform = found.transforms()
    facts = {
        "image_size": transform.crop_size[0],
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "statistics": "which belong to these weights",
    }
    images = _needed(run, data)()
    return _network(recipe, channels, images, weights, _elsewhere(f"torchvision-{name}-pretrained"), notes, facts)


def _timm(name: str, pretrained: bool, data: Callable[[], ImageData] | None) -> Source:
    import timm
    from huggingface_hub import try_to_load_from_cache

    run = f"timm:{name}"
    if name not in timm.list_models():
        raise BadInput(f"run={run} is not a model of timm {timm.__version__}.{nearest(name, timm.list_models())}")
    recipe = {"_target_": "twoviews.backbones.Timm", "name": name}
    if not pretrained:
        images = _needed(run, data)()
        encoder = _random(recipe, images.channels, images.size)
        return Source(encoder, **_elsewhere(f"timm-{name}"), channels=images.channels, **_like(images))
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise BadInput(
            f"run={run}:pretrained: timm knows no weights of {name}; leave :pretrained away for random ones."
        )
    path, origin = _hub() / str(cfg.url).rpartition("/")[2], str(cfg.url)
    if cfg.hf_hub_id:
        path = _hub() / f"{cfg.hf_hub_id.rpartition('/')[2]}.safetensors"
        origin = f"model.safetensors of https://huggingface.co/{cfg.hf_hub_id}"
        cached = try_to_load_from_cache(cfg.hf_hub_id, "model.safetensors")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        raise _absent(run, path, origin)
    _needed(run, data)
    channels, size = cfg.input_size[0], cfg.input_size[-1]
    encoder = Timm(channels, size, name)
    weights, wanted = tensors(path), encoder.model.state_dict()
    _fill(encoder.model, {key: value for key, value in weights.items() if key in wanted}, path)
    facts = {
        "channels": channels,
        "image_size": size,
        "mean": tuple(cfg.mean),
        "std": tuple(cfg.std),
        "statistics": "which belong to these weights",
    }
    return Source(encoder, **_elsewhere(f"timm-{name}-pretrained"), **facts)


def _random(recipe: dict[str, Any], channels: int, image_size: int) -> Encoder:
    """A network with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained"))
        return build(DictConfig(recipe), channels=channels, image_size=image_size)


def _hub() -> Path:
    """Where torch keeps weights that were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _absent(run: str, path: Path, origin: str) -> BadInput:
    return BadInput(
        f"run={run}:pretrained takes weights that lie on this machine, and there are none: put {origin} at {path}, or "
        f"leave :pretrained away for random ones."
    )


# ---------------------------------------------------------------------------------------------------------------- shared


def _needed(run: Path | str, data: Callable[[], ImageData] | None) -> Callable[[], ImageData]:
    """`data`, which there must be."""
    if data is None:
        raise BadInput(
            f"run={run} is not the folder of a run, so its images are not known; name them: data=cifar10, or "
            "data=folder data.root=<pictures>."
        )
    return data


def _elsewhere(origin: Path | str, chosen: str | None = None) -> dict[str, Any]:
    """Name, folder and configuration of what is no run; `chosen` is one of several encoders in a file."""
    name = folder = re.sub(r"[^\w.-]", "_", str(origin))
    if isinstance(origin, Path):  # many files are called last.pt: the folder's name tells most of them apart
        path = origin.resolve()
        stem = re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})+$", "", path.name)
        name = re.sub(r"[^\w.-]", "_", "-".join(filter(None, (path.parent.name, stem, chosen))))
        folder = f"{name}-{digest({'path': str(path)})}"
    return {"name": name, "folder": Path("outputs") / f"evaluation-{folder}", "config": None, "origin": None}


def _like(images: ImageData) -> dict[str, Any]:
    """Size and statistics of the images themselves."""
    statistics = f"those of {images.name}"
    return {"image_size": images.size, "mean": images.mean, "std": images.std, "statistics": statistics}


def _feeding(description: dict[str, Any]) -> dict[str, Any]:
    """How encoder.json says that the encoder is fed."""
    mean, std = tuple(description["mean"]), tuple(description["std"])
    return {"channels": description["channels"], "image_size": description["image_size"], "mean": mean, "std": std}
