"""Encoders of torchvision and timm, with random weights or those that are on this machine; nothing is downloaded."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from twoviews.backbones import Timm
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder, Preprocessing, UnknownImages
from twoviews.encoders.networks import RESNETS, fill, random_network, resnet_network
from twoviews.encoders.weight_files import read_tensors, resnet_weights
from twoviews.errors import BadInput, nearest

OF_WEIGHTS = "which belong to these weights"


def open_torchvision(name: str, pretrained: bool, data: Callable[[], ImageData] | None) -> LoadedEncoder:
    """A ResNet of torchvision.

    Args:
        name: torchvision's, such as resnet18.
        pretrained: with the best weights of torchvision that are in torch's cache; False: with random ones.
        data: loads the images that random weights are for.

    Raises:
        BadInput: there is no such ResNet, its weights are not in the cache, or images are needed and missing.
    """
    from torchvision.models import get_model_weights, list_models

    run = f"torchvision:{name}"
    if name not in RESNETS:
        other = f" It is no ResNet; timm has more networks, run=timm:{name}." if name in list_models() else ""
        raise BadInput(
            f"run={run}: of torchvision the ResNets can be evaluated: {', '.join(RESNETS)}."
            f"{other or nearest(name, RESNETS)}"
        )
    block, depths = RESNETS[name]
    recipe = {
        "_target_": "twoviews.backbones.ResNet",
        "block": block,
        "depths": depths,
        "width": 64,
        "stem": "imagenet",
    }
    title = f"torchvision-{name}{'-pretrained' if pretrained else ''}"
    if not pretrained:
        network = resnet_network(recipe, _of_images(run, data), None, title)
        return _loaded(title, *network)
    paths = {
        weights: _cache() / weights.url.rpartition("/")[2] for weights in reversed(get_model_weights(name))
    }  # the best ones first
    cached = next((weights for weights, path in paths.items() if path.is_file()), None)
    if cached is None:
        best, path = next(iter(paths.items()))
        raise _not_cached(run, path, best.url)
    weights, _, channels, notes = resnet_weights(read_tensors(paths[cached]), paths[cached])
    transform = cached.transforms()
    mean, std = tuple(transform.mean), tuple(transform.std)
    preprocessing = Preprocessing(channels, transform.crop_size[0], mean, std, OF_WEIGHTS)
    encoder, preprocessing, more = resnet_network(recipe, preprocessing, weights, title)
    return _loaded(title, encoder, preprocessing, [*notes, *more])


def open_timm(name: str, pretrained: bool, data: Callable[[], ImageData] | None) -> LoadedEncoder:
    """A network of timm.

    Args:
        name: timm's, such as vit_tiny_patch16_224.
        pretrained: with the weights that are in the cache of torch or Hugging Face; False: with random ones.
        data: loads the images that random weights are for.

    Raises:
        BadInput: there is no such network, its weights are not in the cache, or images are needed and missing.
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    run = f"timm:{name}"
    if name not in timm.list_models():
        raise BadInput(f"run={run} is not a model of timm {timm.__version__}.{nearest(name, timm.list_models())}")
    if not pretrained:
        preprocessing = _of_images(run, data)
        recipe = {"_target_": "twoviews.backbones.Timm", "name": name}
        encoder = random_network(recipe, preprocessing.channels, preprocessing.image_size)
        return _loaded(f"timm-{name}", encoder, preprocessing)
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
    preprocessing = Preprocessing(channels, size, tuple(cfg.mean), tuple(cfg.std), OF_WEIGHTS)
    return _loaded(f"timm-{name}-pretrained", encoder, preprocessing)


def _loaded(title: str, encoder, preprocessing: Preprocessing, notes=()) -> LoadedEncoder:
    name = re.sub(r"[^\w.-]", "_", title)
    folder = Path("outputs") / f"evaluation-{name}"
    return LoadedEncoder(encoder, preprocessing, name, folder, notes=tuple(notes))


def _of_images(run: str, data: Callable[[], ImageData] | None) -> Preprocessing:
    if data is None:
        raise UnknownImages(run)
    return Preprocessing.of_images(data())


def _cache() -> Path:
    """Where torch keeps weights that were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _not_cached(run: str, path: Path, origin: str) -> BadInput:
    return BadInput(
        f"run={run}:pretrained takes weights that lie on this machine, and there are none: put {origin} at {path}, or "
        f"leave :pretrained away for random ones."
    )
