"""The jobs of a sweep on this machine: one after the other, or several at once with leases on GPUs or cores.

The launcher of this machine stays in the foreground. Ctrl-C and SIGTERM stop the jobs with checkpoints; if it is
killed otherwise, the supervisors notice and do the same.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from twoviews.console import Console, duration
from twoviews.errors import BadInput
from twoviews.ranges import Count
from twoviews.sweeps.folder import Job, Sweep
from twoviews.sweeps.job_status import status
from twoviews.sweeps.launcher import JobSource, Launcher, alone
from twoviews.sweeps.supervise import LOG

DRIVER = Path("/dev/nvidiactl")  # as in fallbacks.py, which imports torch


@dataclass
class Slot:
    """Room for one job on this machine.

    Args:
        name: of the lease, the same for all sweeps of this user; empty for none.
        environment: variables that put a training there.
    """

    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    lease: FileLock | None = None

    def take(self) -> bool:
        """Whether nobody else of this user has it, now that this process does."""
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

    def give_back(self) -> None:
        """Let others have it."""
        if self.lease:
            self.lease.release()


class Local(Launcher):
    """One job after the other, each with the whole machine."""

    def free_slots(self) -> int:
        """One."""
        return 1

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs; return when the last one ended.

        Raises:
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        work(jobs, [Slot()])

    def serve(self, sweep: Sweep, feed: JobSource) -> None:
        """Run jobs as they are given.

        Raises:
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        serve(sweep, feed, [Slot()], self.free_slots())

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop those that run; the launcher goes on with the next."""
        stop(jobs)


class Pool(Launcher):
    """Several jobs at once, each with a GPU or a share of one, or with cores of its own.

    Args:
        at_once: jobs that run together at most; None is as many as there is room for.
        points_per_gpu: how many share a GPU, where there are GPUs.
        cores_per_point: CPU cores of a job; without GPUs they say how many there is room for.
    """

    def __init__(self, at_once: Count | None, points_per_gpu: Count, cores_per_point: Count):
        self.at_once, self.points_per_gpu, self.cores_per_point = at_once, points_per_gpu, cores_per_point

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs; return when the last one ended.

        Raises:
            BadInput: a job wants more cores than there are.
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        self._say_missed()
        work(jobs, self.slots(), self.at_once)

    def free_slots(self) -> int:
        """The limit that was given, or what there is room for."""
        return min(self.at_once or sys.maxsize, len(self.slots()))

    def serve(self, sweep: Sweep, feed: JobSource) -> None:
        """Run jobs as they are given.

        Raises:
            BadInput: a job wants more cores than there are.
            SystemExit: a signal stopped them; its code is 128 + the signal's number.
        """
        self._say_missed()
        serve(sweep, feed, self.slots(), self.free_slots())

    def _say_missed(self) -> None:
        """A line where jobs are dealt out to cores, though there is a GPU whose driver nobody can ask."""
        if "CUDA_VISIBLE_DEVICES" not in os.environ and not gpus() and DRIVER.exists():
            Console().say(
                "slower    jobs share the cores: this machine has a GPU, and nvidia-smi, which is missing or fails, does not "
                "name it; CUDA_VISIBLE_DEVICES=0 before the command does."
            )

    def slots(self) -> list[Slot]:
        """Room for jobs on this machine, taken or not.

        Raises:
            BadInput: there is none.
        """
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cores_per_point))}
        shares = [(gpu, share) for share in range(self.points_per_gpu) for gpu in gpus()]
        if shares:
            return [Slot(f"gpu{gpu}-{share}", {**threads, "CUDA_VISIBLE_DEVICES": gpu}) for gpu, share in shares]
        cores = len(os.sched_getaffinity(0))
        if self.cores_per_point > cores:
            raise BadInput(
                f"hydra.launcher.cores_per_point={self.cores_per_point}, but this machine has {cores}; lower it."
            )
        return [
            Slot(f"cores{first}-{first + self.cores_per_point - 1}", threads)
            for first in range(0, cores - self.cores_per_point + 1, self.cores_per_point)
        ]

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop those that run; the launcher goes on with the next."""
        stop(jobs)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one.strip() for one in visible.split(",") if one.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True)
    # Without a driver or a GPU it fails, and says why where the answer would stand.
    return asked.stdout.split() if asked.returncode == 0 else []


def stop(jobs: Sequence[Job]) -> None:
    """Ask the supervisors of these jobs, as far as they run here, to stop with a checkpoint."""
    for job in jobs:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = process.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"twoviews.sweeps.supervise" in words and os.fsencode(job.folder) in words:
                os.kill(int(process.parent.name), signal.SIGTERM)


def work(jobs: Sequence[Job], slots: Sequence[Slot], at_once: int | None = None) -> None:
    """Run jobs of one sweep in slots of this machine, in their order.

    Raises:
        SystemExit: a signal stopped them; its code is 128 + the signal's number.
    """
    if not jobs:
        return
    sweep, console = Sweep(jobs[0].folder.parent), Console()
    with alone(sweep, console):
        now = status(jobs)
        queue = deque(_submitted(sweep, [one for one in jobs if now[one.digest].state not in ("FINISHED", "RUNNING")]))
        count = len(queue)

        def feed(room: int) -> list[Job] | None:
            given = [queue.popleft() for _ in range(min(room, len(queue)))]
            return given if given or queue else None

        _work(feed, slots, at_once or len(slots), console, f"/{count}")


def serve(sweep: Sweep, feed: JobSource, slots: Sequence[Slot], at_once: int) -> None:
    """Run jobs of a sweep in slots of this machine as they are given.

    Raises:
        SystemExit: a signal stopped them; its code is 128 + the signal's number.
    """
    console = Console()

    def submitting(room: int) -> Sequence[Job] | None:
        given = feed(room)
        return _submitted(sweep, given) if given else given

    with alone(sweep, console):
        _work(submitting, slots, at_once, console, "")


def _submitted(sweep: Sweep, jobs: Sequence[Job]) -> list[Job]:
    """These jobs, recorded as submitted just now."""
    when = time.time()
    sweep.submitted({job.digest: None for job in jobs}, when)
    return [replace(job, slurm_id=None, submitted=when) for job in jobs]


class _Signals:
    """Remembers a signal to this process until it is asked for."""

    number = 0

    def __enter__(self) -> "_Signals":
        self._before = {one: signal.signal(one, self._remember) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def _work(feed: JobSource, slots: Sequence[Slot], at_once: int, console: Console, of: str) -> None:
    """Until there is nothing more to run, or a signal came."""
    queue: deque[tuple[int, Job]] = deque()
    running: list[tuple[int, Job, Slot, subprocess.Popen]] = []
    count, more, waiting_said = 0, True, False
    with _Signals() as signals:
        while more or queue or running:
            if signals.number and more:
                more = False
                queue.clear()
                for _, _, _, process in running:
                    process.send_signal(signal.SIGTERM)
            for one in [one for one in running if one[3].poll() is not None]:
                running.remove(one)
                one[2].give_back()
                console.say(f"[{one[0]}{of}] {one[1].label}: {_outcome(one[1])}")
            if more:
                given = feed(max(0, min(at_once, len(slots)) - len(running) - len(queue)))
                more = given is not None
                queue.extend(enumerate(given or (), start=count + 1))
                count += len(given or ())
            busy = [slot for _, _, slot, _ in running]
            for slot in slots:
                if queue and len(running) < at_once and slot not in busy and slot.take():
                    number, job = queue.popleft()
                    running.append((number, job, slot, _start(job, slot)))
                    console.say(f"[{number}{of}] {job.label}: begins; {job.folder / LOG}")
            if queue and not running and not waiting_said:
                waiting_said = True
                console.say("everything this pool could use is leased to another one; waiting …")
            if more or queue or running:
                time.sleep(0.2)
    if signals.number:
        console.say(
            f"stopped by {signal.Signals(signals.number).name}; what ran has a checkpoint, and the same command goes on."
        )
        sys.exit(128 + signals.number)


def _start(job: Job, slot: Slot) -> subprocess.Popen:
    code = job.description["code"]
    paths = os.pathsep.join(filter(None, [str(Path(code) / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "twoviews.sweeps.supervise", str(job.folder), repr(job.submitted)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **slot.environment, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C in the terminal comes to this process alone, which passes it on once
    )


def _outcome(job: Job) -> str:
    state, result = job.state, job.result
    if state.state != "FINISHED":
        return f"{state.state}: {state.reason}"
    knn = f", kNN {result['knn/top1']:.2f} %" if "knn/top1" in result else ""
    return f"FINISHED{knn}, {duration(result['seconds'])}"
