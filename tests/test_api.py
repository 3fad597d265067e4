"""Encoders in Python: the features of the same images are the same, however they are given."""

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import twoviews
from twoviews.data import sources
from twoviews.data.images import ImageData, Images
from twoviews.encoders.opening import open_encoder
from twoviews.features import embed
from twoviews.protocols.finetune import FineTune
from twoviews.protocols.linear import Linear
from twoviews.protocols.protocol import EvaluationContext

RUN = ROOT / "tests" / "folders" / "v0" / "finished"  # digits, 32 x 32 px, one channel


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """[40, 32, 32] uint8."""
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder() -> twoviews.PretrainedEncoder:
    return twoviews.load(RUN, device="cpu")


def test_features_are_those_of_an_evaluation(encoder: twoviews.PretrainedEncoder, digits: np.ndarray) -> None:
    pixels = torch.from_numpy(digits)[:, None]
    images = Images(pixels, torch.full((40, 2), 32), None)
    data = ImageData("x", images, None, None, (), 1, 32, encoder.mean, encoder.std, "", ())
    expected = embed(encoder.loaded.encoder, images, data, torch.device("cpu"), torch.float32)
    x = encoder.features(digits, progress=False)
    assert x.dtype == np.float32 and x.shape == (40, encoder.num_features)
    np.testing.assert_allclose(x, expected.numpy(), rtol=1e-5, atol=1e-6)
    by_hand = (pixels / 255 - torch.tensor(encoder.mean)) / torch.tensor(encoder.std)
    with torch.no_grad():
        np.testing.assert_allclose(encoder.model(by_hand).numpy(), x, rtol=1e-4, atol=1e-5)


def test_files_pictures_arrays_and_tensors_are_one(
    encoder: twoviews.PretrainedEncoder, digits: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = [Image.fromarray(digit) for digit in digits]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number:02}.png")
    expected = encoder.features(digits)
    assert "Features: 40 of 40 images" in capfd.readouterr().err
    paths = encoder.paths(tmp_path)
    assert [Path(path).name for path in paths] == [f"{number:02}.png" for number in range(40)]
    tensor = torch.from_numpy(digits)[:, None]
    lists = ([*digits], [*digits[..., None]], [*tensor])
    for images in (tmp_path, f"{tmp_path}/*.png", paths, pictures, digits[..., None], tensor, tensor / 255, *lists):
        x = encoder.features(images, progress=False, batch_size=7)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    assert capfd.readouterr().err == ""
    assert encoder.features(pictures[0], progress=False).shape == (1, encoder.num_features)
    assert isinstance(encoder.features(tensor, progress=False, as_tensor=True), torch.Tensor)


def test_larger_images_are_resized(encoder: twoviews.PretrainedEncoder, tmp_path: Path) -> None:
    picture = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 50)
    picture.save(tmp_path / "large.png")
    one, other = (encoder.features(images, progress=False) for images in (tmp_path / "large.png", picture))
    np.testing.assert_array_equal(one, other)
    array = encoder.features(np.asarray(picture)[None], progress=False)  # resized by torch, not by Pillow
    mixed = encoder.features([np.asarray(picture), np.zeros((32, 32), np.uint8)], progress=False)
    np.testing.assert_allclose(mixed[:1], array, rtol=1e-4, atol=1e-5)
    assert (one * array).sum() / np.linalg.norm(one) / np.linalg.norm(array) > 0.99


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            "nothing-there",
            r"^'nothing-there' in /.*: there is no such file or folder\..*Images are a picture file, a folder",
        ),
        ("", r"^'' in /.*: names no pictures"),
        ([3, None], "images of type NoneType, int are not understood"),
        (3, "images of type int are not understood"),
        ([], "there are no images"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"is not \[N, H, W, 1\]"),
        (np.zeros((2, 1, 32, 32), np.uint8), r"np\.moveaxis\(array, 1, -1\)"),
        (np.full((2, 32, 32), -1.0), r"have values -1 to -1; give them in \[0, 1\]"),
        (np.full((2, 32, 32), np.nan), "have values nan to nan"),
        (np.zeros((2, 32, 32), np.int64), "type int64"),
        (torch.zeros(32, 32), r"is not \[N, C, H, W\]; one image is tensor\[None\]"),
    ],
)
def test_what_is_not_understood(encoder: twoviews.PretrainedEncoder, images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.features(images, progress=False)  # type: ignore[arg-type]


def test_it_is_shown_in_a_line(encoder: twoviews.PretrainedEncoder) -> None:
    features = encoder.num_features
    shown = f"PretrainedEncoder({str(RUN)!r}: ResNet, {features} features, images of 1 channel and 32x32 px, on cpu)"
    assert repr(encoder) == str(encoder) == shown


def test_a_broken_file_is_named(encoder: twoviews.PretrainedEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        encoder.features(tmp_path, progress=False)


def test_options_that_do_not_exist(encoder: twoviews.PretrainedEncoder, digits: np.ndarray) -> None:
    for options, message in (({"precision": "fp16"}, "needs a GPU"), ({"batch_size": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            encoder.features(digits, **options)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        twoviews.lod  # noqa: B018
    with pytest.raises(ValueError, match="nothing-there"):
        twoviews.load("nothing-there")


def test_weights_of_torchvision_give_its_features(tmp_path: Path) -> None:
    import torchvision

    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "weights.safetensors")
    weights = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match="does not say what images it takes; give image_size="):
        twoviews.load(weights)
    with pytest.raises(ValueError, match="give mean= and std=, too"):
        twoviews.load(weights, image_size=64)
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    encoder = twoviews.load(weights, image_size=64, device="cpu", **statistics)
    assert (encoder.image_size, encoder.channels, encoder.num_features, encoder.mean) == (
        64,
        3,
        512,
        statistics["mean"],
    )
    image = torch.rand(2, 3, 64, 64)
    ours, theirs = (
        encoder.features((image * 255).round().to(torch.uint8), progress=False),
        torchvision.models.resnet18(),
    )
    theirs.load_state_dict(load_file(weights))
    theirs.fc = torch.nn.Identity()
    normalized = torchvision.transforms.functional.normalize((image * 255).round() / 255, **statistics)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs.eval()(normalized).numpy(), rtol=1e-3, atol=1e-4)


WITHOUT = """
import sys
import twoviews
assert "torch" not in sys.modules and twoviews.__version__
x = twoviews.load({run!r}).features([*__import__("pathlib").Path({folder!r}).glob("*.png")], progress=False)
assert x.shape[0] == 2
found = {{"hydra", "omegaconf", "mlflow", "matplotlib", "pandas"}} & {{*sys.modules}}
assert not found, found
"""


def test_neither_hydra_nor_mlflow_is_imported(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (32, 32), 9).save(tmp_path / name)
    script = WITHOUT.format(run=str(RUN), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, evaluated by a linear probe and fine-tuned, as evaluate.py does it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(RUN, folder)
    loaded = open_encoder(str(folder))
    small = sources.digits()
    small = loaded.prepare(replace(small, memory=small.memory.subset(torch.arange(200))))
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "lr": 0.1, "held_out": 0.1, "lr_scaling": "none"}
    settings |= {"momentum": 0.9, "weight_decay": 0.0, "smallest_crop": 0.6, "flip": 0.0, "unfreeze_from": None}
    settings |= {"layer_decay": 1.0, "seed": 0, "every_epochs": 0}
    linear = Linear([1e-2], 0.2, 50, 0)
    for name, protocol in {"linear": linear, "finetune": FineTune(linear=linear, **settings)}.items():
        context = EvaluationContext(loaded.encoder, small, torch.device("cpu"), torch.float32)
        context.folder = folder / "evaluation" / f"{name}-0"
        context.folder.mkdir(parents=True)
        result = protocol(context)
        assert result.probabilities is not None
        np.save(folder / f"{name}.npy", result.probabilities.argmax(1).numpy())
    return folder


@pytest.mark.parametrize(("suffix", "protocol"), [("", "linear"), (":finetune", "finetune")])
def test_classes_are_those_of_the_evaluation(classified: Path, suffix: str, protocol: str) -> None:
    encoder = twoviews.load(f"{classified}{suffix}", device="cpu")
    pixels = sources.digits().test.pixels
    with warnings.catch_warnings(action="error"):  # of them are as many far as are expected
        names, probabilities = encoder.classify(pixels, progress=False)
    assert encoder.classes == tuple("0123456789") and probabilities.shape == (360, 10)
    assert (
        [int(name) for name in names]
        == probabilities.argmax(1).tolist()
        == np.load(classified / f"{protocol}.npy").tolist()
    )
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert probabilities.dtype == np.float32
    noise = torch.randint(256, (20, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    said = "20 of 36 pictures are farther from the training images than 99 % of the 360 test images: such a picture may"
    with pytest.warns(UserWarning, match=said) as warned:
        encoder.classify(torch.cat([pixels[:16], noise]), progress=False)
    assert len(warned) == 1
    x = encoder.features(pixels, progress=False, as_tensor=True)
    np.testing.assert_allclose(encoder.classifier(x).softmax(1).numpy(), probabilities, rtol=1e-4, atol=1e-6)
    assert encoder.classify(pixels[:2], progress=False, as_tensor=True).probabilities.shape == (2, 10)


def test_the_fine_tuned_encoder_is_another_one(classified: Path) -> None:
    pixels = sources.digits().test.pixels[:5]
    files = (f"{classified}:finetune", classified / "evaluation" / "finetune-0" / "classifier.safetensors")
    one, other = (twoviews.load(name, device="cpu").features(pixels, progress=False) for name in files)
    np.testing.assert_array_equal(one, other)
    assert not np.allclose(one, twoviews.load(classified, device="cpu").features(pixels, progress=False))


def test_a_classifier_of_another_encoder_is_none_of_this_one(classified: Path, tmp_path: Path) -> None:
    """As when a run goes on after it was evaluated."""
    folder = tmp_path / "run"
    shutil.copytree(classified, folder)
    weights = load_file(folder / "encoder.safetensors")
    changed = {name: value * 1.5 if "conv1" in name else value for name, value in weights.items()}
    save_file(changed, folder / "encoder.safetensors")
    encoder = twoviews.load(folder, device="cpu")
    assert encoder.classes == () and encoder.classifier is None
    with pytest.raises(
        ValueError, match=rf"python evaluate.py run={folder} protocol=linear.*load \"{folder}:finetune\""
    ):
        encoder.classify(np.zeros((1, 32, 32), np.uint8))


def test_without_a_classifier_the_command_is_told(encoder: twoviews.PretrainedEncoder) -> None:
    assert encoder.classes == ()
    with pytest.raises(
        ValueError, match=r"has no classifier yet; train one by `python evaluate.py .*finished protocol=linear`"
    ):
        encoder.classify(np.zeros((1, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="has no fine-tuned classifier; `python evaluate.py run=.* protocol=finetune`"):
        twoviews.load(f"{RUN}:finetune")
