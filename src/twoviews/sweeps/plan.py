"""`sweep.plan=true`: what a sweep will take before anything is spent: jobs, time, device hours and disk space.

Finished jobs of the same sweep tell how long one takes; without any, the first steps of a job are trained and measured, in
a folder that is removed. Jobs whose steps differ in cost are measured each, a few of them at most.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twoviews.config.groups import ROOT
from twoviews.console import Console, duration, in_bytes
from twoviews.errors import counted
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import LOG, Job, JobSpec, JobState, assigned, summary, text, with_varying_parameters
from twoviews.sweeps.machine import Launcher
from twoviews.sweeps.results import FINISHED, gather
from twoviews.sweeps.runner import train_arguments
from twoviews.sweeps.slurm import Slurm

MAX_MEASURED = 3  # kinds of jobs that are measured; the others are taken to cost as much as the most expensive of these
MEASURED_SECONDS, MEASURED_LINES = 20.0, 4  # a measured training ends when it has both, counted from its first step
MAX_MEASURED_SECONDS = 120.0  # from the first step, after which it ends in any case
FIRST_STEP_SECONDS = 900.0  # longest wait for the first step: images may have to be decoded before
# The cost of a step does not depend on these, nor on fractional numbers of the method such as its temperature.
FREE_OF_COST = ("seed", "epochs", "optimizer.", "schedule.")


@dataclass(frozen=True)
class Cost:
    """The cost of jobs of one kind."""

    fixed_s: float  # seconds of a job besides its epochs
    epoch_s: float  # seconds of an epoch
    disk: int  # bytes of its folder at the end
    device: str  # the GPU's name, or CPU
    device_count: int  # GPUs, or threads of a CPU
    source: str  # how that is known, for the user

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

    The folder of the sweep need not exist; states, by digest, are those of the jobs that exist already.
    """
    now = {spec.digest: states[spec.digest].state if spec.digest in states else "new" for spec in specs}
    rows = [
        {"job": spec.digest, **{key: text(value) for key, value in spec.parameters.items()}, "now": now[spec.digest]}
        for spec in specs
    ]
    console.rows(f"{folder.name}: {counted(len(specs), 'job')}", rows)
    todo = [spec for spec in specs if now[spec.digest] not in (FINISHED, "PRUNED", "RUNNING", "QUEUED")]
    console.say(f"jobs      {summary(now.values())}; {len(todo):,} to run")
    if todo:
        try:
            costs = _costs(folder, todo, launcher.processes(), console)
        except NotMeasured as error:
            console.say(f"time      not known: {error}")
        else:
            _print_costs(folder, todo, costs, launcher, console)
    console.say("nothing was submitted: the same command without sweep.plan=true does that.")


def _print_costs(
    folder: Path, todo: Sequence[JobSpec], costs: Sequence[Cost], launcher: Launcher, console: Console
) -> None:
    """Print time, disk space and SLURM's part of the jobs that have to run, from the cost of each."""
    seconds = [cost.seconds(spec) for cost, spec in zip(costs, todo, strict=True)]
    total, longest, at_once = sum(seconds), max(seconds), min(launcher.capacity(), len(todo))
    hours = sum(own * cost.device_count for own, cost in zip(seconds, costs, strict=True)) / 3600
    unit = "core-hours" if costs[0].device == "CPU" else "GPU-hours"
    per_job = " to ".join(dict.fromkeys([duration(min(seconds)), duration(longest)]))
    console.say(f"time      about {per_job} per job, {duration(total)} one after the other; {hours:.3g} {unit}")
    if at_once > 1:
        together = duration(max(total / at_once, longest))
        console.say(f"          about {together} with {at_once} at once, if that does not slow them down")
    for source in dict.fromkeys(cost.source for cost in costs):
        console.say(f"          {source}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, sum(cost.disk for cost in costs)
    per_job = in_bytes(needed // len(costs))
    console.say(f"disk      about {in_bytes(needed)}, {per_job} per job; {in_bytes(free)} are free")
    if needed > free:
        console.say("          that is more than there is: free some, or move with hydra.sweep.dir=.")
    if isinstance(launcher, Slurm):
        console.say(f"SLURM     would be asked for {counted(len(todo), 'job')}, each: {launcher.describe()}")
        if launcher.gpus_per_node and any(cost.device == "CPU" for cost in costs):
            console.say("          the time above is that of a CPU, and these jobs get GPUs: it says little about them")
        if slow := sum(own > 60 * launcher.timeout_min for own in seconds):
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
        cost = costs[kind] = _measured_cost(spec, console)
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
    sweep, costs, source = Sweep(folder), {}, "as finished jobs of this sweep took"
    rows = gather(sweep).jobs
    for job in with_varying_parameters(sweep.jobs):
        row = rows.loc[job.digest]
        if row["state"] == FINISHED and row["epoch"]:
            epoch_s, disk = float(row["seconds"] / row["epoch"]), _size(job.folder.rglob("*"))
            cost = Cost(0.0, epoch_s, disk, row["device"], int(row["device_count"]), source)
            costs.setdefault(_kind(job.parameters), []).append(cost)
    return {kind: sorted(some, key=lambda cost: cost.epoch_s)[len(some) // 2] for kind, some in costs.items()}


def _size(files: Iterable[Path]) -> int:
    """Bytes of all files among these."""
    return sum(path.stat().st_size for path in files if path.is_file())


def _measured_cost(spec: JobSpec, console: Console) -> Cost:
    """The cost of a job from its first steps, which are trained in a folder that is removed.

    Raises:
        NotMeasured: the training did not come so far.
    """
    console.say(f"measuring the first steps of {assigned(spec.parameters) or spec.digest} …")
    with tempfile.TemporaryDirectory(prefix="twoviews-plan-") as folder:
        sweep, started = Sweep(folder), time.time()
        (job,) = sweep.add([spec])
        _train_first_steps(job)
        results = gather(sweep)
        row, lines = results.jobs.loc[job.digest], results.curves[job.digest]
        # Before the first step, the images are decoded and kNN of the untrained encoder is measured; that is no part of epochs.
        steps = lines[lines["step"] > 0] if len(lines) else lines
        if len(steps) < 2 or steps["epoch"].nunique() < 2:
            output = (job.folder / LOG).read_text(errors="replace").split("\n")
            said = [line.strip() for line in output if line.strip()] or ["the measured training printed nothing"]
            raise NotMeasured(said[-1].removeprefix("error: "))
        first, last = steps.iloc[0], steps.iloc[-1]
        epoch_s = (last["time"] - first["time"]) / (last["epoch"] - first["epoch"])
        others = [path for path in job.folder.rglob("*") if path.suffix != ".pt"]
        return Cost(
            fixed_s=first["time"] - started - first["epoch"] * epoch_s,
            epoch_s=epoch_s * _mean_cost(spec),
            disk=_size(others) + 2 * _size([job.folder / "last.pt"]),  # and previous.pt
            device=row["device"],
            device_count=int(row["device_count"]),
            source=f"as {len(steps)} lines of its first {last['step']:.0f} steps took on this machine, alone ({row['device']}), "
            "without later evaluations",
        )


def _train_first_steps(job: Job) -> None:
    """Train a job until enough is known of its steps, with views of full size from the beginning."""
    command = [sys.executable, str(ROOT / "train.py"), *train_arguments(job.folder), "tracking.mirror=false"]
    command.append("small_views.share=0")  # the first epochs would be cheaper than the others
    with (job.folder / LOG).open("w") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    start = time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(0.5)
            times = [line["time"] for line in job.metrics() if line["step"] > 0]
            spent = times[-1] - times[0] if times else 0.0
            enough = spent > MEASURED_SECONDS and len(times) >= MEASURED_LINES
            if enough or spent > MAX_MEASURED_SECONDS or (not times and time.monotonic() - start > FIRST_STEP_SECONDS):
                break
    finally:
        child.terminate()  # it leaves with a checkpoint, whose size is needed too
        try:
            child.wait(MAX_MEASURED_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _mean_cost(spec: JobSpec) -> float:
    """The mean cost of an epoch of a job, relative to an epoch with views of full size.

    The first epochs may have smaller views (small_views); they are taken to cost as much less as these have fewer pixels.
    """
    match = re.search(r"^small_views:\n  share: (\S+)\n  scale: (\S+)", spec.config_yaml, re.MULTILINE)
    share, scale = map(float, match.groups()) if match else (0.0, 1.0)
    return 1 - share * (1 - scale**2)
