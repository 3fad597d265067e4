"""What is true of points: their supervisors' word, as long as the supervisors live, and after that SLURM's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from twoviews.sweeps import scheduler
from twoviews.sweeps.folder import Point, State, Sweep, held
from twoviews.sweeps.scheduler import Said

AGAIN = "the same command goes on"
_SAME_NAME = ("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED")
_MEANS = {"BOOT_FAIL": "NODE_FAIL", "DEADLINE": "TIMEOUT", "REVOKED": "CANCELLED"}
_WHY = {
    "TIMEOUT": "the time limit came before a checkpoint could be written",
    "PREEMPTED": "preempted, and the cluster does not requeue",
    "NODE_FAIL": "its node failed, and the cluster does not requeue",
    "OUT_OF_MEMORY": "the memory of the job was used up; ask for more (mem_gb)",
    "CANCELLED": "cancelled",
}


def look(points: Sequence[Point]) -> Mapping[str, State]:
    """The state of each point by its digest."""
    jobs = {point.digest: job for point in points if (job := _job(point, point.state)) is not None}
    asked = [jobs[point.digest] for point in points if point.digest in jobs and not settled(point, point.state)]
    # First the scheduler, then the files: a point that ends in between has written its state by then.
    queue = scheduler.queue(asked) if asked else {}
    gone = [job for job in asked if queue is not None and job not in queue]
    accounts = scheduler.accounts(gone) if gone else {}
    found = {}
    for point in points:
        state = point.state
        if settled(point, state):
            found[point.digest] = state
        elif (job := _job(point, state)) is None:
            found[point.digest] = _here(point)
        elif queue is None:
            found[point.digest] = replace(_own(point, state), job=job, reason="SLURM's controller does not answer")
        else:
            found[point.digest] = _there(point, state, job, queue.get(job), accounts.get(job))
    return found


def _job(point: Point, state: State) -> str | None:
    """SLURM's job of the last submission; the launcher may have been killed before it wrote it down."""
    return state.job if state.submitted > point.submitted else point.job


def settled(point: Point, state: State) -> bool:
    """The last submission ended, and its supervisor said how."""
    return state.state in ("FINISHED", "FAILED", "OUT_OF_MEMORY") and state.submitted >= point.submitted


def _own(point: Point, state: State) -> State:
    """What is known of the last submission."""
    if state.submitted >= point.submitted:
        return state
    return replace(state, state="QUEUED", submitted=point.submitted, started=None, ended=None, node=None, reason="")


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
        return replace(state, state="LOST", reason=f"its supervisor was killed; {AGAIN}")
    return replace(state, state="LOST", reason=f"its launcher ended before it began; {AGAIN}")


def _there(point: Point, state: State, job: str, queued: Said | None, accounted: Said | None) -> State:
    """Of a point that SLURM runs, and whose supervisor has not said the last word."""
    own = replace(_own(point, state), job=job)
    said = queued or accounted
    if said is None:
        word = "CANCELLED" if point.cancelled >= own.submitted else "LOST"
        reason = "cancelled" if word == "CANCELLED" else f"SLURM knows nothing of job {job} any more; {AGAIN}"
        return replace(own, state=word, reason=reason)
    if said.state in scheduler.WAITING:
        reason = own.reason if said.reason in ("", "BeginTime") else f"waits: {said.reason}"
        return replace(own, state="QUEUED", reason=reason)
    if said.state in scheduler.WORKING:
        return replace(own, state="RUNNING", node=own.node or said.node)
    word = _MEANS.get(said.state, said.state)
    if word in _SAME_NAME:
        reason = _WHY.get(
            word, f"SLURM says {said.state}, {said.reason}; its files are in {point.folder.parent / 'slurm'}"
        )
        return replace(own, state=word, node=own.node or said.node, reason=f"{reason}; {AGAIN}")  # type: ignore[arg-type]
    reason = f"SLURM says {said.state}, but its supervisor did not say how it ended; {AGAIN}"
    return replace(own, state="LOST", node=own.node or said.node, reason=reason)
