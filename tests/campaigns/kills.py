"""Kill trainings of every method at random moments, start-up and shutdown included, and compare what comes of them.

    python tests/campaigns/kills.py --kills 50 --folder kills          # about 25 minutes on two cores
    python tests/campaigns/kills.py --kills 4 --methods moco byol      # some of the methods

Each method is trained once undisturbed. Then the same command, with an MLflow database of its own, is killed (SIGKILL)
at moments of four kinds in turn: "start" (before the first line of metrics.jsonl), "training" (after a random step),
"schema" (while MLflow makes its tables) and "end" (after the last step: encoder, result, plots, MLflow's final update). The
same command goes on each time, and at last runs to its end and once more. Then encoder and checkpoint have to be those of
the undisturbed run, bit for bit, metrics.jsonl has to have the same points, each once, and MLflow exactly one run, finished,
with the points of metrics.jsonl and the files. Prints counts; the exit code is 1 if anything is wrong. It needs no data set.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "src"))

from conftest import SMALL, weights  # noqa: E402

from twoviews.tracking.client import metric_name  # noqa: E402
from twoviews.tracking.metrics import read  # noqa: E402
from twoviews.tracking.state import UploadState  # noqa: E402

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
KINDS = ("start", "training", "end", "schema")
MEASURED_ANEW = ("time", "images_per_s", "time/e_step", "memory/process_mb", "step", "epoch")
FILES = {"config.yaml", "environment.json", "data.json", "commit.txt", "encoder.json", "result.json", "views.png"}
LIMIT_S = 600.0  # of one command


def overrides(method: str) -> list[str]:
    """A training of some seconds."""
    fitting = (
        ["method.queue_size=128", "method.bn_splits=4"]
        if method.startswith(("moco", "pcl")) and method != "moco_v3"
        else []
    )
    if method.startswith("pcl"):
        fitting += ["method.clusters=[8,20]", "method.negative_prototypes=null", "method.warmup_epochs=1"]
    return [
        *(one for one in SMALL if one != "tracking=files"),
        f"method={method}",
        "augmentation=digits",
        "optimizer=sgd",
        *fitting,
    ]


class Command:
    """train.py with a run folder and, beside it, a database of its own."""

    def __init__(self, folder: Path, method: str):
        self.folder, self.run, self.database = folder, folder / "run", folder / "mlflow.db"
        folder.mkdir(parents=True)
        self._words = [
            sys.executable,
            str(ROOT / "train.py"),
            *overrides(method),
            f"hydra.run.dir={self.run}",
            f"tracking.uri=sqlite:///{self.database}",
        ]

    def start(self) -> subprocess.Popen:
        """The command, in a group of its own, with its output in output.txt."""
        with (self.folder / "output.txt").open("a") as output:
            output.write("---\n")
            output.flush()
            return subprocess.Popen(
                self._words,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
                start_new_session=True,
            )

    def finish(self) -> str:
        """Run it to its end; what is wrong with that, or an empty string."""
        process = self.start()
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"the command did not end within {LIMIT_S:g} s"
        return f"the command ended with {code}" if code else ""

    def last_step(self) -> int:
        """The last one in metrics.jsonl; -1 without any."""
        return max((int(line["step"]) for line in read(self.run)), default=-1)


class Timing:
    """How long an undisturbed command takes, in seconds: to its first line, and from its last step to its end."""

    def __init__(self, command: Command):
        begin, process = time.monotonic(), command.start()
        first = last = None
        while process.poll() is None:
            step, now = command.last_step(), time.monotonic()
            first = first or (now if step >= 0 else None)
            last = last or (now if step >= 12 else None)  # of 3 epochs of 4 steps
            time.sleep(0.02)
        now = time.monotonic()
        self.failed = "" if process.returncode == 0 and first and last else f"undisturbed: exit {process.returncode}"
        self.start, self.end = (first or now) - begin, now - (last or now)


def _kill_mirror(folder: Path) -> None:
    """Kill the process that mirrors a run, which has a session of its own, so that MLflow is not left in peace."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().decode(errors="replace")
            if "twoviews.tracking.mirror" in words and str(folder) in words:
                os.kill(int(place.name), signal.SIGKILL)


def kill(command: Command, kind: str, timing: Timing, moment: random.Random) -> bool:
    """Start the command and kill it at a moment of this kind; False if it ended before."""
    process = command.start()
    step, temporary = moment.randint(1, 11), command.folder / ".mlflow.db.new"
    if kind == "start":
        due = True
    else:
        due = False
        wait = {
            "training": lambda: command.last_step() >= step,
            "schema": temporary.exists,
            "end": lambda: command.last_step() >= 12,
        }[kind]
        while process.poll() is None and not (due := wait()):
            time.sleep(0.01)
    longest = {"start": timing.start, "training": 0.3, "schema": 4.0, "end": timing.end}[kind]
    end = time.monotonic() + moment.uniform(0, longest)
    while due and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
        _kill_mirror(command.folder)
    process.wait()
    return alive


def points(run: Path) -> list[tuple[int, str, float]]:
    """What does not depend on the machine's speed."""
    return [
        (int(line["step"]), key, value) for line in read(run) for key, value in line.items() if key not in MEASURED_ANEW
    ]


def wrong(command: Command, whole: Command) -> list[str]:
    """What differs from the undisturbed run."""
    found, encoder = [], "encoder.safetensors"
    if (command.run / encoder).read_bytes() != (whole.run / encoder).read_bytes():
        found.append("the encoder differs")
    one, other = weights(command.run), weights(whole.run)
    if one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one):
        found.append("the checkpoint differs")
    if points(command.run) != points(whole.run):
        found.append("metrics.jsonl has other points")
    every = [(line["step"], key) for line in read(command.run) for key in line if key not in ("time", "step", "epoch")]
    if doubled := [point for point, count in collections.Counter(every).items() if count > 1]:
        found.append(f"metrics.jsonl has points twice: {doubled[:3]}")
    left = {path.name for path in command.run.iterdir()} - {path.name for path in whole.run.iterdir()}
    if left := {name for name in left if not name.startswith(".") and name != "diff.patch"}:  # of an edited checkout
        found.append(f"files are left over: {sorted(left)}")
    return found + wrong_in_mlflow(command)


def wrong_in_mlflow(command: Command) -> list[str]:
    """What MLflow has otherwise than the run folder."""
    with sqlite3.connect(command.database) as database:
        if (answer := database.execute("pragma integrity_check").fetchone()) != ("ok",):
            return [f"mlflow.db is damaged: {answer}"]
        runs = database.execute("select run_uuid, status, artifact_uri from runs").fetchall()
        stored = database.execute("select step, key, value, is_nan from metrics order by step, key").fetchall()
    if [run[:2] for run in runs] != [(UploadState.load(command.run).run_id, "FINISHED")]:
        return [f"MLflow has the runs {runs}"]
    found = []
    lines = [
        (int(line["step"]), metric_name(key), value)
        for line in read(command.run)
        for key, value in line.items()
        if key not in ("time", "step", "epoch")
    ]
    # What was measured anew after it had been sent, such as the speed, has the value of the first time there.
    anew = {metric_name(key) for key in MEASURED_ANEW}
    steady = [(step, key, value) for step, key, value, _ in stored if key not in anew]
    if sorted(steady) != sorted(one for one in lines if one[1] not in anew):
        found.append("MLflow has other points")
    if sorted((step, key) for step, key, *_ in stored) != sorted((step, key) for step, key, _ in lines):
        found.append("MLflow lacks points, or has some twice")
    artifacts = Path(runs[0][2].removeprefix("file://"))
    if missing := (FILES | {"curves.png"}) - {path.name for path in artifacts.iterdir()}:
        found.append(f"MLflow lacks {sorted(missing)}")
    for name in FILES:
        if (artifacts / name).exists() and (artifacts / name).read_bytes() != (command.run / name).read_bytes():
            found.append(f"MLflow has another {name}")
    return found


def campaign(folder: Path, methods: list[str], kills: int, moment: random.Random) -> int:
    """Run it; the number of methods with something wrong."""
    counts, failures = collections.Counter(), 0
    shares = [kills // len(methods) + (place < kills % len(methods)) for place in range(len(methods))]
    turn = 0
    for method, share in zip(methods, shares, strict=True):
        whole = Command(folder / method / "whole", method)
        timing, problems, done = Timing(whole), [], []
        kinds = [KINDS[(turn + place) % len(KINDS)] for place in range(share)]
        turn += share
        # A training of seconds meets MLflow at its end only, and after that it is finished: those are in a folder of their own.
        rounds = [[kind for kind in kinds if (kind == "schema") == alone] for alone in (False, True)]
        for number, order in enumerate(rounds if not timing.failed else ()):
            killed = Command(folder / method / f"killed{number}", method)
            done += [kind for kind in sorted(order, key=KINDS.index) if kill(killed, kind, timing, moment)]
            problem = killed.finish() or killed.finish()
            problems += [problem] if problem else wrong(killed, whole)
            if "Traceback" in (killed.folder / "output.txt").read_text():
                problems.append("a traceback was printed")
        problems += [timing.failed] if timing.failed else []
        counts.update(done)
        failures += bool(problems)
        where = f"; see {folder / method}" if problems else ""
        print(f"{method}: {len(done)} kills ({', '.join(done)}): {'; '.join(problems) or 'right'}{where}", flush=True)
        if not problems:
            shutil.rmtree(folder / method)
    by_kind = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS)
    print(f"{sum(counts.values())} kills ({by_kind}) over {len(methods)} methods: {failures} methods went wrong")
    return failures


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=52)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--folder", type=Path, default=Path("kills"), help="new; what went wrong stays there")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of the moments")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    return 1 if campaign(given.folder.resolve(), given.methods, given.kills, random.Random(given.seed)) else 0


if __name__ == "__main__":
    sys.exit(main())
