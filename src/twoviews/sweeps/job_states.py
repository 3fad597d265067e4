"""The present state of jobs: as their runners wrote it while these live, otherwise as SLURM reports it."""

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from twoviews.locks import is_locked
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState

CANCEL_SECONDS = 60.0  # for a cancelled job to end; SLURM grants 30 s (KillWait) unless a cluster sets another time
ANSWER_SECONDS = 60.0  # longest wait for one of SLURM's commands
IDS_PER_CALL = 500  # of arrays and single jobs, far below the longest command line
# States of SLURM jobs, by what the job of the sweep does meanwhile.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")
RESUME_HINT = "the same command goes on"
_SAME_NAME = ("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED")
_OTHER_NAME = {"BOOT_FAIL": "NODE_FAIL", "DEADLINE": "TIMEOUT", "REVOKED": "CANCELLED"}
_USUAL_REASONS = ("", "BeginTime", "JobArrayTaskLimit", "Priority", "Resources")  # to wait; others are shown
_REASONS = {
    "TIMEOUT": "the time limit came before a checkpoint could be written",
    "PREEMPTED": "preempted, and the cluster does not requeue",
    "NODE_FAIL": "its node failed, and the cluster does not requeue",
    "OUT_OF_MEMORY": "the memory of the SLURM job was used up; ask for more (mem_gb)",
    "CANCELLED": "cancelled",
}


@dataclass(frozen=True)
class SlurmState:
    """The state of a SLURM job.

    Args:
        state: as squeue and sacct write it in full, such as NODE_FAIL.
        node: one or several; empty before the job ran.
        reason: why the job waits, or its exit code.
    """

    state: str
    node: str = ""
    reason: str = ""


def current_states(jobs: Sequence[Job]) -> Mapping[str, JobState]:
    """The state of each job by its digest, from state.json, locks and the scheduler."""
    slurm_ids = {id_ for job in jobs if not is_final(job, state := job.state) for id_ in _slurm_ids(job, state)}
    # The scheduler is asked before the files are read: a job that ends in between has written its state by then.
    queued = squeue_states([*slurm_ids]) if slurm_ids else {}
    ended = [slurm_id for slurm_id in slurm_ids if queued is not None and slurm_id not in queued]
    slurm_states = {**(sacct_states(ended) if ended else {}), **(queued or {})}
    arrays = {slurm_id.partition("_")[0] for slurm_id in slurm_states}
    states = {}
    for job in jobs:
        state = job.state
        if is_final(job, state):
            states[job.digest] = state
        elif not (own_ids := _slurm_ids(job, state)):
            states[job.digest] = _local_state(job)
        elif queued is None:
            last = _of_last_submission(job, state)
            states[job.digest] = replace(last, slurm_id=own_ids[0], reason="SLURM's controller does not answer")
        else:
            states[job.digest] = _slurm_state(job, state, own_ids[0], slurm_states, arrays)
    return {job.digest: with_recorded_end(job, states[job.digest]) for job in jobs}


def wait_until_ended(
    jobs: Sequence[Job], timeout_s: float = math.inf, poll_s: float = 1.0, say: Callable[[str], None] = lambda _: None
) -> bool:
    """Wait until none of these jobs is queued or running; whether that was so within the time.

    Args:
        jobs: of one sweep.
        timeout_s: seconds.
        poll_s: seconds between two looks at the states.
        say: called with a sentence for each change of a state.
    """
    end, before = time.monotonic() + timeout_s, {}
    while True:
        states = current_states(jobs)
        for job in jobs:
            state = states[job.digest]
            if before.get(job.digest, state.state) != state.state:
                say(f"{job.label}: {state.state}{': ' if state.reason else ''}{state.reason}")
            before[job.digest] = state.state
        if not any(state.active for state in states.values()):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)


def with_recorded_end(job: Job, state: JobState) -> JobState:
    """The state of a job: unless it runs or has finished, PRUNED if a search gave it up, FAILED if the scheduler refused it."""
    runs = state.state == "RUNNING" or (state.state == "QUEUED" and job.slurm_id and not job.refused)
    if runs or state.state == "FINISHED" or not (job.given_up or job.refused):
        return state
    if job.given_up:
        return replace(state, state="PRUNED", reason=job.given_up)
    return replace(state, state="FAILED", reason=job.refused)


def is_final(job: Job, state: JobState) -> bool:
    """Whether a state of state.json is final: the job finished, or failed in its last submission. SLURM is not asked then."""
    ended = state.state in ("FAILED", "OUT_OF_MEMORY") and state.submitted >= job.submitted
    return ended or state.state == "FINISHED"


def _slurm_ids(job: Job, state: JobState) -> list[str]:
    """Ids of the SLURM jobs that may be running a job, the last submission first; empty if it was not SLURM.

    There are two if a launcher was killed before it recorded what it had submitted.
    """
    if job.slurm_id is None and job.submitted > state.submitted:
        return []
    written = state.slurm_id if state.active else None
    candidates = (state.slurm_id, job.slurm_id) if state.submitted > job.submitted else (job.slurm_id, written)
    return [*dict.fromkeys(slurm_id for slurm_id in candidates if slurm_id)]


def _of_last_submission(job: Job, state: JobState) -> JobState:
    """The state, or QUEUED if it belongs to an earlier submission."""
    if state.submitted >= job.submitted:
        return state
    return replace(state, state="QUEUED", submitted=job.submitted, started=None, ended=None, node=None, reason="")


def _local_state(job: Job) -> JobState:
    """The state of a job on this machine: a lock is held exactly as long as its process lives."""
    state = job.state
    if is_locked(job.lock):
        return state if state.state == "RUNNING" else replace(state, state="RUNNING", reason="")
    state = job.state  # the runner may have written it since
    if not state.active and state.submitted >= job.submitted:
        return state
    if is_locked(Sweep(job.folder.parent).launcher_lock):
        return replace(state, state="QUEUED", reason="")
    if state.submitted >= job.submitted and state.state == "RUNNING":
        return replace(state, state="LOST", reason=f"its runner was killed; {RESUME_HINT}")
    return replace(state, state="LOST", reason=f"its launcher ended before it began; {RESUME_HINT}")


def _slurm_state(
    job: Job, state: JobState, slurm_id: str, slurm_states: Mapping[str, SlurmState], arrays: Collection[str]
) -> JobState:
    """The state of a job on SLURM whose runner wrote no final one.

    Args:
        job: whose state is wanted.
        state: in state.json.
        slurm_id: of its last submission.
        slurm_states: SLURM's states by id.
        arrays: ids of the arrays in `slurm_states`.
    """
    writer = slurm_states.get(state.slurm_id or "")  # the SLURM job whose runner wrote the state
    if state.state == "RUNNING" and writer and writer.state in WORKING:
        return state
    last, reported = replace(_of_last_submission(job, state), slurm_id=slurm_id), slurm_states.get(slurm_id)
    if reported is None:
        # SLURM keeps no record of a task that is cancelled while it waits within its array; of other jobs it does.
        if job.cancelled >= last.submitted or slurm_id.partition("_")[0] in arrays:
            return replace(last, state="CANCELLED", reason=f"cancelled before it began; {RESUME_HINT}")
        return replace(last, state="LOST", reason=f"SLURM does not know its job {slurm_id} any more; {RESUME_HINT}")
    if reported.state in WAITING:
        reason = last.reason if reported.reason in _USUAL_REASONS else f"waits: {reported.reason}"
        return replace(last, state="QUEUED", reason=reason)
    node = last.node or reported.node
    if reported.state in WORKING:
        return replace(last, state="RUNNING", node=node, reason="")
    name = _OTHER_NAME.get(reported.state, reported.state)
    if name == "FAILED" and state.state == "INTERRUPTED" and state.submitted >= job.submitted:
        return state  # it could not be requeued, and its runner wrote why
    if name not in _SAME_NAME:
        reason = f"SLURM reports {reported.state}, but its runner did not write how it ended; {RESUME_HINT}"
        return replace(last, state="LOST", node=node, reason=reason)
    details = f"SLURM reports {reported.state}, {reported.reason}; its files are in {job.folder.parent / 'slurm'}"
    reason = f"{_REASONS.get(name, details)}; {RESUME_HINT}"
    return replace(last, state=name, node=node, reason=reason)  # type: ignore[arg-type]


def squeue_states(slurm_ids: Sequence[str]) -> Mapping[str, SlurmState] | None:
    """States by id from squeue, also of jobs that ended a short time ago; None if the controller does not answer."""
    states: dict[str, SlurmState] = {}
    for ids in _batches(slurm_ids):
        answer = run_slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={ids}")
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return None
        for line in answer.stdout.splitlines():
            slurm_id, state, node, reason = line.strip().split("|", 3)
            states[slurm_id] = SlurmState(state, node, "" if reason == "None" else reason)
    return states


def sacct_states(slurm_ids: Sequence[str]) -> Mapping[str, SlurmState]:
    """States by id from sacct; empty on a cluster without accounting."""
    states: dict[str, SlurmState] = {}
    for ids in _batches(slurm_ids) if shutil.which("sacct") else ():
        answer = run_slurm("sacct", "-X", "-n", "-P", "--format=JobID,State,NodeList,ExitCode", "-j", ids)
        for line in answer.stdout.splitlines():
            slurm_id, state, node, code = line.strip().split("|", 3)
            # The state may be followed by other words, as in "CANCELLED by 1000".
            node = "" if node.startswith("None") else node
            states[slurm_id] = SlurmState(state.split()[0], node, f"exit code {code}")
    return states


def _batches(slurm_ids: Sequence[str]) -> Iterator[str]:
    """Comma-separated ids for one call each; an array is named once, not by its tasks."""
    names = sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids})
    for start in range(0, len(names), IDS_PER_CALL):
        yield ",".join(names[start : start + IDS_PER_CALL])


def run_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; what does not answer in time, or is missing, has exit code 1."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
