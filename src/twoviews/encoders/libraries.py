"""Encoders of torchvision and timm, with random weights or those that are on this machine; nothing is downloaded."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from twoviews.backbones import Encoder, Timm
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder, Preprocessing, UnknownImages
from twoviews.encoders.weight_files import RESNETS, fill, random_network, read_tensors, resnet_network, resnet_weights
from twoviews.errors import BadInput, nearest

OF_WEIGHTS = "which belong to these weights"
Opened = tuple[Encoder, Preprocessing, list[str]]  # how its images are prepared, and notes for the user


def open_library(
    library: str, name: str, pretrained: bool, load_chosen: Callable[[], ImageData] | None
) -> LoadedEncoder:
    """A ResNet of torchvision, or a network of timm.

    Args:
        library: "torchvision" or "timm".
        name: theirs, such as resnet18 or vit_tiny_patch16_224.
        pretrained: with the best weights that are in the cache of torch or Hugging Face; False: with random ones.
        load_chosen: loads the images that random weights are for.

    Raises:
        BadInput: there is no such network, its weights are not in the cache, or images are needed and missing.
    """
    run, title = f"{library}:{name}", re.sub(r"[^\w.-]", "_", f"{library}-{name}{'-pretrained' if pretrained else ''}")

    def of_images() -> Preprocessing:
        if load_chosen is None:
            raise UnknownImages(run)
        return Preprocessing.of_images(load_chosen())

    open_one = _open_torchvision if library == "torchvision" else _open_timm
    encoder, preprocessing, notes = open_one(name, run, None if pretrained else of_images)
    return LoadedEncoder(encoder, preprocessing, title, Path("outputs") / f"evaluation-{title}", notes=tuple(notes))


def _open_torchvision(name: str, run: str, random_for: Callable[[], Preprocessing] | None) -> Opened:
    """A network, how its images are prepared, and notes; with random weights for such images, or pretrained."""
    from torchvision.models import get_model_weights, list_models

    if name not in RESNETS:
        other = f" It is no ResNet; timm has more networks, run=timm:{name}." if name in list_models() else ""
        raise BadInput(
            f"run={run}: of torchvision the ResNets can be evaluated: {', '.join(RESNETS)}."
            f"{other or nearest(name, RESNETS)}"
        )
    recipe = {"_target_": "twoviews.backbones.ResNet", "width": 64, "stem": "imagenet"}
    recipe |= dict(zip(("block", "depths"), RESNETS[name], strict=True))
    if random_for is not None:
        return resnet_network(recipe, random_for(), None, run)
    paths = {weights: _cache() / weights.url.rpartition("/")[2] for weights in reversed(get_model_weights(name))}
    best = next(iter(paths))
    cached = next((weights for weights, path in paths.items() if path.is_file()), None)
    if cached is None:
        raise _not_cached(run, paths[best], best.url)
    weights, _, channels, notes = resnet_weights(read_tensors(paths[cached]), paths[cached])
    transform = cached.transforms()
    mean, std = tuple(transform.mean), tuple(transform.std)
    preprocessing = Preprocessing(channels, transform.crop_size[0], mean, std, OF_WEIGHTS)
    encoder, preprocessing, more = resnet_network(recipe, preprocessing, weights, run)
    return encoder, preprocessing, [*notes, *more]


def _open_timm(name: str, run: str, random_for: Callable[[], Preprocessing] | None) -> Opened:
    """As `_open_torchvision`."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if name not in timm.list_models():
        raise BadInput(f"run={run} is not a model of timm {timm.__version__}.{nearest(name, timm.list_models())}")
    if random_for is not None:
        recipe, preprocessing = {"_target_": "twoviews.backbones.Timm", "name": name}, random_for()
        return random_network(recipe, preprocessing.channels, preprocessing.image_size), preprocessing, []
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise BadInput(
            f"run={run}:pretrained: timm knows no weights of {name}; leave :pretrained away for random ones."
        )
    path, origin = _cache() / str(cfg.url).rpartition("/")[2], str(cfg.url)
    if cfg.hf_hub_id:
        path = _cache() / f"{cfg.hf_hub_id.rpartition('/')[2]}.safetensors"
        origin = f"model.safetensors of https://huggingface.co/{cfg.hf_hub_id}"
        cached = try_to_load_from_cache(cfg.hf_hub_id, "model.safetensors")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        raise _not_cached(run, path, origin)
    channels, size = cfg.input_size[0], cfg.input_size[-1]
    encoder = Timm(channels, size, name)
    weights, wanted = read_tensors(path), encoder.model.state_dict()
    fill(encoder.model, {key: value for key, value in weights.items() if key in wanted}, path)
    return encoder, Preprocessing(channels, size, tuple(cfg.mean), tuple(cfg.std), OF_WEIGHTS), []


def _cache() -> Path:
    """Where torch keeps weights that were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _not_cached(run: str, path: Path, origin: str) -> BadInput:
    return BadInput(
        f"run={run}:pretrained takes weights that lie on this machine, and there are none: put {origin} at {path}, or "
        f"leave :pretrained away for random ones."
    )
