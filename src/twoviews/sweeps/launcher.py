"""The contract of launchers, which run the jobs of a sweep. They are not launcher plugins of Hydra, which run one command."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from filelock import Timeout

from twoviews.console import Console
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job

POLL_SECONDS = 5.0  # between two queries of a cluster, each one call of squeue

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
            time.sleep(POLL_SECONDS)

    @abstractmethod
    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ask these jobs to stop, with a checkpoint if they run; does not wait for their end."""


@contextmanager
def exclusive(sweep: Sweep, console: Console) -> Iterator[None]:
    """A block in which no other process starts or submits jobs of this sweep on this machine."""
    lock = sweep.launcher_lock
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.say(f"another process works on {sweep.name}; waiting for its end …")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
