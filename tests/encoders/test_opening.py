"""What run= may be: files made by torchvision itself, by others' habits, by ourselves, and by somebody who means harm."""

import argparse
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import SMALL_MOCO
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from test_configs import composed

import twoviews
from twoviews.assembly import describe_encoder, load_data, make_parts, make_views
from twoviews.backbones import ResNet, Timm
from twoviews.checkpoints import save_checkpoint
from twoviews.config.building import build
from twoviews.data.sources import digits
from twoviews.encoder_file import save_encoder
from twoviews.encoders.opening import open_encoder
from twoviews.encoders.weight_files import read_tensors
from twoviews.errors import BadInput
from twoviews.recording import record_start
from twoviews.run import Run
from twoviews.tracking import uris
from twoviews.tracking.state import run_id, set_target
from twoviews.tracking.upload import upload


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run at its beginning: what train.py writes, without the training."""
    cfg = composed(*SMALL_MOCO)
    data, device = load_data(cfg), torch.device("cpu")
    parts = make_parts(cfg, data, make_views(cfg, data), build(cfg.runtime), device)
    run = Run(tmp_path_factory.mktemp("trained") / "outputs" / "run")
    record_start(run, cfg, parts)
    save_checkpoint(run.folder, {"method": parts.method.state_dict(), "position": {"step": 0}})
    save_encoder(run.folder, parts.method.encoder, describe_encoder(cfg, data))
    run.write("result.json", {"state": "interrupted", "step": 0})
    return run.folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


def theirs(stem: str = "imagenet", depths: tuple[int, ...] = (1, 1, 1, 1)) -> torch.nn.Module:
    """A ResNet of torchvision with statistics that tell its layers apart."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.BasicBlock, list(depths), num_classes=10)
    if stem == "cifar":
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        return model(images)


def colour():
    """Digits in three channels, as a data set of the command line."""
    data = digits(train_images=20)
    pixels = data.train.pixels.expand(-1, 3, -1, -1)
    train = replace(data.train, pixels=pixels)
    return replace(data, train=train, memory=None, test=None, channels=3, mean=data.mean * 3, std=data.std * 3)


# (file, what is saved)
HABITS = {
    "plain.pt": lambda weights: weights,
    "parallel.pth": lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    "moco.pth.tar": lambda weights: {
        "epoch": 3,
        "state_dict": {
            **{f"module.encoder_q.{key}": value for key, value in weights.items()},
            **{f"module.encoder_k.{key}": value * 0 for key, value in weights.items()},
            "module.queue": torch.zeros(3),
        },
    },
    "solo.ckpt": lambda weights: {
        "state_dict": {
            **{f"momentum_backbone.{key}": value * 0 for key, value in weights.items()},
            **{f"backbone.{key}": value for key, value in weights.items()},
            "projector.0.weight": torch.zeros(3),
        }
    },
    "headless.pt": lambda weights: {key: value for key, value in weights.items() if not key.startswith("fc.")},
    "half.pt": lambda weights: {
        key: value.to(torch.float64) if value.is_floating_point() else value for key, value in weights.items()
    },
}


@pytest.mark.parametrize("name", HABITS)
def test_foreign_checkpoints_give_torchvisions_features(tmp_path: Path, name: str) -> None:
    model = theirs()
    torch.save(HABITS[name](model.state_dict()), tmp_path / name)
    found = open_encoder(name, colour)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.encoder.eval()(images), features(model, images), rtol=1e-5, atol=1e-5)
    wanted = found.preprocessing
    assert (found.run, wanted.channels, wanted.image_size) == (None, 3, 64)
    assert found.folder.match(f"outputs/evaluation-{found.name}-????????") and name.split(".")[0] in found.name
    assert any("enlarged to 64 px" in note for note in found.notes)
    fed = found.prepare(colour())
    assert (fed.size, fed.mean) == (64, colour().mean)


def test_a_small_stem_is_seen_by_the_shape_of_conv1(tmp_path: Path) -> None:
    model = theirs("cifar")
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    found = open_encoder("small.safetensors", colour)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.encoder.eval()(images), features(model, images), rtol=1e-5, atol=1e-5)
    assert found.preprocessing.image_size == 32
    assert any("3x3" in note for note in found.notes)


def test_bottlenecks_and_other_widths(tmp_path: Path) -> None:
    ours = ResNet(1, 32, "bottleneck", [1, 2], width=8, stem="imagenet")
    torch.save({"encoder": ours.state_dict()}, tmp_path / "ours.pt")
    found = open_encoder("ours.pt", digits)
    assert found.encoder.recipe == {**ours.recipe, "zero_init_residual": False}
    with pytest.raises(BadInput, match=r"takes images of 1 channel\(s\), and those of digits have 3"):
        found.prepare(colour())


# several encoders in one file

PAIRS = {  # (prefix and name of one, of the other): which is used, and why
    ("student.module.backbone.", "student", "teacher.backbone.", "teacher"): ("teacher", "as DINO evaluates it"),
    ("student_backbone.", "student_backbone", "teacher_backbone.", "teacher_backbone"): ("teacher_backbone", "as DINO"),
    ("module.encoder_q.", "encoder_q", "module.encoder_k.", "encoder_k"): ("encoder_q", "learns from gradients"),
    ("online_encoder.net.", "online_encoder", "target_encoder.net.", "target_encoder"): ("online_encoder", "learns"),
    ("backbone.", "backbone", "momentum_backbone.", "momentum_backbone"): ("backbone", "learns"),
    ("model.", "model", "model_ema.", "model_ema"): ("model", "learns"),
    ("", "", "ema.", "ema"): ("", "learns"),
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[3])
@pytest.mark.parametrize("turned", [False, True])
def test_of_several_encoders_it_says_which_is_used_and_takes_either(tmp_path: Path, pair, turned: bool) -> None:
    used, why = PAIRS[pair]
    weights = {"weights": (first := theirs().state_dict()), "others": {key: value + 1 for key, value in first.items()}}
    prefixes = {pair[1]: (pair[0], "weights"), pair[3]: (pair[2], "others")}
    content = [
        (p + key, value) for p, of in prefixes.values() for key, value in weights[of].items() if "fc." not in key
    ]
    torch.save(dict(reversed(content) if turned else content), tmp_path / "pair.pth")
    found = {name: open_encoder(f"pair.pth:{name}", colour) for name in prefixes}
    found["default"] = open_encoder("pair.pth", colour)
    for name, source in found.items():
        _, of = prefixes[used if name == "default" else name]
        assert torch.equal(source.encoder.state_dict()["layer1.0.conv1.weight"], weights[of]["layer1.0.conv1.weight"])
        assert "holds 2 encoders" in source.notes[0]
    (other,) = prefixes.keys() - {used}
    assert why in found["default"].notes[0] and f"Evaluated is {used}" in found["default"].notes[0]
    assert f"run=pair.pth:{other} is another" in found["default"].notes[0]
    assert "as the command says" in found[other].notes[0]
    folders = {source.folder for source in found.values()}
    assert len(folders) == (2 if "" in prefixes else 3)  # results of one do not replace those of another
    with pytest.raises(BadInput, match=r"run=pair.pth:nobody: pair.pth holds no encoder nobody, but these: "):
        open_encoder("pair.pth:nobody", colour)


def test_one_of_two_equals_has_to_be_named(tmp_path: Path) -> None:
    torch.save({"a": (weights := theirs().state_dict()), "b": weights}, tmp_path / "two.pt")
    with pytest.raises(BadInput, match=r"holds 2 ResNets \(a, b\); choose one: run=two.pt:a or run=two.pt:b\."):
        open_encoder("two.pt", colour)
    assert "Evaluated is b, as the command says" in open_encoder("two.pt:b", colour).notes[0]
    with pytest.raises(BadInput, match=r"there is no such file. Did you mean 'two.pt'\?"):
        open_encoder("tow.pt:a", colour)


def test_the_key_encoder_of_a_run(trained: Path) -> None:
    last = open_encoder(f"{trained}/last.pt")
    assert "Evaluated is encoder, which learns from gradients; run=" in last.notes[0] and "key_encoder" in last.notes[0]
    weights = {
        name: value + 1 for name, value in read_tensors(trained / "last.pt").items() if value.is_floating_point()
    }
    kept = torch.load(trained / "last.pt", weights_only=True)
    keys = {name: value for name, value in kept["method"].items() if name.startswith("key_encoder.")}
    moved = {name: weights[f"method.{name}"] for name in keys if f"method.{name}" in weights}
    folder = shutil.copytree(trained, trained.parent / "moved")
    torch.save({**kept, "method": {**kept["method"], **moved}}, folder / "last.pt")
    key, query = open_encoder(f"{folder}/last.pt:key_encoder"), open_encoder(f"{folder}/last.pt")
    assert same(query.encoder, last.encoder)
    for name, value in query.encoder.state_dict().items():
        assert torch.equal(key.encoder.state_dict()[name], value + 1 if value.is_floating_point() else value), name
    with pytest.raises(BadInput, match="holds one encoder"):
        open_encoder(f"{trained}/encoder.safetensors:key_encoder", digits)


# mean and standard deviation


def test_mean_and_std_are_said_and_can_be_set(tmp_path: Path, trained: Path) -> None:
    torch.save(theirs().state_dict(), tmp_path / "plain.pt")
    place = tmp_path / "hub" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save(theirs(depths=(2, 2, 2, 2)).state_dict(), place / "resnet18-f37072fd.pth")
    shown = ",".join(f"{value:.4g}" for value in colour().mean)
    own = f"mean=[{shown}] and std="
    for name, said in {
        "plain.pt": own,
        "torchvision:resnet18": own,
        "timm:resnet10t": own,
        "torchvision:resnet18:pretrained": "mean=[0.485,0.456,0.406] and std=[0.229,0.224,0.225], which belong to these",
    }.items():
        assert said in open_encoder(name, colour).notes[-1]
        mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
        source = open_encoder(name, colour, mean=mean, std=std)
        assert "mean=[0.1,0.2,0.3] and std=[0.4,0.5,0.6], of the command" in source.notes[-1]
        assert (source.prepare(colour()).mean, source.prepare(colour()).std) == (tuple(mean), tuple(std))
        with pytest.raises(BadInput, match=r"mean=\[0.5\] and std=\[0.5\] need 3 number\(s\) each"):
            open_encoder(name, colour, mean=[0.5], std=[0.5])
        with pytest.raises(BadInput, match="mean= and std= belong together"):
            open_encoder(name, colour, mean=mean)
    assert "encoder.json" in open_encoder(f"{trained}/encoder.safetensors", digits).notes[-1]
    assert not open_encoder(str(trained)).notes
    with pytest.raises(BadInput, match="knows those that it was trained with"):
        open_encoder(str(trained), mean=[0.5], std=[0.5])


# files that are refused


class Harm:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "tensor beside", "renamed"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    made, file = tmp_path / "made", tmp_path / ("evil.safetensors" if kind == "renamed" else "evil.pt")
    content = {"state_dict": theirs().state_dict() if kind == "tensor beside" else {}, "args": Harm(made)}
    if kind in ("pickle", "renamed"):
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(BadInput, match="so it is refused") as refused:
        open_encoder(str(file), colour)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)
    assert kind in ("pickle", "renamed") or "holds posix.system" in str(refused.value)
    assert not made.exists()
    if kind != "renamed":  # the file does what it says: plainly loaded, it runs
        pickle.loads(file.read_bytes()) if kind == "pickle" else torch.load(file, weights_only=False)
        assert made.exists()


def test_a_description_that_would_run_code_is_refused(tmp_path: Path, trained: Path) -> None:
    for target, extra in (("os.system", {"command": "touch made"}), ("subprocess.run", {"args": ["touch", "made"]})):
        folder = shutil.copytree(trained, tmp_path / target)
        description = json.loads((folder / "encoder.json").read_text())
        nested = {**description["backbone"], "depths": [{"_target_": target, **extra}]}
        for backbone in ({"_target_": target, **extra}, nested):
            (folder / "encoder.json").write_text(json.dumps({**description, "backbone": backbone}))
            for run in (folder, folder / "encoder.safetensors"):
                with pytest.raises(
                    BadInput, match=f"refused, because _target_={target} is none that backbone can build"
                ):
                    open_encoder(str(run), digits)
    with pytest.raises(BadInput, match="not part of twoviews"):
        build(DictConfig({"_target_": "os.system", "command": "touch made"}))
    assert not (tmp_path / "made").exists()


REFUSED = {
    "namespace.pt": (lambda: {"args": argparse.Namespace(lr=1), **theirs().state_dict()}, "argparse.Namespace"),
    "module.pt": (theirs, "ResNet"),
    "other.pt": (lambda: torch.nn.Linear(2, 2).state_dict(), "no ResNet with torchvision's names"),
    "tensor.pt": (lambda: torch.zeros(3), "no ResNet"),
    "next.pt": (lambda: torchvision.models.resnext50_32x4d(weights=None).state_dict(), "no plain ResNet"),
    "short.pt": (
        lambda: {key: value for key, value in theirs().state_dict().items() if key != "layer2.0.conv2.weight"},
        "layer2.0.conv2.weight",
    ),
    "deep.pt": (
        lambda: {
            key.replace("conv1.weight", "conv1.0.weight", 1) if key == "conv1.weight" else key: value
            for key, value in theirs().state_dict().items()
        },
        "no 3x3 or 7x7 convolution",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_resnet(tmp_path: Path, name: str) -> None:
    content, part = REFUSED[name]
    torch.save(content(), tmp_path / name)
    with pytest.raises(BadInput, match=part):
        open_encoder(name, colour)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    torch.save(theirs().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1_000_000])
    (tmp_path / "text.pth").write_text("hello world")
    (tmp_path / "text.safetensors").write_text("hello world")
    for name in ("half.pt", "text.pth", "text.safetensors"):
        with pytest.raises(BadInput, match="cannot be read as weights alone, so it is refused"):
            open_encoder(name, colour)
    with pytest.raises(BadInput, match=r"there is no such file. Did you mean 'whole.pt'\?"):
        open_encoder("whle.pt", colour)
    assert set(read_tensors(tmp_path / "whole.pt")) == set(theirs().state_dict())


# names of networks


def test_random_networks_of_both_libraries() -> None:
    found = open_encoder("torchvision:resnet18", colour)
    assert isinstance(found.encoder, ResNet) and found.encoder.state_dict().keys() == {
        key for key in theirs(depths=(2, 2, 2, 2)).state_dict() if not key.startswith("fc.")
    }
    again = open_encoder("torchvision:resnet18", colour).encoder.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in found.encoder.state_dict().items())
    assert (found.name, found.folder) == ("torchvision-resnet18", Path("outputs/evaluation-torchvision-resnet18"))
    found = open_encoder("timm:resnet10t", digits)
    assert isinstance(found.encoder, Timm) and found.preprocessing.channels == 1
    assert found.preprocessing.image_size == 32


NAMES = {
    "torchvision:resnet81": "Did you mean 'resnet18'",
    "torchvision:resnet18:pretraind": ":pretrained",
    "torchvision:vgg11": "run=timm:vgg11",
    "timm:resnet81": "Did you mean 'resnet",
    "tim:resnet18": "Did you mean 'timm'",
    "torchvison:resnet18": "Did you mean 'torchvision'",
    "torchvision:resnet18:pretrained": "resnet18-f37072fd.pth at .*hub/hub/checkpoints/resnet18-f37072fd.pth",
    "timm:resnet18:pretrained": "timm/resnet18.a1_in1k at .*hub/hub/checkpoints/resnet18.a1_in1k.safetensors",
    "timm:vit_tiny_patch16_18:pretrained": "Did you mean",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_not_right(name: str) -> None:
    with pytest.raises(BadInput, match=NAMES[name]):
        open_encoder(name, colour)


def test_pretrained_weights_that_lie_here(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    model = theirs(depths=(2, 2, 2, 2))
    torch.save(model.state_dict(), place / "resnet18-f37072fd.pth")
    save_file(model.state_dict(), place / "resnet18.a1_in1k.safetensors")
    images = torch.randn(2, 3, 64, 64)
    expected = features(model, images)
    for library in ("torchvision", "timm"):
        found = open_encoder(f"{library}:resnet18:pretrained", colour)
        with torch.no_grad():
            torch.testing.assert_close(found.encoder.eval()(images), expected, rtol=1e-5, atol=1e-5)
        assert found.preprocessing.image_size == 224 and found.preprocessing.mean == (0.485, 0.456, 0.406)
        assert found.name == f"{library}-resnet18-pretrained"


def test_what_is_no_run_needs_data(tmp_path: Path) -> None:
    torch.save(theirs().state_dict(), tmp_path / "plain.pt")
    for name in ("plain.pt", "torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(BadInput, match="is not the folder of a run, so its images are not known; name them: data="):
            open_encoder(name)
    (place := tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(theirs(depths=(2, 2, 2, 2)).state_dict(), place / "resnet18-f37072fd.pth")
    loaded = open_encoder("torchvision:resnet18:pretrained")  # which size and statistics belong to them is known
    assert loaded.load_data(colour).size == 224
    with pytest.raises(BadInput, match="its images are not known"):
        loaded.load_data()


# our own


def same(encoder: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(encoder.state_dict().items(), other.state_dict().items(), strict=True)
    return all(key == name and torch.equal(value, there) for (key, value), (name, there) in pairs)


def test_a_run_and_its_files(trained: Path, tmp_path: Path) -> None:
    encoder, facts = Run(trained).encoder(), json.loads((trained / "encoder.json").read_text())
    found = open_encoder(str(trained))
    assert same(found.encoder, encoder) and (found.name, found.folder) == ("run", trained)
    assert found.config == Run(trained).config() and list(found.preprocessing.mean) == facts["mean"]
    assert (found.prepare(digits()).mean, found.prepare(digits()).size) == (digits().mean, 32)
    last = open_encoder(str(trained / "last.pt"))
    assert same(last.encoder, encoder) and last.config == found.config
    assert last.preprocessing == replace(found.preprocessing, statistics_source="those of digits")
    assert last.folder.match("outputs/evaluation-run-last-????????")
    file = open_encoder(str(trained / "encoder.safetensors"), digits)
    assert same(file.encoder, encoder) and file.folder.match("outputs/evaluation-run-encoder-????????")
    shutil.copy(trained / "encoder.safetensors", tmp_path / "alone.safetensors")  # without encoder.json
    assert same(open_encoder("alone.safetensors", digits).encoder, encoder)
    (folder := tmp_path / "bad").mkdir()
    shutil.copy(trained / "encoder.safetensors", folder)
    (folder / "encoder.json").write_text(json.dumps({**facts, "channels": 3}))
    with pytest.raises(BadInput, match="do not make an encoder"):
        open_encoder(str(folder / "encoder.safetensors"), digits)


def test_latest_is_the_run_begun_last(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run below"):
        open_encoder("latest")
    places = [tmp_path / "outputs" / "a", tmp_path / "multirun" / "sweep" / "b", tmp_path / "outputs" / "c" / ".hydra"]
    for age, place in enumerate(places):
        shutil.copytree(trained, place)
        os.utime(place / "config.yaml", (1_000_000 + age, 1_000_000 + age))
    assert open_encoder("latest").folder == Path("multirun/sweep/b")
    os.utime(places[0] / "config.yaml")
    assert open_encoder("latest").folder == Path("outputs/a")
    assert open_encoder("latest").notes == ("run=latest is outputs/a.",) and open_encoder("outputs/a").notes == ()
    assert repr(twoviews.load("latest", device="cpu")).startswith("PretrainedEncoder('outputs/a': ")
    with pytest.raises(BadInput, match="config.yaml is a file of a run; give its folder, run=outputs/a."):
        open_encoder("outputs/a/config.yaml")
    with pytest.raises(BadInput, match="run=lates: no run below .* has this name. Did you mean 'latest'"):
        open_encoder("lates")
    with pytest.raises(BadInput, match="holds no run .* the latest beside it is .*a"):
        open_encoder("outputs/lost")


@pytest.mark.slow  # MLflow makes its tables
def test_mlflows_id(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "ROOT", tmp_path)  # or mlflow.db would be that of the checkout
    away = shutil.copytree(trained, tmp_path / "away" / "run")
    with pytest.raises(BadInput, match="has this id, and MLflow knows none"):
        open_encoder("0" * 32)
    assert not (tmp_path / "mlflow.db").exists()
    set_target(away, f"sqlite:///{tmp_path}/mlflow.db", "found")
    upload(away, training_ended=True)
    made = run_id(away)
    assert open_encoder(made).folder == away  # what MLflow was told
    here = shutil.copytree(away, tmp_path / "outputs" / "here")
    assert open_encoder(made).folder == Path("outputs/here")  # what the folder itself says
    (here / "tracking.json").unlink()
    result = json.loads((here / "result.json").read_text())
    (here / "result.json").write_text(json.dumps({**result, "mlflow_run_id": made}))
    assert open_encoder(made).folder == Path("outputs/here")
    shutil.rmtree(here)
    shutil.rmtree(away)
    with pytest.raises(BadInput, match=f"was trained into {away}, which is not on this machine"):
        open_encoder(made)


def test_weights_are_read_with_nothing_lost(trained: Path) -> None:
    names = {f"method.encoder.{name}" for name in load_file(trained / "encoder.safetensors")}
    assert names <= read_tensors(trained / "last.pt").keys()
