"""What is true of jobs: their supervisors' word, as long as the supervisors live, and after that SLURM's."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from twoviews.sweeps import slurm_commands
from twoviews.sweeps.folder import Job, JobState, Sweep
from twoviews.sweeps.slurm_commands import Said
from twoviews.tracking.state import held

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


def status(jobs: Sequence[Job]) -> Mapping[str, JobState]:
    """The state of each job by its digest."""
    asked = {slurm_id for job in jobs if not settled(job, state := job.state) for slurm_id in _slurm_ids(job, state)}
    # First the scheduler, then the files: a job that ends in between has written its state by then.
    queue = slurm_commands.queue([*asked]) if asked else {}
    gone = [slurm_id for slurm_id in asked if queue is not None and slurm_id not in queue]
    accounts = slurm_commands.accounts(gone) if gone else {}
    known = {**accounts, **(queue or {})}
    arrays = {slurm_id.partition("_")[0] for slurm_id in known}
    found = {}
    for job in jobs:
        state = job.state
        if settled(job, state):
            found[job.digest] = state
        elif not (slurm_ids := _slurm_ids(job, state)):
            found[job.digest] = _here(job)
        elif queue is None:
            found[job.digest] = replace(
                _own(job, state), slurm_id=slurm_ids[0], reason="SLURM's controller does not answer"
            )
        else:
            found[job.digest] = _there(job, state, slurm_ids, known, arrays)
    return {job.digest: judged(job, found[job.digest]) for job in jobs}


def ended(jobs: Sequence[Job], patience_s: float) -> bool:
    """Whether nobody runs these jobs any more; waits so long at most until it is so."""
    end = time.monotonic() + patience_s
    while any(state.active for state in status(jobs).values()):
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def judged(job: Job, state: JobState) -> JobState:
    """The state; of a job that nobody runs PRUNED if a search gave it up, FAILED if the scheduler refused it."""
    runs = state.state == "RUNNING" or (state.state == "QUEUED" and job.slurm_id and not job.refused)
    if runs or state.state == "FINISHED" or not (job.given_up or job.refused):
        return state
    if job.given_up:
        return replace(state, state="PRUNED", reason=job.given_up)
    return replace(state, state="FAILED", reason=job.refused)


def _slurm_ids(job: Job, state: JobState) -> list[str]:
    """Ids of the SLURM jobs that may be running it, the last submission first; none where it was not SLURM.

    There are two if a launcher was killed before it wrote down what it had submitted.
    """
    if job.slurm_id is None and job.submitted > state.submitted:
        return []
    written = state.slurm_id if state.active else None
    both = (state.slurm_id, job.slurm_id) if state.submitted > job.submitted else (job.slurm_id, written)
    return [*dict.fromkeys(slurm_id for slurm_id in both if slurm_id)]


def settled(job: Job, state: JobState) -> bool:
    """The last submission ended, and its supervisor said how."""
    ended = state.state in ("FAILED", "OUT_OF_MEMORY") and state.submitted >= job.submitted
    return ended or state.state == "FINISHED"


def _own(job: Job, state: JobState) -> JobState:
    """What is known of the last submission."""
    if state.submitted >= job.submitted:
        return state
    return replace(state, state="QUEUED", submitted=job.submitted, started=None, ended=None, node=None, reason="")


def _here(job: Job) -> JobState:
    """Of a job that this machine runs: a lock is held as long as its process lives, whatever it dies of."""
    state = job.state
    if held(job.lock):
        return state if state.state == "RUNNING" else replace(state, state="RUNNING", reason="")
    state = job.state  # written since, perhaps
    if not state.active and state.submitted >= job.submitted:
        return state
    if held(Sweep(job.folder.parent).launching):
        return replace(state, state="QUEUED", reason="")
    if state.submitted >= job.submitted and state.state == "RUNNING":
        return replace(state, state="LOST", reason=f"its supervisor was killed; {AGAIN}")
    return replace(state, state="LOST", reason=f"its launcher ended before it began; {AGAIN}")


def _there(
    job: Job, state: JobState, slurm_ids: Sequence[str], known: Mapping[str, Said], arrays: Collection[str]
) -> JobState:
    """Of a job that SLURM runs, and whose supervisor has not said the last word; `arrays` are those of `known`."""
    if (
        state.state == "RUNNING"
        and state.slurm_id
        and state.slurm_id in known
        and known[state.slurm_id].state in slurm_commands.WORKING
    ):
        return state
    slurm_id, own = slurm_ids[0], replace(_own(job, state), slurm_id=slurm_ids[0])
    said = known.get(slurm_id)
    # Of a task that is cancelled while it waits within its array SLURM keeps no record, of the others it does.
    if said is None and (job.cancelled >= own.submitted or slurm_id.partition("_")[0] in arrays):
        return replace(own, state="CANCELLED", reason=f"cancelled before it began; {AGAIN}")
    if said is None:
        return replace(own, state="LOST", reason=f"SLURM knows nothing of job {slurm_id} any more; {AGAIN}")
    if said.state in slurm_commands.WAITING:
        reason = own.reason if said.reason in _USUAL else f"waits: {said.reason}"
        return replace(own, state="QUEUED", reason=reason)
    if said.state in slurm_commands.WORKING:
        return replace(own, state="RUNNING", node=own.node or said.node, reason="")
    word = _MEANS.get(said.state, said.state)
    if word == "FAILED" and state.state == "INTERRUPTED" and state.submitted >= job.submitted:
        return state  # it could not be requeued, and its supervisor said why
    if word in _SAME_NAME:
        reason = _WHY.get(
            word, f"SLURM says {said.state}, {said.reason}; its files are in {job.folder.parent / 'slurm'}"
        )
        return replace(own, state=word, node=own.node or said.node, reason=f"{reason}; {AGAIN}")  # type: ignore[arg-type]
    reason = f"SLURM says {said.state}, but its supervisor did not say how it ended; {AGAIN}"
    return replace(own, state="LOST", node=own.node or said.node, reason=reason)
