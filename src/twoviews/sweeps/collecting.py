"""A sweep into MLflow: its parent run at submission, and later whatever its jobs could not send themselves."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.sweeps.folder import WRITER_THREADS, Sweep
from twoviews.sweeps.job import Job, JobState
from twoviews.sweeps.job_status import status
from twoviews.tracking import NAME, parents, send
from twoviews.tracking.mirror import reason
from twoviews.tracking.sending import known, unsent

PARENT_S = 120.0  # longest wait for another launch that makes the parent run


def prepare(sweep: Sweep, jobs: Sequence[Job], tracking: Mapping[str, Any]) -> None:
    """Make database, experiment and parent run, alone and before any job begins; tell the jobs.

    Args:
        sweep: its sweep.json gets the id of the parent run.
        jobs: those that are to be children of it.
        tracking: the node of the configuration that all jobs share.

    Raises:
        BadInput: the store does not answer.
    """
    uri, experiment = tracking["uri"], tracking["experiment"]
    with FileLock(sweep.folder / ".parent.lock", timeout=PARENT_S):
        with sweep.update() as record:
            aim = {"uri": uri, "experiment": experiment}
            if record.get("tracking") != aim:  # another store: the parent there is another run
                record.update(tracking=aim, parent=None, parent_key=parents.new_key())
        key, tags = record["parent_key"], {"twoviews.sweep": sweep.name, "folder": str(sweep.folder)}
        tags.update(command="\n".join(sweep.commands), **parents.axis_tags(record["axes"]))
        with _answering():
            parent = parents.open_parent(uri, experiment, sweep.name, key, tags)
        with sweep.update() as record:
            record.update(parent=parent, parent_status="RUNNING")
    swept = {job.digest: job.axes for job in sweep.jobs}  # those given may have more, to be told apart
    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        list(pool.map(lambda one: parents.adopt(one.folder, uri, experiment, parent, swept[one.digest]), jobs))


def collect(sweep: Sweep, jobs: Sequence[Job]) -> int:
    """Send what MLflow does not have of these jobs, nothing twice; the number of jobs left.

    Jobs that nobody runs any more end there as result.json says, or as killed; the sweep ends when all have.

    Raises:
        BadInput: the store does not answer.
    """
    states = status(sweep.jobs)
    tracking = _tracking(sweep, jobs)
    prepare(sweep, jobs, tracking)
    left = 0
    for job in jobs:
        if not (job.folder / NAME).exists():
            continue
        try:
            send(job.folder, closed=not states[job.digest].active)
        except Exception as error:  # one folder at fault must not keep the others
            print(f"{job.digest} {job.label}: {unsent(job.folder)} numbers left ({reason(error)})")
            left += 1
    if ended := _parent_status([*states.values()]):
        with _answering():
            parents.end_parent(tracking["uri"], tracking["experiment"], sweep.record["parent"], ended)
        with sweep.update() as record:
            record["parent_status"] = ended
    return left


def deliver(sweep: Sweep, say: Callable[[str], None]) -> None:
    """After the last job: MLflow gets what it does not have; what it does not take is said."""
    states = status(sweep.jobs).values()
    if not states or any(state.active for state in states) or not owed(sweep):
        return
    try:
        left = collect(sweep, sweep.jobs)
    except BadInput as error:
        left = 1
        say(f"error: {error}")
    if left:
        say(f"MLflow does not have all of this; `python -m twoviews.sweep collect {shlex.quote(sweep.name)}` sends it.")


def owed(sweep: Sweep) -> bool:
    """Whether MLflow lacks something of a sweep that nobody works on any more; without asking it."""
    jobs, record = sweep.jobs, sweep.record
    told = record["parent"] and record.get("parent_status") == _parent_status([*status(jobs).values()])
    return not told or not all(known(job.folder) for job in jobs if (job.folder / NAME).exists())


@contextmanager
def _answering() -> Iterator[None]:
    """What mlflow raises about a store, as a sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"MLflow takes no sweep ({reason(error)}); set tracking.uri right, or use tracking=files and "
            "`python -m twoviews.sweep collect` later."
        ) from error


def _parent_status(states: Sequence[JobState]) -> str:
    """Of the parent, as MLflow calls it; empty while jobs are under way."""
    if any(state.active for state in states):
        return ""
    return "FINISHED" if all(state.done for state in states) else "FAILED"


def _tracking(sweep: Sweep, jobs: Sequence[Job]) -> dict[str, Any]:
    if known := sweep.record.get("tracking"):
        return known
    return foreign.load(jobs[0].folder / "config.yaml")["tracking"]
