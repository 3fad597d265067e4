"""What a sweep will take, before anything is spent: points, time, device hours and disk.

Finished points of the same sweep say how long one takes; without any, the first steps of a point are trained and measured,
in a folder that is thrown away. Points that differ in what a step costs are measured each, a few of them at most.
"""

import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twoviews.config.groups import ROOT
from twoviews.console import Console, duration, in_bytes
from twoviews.sweeps.dispatch import Dispatch
from twoviews.sweeps.folder import New, State, Sweep
from twoviews.sweeps.results import gather
from twoviews.sweeps.slurm import Slurm
from twoviews.sweeps.supervise import arguments
from twoviews.sweeps.words import counted, text
from twoviews.tracking.metrics import read

MEASURED = 3  # kinds of points that are measured; the others are taken to cost as much as the dearest of these
ENOUGH_S, ENOUGH_LINES = 20.0, 4  # of training that is measured: the longer of the two, but not more than
LONGEST_S = 120.0  # from the first step on
PATIENCE_S = 900.0  # until the first step: images may have to be decoded first
# What a step costs does not depend on these, nor on a fraction of the method such as its temperature.
FREE_OF_CHARGE = ("seed", "epochs", "optimizer.", "schedule.")


@dataclass(frozen=True)
class Pace:
    """What points of one kind take.

    Args:
        fixed_s: seconds of a point besides its epochs.
        epoch_s: seconds of an epoch.
        disk: bytes of its folder at the end.
        device: GPU's name, or CPU.
        width: GPUs, or threads on a CPU.
        source: how that is known, for a person.
    """

    fixed_s: float
    epoch_s: float
    disk: int
    device: str
    width: int
    source: str

    def seconds(self, point: New) -> float:
        """Of the whole training."""
        return self.fixed_s + self.epoch_s * _epochs(point)


class NotMeasured(Exception):
    """The measured training did not get so far; the message is its own last word."""


def plan(folder: Path, new: Sequence[New], now: Mapping[str, State], dispatch: Dispatch, console: Console) -> None:
    """Print what launching these points would start and what that takes; nothing is submitted.

    Args:
        folder: of the sweep; it need not be there.
        new: its points.
        now: states of those that are there already, by digest.
        dispatch: who would run them.
        console: where it is printed.
    """
    rows = [
        {"point": one.digest, **one.axes, "now": now[one.digest].state if one.digest in now else "new"} for one in new
    ]
    console.rows(
        f"{folder.name}: {counted(len(new), 'point')}",
        [{key: _cell(value) for key, value in row.items()} for row in rows],
    )
    states = [now[one.digest].state if one.digest in now else "new" for one in new]
    done = ("FINISHED", "PRUNED", "RUNNING", "QUEUED")
    todo = [one for one, state in zip(new, states, strict=True) if state not in done]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    console.say(f"points    {', '.join(f'{count:,} {state}' for state, count in counts.items())}; {len(todo):,} to run")
    if todo:
        _say_cost(folder, todo, dispatch, console)
    console.say("nothing was submitted: the same command without sweep.plan=true does that.")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else text(value)


def _say_cost(folder: Path, todo: Sequence[New], dispatch: Dispatch, console: Console) -> None:
    try:
        paces = _paces(folder, todo, dispatch.processes(), console)
    except NotMeasured as error:
        console.say(f"time      not known: {error}")
        return
    each = [pace.seconds(point) for pace, point in zip(paces, todo, strict=True)]
    hours = sum(seconds * pace.width for seconds, pace in zip(each, paces, strict=True)) / 3600
    unit = "core-hours" if paces[0].device == "CPU" else "GPU-hours"
    point = " to ".join(dict.fromkeys([duration(min(each)), duration(max(each))]))
    console.say(f"time      about {point} a point, {duration(sum(each))} one after the other; {hours:.3g} {unit}")
    room = min(dispatch.room(), len(todo))
    if room > 1:
        together = max(sum(each) / room, max(each))
        console.say(f"          about {duration(together)} with {room} at once, if that does not slow them down")
    for source in dict.fromkeys(pace.source for pace in paces):
        console.say(f"          {source}")
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free
    disk = sum(pace.disk for pace in paces)
    console.say(f"disk      about {in_bytes(disk)}, {in_bytes(disk // len(paces))} a point; {in_bytes(free)} are free")
    if disk > free:
        console.say("          that is more than there is: free some, or move with hydra.sweep.dir=.")
    if isinstance(dispatch, Slurm):
        console.say(f"SLURM     would be asked for {counted(len(todo), 'task')}, each: {dispatch.describe()}")
        if any(pace.device == "CPU" for pace in paces) and dispatch.gpus_per_node:
            console.say(
                "          the time above is that of a CPU, and these tasks get GPUs: it says little about them"
            )
        slow = sum(seconds > 60 * dispatch.timeout_min for seconds in each)
        if slow:
            console.say(
                f"          {slow:,} of them need longer than timeout_min={dispatch.timeout_min}: they are requeued and go on"
            )


# ------------------------------------------------------------------------------------------------------ what a point costs


def _paces(folder: Path, todo: Sequence[New], processes: int, console: Console) -> list[Pace]:
    """The pace of each point.

    Raises:
        NotMeasured: no point is finished, and the measured ones did not train.
    """
    known, kinds = _finished(folder), {_kind(point.axes): point for point in reversed(todo)}
    paces = {kind: known[kind] for kind in kinds if kind in known}
    for kind, point in kinds.items():
        if kind not in paces and len(paces) - len(paces.keys() & known.keys()) < MEASURED:
            paces[kind] = _of_several(_measured(point, console), processes)
    left = len(kinds) - len(paces)
    dearest = max(paces.values(), key=lambda pace: pace.epoch_s)
    other = replace(
        dearest, source=f"{counted(left, 'more kind')} of points taken to cost as much as the dearest of these"
    )
    return [paces.get(_kind(point.axes), other) for point in todo]


def _of_several(pace: Pace, processes: int) -> Pace:
    """The pace of a point with so many processes, from that of one."""
    if processes == 1:
        return pace
    source = f"{pace.source}; counted as if {processes} processes a point were no faster than that one"
    return replace(pace, width=pace.width * processes, source=source)


def _kind(axes: Mapping[str, Any]) -> str:
    """What the cost of a step depends on, among the values of the axes."""
    costly = {
        key: value
        for key, value in axes.items()
        if not key.startswith(FREE_OF_CHARGE) and not (key.startswith("method.") and isinstance(value, float))
    }
    return text(dict(sorted(costly.items())))


def _epochs(point: New) -> float:
    """How long the training is to be."""
    return next(float(line.split()[1]) for line in point.config.splitlines() if line.startswith("epochs:"))


def _finished(folder: Path) -> dict[str, Pace]:
    """What finished points of this sweep took, by kind."""
    found: dict[str, list[Pace]] = {}
    if not (folder / "sweep.json").exists():
        return {}
    for row in gather(Sweep(folder)).rows:
        if row.finished and row.epoch:
            source = "as finished points of this sweep took"
            pace = Pace(0.0, row.seconds / row.epoch, _bytes_in(row.folder), row.device, row.width, source)
            found.setdefault(_kind(row.axes), []).append(pace)
    return {kind: sorted(some, key=lambda pace: pace.epoch_s)[len(some) // 2] for kind, some in found.items()}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- a few real steps


def _measured(point: New, console: Console) -> Pace:
    """Train the first steps of a point in a folder that is thrown away.

    Raises:
        NotMeasured: it did not come so far.
    """
    values = " ".join(f"{key}={text(value)}" for key, value in point.axes.items())
    console.say(f"measuring the first steps of {values or point.digest} …")
    with tempfile.TemporaryDirectory(prefix="twoviews-plan-") as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(point.config)
        command = [sys.executable, str(ROOT / "train.py"), *arguments(folder), "tracking.mirror=false"]
        log = folder / "log.txt"
        started = time.time()
        with log.open("w") as out:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            _wait_for_steps(child, folder)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # it leaves with a checkpoint, whose size is wanted too
                try:
                    child.wait(LONGEST_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        return _pace(point, folder, log, started)


def _wait_for_steps(child: subprocess.Popen, folder: Path) -> None:
    start = time.monotonic()
    while child.poll() is None:
        time.sleep(0.5)
        lines = [line for line in read(folder) if line["step"] > 0]
        spent = lines[-1]["time"] - lines[0]["time"] if lines else 0.0
        enough = spent > ENOUGH_S and len(lines) >= ENOUGH_LINES
        if enough or spent > LONGEST_S or (not lines and time.monotonic() - start > PATIENCE_S):
            return


def _pace(point: New, folder: Path, log: Path, started: float) -> Pace:
    """From what the measured training wrote."""
    lines = list(read(folder))
    steps = [line for line in lines if "train/loss" in line]
    result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
    if len(steps) < 2:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise NotMeasured((said or ["the measured training said nothing"])[-1].removeprefix("error: "))
    machine = json.loads((folder / "environment.json").read_text())
    step_s = statistics.median(
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(steps, steps[1:], strict=False)
        if later["step"] > earlier["step"]
    )
    steps_per_epoch = steps[-1]["step"] / steps[-1]["epoch"]
    # Before the first step it measured kNN of the untrained encoder and of the pixels, if it can measure at all; later it
    # does once every so many epochs, and at the end linear accuracy too, which takes about as long again.
    ended = max(line["time"] for line in lines)
    before = max(0.0, result.get("seconds", 0.0) - (ended - lines[0]["time"])) if lines[0]["step"] == 0 else 0.0
    found = re.findall(r"^\s+every_epochs: (\d+)", point.config, re.MULTILINE)
    every = [int(one) for one in found if one != "0"]
    fixed_s, epoch_s = (
        before + lines[0]["time"] - started,
        steps_per_epoch * step_s + before / min(every, default=math.inf),
    )
    if result.get("state") == "finished":  # it was so short that nothing has to be guessed
        fixed_s, epoch_s = lines[0]["time"] - started, (ended - lines[0]["time"]) / steps[-1]["epoch"]
    last, rest = (folder / "last.pt"), _bytes_in(folder)
    size = last.stat().st_size if last.exists() else 0
    checkpoints = sum(path.stat().st_size for path in folder.glob("*.pt"))
    device = machine["gpu"] or "CPU"
    return Pace(
        fixed_s=fixed_s,
        epoch_s=epoch_s,
        disk=rest - checkpoints + 2 * size,  # last.pt and previous.pt
        device=device,
        width=1 if machine["gpu"] else int(machine["threads"]),
        source=f"as {len(steps)} lines of its first {steps[-1]['step']:.0f} steps took on this machine, alone ({device})",
    )
