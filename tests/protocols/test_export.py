"""What is exported, loaded by the lines that stand beside it, gives the encoder's features."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twoviews.backbones import Encoder, ResNet, Timm
from twoviews.classifier_file import as_head
from twoviews.data.images import ImageData
from twoviews.data.sources import digits
from twoviews.data.views import eval_view
from twoviews.encoders.opening import open_encoder
from twoviews.errors import BadInput
from twoviews.protocols import export
from twoviews.protocols.export import Export
from twoviews.protocols.protocol import EvaluationContext


def data(size: int) -> ImageData:
    made = digits(train_images=40)
    return replace(made, memory=made.train, test=made.test.subset(torch.arange(20)), size=size)


def context(encoder: Encoder, folder: Path | None, size: int = 32) -> EvaluationContext:
    with torch.no_grad():
        encoder.train()(torch.randn(8, 1, size, size) * 2)  # running statistics that matter
    made = EvaluationContext(encoder, data(size), torch.device("cpu"), torch.float32)
    made.folder = folder
    return made


def resnet(stem: str, size: int, depths: tuple[int, ...] = (2, 2, 2, 2)) -> ResNet:
    torch.manual_seed(0)
    return ResNet(1, size, "basic", list(depths), width=64, stem=stem)


def images(size: int) -> torch.Tensor:
    test = data(size).test
    return eval_view(test.pixels, test.sizes, size=size, crop=1.0, mean=data(size).mean, std=data(size).std)


def loaded(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """What the lines beside the file make, run as a user would."""
    monkeypatch.chdir(folder)
    names = {}
    exec("\n".join(json.loads((folder / name).read_text())["load"]), names)
    return names["model"]


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 64)])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_lines_beside_the_file_give_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, stem: str, size: int
) -> None:
    made = context(resnet(stem, size), tmp_path, size)
    found = Export(library, 0)(made)
    assert found.values["difference"] < 1e-4 and found.values["images"] == 20
    (row,) = found.tables["export"]
    assert Path(row["file"]).parent == tmp_path / "export" and Path(row["file"]).exists()
    assert ("conv1 and maxpool" in row["note"]) == (stem == "cifar")
    model = loaded(tmp_path / "export", f"{library}_resnet18.json", monkeypatch)
    assert type(model).__module__.startswith(library)
    with torch.no_grad():
        torch.testing.assert_close(model(images(size)), made.encoder.eval()(images(size)), rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}


def test_safetensors_are_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = ResNet(1, 32, "basic", [1, 1, 1], width=8, stem="strided")
    made = context(encoder, tmp_path)
    assert Export("safetensors", 0)(made).values["difference"] == 0
    again = open_encoder(str(tmp_path / "export" / "encoder.safetensors"), digits)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in again.encoder.state_dict().items())
    assert (again.preprocessing.image_size, again.preprocessing.mean) == (32, made.data.mean)
    model = loaded(tmp_path / "export", "README.json", monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(images(32)), encoder.eval()(images(32)))


def test_a_model_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = context(Timm(1, 32, "vit_tiny_patch16_224"), tmp_path)
    assert Export("timm", 0)(made).values["difference"] < 1e-4
    model = loaded(tmp_path / "export", "timm_vit_tiny_patch16_224.json", monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(images(32)), made.encoder.eval()(images(32)), rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="torchvision has no such network .Timm."):
        Export("torchvision", 0)(made)


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = context(ResNet(1, 32, "basic", [1, 1, 1], width=8), tmp_path)
    for library in ("torchvision", "timm"):
        with pytest.raises(
            BadInput, match=rf"{library} has no such network \(blocks \[1, 1, 1\] of width 8\).*safetensors"
        ):
            Export(library, 0)(small)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BadInput, match="needs onnx, onnxscript, onnxruntime, which this environment lacks; install with"
    ):
        Export("onnx", 0)(small)
    monkeypatch.undo()
    monkeypatch.setattr(export, "load_encoder", lambda path: (ResNet(1, 32, "basic", [1, 1, 1], width=8), {}))
    with pytest.raises(BadInput, match="outputs of the exported file differ by .* so it was not kept"):
        Export("safetensors", 0)(small)
    assert not list(tmp_path.iterdir())
    small.folder = None
    with pytest.raises(BadInput, match="for evaluate.py"):
        Export("safetensors", 0)(small)


def test_onnx_takes_batches_of_any_size(tmp_path: Path) -> None:
    import onnxruntime

    made = context(resnet("cifar", 32, (1, 1)), tmp_path)
    assert Export("onnx", 0)(made).values["difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "export" / "encoder.onnx"))
    with torch.no_grad():
        expected = made.encoder.eval()(images(32))
    for count in (1, 2, 7):
        (found,) = session.run(["features"], {"images": images(32)[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "encoder", "description"),
    [
        ("torchvision", lambda: resnet("cifar", 32), "torchvision_resnet18.json"),
        ("timm", lambda: Timm(1, 32, "vit_tiny_patch16_224"), "timm_vit_tiny_patch16_224.json"),
        ("safetensors", lambda: ResNet(1, 32, "basic", [1, 1], width=8), "README.json"),
    ],
)
def test_a_classifier_is_exported_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, encoder, description: str
) -> None:
    made = context(encoder(), tmp_path)
    width = made.encoder.out_dim
    made.head = as_head(torch.randn(10, width), torch.randn(10), made.data.classes)
    assert Export(format, 0)(made).values["difference"] < 1e-3
    assert json.loads((tmp_path / "export" / description).read_text())["classes"] == [*made.data.classes]
    model = loaded(tmp_path / "export", description, monkeypatch)
    with torch.no_grad():
        expected = made.head.linear(made.encoder.eval()(images(32)))
        torch.testing.assert_close(model(images(32)), expected, rtol=1e-3, atol=1e-3)
    if format == "safetensors":
        again = open_encoder(str(tmp_path / "export" / "classifier.safetensors"))
        assert again.head is not None and again.head.classes == made.data.classes


def test_a_classifier_in_onnx_gives_logits(tmp_path: Path) -> None:
    import onnxruntime

    made = context(resnet("cifar", 32, (1, 1)), tmp_path)
    made.head = as_head(torch.randn(10, made.encoder.out_dim), torch.randn(10), made.data.classes)
    assert Export("onnx", 0)(made).values["difference"] < 1e-3
    session = onnxruntime.InferenceSession(str(tmp_path / "export" / "classifier.onnx"))
    (found,) = session.run(["logits"], {"images": images(32)[:3].numpy()})
    assert found.shape == (3, 10)
