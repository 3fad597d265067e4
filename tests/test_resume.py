"""An interrupted run ends bit for bit where an uninterrupted one does, whatever interrupted it."""

import json
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch
from assembled import DIFFERENT_CODE, fitting
from conftest import ROOT, SMALL, SMALL_MOCO, assert_same_weights, refused, start
from hydra.utils import instantiate

from twoviews.checkpoints import CHECKPOINT_KEYS, copied, load_last_checkpoint, save_checkpoint
from twoviews.errors import BadInput
from twoviews.locks import evaluation_lock, is_training, training_lock
from twoviews.recording import record_start
from twoviews.run import Run
from twoviews.stop_signal import StopSignal
from twoviews.tracking.client import metric_name
from twoviews.tracking.metrics import read

LONG = ("epochs=12", "tracking=files", "protocol.knn.every_epochs=4")


def train(folder: Path, *arguments: str):
    return start([str(ROOT / "train.py"), *SMALL_MOCO, *LONG, f"hydra.run.dir={folder / 'run'}", *arguments], folder)


def lines(folder: Path) -> list[dict]:
    return list(read(folder / "run"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder).wait(300) == 0, (folder / "stderr.txt").read_text()
    return folder


def same_metrics(one: Path, other: Path) -> None:
    def points(folder: Path):
        return [
            (line["step"], key, value)
            for line in lines(folder)
            for key, value in line.items()
            if key not in ("time", "images_per_s", "time/e_step", "memory/process_mb", "step", "epoch")
        ]

    assert points(one) == points(other)


def test_killed_at_five_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    total = lines(undisturbed)[-1]["step"]
    moments = sorted(random.Random(1).sample(range(1, int(total)), 5))
    print("killing after steps", moments)
    for moment in moments:
        process = train(tmp_path)
        while process.poll() is None and not any(line["step"] >= moment for line in lines(tmp_path)):
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert train(tmp_path).wait(300) == 0, (tmp_path / "stderr.txt").read_text()
    assert_same_weights(undisturbed / "run", tmp_path / "run")
    same_metrics(undisturbed, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_stopped_by_signal_in_mid_epoch(tmp_path: Path, undisturbed: Path, number: signal.Signals) -> None:
    process = train(tmp_path)
    while process.poll() is None and not any(line["step"] >= 6 for line in lines(tmp_path)):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(120) == 128 + number
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["state"] == "interrupted"
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert "the same command goes on" in (tmp_path / "stdout.txt").read_text()
    if number == signal.SIGTERM:
        process, step = train(tmp_path), result["step"]
        while process.poll() is None and not any(line["step"] > step for line in lines(tmp_path)):
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not (tmp_path / "run" / "encoder.safetensors").exists()  # it was that of the interruption
    assert train(tmp_path).wait(300) == 0
    assert_same_weights(undisturbed / "run", tmp_path / "run")
    same_metrics(undisturbed, tmp_path)


PCL = ("method=pcl", "method.warmup_epochs=1", "method.clusters=[8,20]", "epochs=4")
SIGNAL_IN_E_STEP = """
import os, runpy, sys
from twoviews.methods import pcl

number, *sys.argv[:] = int(sys.argv[1]), *sys.argv[2:]
kmeans, calls = pcl.kmeans, 0

def signalled(*args, **options):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), number)
    return kmeans(*args, **options)

pcl.kmeans = signalled
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def undisturbed_pcl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed-pcl")
    assert train(folder, *PCL).wait(300) == 0, (folder / "stderr.txt").read_text()
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_of_an_e_step(tmp_path: Path, undisturbed_pcl: Path, number: signal.Signals) -> None:
    """In the second E-step, which starts from the first one's centroids, between its two clusterings."""
    broken = tmp_path / "broken"
    command = [str(ROOT / "train.py"), *SMALL_MOCO, *LONG, *PCL, f"hydra.run.dir={broken / 'run'}"]
    process = start(["-c", SIGNAL_IN_E_STEP, str(int(number)), *command], broken)
    assert process.wait(300) == (-number if number == signal.SIGKILL else 128 + number)
    assert [line["step"] for line in lines(broken) if "time/e_step" in line][0] == 4
    assert train(broken, *PCL).wait(300) == 0
    assert_same_weights(undisturbed_pcl / "run", broken / "run")
    same_metrics(undisturbed_pcl, broken)


def test_damaged_checkpoint_falls_back(tmp_path: Path, undisturbed: Path) -> None:
    process = train(tmp_path)
    while process.poll() is None and not any(line["step"] >= 20 for line in lines(tmp_path)):
        time.sleep(0.02)
    process.kill()
    process.wait()
    last = tmp_path / "run" / "last.pt"
    if not last.exists():  # killed between the renames of a save
        last.with_name("new.pt").replace(last)
    last.with_name("new.pt").unlink(missing_ok=True)
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(byte ^ 0xFF for byte in content[middle : middle + 256])  # more than padding
    last.write_bytes(content)
    assert train(tmp_path).wait(300) == 0
    assert "is damaged" in (tmp_path / "stdout.txt").read_text()
    assert_same_weights(undisturbed / "run", tmp_path / "run")


def checkpoint(step: int) -> dict[str, object]:
    return {**dict.fromkeys(CHECKPOINT_KEYS, {}), "metrics_bytes": 0, "step": step}


def test_save_that_was_killed_between_its_renames_is_finished(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "last.pt").replace(tmp_path / "new.pt")
    assert load_last_checkpoint(tmp_path, print) == checkpoint(2)
    assert load_last_checkpoint(tmp_path, print) == checkpoint(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_part_of_a_checkpoint_is_removed(tmp_path: Path, capsys) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "new.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    assert load_last_checkpoint(tmp_path, print) == checkpoint(1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and not capsys.readouterr().out


@pytest.mark.parametrize("names", [("last.pt",), ("last.pt", "previous.pt"), ("previous.pt", "new.pt")])
def test_no_whole_checkpoint_is_refused_until_fresh(tmp_path: Path, names: tuple[str, ...]) -> None:
    run = Run(tmp_path / "run")
    (tmp_path / "run" / "metrics.durable").write_text("80")
    for name in names:
        (run.folder / name).write_bytes(f"damaged {name}".encode())
    for _ in range(3):
        with pytest.raises(BadInput, match="fresh=true"):
            load_last_checkpoint(run.folder, print)
    aside = run.set_aside()
    assert aside is not None and load_last_checkpoint(run.folder, print) is None
    kept = {path.read_bytes() for path in aside.glob("*.pt")}
    assert kept == {f"damaged {name}".encode() for name in names}


def test_checkpoints_that_are_gone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.durable").write_text("80")
    for _ in range(2):
        with pytest.raises(BadInput, match="are gone"):
            load_last_checkpoint(tmp_path, print)


def test_damaged_checkpoints_are_kept_one_beside_the_other(tmp_path: Path, capsys) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
        save_checkpoint(tmp_path, checkpoint(step))
        (tmp_path / "last.pt").write_bytes(f"damaged {step}".encode())
        assert load_last_checkpoint(tmp_path, print) == checkpoint(step)
        assert "is damaged" in capsys.readouterr().out
    assert (tmp_path / "damaged.pt").read_bytes() == b"damaged 1"
    assert (tmp_path / "damaged.2.pt").read_bytes() == b"damaged 2"


TWICE = """
import os, runpy, signal, sys

where, *sys.argv[:] = sys.argv[1:]

def interrupted(function):
    def wrapper(self, *given, **named):
        for _ in range(2 * (not hasattr(self, "position") or self.position.step == 6)):
            os.kill(os.getpid(), signal.SIGINT)
        return function(self, *given, **named)
    return wrapper

from twoviews import loop, recording
of = {"step": (loop.Training, "train_step"), "close": (recording.Recording, "_close")}[where]
setattr(*of, interrupted(getattr(*of)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("where", "code", "state"),
    [("step", 128 + signal.SIGINT, "interrupted"), ("close", 0, "finished")],  # the latter has only MLflow to wait for
)
def test_a_second_ctrl_c_is_no_failure(tmp_path: Path, undisturbed: Path, where: str, code: int, state: str) -> None:
    command = [str(ROOT / "train.py"), *SMALL_MOCO, *LONG, f"hydra.run.dir={tmp_path / 'run'}"]
    assert start(["-c", TWICE, where, *command], tmp_path).wait(300) == code
    error = (tmp_path / "stderr.txt").read_text()
    assert "Traceback" not in error and ("interrupted; the same command goes on" in error) == (code > 0)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["state"] == state
    assert (tmp_path / "stdout.txt").read_text().strip().endswith(f"run: {tmp_path / 'run'}")
    assert train(tmp_path).wait(300) == 0
    assert_same_weights(undisturbed / "run", tmp_path / "run")
    same_metrics(undisturbed, tmp_path)


def test_a_folder_is_locked_before_anything_in_it_is_touched(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twoviews.locks.TRAINING_LOCK_TIMEOUT_S", 0.1)
    done = command("train", *SMALL_MOCO, "protocol=[]")
    locked = []

    def noted(run: Run, *arguments) -> None:
        locked.append(is_training(run.folder))
        record_start(run, *arguments)

    monkeypatch.setattr("twoviews.recording.record_start", noted)
    assert command("train", *SMALL_MOCO, "protocol=[]", "fresh=true").code == 0
    assert locked == [True] and not is_training(done.folder)
    before = sorted(done.folder.parent.iterdir())
    with evaluation_lock(done.folder):
        refused(command("train", *SMALL_MOCO, "protocol=[]", "fresh=true"), "evaluate.py or cluster.py is working on")
    with training_lock(done.folder):
        refused(command("train", *SMALL_MOCO, "protocol=[]", "fresh=true"), "another process is training into")
        refused(command("evaluate", f"run={done.folder}", "protocol=knn"), "is being trained at this moment")
    assert sorted(done.folder.parent.iterdir()) == before


def test_finished_by_another_command_meanwhile(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waited neither trains nor touches what is there."""
    done = command("train", *SMALL_MOCO, "protocol=[]")
    result = (done.folder / "result.json").read_bytes()
    monkeypatch.setattr("twoviews.recording.show_if_finished", lambda cfg, folder: False)
    refused(command("train", *SMALL_MOCO, "protocol=[]"), "another command has just finished the run")
    assert (done.folder / "result.json").read_bytes() == result


def test_an_evaluation_waits_for_another_of_the_same_run(command) -> None:
    done = command("train", *SMALL_MOCO, "protocol=[]")
    lock = evaluation_lock(done.folder)
    assert lock.acquire()
    timer = threading.Timer(3, lock.remove)
    timer.start()
    evaluated = command("evaluate", f"run={done.folder}", "protocol=knn")
    timer.join()
    assert evaluated.code == 0 and "waiting for another command that evaluates" in evaluated.out


def test_mlflow_is_told_later_that_a_run_is_finished(command, tmp_path: Path) -> None:
    """As after a kill between result.json and the last update: the same command sends all that is missing."""
    store = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    small = [one for one in SMALL_MOCO if one != "tracking=files"]
    done = command("train", *small, store, "tracking=files")
    again = command("train", *small, store)
    assert again.code == 0 and "is finished" in again.out and again.folder == done.folder
    result = json.loads((done.folder / "result.json").read_text())
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [
            (result["mlflow_run_id"], "FINISHED")
        ]
        found = database.execute("select step, key from metrics").fetchall()
    head = ("step", "epoch", "time")
    assert sorted(found) == sorted(
        (line["step"], metric_name(key)) for line in read(done.folder) for key in line if key not in head
    )


def test_finished_run_says_so_and_fresh_starts_over(command) -> None:
    done = command("train", *SMALL_MOCO)
    assert done.code == 0
    before = (done.folder / "last.pt").read_bytes()
    again = command("train", *SMALL_MOCO)
    assert again.code == 0 and "is finished" in again.out and again.folder == done.folder
    assert (done.folder / "last.pt").read_bytes() == before
    fresh = command("train", *SMALL_MOCO, "fresh=true")
    assert fresh.code == 0 and fresh.folder == done.folder
    kept = done.folder.with_name(done.folder.name + ".1")
    assert (kept / "last.pt").read_bytes() == before
    assert_same_weights(kept, fresh.folder)


# For 256 images and a network of 16 features, of the parameters that a method has.
FITTING = {
    "embed_dim": 32,
    "hidden_dim": 48,
    "predictor_hidden_dim": 48,
    "prototypes": 32,
    "directions": 32,
    "queue_size": 96,
    "bn_splits": 4,
    "clusters": "[8,20]",
    "negative_prototypes": "null",
    "warmup_epochs": 1,
    "queue_start_epoch": 1,
}
METHODS = sorted({*DIFFERENT_CODE} & {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "muon"])
def test_every_method_resumes(tmp_path: Path, method: str, optimizer: str) -> None:
    if optimizer != "sgd" and method not in ("byol", "simsiam"):
        pytest.skip("optimizers with state are covered by two methods")
    overrides = [
        *SMALL,
        "small_views.share=0.4",
        f"method={method}",
        "augmentation=digits",
        f"optimizer={optimizer}",
        *fitting(method, FITTING),
    ]
    whole, broken = (build(overrides, tmp_path / name) for name in ("whole", "broken"))
    assert whole.fit(Never())
    assert not broken.fit(After(7))
    resumed = build(overrides, tmp_path / "broken")
    state = load_last_checkpoint(tmp_path / "broken", print)
    assert state is not None
    resumed.restore(state)
    assert resumed.position.step == 6
    assert resumed.fit(Never())
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


class Never(StopSignal):
    """A signal that does not come."""

    def received(self, device: torch.device) -> bool:
        return False


class After(StopSignal):
    """A signal that comes after some steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def received(self, device: torch.device) -> bool:
        self.left -= 1
        return self.left < 0


def build(overrides: list[str], folder: Path):
    """A training without labels to judge, as train.py builds it."""
    from hydra import compose, initialize_config_dir

    from twoviews.assembly import load_data, make_parts, make_views
    from twoviews.console import Console
    from twoviews.loop import Training

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides)
    folder.mkdir(parents=True, exist_ok=True)
    runtime = instantiate(cfg.runtime)
    data = load_data(cfg)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu"))
    return Training(parts, folder=folder, metrics=None, console=Console(quiet=True), epochs=cfg.epochs, seed=cfg.seed)


def test_a_step_waits_until_the_checkpoint_before_it_is_copied(tmp_path: Path) -> None:
    overrides = [*SMALL_MOCO, "protocol=[]"]
    training = build(overrides, tmp_path)
    training.method.train()
    batches = iter(training.loader)
    training.train_step(next(batches))  # from here on the optimizer has momentum
    waited = []

    def slowly(state: dict, old: dict) -> dict:
        if "optimizer" in state:
            time.sleep(1)
        return copied(state, old)

    training.checkpoints.copy = slowly
    for _ in range(2):  # the second takes the memory of the first
        expected = copied({key: training.state()[key] for key in ("method", "optimizer")})
        training.save()
        before = time.monotonic()
        training.train_step(next(batches))
        waited.append(time.monotonic() - before)
        training.checkpoints.wait()
        state = load_last_checkpoint(tmp_path, print)
        assert state is not None and state["method"].keys() == expected["method"].keys()
        for name, value in expected["method"].items():
            assert torch.equal(state["method"][name], value), name
        found = torch._foreach_norm([one["momentum_buffer"] for one in state["optimizer"]["state"].values()])
        then = torch._foreach_norm([one["momentum_buffer"] for one in expected["optimizer"]["state"].values()])
        assert torch.equal(torch.stack(found), torch.stack(then))
    assert min(waited) > 0.5


def test_what_cannot_be_copied_is_not_written(tmp_path: Path) -> None:
    """The checkpoint before it stays, and the training does not pass for a finished one."""
    training = build([*SMALL_MOCO, "protocol=[]"], tmp_path)
    training.method.train()
    training.train_step(next(iter(training.loader)))
    training.save()
    training.checkpoints.wait()
    before = (tmp_path / "last.pt").read_bytes()

    def broken(state: dict, old: dict) -> dict:
        if "optimizer" in state:
            raise MemoryError("no room for a copy")
        return copied(state, old)

    training.checkpoints.copy = broken
    with pytest.raises(MemoryError, match="no room for a copy"):
        training.fit(Never())
    training.save()
    with pytest.raises(MemoryError, match="no room for a copy"):
        training.checkpoints.wait()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_copy_of_a_state_takes_the_memory_of_the_one_before() -> None:
    def state(value: float, rows: int) -> dict:
        return {"w": torch.full((2, 3), value), "nested": [{"v": torch.full((rows,), value)}, (value, None)], "step": 1}

    first = copied(state(1.0, 4))
    places = first["w"].data_ptr(), first["nested"][0]["v"].data_ptr()
    now = state(2.0, 5)
    second = copied({**now, "new": torch.zeros(2)}, first)
    assert second["w"].data_ptr() == places[0] and second["nested"][0]["v"].data_ptr() != places[1]
    assert torch.equal(second["w"], now["w"]) and torch.equal(second["nested"][0]["v"], now["nested"][0]["v"])
    assert second["nested"][1] == (2.0, None) and second["step"] == 1 and torch.equal(second["new"], torch.zeros(2))
    now["w"].zero_()
    assert second["w"].min() == 2, "not a copy"


def saved_steps(folder: Path, *overrides: str, stop: StopSignal | None = None) -> list[int]:
    """After how many steps a training of three epochs of four steps writes checkpoints."""
    training, steps = build([*SMALL_MOCO, "protocol=[]", *overrides], folder), []
    save = training.checkpoints.save

    def noted(state: dict, weights) -> None:
        steps.append(state["position"]["step"])
        save(state, weights)

    training.checkpoints.save = noted  # type: ignore[method-assign]
    training.fit(stop or Never())
    return steps


@pytest.mark.parametrize(
    ("overrides", "stop", "steps"),
    [
        ((), None, [0, 4, 8, 12]),  # checkpoint_seconds=0, of SMALL
        (("runtime.checkpoint_seconds=1000",), None, [0, 12]),
        (("runtime.checkpoint_seconds=1000",), After(7), [0, 6]),  # asked three times around steps that end an epoch
        (
            ("runtime.checkpoint_seconds=1000", "runtime.checkpoint_minutes=1e-9"),
            None,
            [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12],
        ),
    ],
    ids=["each epoch", "the last", "a signal", "within epochs"],
)
def test_when_checkpoints_are_written(tmp_path: Path, overrides, stop, steps) -> None:
    found = saved_steps(tmp_path, *overrides, stop=stop)
    assert [step for step in found if step in steps] == steps and set(found) == set(steps)
