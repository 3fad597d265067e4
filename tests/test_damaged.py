"""Files of a run or of a sweep that are damaged: whatever reads them says which one, in a sentence."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL_MOCO, refused
from safetensors.torch import load_file, save_file
from test_foreign import Call, entry  # noqa: F401

from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobSpec, JobState

TRAIN = (*SMALL_MOCO, "epochs=1", "protocol=knn")
STORE = ("--uri", "sqlite:///mlflow.db")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A sweep whose only point is a finished run with clusters."""
    place = tmp_path_factory.mktemp("trained")
    sweep = Sweep(place / "multirun" / "s")
    more = {"cwd": str(place), "code": str(sweep.folder / "code"), "choices": {}}
    sweep.add([JobSpec("aa", {"seed": 0}, ["seed=0"], "seed: 0", more)])
    run = sweep.folder / "aa"
    for name, *arguments in (("train", *TRAIN, f"hydra.run.dir={run}"), ("cluster", f"run={run}", "clusters=[5]")):
        subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *arguments], check=True, cwd=place, umask=0o027)
    sweep.jobs[0].write(JobState("FINISHED", starts=1))
    return sweep.folder


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "multirun" / "s"))


def readers(sweep: Path) -> dict[str, list[list[str]]]:
    """Commands that read a file, the quick ones; "again" is train.py that goes on from the checkpoint."""
    run = sweep / "aa"
    train, again = (["train", *TRAIN, f"hydra.run.dir={run}"], ["again", *TRAIN, f"hydra.run.dir={run}"])
    evaluate, cluster = ["evaluate", f"run={run}", "protocol=knn"], ["cluster", f"run={run}", "clusters=[5]"]
    sync, report = ["tracking", "sync", str(run), *STORE], ["sweep", "report", str(sweep)]
    status = ["sweep", "status", str(sweep)]
    return {
        "aa/result.json": [train, evaluate, sync, report],
        "aa/environment.json": [train, again],
        "aa/data.json": [again, evaluate, cluster],
        "aa/config.yaml": [evaluate, cluster, sync],
        "aa/encoder.json": [evaluate, cluster],
        "aa/encoder.safetensors": [evaluate, cluster],
        "aa/point.json": [status, report],
        "aa/state.json": [status, report],
        "aa/tracking.json": [again, sync],
        "aa/clusters.json": [cluster],
        "sweep.json": [status, report],
    }


def dumped(path: Path, tree: object) -> bytes:
    return (json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree)).encode()


def kept(path: Path) -> Any:
    return yaml.safe_load(path.read_bytes())


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    secret = path.parents[2] / "secret"
    path.replace(secret)
    path.symlink_to(secret)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "list": lambda path: path.write_bytes(b"[1]"),
    "null": lambda path: path.write_bytes(b"null"),
    "folder": folder,
    "link": link,
}


def check(entry: Call, sweep: Path, file: str, damage: Callable[[Path], object], only: int | None = None) -> None:  # noqa: F811
    """Each command that reads the file is refused in one sentence that names it."""
    for command in readers(sweep)[file][:only]:
        copy = sweep.with_name("copy")
        shutil.copytree(sweep, copy)
        if command[0] == "again" and file != "aa/result.json":
            (sweep / "aa" / "result.json").unlink()
        damage(sweep / file)
        refused(entry("train" if command[0] == "again" else command[0], *command[1:]), Path(file).name)
        shutil.rmtree(sweep)
        copy.rename(sweep)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", readers(Path()))
def test_damaged_file(entry: Call, sweep: Path, file: str, damage: str) -> None:  # noqa: F811
    check(entry, sweep, file, DAMAGES[damage])


VALUES: dict[str, dict[str, list[Any]]] = {  # of keys that are read; "-" takes the key away
    "aa/result.json": {"state": ["-", 1, "x"], "epoch": ["x", {}], "seconds": ["x", None, -1], "knn/top1": ["x", None]},
    "aa/environment.json": {"digest": ["-", 3, []]},
    "aa/data.json": {"digest": ["-", 3]},
    "aa/config.yaml": {
        "tracking": ["-", 3, {}, {"uri": 1, "experiment": "x", "mirror": False}],
        "backbone": ["-", [], "tiny"],
        "data": ["-", [], {}, {"_target_": "twoviews.data.sources.digits", "nope": 1}],
        "runtime": [[], {"device": 3}, {"channels_last": 3}],
    },
    "aa/encoder.json": {"channels": ["-", 0, "3"], "backbone": ["-", []], "mean": ["-", [1, 2], "x"], "std": [None]},
    "aa/point.json": {"overrides": ["-", "x", [1]], "axes": ["-", []], "choices": [[]]},
    "aa/state.json": {"state": ["-", "x", 3], "started": ["x"], "submitted": [None, []], "reason": [3]},
    "aa/tracking.json": {"sent_bytes": [-1, "x"], "uri": [3], "files": [[]], "nope": [1]},
    "aa/clusters.json": {"scores": ["-", []], "settings": ["-"]},
    "sweep.json": {
        "points": ["-", [], {"aa": []}, {"aa": {}}, {"aa": {"axes": 3}}, {"aa": {"axes": {}, "submitted": "x"}}],
        "axes": ["-", [], {"seed": 3}],
    },
}


@pytest.mark.parametrize("file", VALUES)
def test_value_of_another_type(entry: Call, sweep: Path, file: str) -> None:  # noqa: F811
    for key, values in VALUES[file].items():
        for value in values:

            def damage(path: Path, key: str = key, value: Any = value) -> None:
                tree = {name: one for name, one in kept(path).items() if name != key}
                path.write_bytes(dumped(path, tree if value == "-" else {**tree, key: value}))

            check(entry, sweep, file, damage, only=1)


def test_a_configuration_of_an_earlier_version(entry: Call, sweep: Path) -> None:  # noqa: F811
    run = sweep / "aa"
    tree = kept(run / "config.yaml")
    tree["runtime"] = {
        key: one
        for key, one in tree["runtime"].items()
        if key not in ("cuda_graph", "deterministic", "checkpoint_seconds")
    }
    (run / "config.yaml").write_bytes(dumped(run / "config.yaml", tree))
    again = [f"--config-path={run}", "--config-name=config", f"hydra.run.dir={run}", "hydra.output_subdir=null"]
    done = entry("train", *again, "hydra/job_logging=none")
    assert done.code == 0, done.err
    assert "runtime.cuda_graph=True, runtime.deterministic=False, runtime.checkpoint_seconds=30" in done.out
    assert "this run is finished" in done.out
    del tree["runtime"]["precision"]
    (run / "config.yaml").write_bytes(dumped(run / "config.yaml", tree))
    refused(entry("train", *again, "hydra/job_logging=none"), "runtime.precision is missing")


def test_damaged_metrics(entry: Call, sweep: Path) -> None:  # noqa: F811
    """A line that a crash tore is left out; one that the last checkpoint covers was whole."""
    run = sweep / "aa"
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "epo')
    assert entry("sweep", "status", str(sweep)).code == 0
    commands = (["sweep", "status", str(sweep)], ["tracking", "sync", str(run), *STORE])
    for damage in (b"\xff\xfe\n", b'{"step": "x", "epoch": 1, "time": 1}\n', b"{}\n", b"0" * 2**21):
        path.write_bytes(damage + whole)
        for one in commands:
            refused(entry(*one), "metrics.jsonl is damaged at byte 0", "fresh=true")
    (run / "metrics.durable").write_bytes(b"\xff")
    refused(entry(*commands[0]), "metrics.durable", "delete it")
    path.unlink()
    path.mkdir()
    for one in (*commands, ["evaluate", f"run={run}", "protocol=knn"]):
        refused(entry(*one), "metrics.jsonl")


def test_missing_files(entry: Call, sweep: Path) -> None:  # noqa: F811
    for file in ("aa/data.json", "aa/encoder.json", "aa/encoder.safetensors", "aa/point.json"):
        check(entry, sweep, file, Path.unlink)


CHECKPOINTS: dict[str, Callable[[dict], object]] = {
    "list": lambda state: [state],
    "empty": lambda state: {},
    "method": lambda state: {**state, "method": {"encoder.nope": torch.zeros(1)}},
    "shape": lambda state: {**state, "method": {name: one.reshape(1, -1) for name, one in state["method"].items()}},
    "position": lambda state: {**state, "position": {"x": 1}},
    "optimizer": lambda state: {**state, "optimizer": [1]},
    "without": lambda state: {key: one for key, one in state.items() if key != "optimizer"},
    "bytes": lambda state: {**state, "metrics_bytes": "x"},
}


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "binary", "bomb", "folder"])
def test_checkpoint_that_is_none(entry: Call, sweep: Path, kind: str) -> None:  # noqa: F811
    run = sweep / "aa"
    path = run / "last.pt"
    (run / "previous.pt").unlink()
    (run / "result.json").unlink()
    state = torch.load(path, weights_only=True)
    if kind == "binary":
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == "folder":
        folder(path)
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(2**24))
    else:
        torch.save(CHECKPOINTS[kind](state), path)
    if kind in ("list", "empty", "method", "shape", "binary", "bomb", "folder"):
        refused(
            entry("evaluate", f"run={run}", "feature=projection", "protocol=knn"),
            str(path if kind != "method" else run),
        )
    refused(entry("train", *TRAIN, f"hydra.run.dir={run}"), "fresh=true")


def test_checkpoint_given_as_run(entry: Call, sweep: Path) -> None:  # noqa: F811
    run = sweep / "aa"
    done = entry("evaluate", f"run={run / 'last.pt'}", "protocol=knn")
    assert done.code == 0 and "knn/top1" in done.out, done.err
    done = entry("cluster", f"run={run / 'last.pt'}", "clusters=[5]")
    assert done.code == 0 and re.search(r"│ +5 +│", done.out), done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_weights_that_make_no_features(entry: Call, sweep: Path, value: float) -> None:  # noqa: F811
    run = sweep / "aa"
    weights = load_file(run / "encoder.safetensors")
    name = next(one for one in weights if one.endswith("running_var" if value == -1 else "weight"))
    weights[name].view(-1)[0] = value
    save_file(weights, run / "encoder.safetensors")
    images = run  # there, and without pictures
    for protocol in ("knn", "linear", "health", "predict", "embed"):
        more = [f"protocol={protocol}", *([f"images={images}"] if protocol in ("predict", "embed") else [])]
        refused(entry("evaluate", f"run={run}", *more), "encoder.safetensors", name)
    refused(entry("cluster", f"run={run}", "clusters=[5]"), "encoder.safetensors", name)
    state = torch.load(run / "last.pt", weights_only=True)
    state["method"][f"encoder.{name}"].view(-1)[0] = value
    torch.save(state["method"], run / "weights.pt")
    refused(entry("evaluate", f"run={run / 'weights.pt'}", "data=folder", f"data.root={run}", "protocol=health"))


def test_files_are_for_whom_the_umask_says(trained: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (trained / "aa").iterdir() if path.is_file()}
    assert modes.pop("point.json") and {name for name, mode in modes.items() if mode != 0o640} <= {
        *("state.json", "config.yaml", ".supervisor.lock"),
    }, modes


def test_runs_by_the_names_that_are_printed(entry: Call, sweep: Path) -> None:  # noqa: F811
    refused(entry("evaluate", str(sweep / "aa")), f"write run={sweep / 'aa'}.")
    refused(entry("evaluate", "multirun/s/aa", "protocol=knn"), "write run=multirun/s/aa.")
    for run in ("aa", "s"):  # the table of a sweep has digests, and its name
        done = entry("evaluate", f"run={run}", "protocol=knn")
        assert done.code == 0 and "multirun/s/aa/evaluation" in done.out, done.err
    shutil.copytree(sweep, sweep.with_name("t"))
    refused(entry("evaluate", "run=aa", "protocol=knn"), "several runs", "multirun/s/aa", "multirun/t/aa")


LINKED = ("evaluation", "clusters.json", "views.png", ".writer.lock", "last.pt", "result.json.part", "deep/er/x")


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_a_folder(entry: Call, sweep: Path, name: str) -> None:  # noqa: F811
    """Through a link nothing is read, sent or overwritten, whichever file it is and whether there is such a file."""
    run, outside = sweep / "aa", sweep.parents[1] / "outside"
    outside.write_text("precious")
    path = run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    again = [f"--config-path={run}", "--config-name=config", f"hydra.run.dir={run}"]
    for command in (
        ["evaluate", f"run={run}", "protocol=knn"],
        ["cluster", f"run={run}", "clusters=[5]"],
        ["train", *TRAIN, f"hydra.run.dir={run}"],
        ["train", *TRAIN, f"hydra.run.dir={run}", "fresh=true"],
        ["train", *TRAIN, f"hydra.run.dir={run}", "preview=true"],
        ["train", *again],
        ["tracking", "sync", str(run), *STORE],
        *(["sweep", one, str(sweep)] for one in ("status", "logs", "retry", "report", "collect", "cancel")),
    ):
        refused(entry(*command), Path(name).name, "is a link", "outside")
    assert outside.read_text() == "precious" and path.is_symlink()


def test_a_link_to_a_folder_and_within_it(entry: Call, sweep: Path) -> None:  # noqa: F811
    """The folder itself may be a link, and what is in it may be a link to another file of it."""
    (sweep.parents[1] / "outputs").symlink_to(sweep)
    (sweep / "aa" / "newest.png").symlink_to("views.png")
    assert entry("evaluate", "run=outputs/aa", "protocol=knn").code == 0
    os.mkfifo(sweep / "aa" / "curves.fifo")
    refused(entry("evaluate", "run=outputs/aa", "protocol=knn"), "curves.fifo", "no regular file")


SERVER = "http://127.0.0.1:9"


def test_a_store_that_a_foreign_folder_names(entry: Call, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It would get the credentials in the environment, or write a database where it likes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(sweep.parent / "caches"))
    run = sweep / "aa"
    for uri in (SERVER.replace("127", "126"), f"sqlite:///{sweep.parent / 'made.db'}"):
        tree = kept(run / "config.yaml")
        tree["tracking"] = {**tree["tracking"], "uri": uri, "mirror": True}
        (run / "config.yaml").write_bytes(dumped(run / "config.yaml", tree))
        tree = kept(run / "tracking.json")
        (run / "tracking.json").write_text(json.dumps({**tree, "uri": uri}))
        record = kept(sweep / "sweep.json")
        (sweep / "sweep.json").write_text(
            json.dumps({**record, "parent": "0" * 32, "parent_key": "x", "tracking": {"uri": uri, "experiment": "x"}})
        )
        refused(entry("tracking", "sync", str(run)), "name it once", uri)
        refused(entry("sweep", "collect", str(sweep)), "name it once", uri)
        refused(entry("train", f"--config-path={run}", "--config-name=config", f"hydra.run.dir={run}"), "name it once")
        for one in (["cluster", f"run={run}", "clusters=[5]"], ["sweep", "report", str(sweep)]):
            done = entry(*one)
            assert done.code == 0 and "name it once" in done.out, done.out + done.err
        assert entry("evaluate", f"run={'0' * 32}").code == 2
    assert not (sweep.parent / "made.db").exists()
    assert entry("tracking", "sync", str(run), "--uri", uri).code == 0
    assert entry("tracking", "sync", str(run)).code == 0, "it is known now"


@pytest.mark.parametrize("name", ["n" * 300, "[red]x[/red]", "m\udcfcll"], ids=("long", "brackets", "latin"))
def test_names_of_all_kinds(entry: Call, trained: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Too long for a file system, markup of the console, and no UTF-8."""
    quoted = f"'{name}'"
    missing = [
        ["evaluate", f"run={quoted}"],
        ["cluster", f"run={quoted}", "clusters=[5]"],
        ["tracking", "sync", name],
        ["sweep", "status", name],
        ["train", "data=folder", f"data.root={quoted}"],
        ["train", "-m", *TRAIN, f"sweep.name={quoted}", "seed=0"],
    ]
    for one in missing:
        refused(entry(*one))
    done = entry("evaluate", name)  # which also lacks run=
    assert done.code == 2 and "Traceback" not in done.err and "is not of the form key=value" in done.err
    if len(name) > 255:
        refused(entry("train", *TRAIN, f"hydra.run.dir={quoted}"), "too long")
        return
    run = Path(shutil.copytree(trained / "aa", tmp_path / name))
    done = entry("train", *TRAIN, f"hydra.run.dir={quoted}")
    assert done.code == 0 and "this run is finished" in done.out, done.err
    for one in (
        ["evaluate", f"run={quoted}", "protocol=knn"],
        ["cluster", f"run={quoted}", "clusters=[5]"],
        ["tracking", "sync", name, *STORE],
    ):
        done = entry(*one)
        assert done.code == 0 and (name.isascii() is False or name in done.out), done.out + done.err
    assert (run / "evaluation.json").exists() and (run / "clusters.json").exists()
