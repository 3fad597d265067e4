"""A mistake ends in one or two lines that name value, limit and remedy, with exit code 2, no traceback, nothing lost."""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_MOCO, Finished, refused, start
from PIL import Image

# (arguments, what the sentence names: the key, the value, the limit or the remedy)
COMMANDS = [
    (["metod=simclr"], ["metod", "'method'"]),
    (["--help", "method"], ["'method' is a group", "method=<choice>", "barlow, byol"]),
    (["method=simclrr"], ["simclrr", "'simclr'", "byol"]),
    (["backbone=resnet19"], ["resnet19", "resnet18"]),
    (["optimizer.lrr=0.1"], ["optimizer", "lrr", "'optimizer.lr'"]),
    (["method.temprature=0.1"], ["temprature", "'method.temperature'"]),
    (["+method.temprature=0.1"], ["temprature", "'method.temperature'"]),
    (["+typo=3"], ["typo"]),
    (["+epoch=3"], ["epoch", "'epochs'"]),
    (["protocol.knn.kk=3"], ["protocol.knn", "kk"]),
    (
        ["protocol=[few_labels_finetune]", "protocol.few_labels.finetune.lr=-3"],
        ["few_labels.finetune.lr=-3", "above 0"],
    ),
    (["protocol=[few_labels_finetune]", "protocol.few_labels.finetune._target_=os.system"], ["os.system", "twoviews"]),
    (["protocol=[linear_simsiam]", "protocol.linear_simsiam.optimizer=lars"], ["optimizer=lars", "larc"]),
    (["+runtime.devise=cpu"], ["devise", "'runtime.device'"]),
    (["method.temperature=0"], ["method.temperature=0", "above 0", "0.05 to 0.5"]),
    (["method.temperature=warm"], ["method.temperature=warm", "not a number"]),
    (["method.momentum=1"], ["method.momentum=1", "below 1"]),
    (["optimizer.lr=-0.1"], ["optimizer.lr=-0.1", "above 0"]),
    (["optimizer.lr_scaling=linaer"], ["linaer", "linear"]),
    (["epochs=0"], ["epochs=0", "must be at least 1."]),
    (["epochs=2.5"], ["epochs=2.5", "whole number"]),
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["fresh=maybe"], ["fresh=maybe", "true or false"]),
    (["runtime.device=gpu"], ["gpu", "cuda"]),
    (["runtime.precision=fp16", "runtime.device=cpu"], ["fp16", "GPU"]),
    (["augmentation.views.both.scael=[0.1,1]"], ["scael", "scale"]),
    (["+augmentation.views.both.scael=[0.1,1]"], ["scael", "scale"]),
    (["augmentation=moco_v2"], ["saturation", "RGB", "augmentation=no_color"]),
    (["augmentation=multicrop", "method=simclr"], ["RGB"]),
    (["batch_size=2000"], ["batch_size=2000", "1437"]),
    (["method.queue_size=4096"], ["method.queue_size=4096", "1437", "method.queue_size="]),
    (["method.queue_size=64"], ["method.queue_size=64", "128"]),
    (["batch_size=100"], ["bn_splits=8", "batch_size="]),
    (["data.train_images=5000"], ["5000", "1437"]),
    (["backbone=resnet18"], ["32x32", "backbone=resnet18_cifar"]),
    (["backbone=timm", "backbone.name=resnet81"], ["resnet81", "resnet"]),
    (["data=folder"], ["data.root"]),
    (["data=folder", "data.root=nowhere"], ["nowhere"]),
    (["data=array", "data.root=nowhere.npz"], ["nowhere.npz"]),
    (["experiment=simclr_cifar_10"], ["no such experiment", "'simclr_cifar10'"]),
    (["experiment=typo", "preview=true"], ["no such experiment", "laptop"]),
    (["+experiment=typo"], ["no such experiment"]),
    (["experiment=[laptop,typo]", "data=cifar100"], ["experiment=typo"]),
    (["experiment='None'"], ["no such experiment"]),
    (["experiment=null"], ["no such experiment", "Known: none, "]),
    (["special=null"], ["no such special", "Known: none, "]),
    (["special=digits_mocoo"], ["no such special", "'digits_moco'"]),
    (["special@_global_=typo"], ["no such special"]),
    (["-m", "experiment=laptop,typo", "seed=0"], ["experiment=typo"]),
    (["-m", "special=choice(digits_moco,typo)"], ["special=typo"]),
    (["-m", "hydra/sweeper=random", "experiment=laptop,typo"], ["experiment=typo"]),
    (["data=imagenet"], ["imagenet", "cifar10", "folder"]),
    (["epochs"], ["epochs"]),
    (["--batch-size", "64"], ["no option --batch-size", "batch_size="]),
    (["--batch-size=64"], ["no option --batch-size", "batch_size="]),
    (["seed=0,1"], ["seed=0,1", "-m"]),
    (["temperture=0.2"], ["no key or group 'temperture'", "write method.temperature=0.2"]),
    (["epoch=5"], ["Did you mean 'epochs'?"]),
    (["method.encoder=3"], ["encoder"]),
    (["+method.encoder=3"], ["encoder"]),
    (["+augmentation.size=24"], ["size"]),
    (["~method.temperature"], ["method.temperature", "missing"]),
    (["optimizer.lr=inf"], ["optimizer.lr=inf"]),
    (["simclr"], ["write augmentation=simclr or method=simclr"]),
    (["simclr", "-m"], ["write augmentation=simclr or method=simclr"]),
    (["experiment=laptop", "optimizer.lrr=1"], ["optimizer.lr", "lrr"]),
    (["schedule.warmup_epochs=200"], ["warmup_epochs=200", "50 epochs"]),
    (["data=folder", "data.root=2024"], ["data.root=2024"]),
    (["method=null"], ["method"]),
    (["method=simsiam", "batch_size=1"], ["batch_size=2"]),
    (["optimizer.nesterov=true", "optimizer.momentum=0"], ["nesterov", "momentum"]),
    (["backbone=timm", "backbone.name=efficientnet_b0", "data.train_images=1400"], ["bn_splits=1"]),
    (["method._target_=os.system"], ["os.system", "twoviews"]),
    (["tracking.uri=ftp://somewhere"], ["ftp://somewhere", "sqlite:///"]),
    (["tracking.uri=http://127.0.0.1:9"], ["http://127.0.0.1:9", "tracking=files"]),
    (["tracking.uri=./mlruns"], ["mlruns", "sqlite:///"]),
    (["runtime.accumulate=3"], ["accumulate=3", "batch_size=128"]),
    # What is made of it would not fit into any memory, or never be made.
    (["backbone.width=1000000000000"], ["more than 9.22 EB", "free", "backbone.width=1000000000000"]),
    (["backbone.width=300000"], ["TB of memory", "free", "backbone.width=300000"]),
    (["method.embed_dim=1000000000000"], ["PB of memory", "method.embed_dim=1000000000000"]),
    (["method.queue_size=100000000"], ["method.queue_size=100000000", "1437"]),
    (["method=simsiam", "method.projector_layers=1000000000000"], ["projector_layers", "at most 200"]),
    (["backbone.depths=[1000000000000]"], ["backbone.depths", "at most 200"]),
    (["augmentation.views.both.count=1000000000000"], ["views.both.count", "at most 200"]),
    (["augmentation.views.both.size=1000000"], ["PB of memory", "views.<name>.size"]),
    (["epochs=1000000000000"], ["epochs", "at most 1,000,000,000"]),
    (["seed=1" + 400 * "0"], ["seed=1", "too large"]),
    (["epochs=1" + 400 * "0"], ["epochs=1", "at most 1,000,000,000"]),
    (["batch_size=1000000000000"], ["batch_size=1000000000000", "1437"]),
    (["method=lejepa", "method.directions=9223372036854775807"], ["directions", "at most 100,000"]),
    (["optimizer.lr=1e300"], ["optimizer.lr", "at most 1e+30"]),
    (["optimizer.weight_decay=1e300"], ["optimizer.weight_decay", "at most 1e+30"]),
    (["augmentation=" + 300 * "x"], ["there is no such augmentation", "simclr"]),
    (["data=folder", "data.root=x", "data.size=16384"], ["data.size=16384", "at most 4,096"]),
    # Empty, or null where something has to be.
    (["protocol.knn=null"], ["protocol.knn=null", "protocol=[…]"]),
    (["protocol.knn=foo"], ["protocol.knn=foo", "whole group"]),
    (["protocol=[t3a]", "protocol.t3a.linear=foo"], ["protocol.t3a.linear=foo", "Linear"]),
    (["optimizer=null"], ["optimizer=null", "sgd"]),
    (["runtime=[a,b]"], ["runtime=a", "default"]),
    (["method=[1,null]"], ["method=1", "simclr"]),
    (["protocol=[3]"], ["protocol=3", "knn"]),
    (["backbone=2"], ["backbone=2", "tiny"]),
    (["sweep=null"], ["sweep=null", "sweep.name"]),
    (["augmentation.views=null"], ["augmentation.views=null", "dictionary"]),
    (["augmentation.views.both=foo"], ["both=foo", "dictionary"]),
    (["augmentation.views={}"], ["augmentation.views={}", "changes nothing"]),
    (["backbone.depths=[]"], ["backbone.depths=[]", "empty list"]),
    (["method=pcl", "method.clusters=[]"], ["method.clusters=[]", "empty list"]),
    (["method=pcl", "method.clusters=10"], ["method.clusters=10", "write [10]"]),
    (["schedule.epochs=0"], ["schedule.epochs=0", "above 0"]),
    (["schedule=step", "schedule.milestones=[inf,1]"], ["schedule.milestones=[inf, 1]", "finite"]),
    (["data=cifar10", "data.cache=''"], ["data.cache=''", "empty text"]),
    (["data=folder", "data.root='a\nb'"], ["data.root=a?b", "control character"]),
    (["data=folder", "data.channels=2"], ["data.channels=2", "1, 3"]),
    (["-m", "epochs=range(1,0)"], ["epochs=range(1,0)", "no values"]),
    (["epochs=range(1,0)"], ["epochs=range(1,0)", "-m"]),
    (["-m", "seed=0,1", "hydra/launcher=slurm", "hydra.launcher.options=foo"], ["options=foo", "dictionary"]),
    (["hydra.launcher.options=foo"], ["hydra.launcher has no key 'options'"]),
    (["-m", "seed=1,2", "hydra.sweeper.foo=3"], ["hydra.sweeper has no key 'foo'"]),
    (["tracking.uri=mysql+evil://"], ["mysql+evil", "sqlite:///"]),
    (["tracking.uri=mysql+evil://host/db"], ["mysql+evil", "mysql+pymysql"]),
    (["protocol=[corruptions]", "protocol.corruptions.corruptions=[fogg]"], ["fogg", "'protocol.corruptions"]),
    # The text to type.
    (["lr=0.1"], ["'lr'", "write optimizer.lr=0.1."]),
    (["+lr=0.1"], ["'lr'", "write optimizer.lr=0.1."]),
    (["temperature=0.1"], ["write method.temperature=0.1 or protocol.knn.temperature=0.1."]),
    (["size=64"], ["augmentation.views.both.size=64", "data.size=64 with data=array or data=folder"]),
    (["runtime.device=gpu"], ["runtime.device=cuda"]),
    (["data.root=photos"], ["data has no key 'root'", "It is a key of data=array, cifar10, cifar100, folder, stl10."]),
    (["fresh"], ["write fresh=true."]),
]


@pytest.mark.parametrize(("arguments", "parts"), COMMANDS, ids=[" ".join(arguments) for arguments, _ in COMMANDS])
def test_command(command, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    refused(command("train", *arguments), *parts)
    assert not list(tmp_path.rglob("*")), "a refused command left something behind"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["metod=simclr", "epochs=0", "optimizer.lrr=3", "batch_size=nan", "fresh"],
            ["'metod'", "'lrr'", "fresh=true", "epochs=0", "batch_size=nan"],
        ),
        (
            ["method.temperature=0", "protocol.knn=null", "seed=-1"],
            ["seed=-1", "method.temperature=0", "protocol.knn=null"],
        ),
        (["method=simclrr", "method.hidden_dim=3", "epochs=0"], ["method=simclrr", "epochs=0"]),
        (["experiment=typo", "epochs=0"], ["experiment=typo", "epochs=0"]),
        (["seed=0,1", "method.nope=3"], ["'nope'", "seed=0,1"]),
        (["-m", "seed=0,1", "epochs=0", "batch_size=0"], ["epochs=0", "schedule.epochs=0", "batch_size=0"]),
        (  # values that do not go together, of a data set that would have to be found first
            [
                "data=folder",
                "schedule.warmup_epochs=300",
                "batch_size=127",
                "runtime.accumulate=2",
                "tracking.uri=ftp://x",
            ],
            ["batch_size=127", "warmup_epochs=300", "ftp://x", "data.root="],
        ),
    ],
)
def test_every_mistake_is_said_at_once(command, arguments: list[str], parts: list[str]) -> None:
    finished = command("train", *arguments)
    errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert finished.code == 2 and "Traceback" not in finished.err
    assert len(errors) == len(parts), finished.err
    for part in parts:
        assert any(part in line for line in errors), f"{part!r} is not in {errors}"


def test_a_group_that_nobody_chooses_is_not_among_the_known_ones(command) -> None:
    """Of `special` a file is chosen by the names of method and data."""
    done = command("train", "spezial=digits_moco")
    refused(done, "there is no key or group 'spezial'", "protocol, ")
    assert "special" not in done.err


def test_memory_that_runs_out(command, monkeypatch: pytest.MonkeyPatch) -> None:
    import twoviews.assembly

    def exhausted(cfg):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(twoviews.assembly, "load_data", exhausted)
    refused(command("train", *SMALL_MOCO), "memory does not suffice", "find_batch=true")


def test_method_that_returns_no_output(command, monkeypatch: pytest.MonkeyPatch) -> None:
    from twoviews.methods.method import Output
    from twoviews.methods.moco import MoCo

    loss = MoCo.forward
    monkeypatch.setattr(MoCo, "forward", lambda *inputs: loss(*inputs).loss)
    refused(
        command("train", *SMALL_MOCO, "hydra.run.dir=a"), "twoviews.methods.moco.MoCo.forward", "Output(loss, metrics)"
    )
    monkeypatch.setattr(MoCo, "forward", lambda *inputs: Output(loss(*inputs).loss.detach()))
    refused(command("train", *SMALL_MOCO, "hydra.run.dir=b"), "twoviews.methods.moco.MoCo.forward", "gradient")


def test_cifar_without_network(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy that nobody answers at stands for a machine without network.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    finished = command(
        "train", "data=cifar10", f"data.root={tmp_path / 'd'}", f"data.cache={tmp_path / 'c'}", "tracking=files"
    )
    refused(finished, "cifar-10-python.tar.gz", str(tmp_path / "d"), "data=digits")


def images(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(len(str(folder)))
    for number in range(count):
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")


FOLDER = ("data=folder", "data.workers=0", "tracking=files")


def test_empty_folder(command, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    refused(command("train", *FOLDER, "data.root=images", "data.cache=cache"), "images")


def test_corrupt_jpeg_is_named(command, tmp_path: Path) -> None:
    images(tmp_path / "images" / "train" / "a")
    (tmp_path / "images" / "train" / "a" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    finished = command("train", *FOLDER, "data.root=images", "data.cache=cache")
    refused(finished, "bad.jpg", "data.max_broken=1")


def test_supervised_without_labels(command, tmp_path: Path) -> None:
    images(tmp_path / "images" / "train", 8)
    finished = command(
        "train", *FOLDER, "data.root=images", "data.cache=cache", "method=supervised", "batch_size=4", "backbone=tiny"
    )
    refused(finished, "labels")


def test_array_labels_of_another_length(command, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((10, 32, 32, 3), np.uint8), labels=np.arange(9))
    refused(command("train", "data=array", "data.root=data.npz", "data.cache=cache"), "9", "10")


def test_array_of_pickled_objects(command, tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.array([{"code": "runs"}], dtype=object), allow_pickle=True)
    refused(command("train", "data=array", "data.root=data.npy", "data.cache=cache"), "data.npy")


def test_run_folder_under_a_file(command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(command("train", *SMALL_MOCO, "hydra.run.dir=file/run"), "file", "hydra.run.dir=")


def test_run_folder_of_another_run(command) -> None:
    assert command("train", *SMALL_MOCO, "epochs=1", "hydra.run.dir=run").code == 0
    before = Path("run/last.pt").read_bytes()
    finished = command("train", *SMALL_MOCO, "epochs=1", "optimizer.lr=0.01", "hydra.run.dir=run")
    refused(finished, "optimizer.lr is 0.12 there and 0.01 here", "fresh=true")
    assert Path("run/last.pt").read_bytes() == before


def test_two_processes_in_one_run_folder(tmp_path: Path) -> None:
    arguments = [str(ROOT / "train.py"), *SMALL_MOCO, "epochs=2000", f"hydra.run.dir={tmp_path / 'run'}"]
    first = start(arguments, tmp_path / "first")
    try:
        while first.poll() is None and not (tmp_path / "run" / "last.pt").exists():
            time.sleep(0.05)
        second = subprocess.run(
            [*_python(), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
        refused(Finished(second.returncode, second.stdout, second.stderr), "another process", "hydra.run.dir")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_disk_full_keeps_the_checkpoint(tmp_path: Path) -> None:
    """A file system of one megabyte: the run stops with a sentence, and what was saved stays whole."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        process = subprocess.run(
            [
                *_python(),
                str(ROOT / "train.py"),
                *SMALL_MOCO,
                "backbone.width=32",
                "backbone.depths=[1,1,1]",
                f"hydra.run.dir={small / 'run'}",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=240,
        )
        finished = Finished(process.returncode, process.stdout, process.stderr)
        refused(finished, "no space", "hydra.run.dir=")
    finally:
        subprocess.run(["umount", small], check=True)


def test_loss_that_is_not_finite(command) -> None:
    finished = command("train", *SMALL_MOCO, "optimizer.lr=1e30", "schedule=constant", "runtime.log_every=1")
    assert finished.code == 1
    assert "Traceback" not in finished.err
    for part in ("step", "lr", "last.pt", "optimizer.lr"):
        assert part in finished.err
    result = json.loads((finished.folder / "result.json").read_text())
    assert result["state"] == "failed" and result["diverged"] and "at step" in result["reason"]


def test_evaluate_without_a_run(command) -> None:
    refused(command("evaluate"), "run")
    refused(command("evaluate", "run=outputs/nothing"), "outputs/nothing")
    refused(command("evaluate", "run=x", "protocol=[knnn]"), "knnn")
    refused(
        command("evaluate", "run=x", "protocol=export", "format=torchvison"), "error: format=torchvison is not one of"
    )
    refused(command("evaluate", "run=[]"), "run=[]", "empty list")
    refused(command("evaluate", "run=x", "protocol=[]"), "protocol=[knn,linear]")
    refused(command("evaluate", "outputs/moco-digits-1"), "write run=outputs/moco-digits-1.")
    refused(command("cluster", "clusters=10", "outputs/moco-digits-1"), "write run=outputs/moco-digits-1.")
    refused(command("cluster", "run=outputs/nothing", "clusters=10"), "outputs/nothing")


def _python() -> list[str]:
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return [sys.executable]
