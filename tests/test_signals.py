"""A signal ends a training within a moment wherever it is, and the same command goes on to the same weights."""

import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_MOCO, Finished, assert_same_weights, refused
from PIL import Image

from twoviews import process_group
from twoviews.errors import Stopped
from twoviews.stop_signal import StopSignal

NUMBER = signal.SIGTERM
RUN = (*SMALL_MOCO, "epochs=2", "protocol=knn_small", "hydra.run.dir=run")
# What is called in each phase, its call that is interrupted, and the step at which result.json says that it was; -1: none.
PHASES = {
    "data": ("twoviews.assembly.make_views", 1, -1),
    "folder": ("twoviews.recording.draw_views", 1, -1),
    "pixels": ("twoviews.monitoring.PixelEncoder", 1, 0),
    "E-step": ("twoviews.methods.moco.MoCo.before_epoch", 2, 4),
    "measurement": ("twoviews.monitoring.run_protocols", 3, 8),  # after the two baselines
}


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch, name: str, wait_s: float = 60.0) -> None:
    """In that call of a function the process gets a signal, and the function would go on for a long time."""
    place, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(place)
    before, calls = getattr(owner, attribute), []

    def long(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), NUMBER)
            for _ in range(int(wait_s / 0.01)):
                time.sleep(0.01)
        return before(*arguments, **options)

    monkeypatch.setattr(owner, attribute, long)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a training that nothing interrupted."""
    place = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *RUN], cwd=place, check=True, capture_output=True)
    return place / "run"


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_ends_it_and_the_rest_comes_later(command, monkeypatch, whole: Path, phase: str) -> None:
    name, call, step = PHASES[phase]
    with monkeypatch.context() as patched:
        interrupted_at(call, patched, name)
        begun = time.monotonic()
        done: Finished = command("train", *RUN)
    assert done.code == 128 + NUMBER and time.monotonic() - begun < 60, done.out + done.err
    assert "SIGTERM: stopping" in done.err and "Traceback" not in done.err
    if step < 0:
        assert "stopped before the training began; the same command begins again" in done.err
    else:
        result = json.loads(Path("run/result.json").read_text())
        assert (result["state"], result["step"]) == ("interrupted", step)
        assert "the same command goes on" in done.out
    again: Finished = command("train", *RUN)
    assert again.code == 0, again.err
    if phase == "measurement":
        assert "resuming at step 8" in again.out
    assert_same_weights(whole, Path("run"))
    assert measured(Path("run")) == measured(whole)


def measured(run: Path) -> list[tuple[int, str, float]]:
    """Each accuracy with its step, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, value) for line in lines for name, value in line.items() if "top1" in name]


def test_a_signal_is_remembered_only_while_there_is_something_to_save() -> None:
    with StopSignal() as stop:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), NUMBER)
        assert stopped.value.number == stop.number == NUMBER
        os.kill(os.getpid(), signal.SIGUSR2)  # SLURM sends two: the second does not disturb what the first has begun
    with StopSignal() as stop, stop.deferred():
        with stop.at_once():
            pass
        os.kill(os.getpid(), NUMBER)
        assert stop.number == NUMBER
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it came before")


def test_a_signal_does_not_wait_for_the_other_processes(monkeypatch, capfd) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "START_NOTICE_S", 0.2)
    later = threading.Timer(1.0, lambda: os.kill(os.getpid(), NUMBER))
    later.start()
    with StopSignal(), pytest.raises(Stopped), process_group.group(torch.device("cpu")):
        pytest.fail("the other process does not exist")
    assert "for the others of 2 (WORLD_SIZE); if there are none, unset WORLD_SIZE" in capfd.readouterr().err


def test_processes_that_do_not_come_are_a_sentence(command, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    port = free_port()
    os.environ.update({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    monkeypatch.setattr(process_group, "START_TIMEOUT_S", 0.5)
    refused(command("train", *RUN), f"not all of the 2 processes (WORLD_SIZE) came to 127.0.0.1:{port}", "torchrun")


def free_port() -> str:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def photographs(root: Path) -> list[str]:
    """A data set of files that are decoded on demand; overrides that choose it."""
    for number in range(48):
        path = root / "train" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (230, 230, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return ["data=folder", f"data.root={root}", f"data.cache={root}/cache", "data.workers=2"]


@pytest.mark.parametrize(
    "die", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)], ids=["killed", "left"]
)
def test_a_worker_that_dies_is_one_sentence(command, monkeypatch, tmp_path: Path, die: Callable[[], None]) -> None:
    ours = os.getpid()
    monkeypatch.setattr("twoviews.data.decoding.decode", lambda *_: die() if os.getpid() != ours else None)
    done = command("train", "preview=true", *photographs(tmp_path / "set"))
    refused(done, "a process that decodes images is gone (DataLoader worker", "data.workers=1", "same command")
    assert re.search(r"killed by signal|exited", done.err)
