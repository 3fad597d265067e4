"""`sweep.plan=true`: what a sweep will take before anything is spent: jobs, time, device hours and disk space.

Finished jobs of the same sweep tell how long one takes; without any, the first steps of a job are trained and measured, in
a folder that is removed. Jobs whose steps differ in cost are measured each, a few of them at most.
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twoviews.config.groups import ROOT
from twoviews.console import Console, duration, in_bytes
from twoviews.errors import counted
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import LOG, JobSpec, JobState, assigned, text, with_varying_parameters
from twoviews.sweeps.machine import Launcher
from twoviews.sweeps.results import FINISHED, gather
from twoviews.sweeps.runner import train_arguments
from twoviews.sweeps.slurm import Slurm
from twoviews.tracking.metrics import read

MAX_MEASURED = 3  # kinds of jobs that are measured; the others are taken to cost as much as the most expensive of these
MEASURED_SECONDS, MEASURED_LINES = 20.0, 4  # of training: until both are reached, but not longer than
MAX_MEASURED_SECONDS = 120.0  # from the first step on
FIRST_STEP_SECONDS = 900.0  # longest wait for the first step: images may have to be decoded before
# The cost of a step does not depend on these, nor on fractional numbers of the method such as its temperature.
FREE_OF_COST = ("seed", "epochs", "optimizer.", "schedule.")


@dataclass(frozen=True)
class Cost:
    """The cost of jobs of one kind.

    Args:
        fixed_s: seconds of a job besides its epochs.
        epoch_s: seconds of an epoch.
        disk: bytes of its folder at the end.
        device: the GPU's name, or CPU.
        device_count: GPUs, or threads of a CPU.
        source: how that is known, for the user.
    """

    fixed_s: float
    epoch_s: float
    disk: int
    device: str
    device_count: int
    source: str

    def seconds(self, spec: JobSpec) -> float:
        """Seconds of the whole training of a job."""
        epochs = next(line.split()[1] for line in spec.config_yaml.splitlines() if line.startswith("epochs:"))
        return self.fixed_s + self.epoch_s * float(epochs)


class NotMeasured(Exception):
    """The measured training did not come so far; the message is its own last line."""


def plan(
    folder: Path, specs: Sequence[JobSpec], states: Mapping[str, JobState], launcher: Launcher, console: Console
) -> None:
    """Print what launching these jobs would start and what that takes; nothing is submitted.

    Args:
        folder: of the sweep, which need not exist.
        specs: its jobs.
        states: of those that exist already, by digest.
        launcher: which would run them.
        console: where it is printed.
    """
    now = {spec.digest: states[spec.digest].state if spec.digest in states else "new" for spec in specs}
    rows = [
        {"job": spec.digest, **{key: text(value) for key, value in spec.parameters.items()}, "now": now[spec.digest]}
        for spec in specs
    ]
    console.rows(f"{folder.name}: {counted(len(specs), 'job')}", rows)
    todo = [spec for spec in specs if now[spec.digest] not in (FINISHED, "PRUNED", "RUNNING", "QUEUED")]
    counts = ", ".join(f"{count:,} {state}" for state, count in Counter(now.values()).items())
    console.say(f"jobs      {counts}; {len(todo):,} to run")
    if todo:
        try:
            costs = _costs(folder, todo, launcher.processes(), console)
        except NotMeasured as error:
            console.say(f"time      not known: {error}")
        else:
            _print_time(todo, costs, launcher, console)
            _print_disk(folder, costs, console)
            if isinstance(launcher, Slurm):
                _print_slurm(todo, costs, launcher, console)
    console.say("nothing was submitted: the same command without sweep.plan=true does that.")


def _print_time(todo: Sequence[JobSpec], costs: Sequence[Cost], launcher: Launcher, console: Console) -> None:
    seconds = [cost.seconds(spec) for cost, spec in zip(costs, todo, strict=True)]
    hours = sum(job_seconds * cost.device_count for job_seconds, cost in zip(seconds, costs, strict=True)) / 3600
    unit = "core-hours" if costs[0].device == "CPU" else "GPU-hours"
    per_job = " to ".join(dict.fromkeys([duration(min(seconds)), duration(max(seconds))]))
    console.say(f"time      about {per_job} per job, {duration(sum(seconds))} one after the other; {hours:.3g} {unit}")
    at_once = min(launcher.capacity(), len(todo))
    if at_once > 1:
        together = max(sum(seconds) / at_once, max(seconds))
        console.say(f"          about {duration(together)} with {at_once} at once, if that does not slow them down")
    for source in dict.fromkeys(cost.source for cost in costs):
        console.say(f"          {source}")


def _print_disk(folder: Path, costs: Sequence[Cost], console: Console) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, sum(cost.disk for cost in costs)
    per_job = in_bytes(needed // len(costs))
    console.say(f"disk      about {in_bytes(needed)}, {per_job} per job; {in_bytes(free)} are free")
    if needed > free:
        console.say("          that is more than there is: free some, or move with hydra.sweep.dir=.")


def _print_slurm(todo: Sequence[JobSpec], costs: Sequence[Cost], launcher: Slurm, console: Console) -> None:
    console.say(f"SLURM     would be asked for {counted(len(todo), 'job')}, each: {launcher.describe()}")
    if any(cost.device == "CPU" for cost in costs) and launcher.gpus_per_node:
        console.say("          the time above is that of a CPU, and these jobs get GPUs: it says little about them")
    slow = sum(cost.seconds(spec) > 60 * launcher.timeout_min for cost, spec in zip(costs, todo, strict=True))
    if slow:
        limit = f"timeout_min={launcher.timeout_min}"
        console.say(f"          {slow:,} of them need longer than {limit}: they are requeued and go on")


def _costs(folder: Path, todo: Sequence[JobSpec], processes: int, console: Console) -> list[Cost]:
    """The cost of each job.

    Raises:
        NotMeasured: no job is finished, and the measured ones did not train.
    """
    finished, kinds = _finished_costs(folder), {_kind(spec.parameters): spec for spec in reversed(todo)}
    costs = {kind: finished[kind] for kind in kinds if kind in finished}
    for kind, spec in [(kind, spec) for kind, spec in kinds.items() if kind not in finished][:MAX_MEASURED]:
        cost = costs[kind] = _measured(spec, console)
        if processes > 1:
            source = f"{cost.source}; counted as if {processes} processes per job were no faster than that one"
            costs[kind] = replace(cost, device_count=cost.device_count * processes, source=source)
    highest = max(costs.values(), key=lambda cost: cost.epoch_s)
    left = counted(len(kinds) - len(costs), "more kind")
    assumed = replace(highest, source=f"{left} of jobs taken to cost as much as the most expensive of these")
    return [costs.get(_kind(spec.parameters), assumed) for spec in todo]


def _kind(parameters: Mapping[str, Any]) -> str:
    """The varying parameters on which the cost of a step depends, as text."""
    costly = {
        key: value
        for key, value in parameters.items()
        if not key.startswith(FREE_OF_COST) and not (key.startswith("method.") and isinstance(value, float))
    }
    return text(dict(sorted(costly.items())))


def _finished_costs(folder: Path) -> dict[str, Cost]:
    """The median cost of the finished jobs of a sweep, by kind."""
    if not (folder / "sweep.json").exists():
        return {}
    sweep, costs = Sweep(folder), {}
    rows = gather(sweep).jobs
    for job in with_varying_parameters(sweep.jobs):
        row = rows.loc[job.digest]
        if row["state"] == FINISHED and row["epoch"]:
            seconds, device_count = float(row["seconds"] / row["epoch"]), int(row["device_count"])
            source = "as finished jobs of this sweep took"
            cost = Cost(0.0, seconds, _size(job.folder), str(row["device"]), device_count, source)
            costs.setdefault(_kind(job.parameters), []).append(cost)
    return {kind: sorted(some, key=lambda cost: cost.epoch_s)[len(some) // 2] for kind, some in costs.items()}


def _size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _measured(spec: JobSpec, console: Console) -> Cost:
    """The cost of a job from its first steps, which are trained in a folder that is removed.

    Raises:
        NotMeasured: the training did not come so far.
    """
    console.say(f"measuring the first steps of {assigned(spec.parameters) or spec.digest} …")
    with tempfile.TemporaryDirectory(prefix="twoviews-plan-") as name:
        folder, started = Path(name), time.time()
        (folder / "config.yaml").write_text(spec.config_yaml)
        (folder / "point.json").write_text(
            json.dumps({"axes": dict(spec.parameters), "overrides": list(spec.overrides)})
        )
        command = [sys.executable, str(ROOT / "train.py"), *train_arguments(folder), "tracking.mirror=false"]
        if _mean_cost(spec) < 1:  # the first epochs are cheaper than the others
            command.append("small_views.share=0")
        with (folder / LOG).open("w") as log:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_steps(child, folder)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # it leaves with a checkpoint, whose size is needed too
                try:
                    child.wait(MAX_MEASURED_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        return _cost_of_folder(spec, folder, started)


def _wait_for_steps(child: subprocess.Popen, folder: Path) -> None:
    start = time.monotonic()
    while child.poll() is None:
        time.sleep(0.5)
        lines = [line for line in read(folder) if line["step"] > 0]
        spent = lines[-1]["time"] - lines[0]["time"] if lines else 0.0
        enough = spent > MEASURED_SECONDS and len(lines) >= MEASURED_LINES
        if enough or spent > MAX_MEASURED_SECONDS or (not lines and time.monotonic() - start > FIRST_STEP_SECONDS):
            return


def _cost_of_folder(spec: JobSpec, folder: Path, started: float) -> Cost:
    """The cost of a job from the files of its measured training, which started at that time."""
    lines = list(read(folder))
    steps = [line for line in lines if "train/loss" in line]
    if len(steps) < 2:
        output = [line.strip() for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
        raise NotMeasured((output or ["the measured training printed nothing"])[-1].removeprefix("error: "))
    environment = json.loads((folder / "environment.json").read_text())
    result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
    fixed_s, epoch_s = _seconds(spec, lines, steps, result, started)
    checkpoints = {path.name: path.stat().st_size for path in folder.glob("*.pt")}
    device = environment["gpu"] or "CPU"
    return Cost(
        fixed_s=fixed_s,
        epoch_s=epoch_s * _mean_cost(spec),
        disk=_size(folder) - sum(checkpoints.values()) + 2 * checkpoints.get("last.pt", 0),  # last.pt and previous.pt
        device=device,
        device_count=1 if environment["gpu"] else int(environment["threads"]),
        source=f"as {len(steps)} lines of its first {steps[-1]['step']:.0f} steps took on this machine, alone ({device})",
    )


def _mean_cost(spec: JobSpec) -> float:
    """What an epoch costs on average, as a share of one without smaller views: of the first epochs, their share of pixels."""
    match = re.search(r"^small_views:\n  share: (\S+)\n  scale: (\S+)", spec.config_yaml, re.MULTILINE)
    share, scale = map(float, match.groups()) if match else (0.0, 1.0)
    return 1 - share * (1 - scale**2)


def _seconds(
    spec: JobSpec,
    lines: Sequence[Mapping[str, float]],
    steps: Sequence[Mapping[str, float]],
    result: Mapping[str, Any],
    started: float,
) -> tuple[float, float]:
    """Seconds besides the epochs, and of an epoch; `steps` are the lines with a loss."""
    end = max(line["time"] for line in lines)
    if result.get("state") == "finished":  # it was so short that nothing has to be extrapolated
        return lines[0]["time"] - started, (end - lines[0]["time"]) / steps[-1]["epoch"]
    step_s = statistics.median(
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(steps, steps[1:], strict=False)
        if later["step"] > earlier["step"]
    )
    # Before the first step, kNN of the untrained encoder and of the pixels was measured, if that is possible. Later it is
    # measured every so many epochs, and at the end linear accuracy too, which takes about as long again.
    probes_s = max(0.0, result.get("seconds", 0.0) - (end - lines[0]["time"])) if lines[0]["step"] == 0 else 0.0
    every = [int(epochs) for epochs in re.findall(r"^\s+every_epochs: ([1-9]\d*)", spec.config_yaml, re.MULTILINE)]
    epoch_s = steps[-1]["step"] / steps[-1]["epoch"] * step_s + probes_s / min(every, default=math.inf)
    return probes_s + lines[0]["time"] - started, epoch_s
