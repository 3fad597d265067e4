"""What MLflow's pages show of a run: description, order of charts, encoder, user; and the same values in TensorBoard."""

import json
import math
import sys
from pathlib import Path

import numpy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twoviews import environment
from twoviews.tracking import uris
from twoviews.tracking.__main__ import main
from twoviews.tracking.client import open_experiment
from twoviews.tracking.metrics import Metrics, read
from twoviews.tracking.mirror import Tracking
from twoviews.tracking.state import NAME_TAG, UploadState, run_id, set_target
from twoviews.tracking.upload import is_uploaded, pending_artifact_bytes, upload

NOTE = "mlflow.note.content"
RESULT = {
    "state": "finished",
    "knn/top1": 91.234,
    "linear/top1": 95.0,
    "baseline/pixels_knn_top1": 60.0,
    "baseline/untrained_knn_top1": 42.0,
    "epoch": 3.0,
    "precision": "bfloat16",
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    uris.trust(uri)
    return uri


@pytest.fixture
def run(tmp_path: Path, uri: str, request: pytest.FixtureRequest) -> Path:
    """A run of 3 epochs that has just begun."""
    folder = tmp_path / "moco-digits"
    folder.mkdir()
    set_target(folder, uri, request.node.name)
    write(folder, "config.yaml", {"method": {"_target_": "twoviews.methods.moco.MoCo"}, "epochs": 3, "seed": 7})
    write(folder, "data.json", {"name": "digits", "digest": "ab"})
    write(
        folder, "environment.json", {"digest": "ab", "host": "node7", "command": "python train.py method=moco epochs=3"}
    )
    metrics = Metrics(folder)
    metrics.log(0, 0.0, {"baseline/untrained_knn_top1": 42.0, "baseline/pixels_knn_top1": 60.0})
    for step in range(1, 5):
        metrics.log(step, step / 4, {"train/loss": 1 / step, "lr": 0.1, "e_step/all/nmi": 0.5})
    metrics.log(4, 1.0, {"knn/top1": 91.234, "memory/process_mb": 100.0})
    metrics.commit(metrics.flush())
    metrics.close()
    return folder


def write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content))


def stored(folder: Path):
    state = UploadState.load(folder)
    return open_experiment(state.tracking_uri, state.experiment)[0].get_run(str(run_id(folder)))


def artifacts(folder: Path) -> set[str]:
    state = UploadState.load(folder)
    return {
        each.path
        for each in open_experiment(state.tracking_uri, state.experiment)[0].list_artifacts(str(run_id(folder)))
    }


def test_the_description_has_results_and_command(run: Path) -> None:
    upload(run, training_ended=False)
    begun = stored(run).data.tags[NOTE]
    assert begun.startswith("**MoCo** on **digits**\n\n`python train.py method=moco epochs=3`\n\n3 epochs, seed 7")
    assert "kNN" not in begun
    write(run, "result.json", RESULT)
    upload(run, training_ended=True)
    ended = stored(run).data.tags[NOTE]
    assert ended.startswith("**MoCo** on **digits**: kNN **91.23 %**, linear **95.00 %**, finished after 3 epochs\n\n")
    assert "kNN of untrained encoder 42.00 %, raw pixels 60.00 %" in ended and f"`{run}`" in ended


def test_a_description_that_a_user_has_edited_stays(run: Path) -> None:
    upload(run, training_ended=False)
    state = UploadState.load(run)
    mine = stored(run).data.tags[NOTE].replace("digits", "digits, with the new camera")
    open_experiment(state.tracking_uri, state.experiment)[0].set_tag(str(state.run_id), NOTE, mine)
    write(run, "result.json", RESULT)
    upload(run, training_ended=True)
    assert stored(run).data.tags[NOTE] == mine


def test_an_interrupted_run_says_where_and_a_job_how_it_is_trained_alone(run: Path) -> None:
    write(run, "result.json", {"state": "interrupted", "epoch": 1.25, "reason": "http://me:s3cretZ@h is away"})
    write(run, "point.json", {"axes": {}, "overrides": ["method=byol", "sweep.name=s", "data.root='a b'"]})
    upload(run, training_ended=True)
    note = stored(run).data.tags[NOTE]
    assert "interrupted after 1.25 of 3 epochs (http://…@h is away)" in note and "s3cretZ" not in note
    assert "`python train.py method=byol 'data.root='\"'\"'a b'\"'\"''`" in note


def test_a_description_that_is_too_long_ends_at_a_line(run: Path) -> None:
    write(run, "environment.json", {"digest": "ab", "command": "python train.py " + "x" * 9000})
    upload(run, training_ended=True)
    note = stored(run).data.tags[NOTE]
    assert len(note) <= 8000 and note.startswith("**MoCo** on **digits**\n\n…")


def test_charts_of_knn_and_losses_come_first(run: Path) -> None:
    upload(run, training_ended=True)
    sections = sorted({name.rpartition("/")[0] for name in stored(run).data.metrics} - {""})
    assert sections == ["knn", "train", "train/e_step/all", "train/memory"]
    assert {name for name in stored(run).data.metrics if name.startswith("knn/")} == {
        *("knn/top1", "knn/top1_pixels", "knn/top1_untrained")
    }


def test_the_encoder_of_a_finished_run_is_sent_unless_it_is_not_wanted(run: Path, uri: str) -> None:
    (run / "encoder.safetensors").write_bytes(b"weights")
    write(run, "result.json", {"state": "interrupted"})
    upload(run, training_ended=True)
    assert "encoder.safetensors" not in artifacts(run) and is_uploaded(run)
    Tracking(uri, UploadState.load(run).experiment, mirror=False, encoder=False).start(run)
    write(run, "result.json", RESULT)
    upload(run, training_ended=True)
    assert "encoder.safetensors" not in artifacts(run) and is_uploaded(run)
    Tracking(uri, UploadState.load(run).experiment, mirror=False).start(run)
    assert not is_uploaded(run) and pending_artifact_bytes(run) == len(b"weights")
    upload(run, training_ended=True)
    assert "encoder.safetensors" in artifacts(run) and is_uploaded(run)


def test_the_state_of_a_run_can_be_read_by_earlier_versions(run: Path, uri: str) -> None:
    assert "encoder" not in json.loads((run / "tracking.json").read_text())
    set_target(run, uri, "other", encoder=False)
    assert not UploadState.load(run).encoder


def test_a_run_has_the_name_of_its_user(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    upload(run, training_ended=True)
    assert stored(run).data.tags["mlflow.user"] == "ada"

    def fails() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", fails)
    set_target(run, UploadState.load(run).uri, "nobody")
    upload(run, training_ended=True)
    assert stored(run).data.tags["mlflow.user"] == "unknown"


def test_the_recorded_command_has_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(sys, "argv", ["train.py", "method=moco", "data.root=https://me:s3cretZ@h/x", "a=b c"])
    command = environment.environment(torch.device("cpu"))["command"]
    assert command == "python train.py method=moco 'data.root=https://…@h/x' 'a=b c'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert environment.environment(torch.device("cpu"))["command"].startswith("torchrun --nproc-per-node 2 train.py")


# TensorBoard


def test_tensorboard_gets_every_value_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = Metrics(run, (run / "metrics.jsonl").stat().st_size)
    metrics.log(5, 1.25, {"train/loss": math.inf})
    metrics.close()
    set_target(run, None, "x", {NAME_TAG: "temperature=0.1 seed=0"})
    out = tmp_path / "out"
    (out / "other").mkdir(parents=True)
    for _ in range(2):
        assert main(["tensorboard", str(tmp_path), "--out", str(out)]) == 0
    (file,) = out.rglob("events*")
    assert file.parent.name == "temperature=0.1 seed=0"
    events = EventAccumulator(str(file)).Reload()
    written = {(name, e.step, e.wall_time, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    recorded = {
        (name, line["step"], line["time"], numpy.float32(value).item())
        for line in read(run)
        for name, value in line.items()
        if name not in ("step", "epoch", "time")
    }
    assert written == recorded and len(written) == 17
    assert b"twoviews.methods.moco.MoCo" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert "17 values written to" in capsys.readouterr().out


def test_tensorboard_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tensorboard", str(tmp_path)]) == 2
    assert "is no run folder and has none in it" in capsys.readouterr().err


def test_without_tensorboard(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["tensorboard", str(run)]) == 2
    assert "python -m pip install tensorboard" in capsys.readouterr().err
