"""What is true of points: their supervisors' word, as long as the supervisors live."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from twoviews.sweeps.folder import Point, State, Sweep, held


def look(points: Sequence[Point]) -> Mapping[str, State]:
    """The state of each point by its digest."""
    return {point.digest: _here(point) for point in points}


def _here(point: Point) -> State:
    """Of a point that this machine runs: a lock is held as long as its process lives, whatever it dies of."""
    state = point.state
    if held(point.lock):
        return state if state.state == "RUNNING" else replace(state, state="RUNNING", reason="")
    state = point.state  # written since, perhaps
    if not state.active and state.submitted >= point.submitted:
        return state
    if held(Sweep(point.folder.parent).launching):
        return replace(state, state="QUEUED", reason="")
    if state.submitted >= point.submitted and state.state == "RUNNING":
        return replace(state, state="LOST", reason="its supervisor was killed; the same command goes on")
    return replace(state, state="LOST", reason="its launcher ended before it began; the same command goes on")
