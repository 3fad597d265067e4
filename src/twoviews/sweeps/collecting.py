"""A sweep into MLflow: its parent run at submission, and later whatever its points could not send themselves."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.sweeps.folder import WRITERS, Point, State, Sweep
from twoviews.sweeps.truth import look
from twoviews.tracking.client import short_error
from twoviews.tracking.metrics import METRICS_FILE
from twoviews.tracking.parent_run import attach_parent, end_parent_run, open_parent_run, value_tags
from twoviews.tracking.state import new_run_key
from twoviews.tracking.upload import is_uploaded, pending_values, upload

PARENT_S = 120.0  # longest wait for another launch that makes the parent run


def prepare(sweep: Sweep, points: Sequence[Point], tracking: Mapping[str, Any]) -> None:
    """Make database, experiment and parent run, alone and before any point begins; tell the points.

    Args:
        sweep: its sweep.json gets the id of the parent run.
        points: those that are to be children of it.
        tracking: the node of the configuration that all points share.

    Raises:
        BadInput: the store does not answer.
    """
    uri, experiment = tracking["uri"], tracking["experiment"]
    with FileLock(sweep.folder / ".parent.lock", timeout=PARENT_S):
        with sweep.update() as record:
            aim = {"uri": uri, "experiment": experiment}
            if record.get("tracking") != aim:  # another store: the parent there is another run
                record.update(tracking=aim, parent=None, parent_key=new_run_key())
        key, tags = record["parent_key"], {"twoviews.sweep": sweep.name, "folder": str(sweep.folder)}
        tags.update(command="\n".join(sweep.commands), **value_tags(record["axes"]))
        with _answering():
            parent = open_parent_run(uri, experiment, sweep.name, key, tags)
        with sweep.update() as record:
            record.update(parent=parent, parent_status="RUNNING")
    swept = {point.digest: point.axes for point in sweep.points}  # those given may have more, to be told apart
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda one: attach_parent(one.folder, uri, experiment, parent, swept[one.digest]), points))


def collect(sweep: Sweep, points: Sequence[Point]) -> int:
    """Send what MLflow does not have of these points, nothing twice; the number of points left.

    Points that nobody runs any more end there as result.json says, or as killed; the sweep ends when all have.

    Raises:
        BadInput: the store does not answer.
    """
    states = look(sweep.points)
    tracking = _tracking(sweep, points)
    prepare(sweep, points, tracking)
    left = 0
    for point in points:
        if not (point.folder / METRICS_FILE).exists():
            continue
        try:
            upload(point.folder, closed=not states[point.digest].active)
        except Exception as error:  # one folder at fault must not keep the others
            print(f"{point.digest} {point.label}: {pending_values(point.folder)} numbers left ({short_error(error)})")
            left += 1
    if status := _status([*states.values()]):
        with _answering():
            end_parent_run(tracking["uri"], tracking["experiment"], sweep.record["parent"], status)
        with sweep.update() as record:
            record["parent_status"] = status
    return left


def deliver(sweep: Sweep, say: Callable[[str], None]) -> None:
    """After the last point: MLflow gets what it does not have; what it does not take is said."""
    states = look(sweep.points).values()
    if not states or any(state.active for state in states) or not owed(sweep):
        return
    try:
        left = collect(sweep, sweep.points)
    except BadInput as error:
        left = 1
        say(f"error: {error}")
    if left:
        say(f"MLflow does not have all of this; `python -m twoviews.sweep collect {shlex.quote(sweep.name)}` sends it.")


def owed(sweep: Sweep) -> bool:
    """Whether MLflow lacks something of a sweep that nobody works on any more; without asking it."""
    points, record = sweep.points, sweep.record
    told = record["parent"] and record.get("parent_status") == _status([*look(points).values()])
    return not told or not all(is_uploaded(point.folder) for point in points if (point.folder / METRICS_FILE).exists())


@contextmanager
def _answering() -> Iterator[None]:
    """What mlflow raises about a store, as a sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"MLflow takes no sweep ({short_error(error)}); set tracking.uri right, or use tracking=files and "
            "`python -m twoviews.sweep collect` later."
        ) from error


def _status(states: Sequence[State]) -> str:
    """Of the parent, as MLflow calls it; empty while points are under way."""
    if any(state.active for state in states):
        return ""
    return "FINISHED" if all(state.done for state in states) else "FAILED"


def _tracking(sweep: Sweep, points: Sequence[Point]) -> dict[str, Any]:
    if known := sweep.record.get("tracking"):
        return known
    return foreign.load(points[0].folder / "config.yaml")["tracking"]
