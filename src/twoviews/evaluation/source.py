"""What `run=` may be: a run, a file of weights, or a network of torchvision or timm; each an encoder and how to feed it."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from twoviews.backbones import Encoder, Timm
from twoviews.config import build, digest, flat
from twoviews.data.images import ImageData
from twoviews.errors import BadInput, nearest, printable
from twoviews.evaluation.names import by_name
from twoviews.randomness import seed_of
from twoviews.run import Run, load_encoder

RESNETS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")  # what files of weights are called
FIRST_BLOCK = "layer1.0.conv1.weight"  # the parameter that a ResNet is found by, whatever stands before its name
FOLLOWERS = re.compile(
    r"encoder_k|key_encoder|momentum|target|teacher|ema|slow"
)  # networks that learn nothing themselves

Statistics = tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """An encoder, and what is needed to feed it and to keep what is found out about it."""

    encoder: Encoder
    name: str  # in tables and pictures
    folder: Path  # where results go; that of a run, or one that need not exist yet
    config: dict[str, Any] | None  # of the run; None: not a run, so that the images are named on the command line
    channels: int  # C of the images
    image_size: int  # px, side of the square that the encoder is fed
    mean: Statistics  # per channel, of pixels in [0, 1]
    std: Statistics
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


def open_source(run: str, data: Callable[[], ImageData] | None = None) -> Source:
    """The encoder that `run=` names.

    Args:
        run: a run folder, "latest", MLflow's id of a run, a file of weights, or "torchvision:<name>" or "timm:<name>",
            with random weights or, with ":pretrained" behind, those that lie on this machine.
        data: loads the images of the command line, called once that much is known to be right; None: there are none.

    Raises:
        BadInput: there is no such thing, it is damaged or could run code, or it is no run and `data` is missing.
    """
    library, colon, name = run.partition(":")
    if colon and library in ("torchvision", "timm"):
        name, _, pretrained = name.partition(":")
        if pretrained not in ("", "pretrained"):
            raise BadInput(
                f"run={run}: what follows the name can only be :pretrained, run={library}:{name}:pretrained."
            )
        return (_torchvision if library == "torchvision" else _timm)(name, bool(pretrained), data)
    path = Path(run).expanduser()
    if path.is_file():
        return _file(path, data)
    if (place := by_name(run)) is not None:
        path = place
    elif not path.exists():
        if path.suffix in WEIGHTS:
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
        **_feeding(opened.read("encoder.json")),
    )


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file of weights by its dotted name, however nested; nothing that is in the file is run.

    Raises:
        BadInput: it is no such file, or holds what could run code.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # about unusual versions of pickle
            content = flat(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of many kinds; nothing in the file can have done more than fail to be read
        if isinstance(error, OSError) and error.errno:
            raise
        found = re.search(r"(?:GLOBAL|global|class) ([\w.]+\.[\w.]+)", str(error))
        what = f"holds {found[1]}, and reading that could run code" if found else "cannot be read as weights alone"
        raise BadInput(
            f"{path} {what}, so it is refused; ask for a file of weights alone, as torch.save(model.state_dict(), …) "
            "or safetensors write it."
        ) from None
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------------------ files of weights


def _file(path: Path, data: Callable[[], ImageData] | None) -> Source:
    """Weights from anywhere; those in a run folder are built as its config.yaml says."""
    if path.suffix == ".safetensors" and path.with_name("encoder.json").exists():
        encoder, description = load_encoder(path)
        _needed(path, data)
        return Source(encoder, **_elsewhere(path), **_feeding(description))
    weights = tensors(path)
    ours = {name: value for name, value in weights.items() if name.startswith("method.encoder.")}
    if ours and path.with_name("config.yaml").exists():
        config = Run.existing(path.parent).config()
        images = data() if data else build(DictConfig(config["data"]))
        encoder = build(DictConfig(config["backbone"]), channels=images.channels, image_size=images.size)
        _fill(encoder, {name.removeprefix("method.encoder."): value for name, value in ours.items()}, path)
        own = {**_elsewhere(path), "config": config}
        return Source(encoder, **own, channels=images.channels, **_like(images))
    own, recipe, channels, notes = _resnet(weights, path)
    images = _needed(path, data)()
    return _network(recipe, channels, images, own, _elsewhere(path), notes)


def _resnet(weights: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Any], int, tuple[str, ...]]:
    """A ResNet with torchvision's names among these weights: its own, how to build it, its channels, and notes."""
    prefixes = [name.removesuffix(FIRST_BLOCK) for name in weights if name.endswith(FIRST_BLOCK)]
    leaders = [prefix for prefix in prefixes if not FOLLOWERS.search(prefix)] or prefixes
    if not leaders:
        raise BadInput(
            f"{path} holds no ResNet with torchvision's names (no {FIRST_BLOCK} among its {len(weights)} tensors); "
            "only those can be recognised without the code that made them."
        )
    if len(leaders) > 1:
        raise BadInput(f"{path} holds {len(leaders)} ResNets ({', '.join(leaders)}); save the one to judge alone.")
    own = {name.removeprefix(leaders[0]): value for name, value in weights.items() if name.startswith(leaders[0])}
    stem = own.get("conv1.weight", torch.empty(0))
    side = stem.shape[-1] if stem.ndim == 4 else 0
    if side not in (3, 7):
        raise BadInput(f"{path}: the ResNet begins with no 3x3 or 7x7 convolution conv1, so its stem is not known.")
    stages, depths = 0, []
    while depth := len({name.split(".")[1] for name in own if name.startswith(f"layer{stages + 1}.")}):
        stages, depths = stages + 1, [*depths, depth]
    recipe = {
        "_target_": "twoviews.backbones.ResNet",
        "block": "bottleneck" if "layer1.0.conv3.weight" in own else "basic",
        "depths": depths,
        "width": stem.shape[0],
        "stem": "imagenet" if side == 7 else "cifar",
    }
    inner = {name: value for name, value in own.items() if re.match(r"(conv1|bn1|layer\d+)\.", name)}
    note = f"{path.name}: ResNet with {'-'.join(map(str, depths))} {recipe['block']} blocks of width {stem.shape[0]}"
    if side == 3:
        return (
            inner,
            recipe,
            stem.shape[1],
            (f"{note}; its conv1 is 3x3, so stride 1 and no max-pool are taken for granted.",),
        )
    return inner, recipe, stem.shape[1], (f"{note} and ImageNet's stem.",)


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


# ------------------------------------------------------------------------------------------------- networks of libraries


def _torchvision(name: str, pretrained: bool, data: Callable[[], ImageData] | None) -> Source:
    from torchvision.models import get_model_weights, list_models

    run = f"torchvision:{name}"
    if name not in RESNETS:
        other = f" It is no ResNet; timm has more networks, run=timm:{name}." if name in list_models() else ""
        raise BadInput(
            f"run={run}: of torchvision the ResNets can be judged: {', '.join(RESNETS)}.{other or nearest(name, RESNETS)}"
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
    weights, _, channels, notes = _resnet(tensors(known[found]), known[found])
    transform = found.transforms()
    facts = {"image_size": transform.crop_size[0], "mean": tuple(transform.mean), "std": tuple(transform.std)}
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
    facts = {"channels": channels, "image_size": size, "mean": tuple(cfg.mean), "std": tuple(cfg.std)}
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


def _elsewhere(origin: Path | str) -> dict[str, Any]:
    """Name, folder and configuration of what is no run."""
    name = folder = re.sub(r"[^\w.-]", "_", str(origin))
    if isinstance(origin, Path):  # many files are called last.pt: the folder's name tells most of them apart
        path = origin.resolve()
        stem = re.sub(rf"({'|'.join(map(re.escape, WEIGHTS))})+$", "", path.name)
        name = re.sub(r"[^\w.-]", "_", "-".join(filter(None, (path.parent.name, stem))))
        folder = f"{name}-{digest({'path': str(path)})}"
    return {"name": name, "folder": Path("outputs") / f"evaluation-{folder}", "config": None}


def _like(images: ImageData) -> dict[str, Any]:
    """Size and statistics of the images themselves."""
    return {"image_size": images.size, "mean": images.mean, "std": images.std}


def _feeding(description: dict[str, Any]) -> dict[str, Any]:
    """How encoder.json says that the encoder is fed."""
    mean, std = tuple(description["mean"]), tuple(description["std"])
    return {"channels": description["channels"], "image_size": description["image_size"], "mean": mean, "std": std}
