"""What is true of points: their supervisors' word, as long as the supervisors live, and after that SLURM's."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from twoviews.locks import is_locked
from twoviews.sweeps import scheduler
from twoviews.sweeps.folder import Point, State, Sweep
from twoviews.sweeps.scheduler import Said

CANCEL_S = 60.0  # for what was cancelled to end; SLURM gives it 30 s (KillWait) unless a cluster says otherwise
AGAIN = "the same command goes on"
_SAME_NAME = ("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED")
_MEANS = {"BOOT_FAIL": "NODE_FAIL", "DEADLINE": "TIMEOUT", "REVOKED": "CANCELLED"}
_USUAL = ("", "BeginTime", "JobArrayTaskLimit", "Priority", "Resources")  # of waiting; anything else is worth telling
_WHY = {
    "TIMEOUT": "the time limit came before a checkpoint could be written",
    "PREEMPTED": "preempted, and the cluster does not requeue",
    "NODE_FAIL": "its node failed, and the cluster does not requeue",
    "OUT_OF_MEMORY": "the memory of the job was used up; ask for more (mem_gb)",
    "CANCELLED": "cancelled",
}


def look(points: Sequence[Point]) -> Mapping[str, State]:
    """The state of each point by its digest."""
    asked = {job for point in points if not settled(point, state := point.state) for job in _jobs(point, state)}
    # First the scheduler, then the files: a point that ends in between has written its state by then.
    queue = scheduler.queue([*asked]) if asked else {}
    gone = [job for job in asked if queue is not None and job not in queue]
    accounts = scheduler.accounts(gone) if gone else {}
    known = {**accounts, **(queue or {})}
    arrays = {job.partition("_")[0] for job in known}
    found = {}
    for point in points:
        state = point.state
        if settled(point, state):
            found[point.digest] = state
        elif not (jobs := _jobs(point, state)):
            found[point.digest] = _here(point)
        elif queue is None:
            found[point.digest] = replace(_own(point, state), job=jobs[0], reason="SLURM's controller does not answer")
        else:
            found[point.digest] = _there(point, state, jobs, known, arrays)
    return {point.digest: judged(point, found[point.digest]) for point in points}


def ended(points: Sequence[Point], patience_s: float) -> bool:
    """Whether nobody runs these points any more; waits so long at most until it is so."""
    end = time.monotonic() + patience_s
    while any(state.active for state in look(points).values()):
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def judged(point: Point, state: State) -> State:
    """The state; of a point that nobody runs PRUNED if a search gave it up, FAILED if the scheduler refused it."""
    runs = state.state == "RUNNING" or (state.state == "QUEUED" and point.job and not point.refused)
    if runs or state.state == "FINISHED" or not (point.given_up or point.refused):
        return state
    if point.given_up:
        return replace(state, state="PRUNED", reason=point.given_up)
    return replace(state, state="FAILED", reason=point.refused)


def _jobs(point: Point, state: State) -> list[str]:
    """SLURM's jobs that may be running it, the last submission first; none where it was not SLURM.

    There are two if a launcher was killed before it wrote down what it had submitted.
    """
    if point.job is None and point.submitted > state.submitted:
        return []
    written = state.job if state.active else None
    both = (state.job, point.job) if state.submitted > point.submitted else (point.job, written)
    return [*dict.fromkeys(job for job in both if job)]


def settled(point: Point, state: State) -> bool:
    """The last submission ended, and its supervisor said how."""
    ended = state.state in ("FAILED", "OUT_OF_MEMORY") and state.submitted >= point.submitted
    return ended or state.state == "FINISHED"


def _own(point: Point, state: State) -> State:
    """What is known of the last submission."""
    if state.submitted >= point.submitted:
        return state
    return replace(state, state="QUEUED", submitted=point.submitted, started=None, ended=None, node=None, reason="")


def _here(point: Point) -> State:
    """Of a point that this machine runs: a lock is held as long as its process lives, whatever it dies of."""
    state = point.state
    if is_locked(point.lock):
        return state if state.state == "RUNNING" else replace(state, state="RUNNING", reason="")
    state = point.state  # written since, perhaps
    if not state.active and state.submitted >= point.submitted:
        return state
    if is_locked(Sweep(point.folder.parent).launching):
        return replace(state, state="QUEUED", reason="")
    if state.submitted >= point.submitted and state.state == "RUNNING":
        return replace(state, state="LOST", reason=f"its supervisor was killed; {AGAIN}")
    return replace(state, state="LOST", reason=f"its launcher ended before it began; {AGAIN}")


def _there(
    point: Point, state: State, jobs: Sequence[str], known: Mapping[str, Said], arrays: Collection[str]
) -> State:
    """Of a point that SLURM runs, and whose supervisor has not said the last word; `arrays` are those of `known`."""
    if state.state == "RUNNING" and state.job and state.job in known and known[state.job].state in scheduler.WORKING:
        return state
    job, own = jobs[0], replace(_own(point, state), job=jobs[0])
    said = known.get(job)
    # Of a task that is cancelled while it waits within its array SLURM keeps no record, of the others it does.
    if said is None and (point.cancelled >= own.submitted or job.partition("_")[0] in arrays):
        return replace(own, state="CANCELLED", reason=f"cancelled before it began; {AGAIN}")
    if said is None:
        return replace(own, state="LOST", reason=f"SLURM knows nothing of job {job} any more; {AGAIN}")
    if said.state in scheduler.WAITING:
        reason = own.reason if said.reason in _USUAL else f"waits: {said.reason}"
        return replace(own, state="QUEUED", reason=reason)
    if said.state in scheduler.WORKING:
        return replace(own, state="RUNNING", node=own.node or said.node, reason="")
    word = _MEANS.get(said.state, said.state)
    if word == "FAILED" and state.state == "INTERRUPTED" and state.submitted >= point.submitted:
        return state  # it could not be requeued, and its supervisor said why
    if word in _SAME_NAME:
        reason = _WHY.get(
            word, f"SLURM says {said.state}, {said.reason}; its files are in {point.folder.parent / 'slurm'}"
        )
        return replace(own, state=word, node=own.node or said.node, reason=f"{reason}; {AGAIN}")  # type: ignore[arg-type]
    reason = f"SLURM says {said.state}, but its supervisor did not say how it ended; {AGAIN}"
    return replace(own, state="LOST", node=own.node or said.node, reason=reason)
