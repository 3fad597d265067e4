"""Who runs the points of a sweep: the contract."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from twoviews.sweeps.folder import Point, State


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
    def cancel(self, points: Sequence[Point]) -> None:
        """Stop these points, with a checkpoint where they run; returns when that was asked for."""

    def look(self, points: Sequence[Point]) -> Mapping[str, State]:
        """The truth about each point by its digest: state.json, compared with locks and the scheduler."""
        from twoviews.sweeps.truth import look

        return look(points)
