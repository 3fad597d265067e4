"""The encoder in the formats of others, loaded back and compared on real images before it counts as written."""

import copy
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twoviews.backbones import Encoder, ResNet, Timm
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.evaluation.source import RESNETS
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import Index
from twoviews.run import load_encoder, weight_file

COMPARED = 32  # images that the file and the encoder are compared on
TOLERANCE = 1e-4  # of a feature, or of the largest feature where that is above 1
NOTE = "The stem is one for small images: replace conv1 and maxpool as shown before loading the weights."
ONNX = ("onnx", "onnxscript", "onnxruntime")


class Export(Protocol):
    """Writes the encoder to the folder export: the file, and beside it what it is, how to load it and how to feed it.

    Args:
        format: "torchvision" and "timm" are weights for their networks of the same name, "safetensors" is read by
            run=<file>, "onnx" is a graph for batches of any size.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    needs_labels = False

    def __init__(self, format: Literal["torchvision", "timm", "safetensors", "onnx"], every_epochs: Index):
        self.format, self.every_epochs = format, every_epochs

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """difference: the largest one between a feature of the encoder and of the file loaded back, on real images.

        Raises:
            BadInput: the format has no such network or needs what is not installed, or the difference is too large.
        """
        if context.folder is None:
            raise BadInput("protocol=export writes files and is for evaluate.py: evaluate.py run=... protocol=export.")
        encoder = copy.deepcopy(context.encoder).cpu().float().eval()
        images = _images(context)
        write = {"torchvision": _torchvision, "timm": _timm, "safetensors": _safetensors, "onnx": _onnx}[self.format]
        with TemporaryDirectory(dir=context.folder, prefix="export.") as place, torch.no_grad():
            expected = encoder(images)
            name, load, loaded = write(encoder, context, Path(place), images)
            difference = (loaded - expected).abs().max().item()
            largest = expected.abs().max().item()
            if not difference <= TOLERANCE * max(1.0, largest):
                raise BadInput(
                    f"format={self.format}: features of the exported file differ by {difference:.2g} from the encoder's "
                    f"(at most {TOLERANCE * max(1.0, largest):.2g} is rounding), so it was not kept."
                )
            data = context.data
            about = {
                "file": name,
                "load": load,
                "note": NOTE if any("model.maxpool" in line for line in load) else "",
                "input": f"[B, {data.channels}, {data.size}, {data.size}] float32: the central square of a picture, "
                f"pixels in [0, 1]{', red green blue' if data.channels == 3 else ''}, minus mean, over std",
                "mean": list(data.mean),
                "std": list(data.std),
                "features": context.encoder.out_dim,
                "largest_difference": difference,
                "compared_images": len(images),
            }
            beside = {"safetensors": "README.json"}.get(self.format, Path(name).with_suffix(".json").name)
            (Path(place) / beside).write_text(json.dumps(about, indent=2) + "\n")
            folder = context.folder / "export"
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(place).iterdir()):
                file.replace(folder / file.name)
        row = {"file": str(folder / name), "difference": difference, "load": "; ".join(load), "note": about["note"]}
        return EvaluationResult({"difference": difference, "images": float(len(images))}, tables={"export": [row]})


def _images(context: EvaluationContext) -> Float[Tensor, "B C S S"]:
    """The first test images (training images, where there are none) as the encoder is fed them."""
    data = context.data
    split = data.test or data.train
    pixels, sizes, _ = next(split.batches(COMPARED, torch.arange(min(COMPARED, len(split)))))
    return eval_view(pixels.cpu(), sizes, size=data.size, crop=1.0, mean=data.mean, std=data.std)


def _library_name(encoder: Encoder, library: str) -> tuple[str, str]:
    """What torchvision and timm call a ResNet, and the kind of its stem."""
    recipe = getattr(encoder, "recipe", {})
    for name, (block, depths) in RESNETS.items():
        if isinstance(encoder, ResNet) and (recipe["block"], recipe["depths"], recipe["width"]) == (block, depths, 64):
            return name, recipe["stem"]
    shape = (
        f"blocks {recipe['depths']} of width {recipe['width']}"
        if isinstance(encoder, ResNet)
        else type(encoder).__name__
    )
    raise BadInput(
        f"format={library}: {library} has no such network ({shape}), only {', '.join(RESNETS)} of width 64; use "
        "format=safetensors or onnx."
    )


def _stem(stem: str, channels: int) -> tuple[Sequence[nn.Module | None], list[str]]:
    """Modules conv1 and maxpool of a network for small images in place of ImageNet's, and the lines that put them in."""
    if stem == "imagenet":
        if channels == 3:
            return [None, None], []
        shape = f"{channels}, 64, 7, 2, 3, bias=False"
        return [nn.Conv2d(channels, 64, 7, 2, 3, bias=False), None], [f"model.conv1 = torch.nn.Conv2d({shape})"]
    stride = 2 if stem == "strided" else 1
    lines = [
        f"model.conv1 = torch.nn.Conv2d({channels}, 64, 3, {stride}, 1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]
    return [nn.Conv2d(channels, 64, 3, stride, 1, bias=False), nn.Identity()], lines


def _loaded(
    model: nn.Module, modules: Sequence[nn.Module | None], weights: dict[str, Tensor], images: Tensor
) -> Tensor:
    """What a library's network makes of the images with these weights."""
    for name, module in zip(("conv1", "maxpool"), modules, strict=True):
        if module is not None:
            setattr(model, name, module)
    model.load_state_dict(weights)
    return model.eval()(images)


def _torchvision(
    encoder: Encoder, context: EvaluationContext, place: Path, images: Tensor
) -> tuple[str, list[str], Tensor]:
    import torchvision

    name, stem = _library_name(encoder, "torchvision")
    file = f"torchvision_{name}.pth"
    torch.save(encoder.state_dict(), place / file)
    model = torchvision.models.get_model(name, weights=None)
    model.fc = nn.Identity()
    modules, lines = _stem(stem, context.data.channels)
    load = [
        "import torch, torchvision",
        f"model = torchvision.models.{name}()",
        *lines,
        "model.fc = torch.nn.Identity()",
        f'model.load_state_dict(torch.load("{file}", weights_only=True))',
        "model.eval()",
    ]
    return file, load, _loaded(model, modules, torch.load(place / file, weights_only=True), images)


def _timm(encoder: Encoder, context: EvaluationContext, place: Path, images: Tensor) -> tuple[str, list[str], Tensor]:
    import timm
    from safetensors.torch import load_file

    options: dict[str, Any] = {"num_classes": 0}
    if isinstance(encoder, Timm):
        name, options, weights = encoder.recipe["name"], encoder.options, encoder.model.state_dict()
        modules, lines = [None, None], []
    else:
        (name, stem), weights = _library_name(encoder, "timm"), encoder.state_dict()
        modules, lines = _stem(stem, context.data.channels)
    file = f"timm_{name}.safetensors"
    (place / file).write_bytes(weight_file(weights))
    load = [
        "import timm, torch",
        "from safetensors.torch import load_file",
        f"model = timm.create_model({', '.join([repr(name), *(f'{key}={value}' for key, value in options.items())])})",
        *lines,
        f'model.load_state_dict(load_file("{file}"))',
        "model.eval()",
    ]
    return file, load, _loaded(timm.create_model(name, **options), modules, load_file(place / file), images)


def _safetensors(
    encoder: Encoder, context: EvaluationContext, place: Path, images: Tensor
) -> tuple[str, list[str], Tensor]:
    data, file = context.data, "encoder.safetensors"
    (place / file).write_bytes(weight_file(encoder.state_dict()))
    description = {
        "backbone": encoder.recipe,
        "channels": data.channels,
        "image_size": data.size,
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.classes),
        "data": data.name,
        "features": encoder.out_dim,
    }
    (place / "encoder.json").write_text(json.dumps(description, indent=2) + "\n")
    load = [
        "from pathlib import Path",
        "from twoviews.run import load_encoder",
        f'model, _ = load_encoder(Path("{file}"))',
        "model.eval()",
    ]
    return file, load, load_encoder(place / file)[0].eval()(images)


def _onnx(encoder: Encoder, context: EvaluationContext, place: Path, images: Tensor) -> tuple[str, list[str], Tensor]:
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"format=onnx needs {', '.join(missing)}, which this environment lacks; install with `.venv/bin/uv pip install "
            f"--python .venv/bin/python {' '.join(missing)}`."
        )
    file = "encoder.onnx"
    batch: Any = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        encoder,
        (images[:2],),
        place / file,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: batch},),
    )
    onnxruntime: Any = importlib.import_module("onnxruntime")  # no part of the pinned environment
    session = onnxruntime.InferenceSession(str(place / file), providers=["CPUExecutionProvider"])
    load = [
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{file}")',
        'features = session.run(["features"], {"images": images})[0]',
    ]
    return file, load, torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
