"""Who runs the jobs of a sweep: the contract."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from filelock import Timeout

from twoviews.console import Console
from twoviews.sweeps.folder import Job, Sweep

POLL_S = 5.0  # between two looks at a cluster, each one call of squeue

# From the number of jobs that there is room for at the moment, 0 included: as many or fewer to run now, or None when
# there will be no more.
JobSource = Callable[[int], Sequence[Job] | None]


class Launcher(ABC):
    """Runs jobs of one sweep, each under a supervisor of its own that writes the job's state.json.

    What the constructor takes are the keys of conf/hydra/launcher/<name>.yaml.
    """

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Have these jobs run, from their last checkpoints if they have any; those that run already are left alone.

        A launcher of this machine returns when they have ended, one of a cluster when they are in its queue.

        Raises:
            BadInput: the scheduler refuses.
        """

    @abstractmethod
    def free_slots(self) -> int:
        """How many jobs it runs at once, if nobody else is there."""

    def processes(self) -> int:
        """Of each job."""
        return 1

    def serve(self, sweep: Sweep, feed: JobSource) -> None:
        """Run jobs as they are given; returns when there will be no more.

        Args:
            sweep: that they belong to.
            feed: called again and again, to the end.

        Raises:
            BadInput: the scheduler refuses.
        """
        while (jobs := feed(self.free_slots())) is not None:
            if jobs:
                self.submit(jobs)
            time.sleep(POLL_S)

    @abstractmethod
    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop these jobs, with a checkpoint where they run; returns when that was asked for."""


@contextmanager
def alone(sweep: Sweep, console: Console) -> Iterator[None]:
    """As the only process that starts or submits jobs of this sweep on this machine."""
    launching = sweep.launching
    try:
        launching.acquire(timeout=0)
    except Timeout:
        console.say(f"another process works on {sweep.name}; waiting for its end …")
        launching.acquire()
    try:
        yield
    finally:
        launching.release()
