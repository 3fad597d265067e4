"""Who runs the points of a sweep: the contract."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from filelock import Timeout

from twoviews.console import Console
from twoviews.sweeps.folder import Point, State, Sweep

POLL_S = 5.0  # between two looks at a cluster, each one call of squeue

# From the number of points that there is room for at the moment, 0 included: as many or fewer to run now, or None when
# there will be no more.
Feed = Callable[[int], Sequence[Point] | None]


class Dispatch(ABC):
    """Runs points of one sweep, each under a supervisor of its own that writes the point's state.json.

    What the constructor takes are the keys of conf/hydra/launcher/<name>.yaml.
    """

    @abstractmethod
    def submit(self, points: Sequence[Point]) -> None:
        """Have these points run, from their last checkpoints if they have any; those that run already are left alone.

        A dispatch of this machine returns when they have ended, one of a cluster when they are in its queue.

        Raises:
            BadInput: the scheduler refuses.
        """

    @abstractmethod
    def room(self) -> int:
        """How many points it runs at once, if nobody else is there."""

    def processes(self) -> int:
        """Of each point."""
        return 1

    def serve(self, sweep: Sweep, feed: Feed) -> None:
        """Run points as they are given; returns when there will be no more.

        Args:
            sweep: that they belong to.
            feed: called again and again, to the end.

        Raises:
            BadInput: the scheduler refuses.
        """
        while (points := feed(self.room())) is not None:
            if points:
                self.submit(points)
            time.sleep(POLL_S)

    @abstractmethod
    def cancel(self, points: Sequence[Point]) -> None:
        """Stop these points, with a checkpoint where they run; returns when that was asked for."""

    def look(self, points: Sequence[Point]) -> Mapping[str, State]:
        """The truth about each point by its digest: state.json, compared with locks and the scheduler."""
        from twoviews.sweeps.truth import look

        return look(points)


@contextmanager
def alone(sweep: Sweep, console: Console) -> Iterator[None]:
    """As the only process that starts or submits points of this sweep on this machine."""
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
