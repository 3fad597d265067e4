"""Launchers, which run the jobs of a sweep, and those of this machine: one job after the other, or several at once with leases
on GPUs or cores. They are not launcher plugins of Hydra, which run one command.

The launchers of this machine stay in the foreground. Ctrl-C and SIGTERM stop the jobs with checkpoints. After kill -9 of

- a training, its runner writes FAILED,
- a runner, its training stops with a checkpoint, and the launcher writes LOST,
- the launcher, the runners stop their trainings with checkpoints and write INTERRUPTED.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from twoviews.console import Console, duration
from twoviews.errors import BadInput
from twoviews.locks import try_acquire
from twoviews.protocols.units import KNN_TOP1
from twoviews.ranges import Count
from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import LOG, Job
from twoviews.sweeps.job_states import RESUME_HINT, current_states
from twoviews.sweeps.mlflow_sync import BackgroundReport

POLL_SECONDS = 0.2  # between two looks at the processes
NVIDIA_SMI_SECONDS = 60.0  # it hangs where a driver does
CLUSTER_POLL_SECONDS = 5.0  # between two queries of a cluster, each one call of squeue
DRIVER = Path("/dev/nvidiactl")  # as in fallbacks.py, which imports torch

# Called with the number of free slots, which may be 0, on a cluster with `Launcher.capacity` each time; returns so many jobs or
# fewer, or None when there are no more.
JobSource = Callable[[int], Sequence[Job] | None]


class Launcher(ABC):
    """Runs the jobs of one sweep, each below a runner of its own that writes its state.json.

    The parameters of the constructor are the keys of conf/hydra/launcher/<name>.yaml.
    """

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run these jobs, from their last checkpoints if they have any; those that run already are left alone.

        Launchers of this machine return when the jobs have ended, those of a cluster when they are in its queue.

        Raises:
            BadInput: the scheduler refuses.
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        if jobs:
            sweep, say = Sweep(jobs[0].folder.parent), Console().say
            with sweep.launching(say):
                # Read again: another process may have submitted some meanwhile.
                states = current_states(sweep.named(job.digest for job in jobs))
                todo = [job for job in jobs if states[job.digest].needs_start]
                for job in jobs:
                    if job not in todo and (state := states[job.digest]).state != "FINISHED":
                        say(f"left out: {job.label}, {state.state}{': ' if state.reason else ''}{state.reason}")
                self.start(sweep, todo)

    @abstractmethod
    def start(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """What `submit` does with the jobs of a sweep that do not run, while no other process starts any."""

    @abstractmethod
    def capacity(self) -> int:
        """Number of jobs that run at once if nothing else runs."""

    def processes(self) -> int:
        """Number of processes per job."""
        return 1

    def serve(self, sweep: Sweep, source: JobSource) -> None:
        """Run jobs as `source` returns them, until there are no more.

        Args:
            sweep: to which the jobs belong.
            source: called again and again.

        Raises:
            BadInput: the scheduler refuses.
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        while (jobs := source(self.capacity())) is not None:
            if jobs:
                self.submit(jobs)
            time.sleep(CLUSTER_POLL_SECONDS)


class Slot(NamedTuple):
    """A place for one job on this machine."""

    environment: Mapping[str, str]  # variables that put a training there
    lease: FileLock | None  # held while a job runs there, and respected by all sweeps of this user


class Local(Launcher):
    """One job after the other, each with the whole machine."""

    at_once: int | None = None

    def slots(self) -> list[Slot]:
        """All slots of this machine, leased or not."""
        return [Slot({}, None)]

    def capacity(self) -> int:
        """Number of slots, or `at_once` if that is smaller."""
        return min(self.at_once or sys.maxsize, len(self.slots()))

    def start(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; return when the last one has ended."""
        batches = iter([jobs])
        self._work(sweep, lambda _: next(batches, None), f"/{len(jobs)}")

    def serve(self, sweep: Sweep, source: JobSource) -> None:
        """Run jobs as `source` returns them."""
        with sweep.launching(Console().say):
            self._work(sweep, source)

    def _work(self, sweep: Sweep, source: JobSource, total: str = "") -> None:
        """Run the jobs of a source in the slots until there are no more; returns when all have ended.

        Args:
            sweep: to which the jobs belong.
            source: called again and again.
            total: printed behind the number of each job, such as "/9".

        Raises:
            SystemExit: a signal stopped them.
        """
        slots, console, report = self.slots(), Console(), BackgroundReport()
        limit = min(self.at_once or sys.maxsize, len(slots))
        queue: deque[tuple[str, Job]] = deque()  # with their titles
        running: list[tuple[str, Job, Slot, subprocess.Popen]] = []
        signals: list[int] = []
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in numbers}
        count, more, stopping = 0, True, False
        try:
            while more or queue or running:
                if signals and not stopping:
                    more, stopping = False, True
                    queue.clear()
                    for *_, process in running:
                        process.send_signal(signal.SIGTERM)
                for entry in [entry for entry in running if entry[3].poll() is not None]:
                    title, job, slot, _ = entry
                    running.remove(entry)
                    _record_killed(job)
                    if slot.lease:
                        slot.lease.release()
                    console.say(f"{title}: {_outcome(job)}")
                    report.update(sweep)
                if more:
                    jobs, when = source(max(0, limit - len(running) - len(queue))), time.time()
                    more = jobs is not None
                    if jobs:
                        sweep.mark({job.digest: submission(None, when) for job in jobs})
                    for job in jobs or ():
                        count += 1
                        queue.append((f"[{count}{total}] {job.label}", replace(job, slurm_id=None, submitted=when)))
                for slot in [slot for slot in slots if slot not in [entry[2] for entry in running]]:
                    if queue and len(running) < limit and (slot.lease is None or try_acquire(slot.lease)):
                        title, job = queue.popleft()
                        running.append((title, job, slot, runner.start(job, slot.environment)))
                        console.say(f"{title}: begins; {job.folder / LOG}")
                if queue and not running:
                    console.say_once("all slots are leased to other pools; waiting …")
                if more or queue or running:
                    time.sleep(POLL_SECONDS)
        finally:
            report.stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if signals:
            first = signal.Signals(signals[0])
            console.say(f"stopped by {first.name}; what ran has a checkpoint, and the same command goes on.")
            sys.exit(128 + first)


@dataclass
class Pool(Local):
    """Several jobs at once, each with a GPU, a share of a GPU, or cores of its own; conf/hydra/launcher/pool.yaml says what its
    parameters mean.
    """

    jobs_per_gpu: Count
    cores_per_job: Count
    at_once: Count | None = None

    def slots(self) -> list[Slot]:
        """A slot for each share of a GPU; without GPUs, for each group of cores, which is said if the machine has a GPU.

        Raises:
            BadInput: there is none.
        """
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cores_per_job))}
        if shares := [(gpu, share) for share in range(self.jobs_per_gpu) for gpu in gpus()]:
            return [
                Slot({**threads, "CUDA_VISIBLE_DEVICES": gpu}, _lease(f"gpu{gpu}-{share}")) for gpu, share in shares
            ]
        if "CUDA_VISIBLE_DEVICES" not in os.environ and DRIVER.exists():
            Console().say(
                "slower    jobs share the cores: this machine has a GPU, and nvidia-smi, which is missing or fails, does not "
                "name it; CUDA_VISIBLE_DEVICES=0 before the command does."
            )
        cores, step = len(os.sched_getaffinity(0)), self.cores_per_job
        if step > cores:
            raise BadInput(f"hydra.launcher.cores_per_job={step}, but this machine has {cores} cores; lower it.")
        firsts = range(0, cores - step + 1, step)
        return [Slot(threads, _lease(f"cores{first}-{first + step - 1}")) for first in firsts]


def _lease(name: str) -> FileLock:
    folder = Path(tempfile.gettempdir()) / f"twoviews-leases-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; determined without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    return [] if listing.returncode else listing.stdout.split()  # when it fails, it prints the reason to stdout


def stop(jobs: Sequence[Job]) -> None:
    """Ask the runners of these jobs that live on this machine to stop with a checkpoint."""
    modules = {runner.MODULE.encode(), runner.OLD_MODULE.encode()}
    folders = {os.fsencode(job.folder) for job in jobs}
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = {*cmdline.read_bytes().split(b"\0")}
        except OSError:
            continue
        if words & modules and words & folders:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(int(cmdline.parent.name), signal.SIGTERM)


def _record_killed(job: Job) -> None:
    """Write LOST for a job whose runner was killed before it wrote how the job ended.

    Otherwise `current_states` would take the job for queued as long as this launcher lives.
    """
    if try_acquire(lock := job.lock):
        state = job.state
        if state.state != "FINISHED" and (state.active or state.submitted < job.submitted):
            reason = f"its runner was killed; {RESUME_HINT}"
            job.write(replace(state, state="LOST", submitted=job.submitted, slurm_id=None, reason=reason))
        lock.release()


def _outcome(job: Job) -> str:
    """How a job ended, as it is printed."""
    state, result = job.state, job.result
    if state.state != "FINISHED":
        return f"{state.state}: {state.reason}"
    knn = f", kNN {result[KNN_TOP1]:.2f} %" if KNN_TOP1 in result else ""
    return f"FINISHED{knn}, {duration(result['seconds'])}"
