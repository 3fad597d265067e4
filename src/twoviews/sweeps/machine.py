"""Launchers that run jobs on this machine: one after the other, or several at once with leases on GPUs or cores.

They stay in the foreground. Ctrl-C and SIGTERM stop the jobs with checkpoints; if the launcher is killed otherwise, the
runners notice that and stop their trainings with checkpoints too.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from twoviews.console import Console, duration
from twoviews.errors import BadInput
from twoviews.ranges import Count
from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import LOG, Job
from twoviews.sweeps.job_status import status
from twoviews.sweeps.launcher import JobSource, Launcher, exclusive
from twoviews.sweeps.mlflow_sync import BackgroundReport

POLL_SECONDS = 0.2  # between two looks at the processes
DRIVER = Path("/dev/nvidiactl")  # as in fallbacks.py, which imports torch


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


class _MachineLauncher(Launcher):
    """What the launchers of this machine share."""

    at_once: int | None = None

    @abstractmethod
    def slots(self) -> list[Slot]:
        """All slots of this machine, leased or not.

        Raises:
            BadInput: there is none.
        """

    def print_warnings(self) -> None:
        """Print what makes the jobs slower than they could be."""
        return

    def capacity(self) -> int:
        """Number of slots, or `at_once` if that is smaller."""
        return min(self.at_once or sys.maxsize, len(self.slots()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; return when the last one has ended."""
        self.print_warnings()
        if not jobs:
            return
        sweep, console, work = Sweep(jobs[0].folder.parent), Console(), _Work(self)
        with exclusive(sweep, console):
            states = status(jobs)
            todo = [job for job in jobs if states[job.digest].state not in ("FINISHED", "RUNNING")]
            queue = deque(_mark_submitted(sweep, todo))

            def source(free_slots: int) -> list[Job] | None:
                taken = [queue.popleft() for _ in range(min(free_slots, len(queue)))]
                return taken if taken or queue else None

            work.run(source, f"/{len(todo)}")

    def serve(self, sweep: Sweep, source: JobSource) -> None:
        """Run jobs as `source` returns them."""

        def submitted(free_slots: int) -> Sequence[Job] | None:
            jobs = source(free_slots)
            return _mark_submitted(sweep, jobs) if jobs else jobs

        self.print_warnings()
        work = _Work(self)
        with exclusive(sweep, Console()):
            work.run(submitted)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop the jobs that run; the launcher goes on with the next ones."""
        stop(jobs)


class Local(_MachineLauncher):
    """One job after the other, each with the whole machine."""

    def slots(self) -> list[Slot]:
        """A single slot: jobs run one after the other."""
        return [Slot()]


class Pool(_MachineLauncher):
    """Several jobs at once, each with a GPU, a share of a GPU, or cores of its own.

    Args:
        at_once: most jobs that run together; None: as many as there are slots.
        points_per_gpu: jobs that share a GPU, if there are GPUs.
        cores_per_point: CPU cores of a job; without GPUs they determine the number of slots.
    """

    def __init__(self, at_once: Count | None, points_per_gpu: Count, cores_per_point: Count):
        self.at_once, self.jobs_per_gpu, self.cores_per_job = at_once, points_per_gpu, cores_per_point

    def print_warnings(self) -> None:
        """Print a line if jobs get cores although there is a GPU, because nvidia-smi cannot list it."""
        if "CUDA_VISIBLE_DEVICES" not in os.environ and not gpus() and DRIVER.exists():
            Console().say(
                "slower    jobs share the cores: this machine has a GPU, and nvidia-smi, which is missing or fails, does not "
                "name it; CUDA_VISIBLE_DEVICES=0 before the command does."
            )

    def slots(self) -> list[Slot]:
        """A slot for each share of a GPU; without GPUs, for each group of cores."""
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cores_per_job))}
        shares = [(gpu, share) for share in range(self.jobs_per_gpu) for gpu in gpus()]
        if shares:
            return [Slot(f"gpu{gpu}-{share}", {**threads, "CUDA_VISIBLE_DEVICES": gpu}) for gpu, share in shares]
        cores, step = len(os.sched_getaffinity(0)), self.cores_per_job
        if step > cores:
            raise BadInput(f"hydra.launcher.cores_per_point={step}, but this machine has {cores} cores; lower it.")
        return [Slot(f"cores{first}-{first + step - 1}", threads) for first in range(0, cores - step + 1, step)]


def gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; determined without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    # Without a driver or a GPU it fails, and prints the reason to stdout.
    return done.stdout.split() if done.returncode == 0 else []


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


def _mark_submitted(sweep: Sweep, jobs: Sequence[Job]) -> list[Job]:
    """These jobs, recorded as submitted now."""
    when = time.time()
    sweep.mark_submitted({job.digest: None for job in jobs}, when)
    return [replace(job, slurm_id=None, submitted=when) for job in jobs]


class _Work:
    """Runs the jobs of a source in the slots of a launcher until there are no more, or a signal came.

    Args:
        launcher: with the slots.

    Raises:
        BadInput: there is no slot.
    """

    def __init__(self, launcher: _MachineLauncher):
        self._slots, self._console, self._total = launcher.slots(), Console(), ""
        self._limit = min(launcher.at_once or sys.maxsize, len(self._slots))
        self._queue: deque[tuple[int, Job]] = deque()
        self._running: list[tuple[int, Job, Slot, subprocess.Popen]] = []
        self._signal, self._report = 0, BackgroundReport()

    def run(self, source: JobSource, total: str = "") -> None:
        """Return when all jobs have ended.

        Args:
            source: of the jobs.
            total: printed behind the number of a job, such as /12.

        Raises:
            SystemExit: a signal stopped them.
        """
        self._total = total
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

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def _loop(self, source: JobSource) -> None:
        count, more, said = 0, True, False
        while more or self._queue or self._running:
            if self._signal and more:
                more = False
                self._queue.clear()
                for *_, process in self._running:
                    process.send_signal(signal.SIGTERM)
            self._release_ended()
            if more:
                jobs = source(max(0, self._limit - len(self._running) - len(self._queue)))
                more = jobs is not None
                self._queue.extend(enumerate(jobs or (), start=count + 1))
                count += len(jobs or ())
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
            self._report.update(Sweep(job.folder.parent))

    def _fill_slots(self) -> None:
        busy = [slot for _, _, slot, _ in self._running]
        for slot in self._slots:
            if self._queue and len(self._running) < self._limit and slot not in busy and slot.acquire():
                number, job = self._queue.popleft()
                self._running.append((number, job, slot, _start(job, slot)))
                self._console.say(f"[{number}{self._total}] {job.label}: begins; {job.folder / LOG}")


def _start(job: Job, slot: Slot) -> subprocess.Popen:
    """The runner of a job as a process, with the code that was frozen for it."""
    code = Path(job.description["code"])
    module = runner.OLD_MODULE if runner.is_old(code) else runner.MODULE
    path = os.pathsep.join(filter(None, [str(code / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module, str(job.folder), repr(job.submitted)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **slot.environment, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which passes it on once
    )


def _outcome(job: Job) -> str:
    state, result = job.state, job.result
    if state.state != "FINISHED":
        return f"{state.state}: {state.reason}"
    knn = f", kNN {result['knn/top1']:.2f} %" if "knn/top1" in result else ""
    return f"FINISHED{knn}, {duration(result['seconds'])}"
