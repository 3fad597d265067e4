"""The present state of jobs: as their runners wrote it while these live, otherwise as SLURM reports it."""

import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from twoviews.locks import is_held
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState

CANCEL_SECONDS = 60.0  # for a cancelled job to end; SLURM grants 30 s (KillWait) unless a cluster sets another time
ANSWER_SECONDS = 60.0  # longest wait for one of SLURM's commands
IDS_PER_CALL = 500  # of arrays and single jobs, far below the longest command line
# States of SLURM jobs, by what the job of the sweep does meanwhile.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")
RESUME_HINT = "the same command goes on"
NO_CONTROLLER = "SLURM's controller does not answer; ask again where squeue does"
_OTHER_NAME = {"BOOT_FAIL": "NODE_FAIL", "DEADLINE": "TIMEOUT", "REVOKED": "CANCELLED"}
_USUAL_REASONS = ("", "BeginTime", "JobArrayTaskLimit", "Priority", "Resources")  # to wait; others are shown
_REASONS = {  # of the states that SLURM and sweeps have in common
    "FAILED": "SLURM reports FAILED, {reason}; its files are in {folder}",
    "TIMEOUT": "the time limit came before a checkpoint could be written",
    "PREEMPTED": "preempted, and the cluster does not requeue",
    "NODE_FAIL": "its node failed, and the cluster does not requeue",
    "OUT_OF_MEMORY": "the memory of the SLURM job was used up; ask for more (mem_gb)",
    "CANCELLED": "cancelled",
}


@dataclass(frozen=True)
class SlurmState:
    """The state of a SLURM job."""

    state: str  # as squeue and sacct write it in full, such as NODE_FAIL
    node: str  # one or several; empty before the job ran
    reason: str  # why the job waits, or its exit code


def current_states(jobs: Sequence[Job]) -> Mapping[str, JobState]:
    """The state of each job by its digest, from state.json, locks and the scheduler."""
    slurm_ids = {id_ for job in jobs if not file_suffices(job, state := job.state) for id_ in _slurm_ids(job, state)}
    # The scheduler is asked before the files are read: a job that ends in between has written its state by then.
    queued = squeue_states(slurm_ids)
    slurm_states = None if queued is None else {**sacct_states(slurm_ids - queued.keys()), **queued}
    return {job.digest: pruned_or_refused(job, _state(job, slurm_states)) for job in jobs}


def _state(job: Job, slurm_states: Mapping[str, SlurmState] | None) -> JobState:
    """The state of a job before `pruned_or_refused`, by SLURM's states by id; None if SLURM's controller does not answer."""
    state = job.state
    if file_suffices(job, state):
        return state
    if not (slurm_ids := _slurm_ids(job, state)):
        return _local_state(job)
    last = replace(state, slurm_id=slurm_ids[0])
    if state.submitted < job.submitted:  # it belongs to an earlier submission
        last = replace(last, state="QUEUED", submitted=job.submitted, started=None, ended=None, node=None, reason="")
    if slurm_states is None:
        # An interrupted job is on its way back into the queue, where only the controller can put it.
        return replace(last, state="QUEUED" if last.state == "INTERRUPTED" else last.state, reason=NO_CONTROLLER)
    reported = slurm_states.get(state.slurm_id or "")  # of the SLURM job whose runner wrote state.json
    if state.state == "RUNNING" and reported and reported.state in WORKING:
        return state
    return _slurm_state(job, state, last, slurm_states)


def pruned_or_refused(job: Job, state: JobState) -> JobState:
    """`state`, or PRUNED if a search gave the job up, or FAILED if the scheduler refused it, unless it runs or has finished."""
    runs = state.state == "RUNNING" or (state.state == "QUEUED" and job.slurm_id and not job.refused)
    if runs or state.state == "FINISHED" or not (job.given_up or job.refused):
        return state
    if job.given_up:
        return replace(state, state="PRUNED", reason=job.given_up)
    return replace(state, state="FAILED", reason=job.refused)


def file_suffices(job: Job, state: JobState) -> bool:
    """Whether `state`, from state.json, holds whatever SLURM reports: the job finished, or failed in its last submission."""
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


def _local_state(job: Job) -> JobState:
    """The state of a job on this machine: a lock is held exactly as long as its process lives."""
    running, state = is_held(job.lock), job.state  # read after that: the runner may have ended
    if running:
        return state if state.state == "RUNNING" else replace(state, state="RUNNING", reason="")
    written = state.submitted >= job.submitted
    if written and not state.active:
        return state
    if is_held(Sweep(job.folder.parent).launcher_lock):
        return replace(state, state="QUEUED", slurm_id=None, reason="")  # in the queue of that launcher, not of SLURM
    reason = "its runner was killed" if written and state.state == "RUNNING" else "its launcher ended before it began"
    return replace(state, state="LOST", reason=f"{reason}; {RESUME_HINT}")


def _slurm_state(job: Job, state: JobState, last: JobState, slurm_states: Mapping[str, SlurmState]) -> JobState:
    """The state of a job on SLURM that state.json does not tell.

    Args:
        job: whose state is wanted.
        state: in state.json.
        last: the state in state.json with the id of the last submission, QUEUED if state.json is older than that.
        slurm_states: SLURM's states by id.
    """
    slurm_id = str(last.slurm_id)
    if not (reported := slurm_states.get(slurm_id)):
        # SLURM keeps no record of a task that is cancelled while it waits within its array; of other jobs it does.
        array = slurm_id.partition("_")[0]
        if job.cancelled >= last.submitted or any(known.partition("_")[0] == array for known in slurm_states):
            return replace(last, state="CANCELLED", reason=f"cancelled before it began; {RESUME_HINT}")
        return replace(last, state="LOST", reason=f"SLURM does not know its job {slurm_id} any more; {RESUME_HINT}")
    if reported.state in WAITING:
        reason = last.reason if reported.reason in _USUAL_REASONS else f"waits: {reported.reason}"
        return replace(last, state="QUEUED", reason=reason)
    last = replace(last, node=last.node or reported.node)
    if reported.state in WORKING:
        return replace(last, state="RUNNING", reason="")
    name = _OTHER_NAME.get(reported.state, reported.state)
    if name == "FAILED" and state.state == "INTERRUPTED" and state.submitted >= job.submitted:
        return state  # it could not be requeued, and its runner wrote why
    if name not in _REASONS:
        reason = f"SLURM reports {reported.state}, but its runner did not write how it ended; {RESUME_HINT}"
        return replace(last, state="LOST", reason=reason)
    reason = _REASONS[name].format(reason=reported.reason, folder=job.folder.parent / "slurm")
    return replace(last, state=name, reason=f"{reason}; {RESUME_HINT}")  # type: ignore[arg-type]


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
    end, before, silent = time.monotonic() + timeout_s, {}, False
    while True:
        states = current_states(jobs)
        if not silent and (silent := any(state.reason == NO_CONTROLLER for state in states.values())):
            say(f"{NO_CONTROLLER}; waiting for it")
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


def squeue_states(slurm_ids: Iterable[str]) -> dict[str, SlurmState] | None:
    """States by id from squeue, also of jobs that ended a short time ago; None if the controller does not answer."""
    return _reported(slurm_ids, "squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r")


def sacct_states(slurm_ids: Iterable[str]) -> dict[str, SlurmState]:
    """States by id from sacct; empty on a cluster without accounting."""
    states = _reported(slurm_ids, "sacct", "-X", "-n", "-P", "--format=JobID,State,NodeList,ExitCode") or {}
    return {slurm_id: replace(state, reason=f"exit code {state.reason}") for slurm_id, state in states.items()}


def _reported(slurm_ids: Iterable[str], *command: str) -> dict[str, SlurmState] | None:
    """States by id from a command that prints id, state, node and reason; None if squeue fails."""
    states: dict[str, SlurmState] = {}
    names = sorted({slurm_id.partition("_")[0] for slurm_id in slurm_ids})  # an array is named once, not by its tasks
    for start in range(0, len(names), IDS_PER_CALL):
        answer = run_slurm(*command, f"--jobs={','.join(names[start : start + IDS_PER_CALL])}")
        failed = answer.returncode and "Invalid job id" not in answer.stderr
        if failed and command[0] == "squeue":
            return None
        for line in answer.stdout.splitlines():
            slurm_id, state, node, reason = line.strip().split("|", 3)
            # The state may be followed by other words, as in "CANCELLED by 1000".
            node, reason = ("" if text.startswith("None") else text for text in (node, reason))
            states[slurm_id] = SlurmState(state.split()[0], node, reason)
    return states


def run_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; what does not answer in time, or is missing, has exit code 1."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
