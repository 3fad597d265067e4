"""Export the encoder in formats of other libraries; each file is loaded again and compared on images."""

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twoviews.backbones import Encoder, ResNet, Timm
from twoviews.classifier_file import CLASSIFIER_FILE, load_classifier, save_classifier
from twoviews.data.views import eval_view
from twoviews.encoder_file import WEIGHTS_FILE, describe, load_encoder, save_encoder, weight_file
from twoviews.encoders.weight_files import RESNETS
from twoviews.errors import BadInput
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import NonNegativeInt

COMPARED_IMAGES = 32
TOLERANCE = 1e-4  # of a feature, or of the largest feature where that is above 1
LOGITS = "[B, C] logits of the classes, in their order; softmax makes them probabilities"
NOTE = "The stem is one for small images: replace conv1 and maxpool as shown before loading the weights."
ONNX = ("onnx", "onnxscript", "onnxruntime")
# Of an exported file: its name, the code that loads it, and what makes of images what it makes of them.
Written = tuple[str, list[str], Callable[[Tensor], Tensor]]


@dataclass
class Export(Protocol):
    """Writes the encoder to the folder export, with a description of how to load it and how to prepare its images.

    Of a fine-tuned encoder it is the classifier: its outputs are logits in place of features.

    Args:
        format: "torchvision" and "timm" are weights for their networks of the same name, "safetensors" is read by
            run=<file>, "onnx" is a graph for batches of any size.
    """

    needs_labels = False

    format: Literal["torchvision", "timm", "safetensors", "onnx"]
    every_epochs: NonNegativeInt

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """The value `difference` is the largest one between an output of the network and of the exported file.

        Raises:
            BadInput: the format has no such network or needs what is not installed, or the difference is too large.
        """
        if context.folder is None:
            raise BadInput("protocol=export writes files and is for evaluate.py: evaluate.py run=... protocol=export.")
        encoder = copy.deepcopy(context.encoder).cpu().float().eval()
        head = None if context.head is None else copy.deepcopy(context.head.linear).cpu()
        write = {"torchvision": _torchvision, "timm": _timm, "safetensors": _safetensors, "onnx": _onnx}[self.format]
        images, data = _images(context), context.data
        with TemporaryDirectory(dir=context.folder, prefix="export.") as place, torch.no_grad():
            expected = (encoder if head is None else nn.Sequential(encoder, head))(images)
            name, load, loaded = write(encoder, head, context, Path(place))
            difference, largest = (loaded(images) - expected).abs().max().item(), expected.abs().max().item()
            if not difference <= TOLERANCE * max(1.0, largest):
                raise BadInput(
                    f"format={self.format}: outputs of the exported file differ by {difference:.2g} from the network's "
                    f"(at most {TOLERANCE * max(1.0, largest):.2g} is rounding), so it was not kept."
                )
            about = {
                "file": name,
                "load": load,
                "note": NOTE if any("model.maxpool" in line for line in load) else "",
                "input": f"[B, {data.channels}, {data.size}, {data.size}] float32: the central square of a picture, "
                f"pixels in [0, 1]{', red green blue' if data.channels == 3 else ''}, minus mean, over std",
                "mean": list(data.mean),
                "std": list(data.std),
                "features": context.encoder.out_dim,
                **({} if context.head is None else {"output": LOGITS, "classes": list(context.head.classes)}),
                "largest_difference": difference,
                "compared_images": len(images),
            }
            beside = "README.json" if self.format == "safetensors" else Path(name).with_suffix(".json").name
            (Path(place) / beside).write_text(json.dumps(about, indent=2) + "\n")
            folder = context.folder / "export"
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(place).iterdir()):
                file.replace(folder / file.name)
        row = {"file": str(folder / name), "difference": difference, "load": "; ".join(load), "note": about["note"]}
        return EvaluationResult({"difference": difference, "images": float(len(images))}, tables={"export": [row]})


def _images(context: EvaluationContext) -> Float[Tensor, "B C S S"]:
    """The first test images (training images, if there are none) as the encoder takes them."""
    data = context.data
    split = data.test or data.train
    pixels, sizes, _ = next(split.batches(COMPARED_IMAGES, torch.arange(min(COMPARED_IMAGES, len(split)))))
    return eval_view(pixels.cpu(), sizes, size=data.size, crop=1.0, mean=data.mean, std=data.std)


def _library_name(encoder: Encoder, library: str) -> str:
    """The name of a ResNet in torchvision and timm."""
    shape = type(encoder).__name__
    if isinstance(encoder, ResNet):
        recipe = encoder.recipe
        for name, (block, depths) in RESNETS.items():
            if (recipe["block"], recipe["depths"], recipe["width"]) == (block, depths, 64):
                return name
        shape = f"blocks {recipe['depths']} of width {recipe['width']}"
    raise BadInput(
        f"format={library}: {library} has no such network ({shape}), only {', '.join(RESNETS)} of width 64; use "
        "format=safetensors or onnx."
    )


def _stem(encoder: Encoder, channels: int) -> dict[str, str]:
    """The code of the modules by which those of an ImageNet network are replaced, by name."""
    if (stem := encoder.recipe["stem"]) == "imagenet":
        return {} if channels == 3 else {"conv1": f"torch.nn.Conv2d({channels}, 64, 7, 2, 3, bias=False)"}
    conv1 = f"torch.nn.Conv2d({channels}, 64, 3, {2 if stem == 'strided' else 1}, 1, bias=False)"
    return {"conv1": conv1, "maxpool": "torch.nn.Identity()"}


def _loaded(model: nn.Module, modules: Mapping[str, str], weights: Mapping[str, Tensor]) -> nn.Module:
    """A library's network with these weights, after the code has replaced some of its modules."""
    for name, code in modules.items():
        setattr(model, name, eval(code, {"torch": torch}))  # by what the user is told to do; all of it is made above
    model.load_state_dict(weights)
    return model.eval()


def _lines(modules: Mapping[str, str]) -> list[str]:
    return [f"model.{name} = {code}" for name, code in modules.items()]


def _named(layer: str, head: nn.Linear | None) -> dict[str, Tensor]:
    """Weights of the head with the names that they have in a library's network."""
    return {} if head is None else {f"{layer}.{name}": value for name, value in head.state_dict().items()}


def _torchvision(encoder: Encoder, head: nn.Linear | None, context: EvaluationContext, place: Path) -> Written:
    import torchvision

    name = _library_name(encoder, "torchvision")
    last = "torch.nn.Identity()" if head is None else f"torch.nn.Linear({head.in_features}, {head.out_features})"
    modules, file = {**_stem(encoder, context.data.channels), "fc": last}, f"torchvision_{name}.pth"
    torch.save({**encoder.state_dict(), **_named("fc", head)}, place / file)
    load = [
        "import torch, torchvision",
        f"model = torchvision.models.{name}()",
        *_lines(modules),
        f'model.load_state_dict(torch.load("{file}", weights_only=True))',
        "model.eval()",
    ]
    model = torchvision.models.get_model(name, weights=None)
    return file, load, _loaded(model, modules, torch.load(place / file, weights_only=True))


def _timm(encoder: Encoder, head: nn.Linear | None, context: EvaluationContext, place: Path) -> Written:
    import timm
    from safetensors.torch import load_file

    if isinstance(encoder, Timm):
        name, options, weights, modules = encoder.recipe["name"], encoder.options, encoder.model.state_dict(), {}
    else:
        name, options, weights = _library_name(encoder, "timm"), {}, encoder.state_dict()
        modules = _stem(encoder, context.data.channels)
    options = {**options, "num_classes": 0 if head is None else head.out_features}
    layer = timm.models.get_pretrained_cfg_value(name, "classifier")
    if head is not None and not isinstance(layer, str):
        raise BadInput(f"format=timm: {name} has no single layer as its classifier; use format=safetensors or onnx.")
    file = f"timm_{name}.safetensors"
    (place / file).write_bytes(weight_file({**weights, **_named(str(layer), head)}))
    load = [
        "import timm, torch",
        "from safetensors.torch import load_file",
        f"model = timm.create_model({', '.join([repr(name), *(f'{key}={value}' for key, value in options.items())])})",
        *_lines(modules),
        f'model.load_state_dict(load_file("{file}"))',
        "model.eval()",
    ]
    return file, load, _loaded(timm.create_model(name, **options), modules, load_file(place / file))


def _safetensors(encoder: Encoder, head: nn.Linear | None, context: EvaluationContext, place: Path) -> Written:
    description = describe(encoder, context.data)
    if context.head is not None and head is not None:
        save_classifier(place, encoder, replace(context.head, linear=head), description)
        load = [
            "import torch",
            "from pathlib import Path",
            "from twoviews.classifier_file import load_classifier",
            f'encoder, head, _ = load_classifier(Path("{CLASSIFIER_FILE}"))',
            "model = torch.nn.Sequential(encoder, head.linear)",
            "model.eval()",
        ]
        again, head_again, _ = load_classifier(place / CLASSIFIER_FILE)
        return CLASSIFIER_FILE, load, nn.Sequential(again, head_again.linear).eval()
    save_encoder(place, encoder, description)
    load = [
        "from pathlib import Path",
        "from twoviews.encoder_file import load_encoder",
        f'model, _ = load_encoder(Path("{WEIGHTS_FILE}"))',
        "model.eval()",
    ]
    return WEIGHTS_FILE, load, load_encoder(place / WEIGHTS_FILE)[0].eval()


def _onnx(encoder: Encoder, head: nn.Linear | None, context: EvaluationContext, place: Path) -> Written:
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"format=onnx needs {', '.join(missing)}, which this environment lacks; install with `.venv/bin/uv pip install "
            f"--python .venv/bin/python {' '.join(missing)}`."
        )
    file, output = ("encoder.onnx", "features") if head is None else ("classifier.onnx", "logits")
    batch: Any = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        encoder if head is None else nn.Sequential(encoder, head).eval(),
        (_images(context)[:2],),
        place / file,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=[output],
        dynamic_shapes=({0: batch},),
    )
    onnxruntime: Any = importlib.import_module("onnxruntime")  # no part of the pinned environment
    session = onnxruntime.InferenceSession(str(place / file), providers=["CPUExecutionProvider"])
    load = [
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{file}")',
        f'{output} = session.run(["{output}"], {{"images": images}})[0]',
    ]
    return file, load, lambda images: torch.from_numpy(session.run([output], {"images": images.numpy()})[0])
