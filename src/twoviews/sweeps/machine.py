"""Launchers, which run the jobs of a sweep, and those of this machine: one job after the other, or several at once with leases
on GPUs or cores. They are not launcher plugins of Hydra, which run one command.

The launchers of this machine stay in the foreground. Ctrl-C and SIGTERM stop the jobs with checkpoints; if the launcher is
killed otherwise, the runners notice that and stop their trainings with checkpoints too.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from twoviews.console import Console, duration
from twoviews.errors import BadInput
from twoviews.protocols.units import KNN_TOP1
from twoviews.ranges import Count
from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import LOG, Job
from twoviews.sweeps.job_states import current_states
from twoviews.sweeps.mlflow_sync import BackgroundReport

POLL_SECONDS = 0.2  # between two looks at the processes
CLUSTER_POLL_SECONDS = 5.0  # between two queries of a cluster, each one call of squeue
DRIVER = Path("/dev/nvidiactl")  # as in fallbacks.py, which imports torch

# Called with the number of free slots, which may be 0; returns so many jobs or fewer, or None when there are no more.
JobSource = Callable[[int], Sequence[Job] | None]


class Launcher(ABC):
    """Runs the jobs of one sweep, each below a runner of its own that writes its state.json.

    The parameters of the constructor are the keys of conf/hydra/launcher/<name>.yaml.
    """

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Run these jobs, from their last checkpoints if they have any; those that run already are left alone.

        Launchers of this machine return when the jobs have ended, those of a cluster when they are in its queue.

        Raises:
            BadInput: the scheduler refuses.
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """

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


@dataclass
class Slot:
    """A place for one job on this machine.

    Args:
        name: of its lease, which all sweeps of this user respect; empty for no lease.
        environment: variables that put a training there.
    """

    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    lease: FileLock | None = None

    def acquire(self) -> bool:
        """Take the lease; False if another process of this user holds it."""
        if not self.name:
            return True
        folder = Path(tempfile.gettempdir()) / f"twoviews-leases-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.lease = FileLock(folder / f"{self.name}.lock")
        try:
            self.lease.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Release the lock that `acquire` took, so that another process may use this slot."""
        if self.lease:
            self.lease.release()


class Local(Launcher):
    """One job after the other, each with the whole machine."""

    at_once: int | None = None

    def slots(self) -> list[Slot]:
        """All slots of this machine, leased or not."""
        return [Slot()]

    def print_warnings(self) -> None:
        """Print what makes the jobs slower than they could be."""

    def capacity(self) -> int:
        """Number of slots, or `at_once` if that is smaller."""
        return min(self.at_once or sys.maxsize, len(self.slots()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; return when the last one has ended."""
        self.print_warnings()
        if jobs:
            self._run(Sweep(jobs[0].folder.parent), jobs, lambda _: None)

    def serve(self, sweep: Sweep, source: JobSource) -> None:
        """Run jobs as `source` returns them."""
        self.print_warnings()
        self._run(sweep, [], source)

    def _run(self, sweep: Sweep, jobs: Sequence[Job], source: JobSource) -> None:
        slots = self.slots()
        with sweep.launching(Console().say):
            states = current_states(jobs)
            todo = [job for job in jobs if states[job.digest].state not in ("FINISHED", "RUNNING")]
            _Work(sweep, slots, min(self.at_once or sys.maxsize, len(slots))).run(todo, source)


class Pool(Local):
    """Several jobs at once, each with a GPU, a share of a GPU, or cores of its own.

    Args:
        at_once: most jobs that run together; None: as many as there are slots.
        jobs_per_gpu: jobs that share a GPU, if there are GPUs.
        cores_per_job: CPU cores of a job; without GPUs they determine the number of slots.
    """

    def __init__(self, at_once: Count | None, jobs_per_gpu: Count, cores_per_job: Count):
        self.at_once, self.jobs_per_gpu, self.cores_per_job = at_once, jobs_per_gpu, cores_per_job

    def print_warnings(self) -> None:
        """Print a line if jobs get cores although there is a GPU, because nvidia-smi cannot list it."""
        if "CUDA_VISIBLE_DEVICES" not in os.environ and not gpus() and DRIVER.exists():
            Console().say(
                "slower    jobs share the cores: this machine has a GPU, and nvidia-smi, which is missing or fails, does not "
                "name it; CUDA_VISIBLE_DEVICES=0 before the command does."
            )

    def slots(self) -> list[Slot]:
        """A slot for each share of a GPU; without GPUs, for each group of cores.

        Raises:
            BadInput: there is none.
        """
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cores_per_job))}
        shares = [(gpu, share) for share in range(self.jobs_per_gpu) for gpu in gpus()]
        if shares:
            return [Slot(f"gpu{gpu}-{share}", {**threads, "CUDA_VISIBLE_DEVICES": gpu}) for gpu, share in shares]
        cores, step = len(os.sched_getaffinity(0)), self.cores_per_job
        if step > cores:
            raise BadInput(f"hydra.launcher.cores_per_job={step}, but this machine has {cores} cores; lower it.")
        return [Slot(f"cores{first}-{first + step - 1}", threads) for first in range(0, cores - step + 1, step)]


def gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; determined without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listing = subprocess.run(command, capture_output=True, text=True)
    return [] if listing.returncode else listing.stdout.split()  # when it fails, it prints the reason to stdout


def stop(jobs: Sequence[Job]) -> None:
    """Ask the runners of these jobs that live on this machine to stop with a checkpoint."""
    modules = {runner.MODULE.encode(), runner.OLD_MODULE.encode()}
    folders = {os.fsencode(job.folder) for job in jobs}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = {*process.read_bytes().split(b"\0")}
        except OSError:
            continue
        if words & modules and words & folders:
            os.kill(int(process.parent.name), signal.SIGTERM)


class _Work:
    """Runs jobs in slots until there are no more, or a signal came.

    Args:
        sweep: to which the jobs belong.
        slots: of this machine.
        limit: most jobs that run at once.
    """

    def __init__(self, sweep: Sweep, slots: Sequence[Slot], limit: int):
        self._sweep, self._slots, self._limit, self._console = sweep, slots, limit, Console()
        self._count, self._total = 0, ""  # of the jobs so far; of all jobs, if that is known
        self._queue: deque[tuple[int, Job]] = deque()
        self._running: list[tuple[int, Job, Slot, subprocess.Popen]] = []
        self._signal, self._report = 0, BackgroundReport()

    def run(self, jobs: Sequence[Job], source: JobSource) -> None:
        """Run these jobs, and those that a source returns meanwhile; return when all have ended.

        Raises:
            SystemExit: a signal stopped them.
        """
        self._total = f"/{len(jobs)}" if jobs else ""
        self._add(jobs)
        handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop(source)
        finally:
            self._report.stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._signal:
            name = signal.Signals(self._signal).name
            self._console.say(f"stopped by {name}; what ran has a checkpoint, and the same command goes on.")
            sys.exit(128 + self._signal)

    def _add(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, which are recorded as submitted now."""
        when = time.time()
        if jobs:
            self._sweep.mark_submitted({job.digest: None for job in jobs}, when)
        for job in jobs:
            self._count += 1
            self._queue.append((self._count, replace(job, slurm_id=None, submitted=when)))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def _loop(self, source: JobSource) -> None:
        more, stopping, said = True, False, False
        while more or self._queue or self._running:
            if self._signal and not stopping:
                more, stopping = False, True
                self._queue.clear()
                for *_, process in self._running:
                    process.send_signal(signal.SIGTERM)
            self._release_ended()
            if more:
                jobs = source(max(0, self._limit - len(self._running) - len(self._queue)))
                more = jobs is not None
                self._add(jobs or ())
            self._fill_slots()
            if self._queue and not self._running and not said:
                said = True
                self._console.say("all slots are leased to other pools; waiting …")
            if more or self._queue or self._running:
                time.sleep(POLL_SECONDS)

    def _release_ended(self) -> None:
        for entry in [entry for entry in self._running if entry[3].poll() is not None]:
            number, job, slot, _ = entry
            self._running.remove(entry)
            slot.release()
            self._console.say(f"[{number}{self._total}] {job.label}: {_outcome(job)}")
            self._report.update(self._sweep)

    def _fill_slots(self) -> None:
        for slot in [slot for slot in self._slots if slot not in [entry[2] for entry in self._running]]:
            if self._queue and len(self._running) < self._limit and slot.acquire():
                number, job = self._queue.popleft()
                self._running.append((number, job, slot, runner.start(job, slot.environment)))
                self._console.say(f"[{number}{self._total}] {job.label}: begins; {job.folder / LOG}")


def _outcome(job: Job) -> str:
    state, result = job.state, job.result
    if state.state != "FINISHED":
        return f"{state.state}: {state.reason}"
    knn = f", kNN {result[KNN_TOP1]:.2f} %" if KNN_TOP1 in result else ""
    return f"FINISHED{knn}, {duration(result['seconds'])}"
