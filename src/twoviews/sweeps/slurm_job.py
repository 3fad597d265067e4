"""What runs inside a SLURM job: a runner for each process, which starts the training and talks to SLURM.

SLURM's signals come to the runner and to the training. With several processes per job, each has a runner and a training of
its own; the runner of process 0 writes the state of the job and requeues it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState
from twoviews.sweeps.job_states import RESUME_HINT, current_states, run_slurm, squeue_states
from twoviews.sweeps.mlflow_sync import is_due
from twoviews.sweeps.runner import STOP_SIGNALS, TrainingProcess

REQUEUE_SECONDS = 600.0  # longest wait for the controller to answer a job that has to be requeued
KILL_SECONDS = 120.0  # longest wait for SLURM to end a job that it requeues
MLFLOW_SECONDS = 120.0  # longest wait for MLflow to take the end of a job or of the sweep
PARTNER_SECONDS = 30.0  # for process 0 to write down why another one failed, before SLURM ends the job


class JobFailed(Exception):
    """The training failed; raised so that SLURM reports FAILED as well."""


class RunnerSignals:
    """Handlers for the time when no training runs; those of submitit would requeue or end the job meanwhile."""

    def __init__(self) -> None:
        self._number = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def wait(self, seconds: float) -> None:
        """Wait for the next signal, at most so long."""
        self._number, end = 0, time.monotonic() + seconds
        while not self._number and time.monotonic() < end:
            time.sleep(0.1)


def run_job(folder: str, submitted: float) -> str:
    """Run a job; called in each process of its SLURM job, returns the name of its state.

    Args:
        folder: of the job.
        submitted: time of the submission, unix seconds.

    Raises:
        JobFailed: the training failed.
    """
    signals, job = RunnerSignals(), Job(Path(folder), {})
    rank, processes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    failures = FailureFiles(job, rank)
    environment = _rendezvous(processes) if processes > 1 else {}
    if rank > 0:
        return _run_other_process(job, failures, environment, signals)
    slurm_id = own_slurm_id()
    state = runner.run(job, submitted, environment, slurm_id, failures.read)
    if state.state == "INTERRUPTED" and slurm_id:
        _requeue(job, state, slurm_id, signals)
    _tell_mlflow(job)
    if state.state in ("FAILED", "OUT_OF_MEMORY"):
        raise JobFailed(state.reason)
    if state.state != "FINISHED" and processes > 1:
        raise JobFailed("another SLURM job runs this job")  # or the other processes would wait for this one
    return state.state


def own_slurm_id() -> str | None:
    """The id of the SLURM job that this process belongs to, as 12_3 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _requeue(job: Job, state: JobState, slurm_id: str, signals: RunnerSignals) -> None:
    """Put the SLURM job back into the queue, unless SLURM did that or ends it for good. Does not return."""
    missing = [command for command in ("scontrol", "squeue") if not shutil.which(command)]
    if missing:
        reason = f"{state.reason}, and {runner.node()} has no {missing[0]} to put it back into the queue; {RESUME_HINT}"
        job.write(replace(state, reason=reason))
        os._exit(1)
    end = time.monotonic() + REQUEUE_SECONDS
    while time.monotonic() < end:
        queued = squeue_states([slurm_id])
        if queued is None:  # the controller does not answer
            signals.wait(5)
            continue
        if slurm_id not in queued or queued[slurm_id].state != "RUNNING":  # requeued or cancelled by others
            os._exit(0)
        # Written before the request: SLURM kills this process at any moment after it.
        job.write(replace(state, state="QUEUED", reason=f"requeued, {state.reason}"))
        if run_slurm("scontrol", "requeue", slurm_id).returncode == 0:
            # Leaving now would end the SLURM job before it is back in the queue.
            signals.wait(KILL_SECONDS)
            os._exit(0)
        signals.wait(2)
    job.write(state)
    os._exit(1)


def _tell_mlflow(job: Job) -> None:
    """Send the end of a job whose training could not send it, the report, and the end of the sweep after its last job.

    What fails here can be done by `python -m twoviews.sweep collect`.
    """
    sweep = Sweep(job.folder.parent)
    if not sweep.record["parent"]:
        return
    if not any(state.active for state in current_states(sweep.jobs).values()):
        command = ["twoviews.sweep", "collect", str(sweep.folder)]
    elif not job.result:
        command = ["twoviews.tracking", "sync", str(job.folder)]
    elif is_due(sweep):
        command = ["twoviews.sweep", "report", str(sweep.folder)]
    else:
        return
    words = [sys.executable, "-m", *command]
    with (sweep.folder / "slurm" / "mlflow.log").open("a") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(words, stdout=log, stderr=log, timeout=MLFLOW_SECONDS, preexec_fn=_ignore_stop_signals)


def _ignore_stop_signals() -> None:
    """In a child process: the signal before a time limit reaches all processes of a SLURM job, and would end this one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class FailureFiles:
    """Files by which processes of a job tell process 0 why they failed: one that waits in a collective notices nothing.

    Args:
        job: in whose folder the files are.
        rank: of this process.
    """

    def __init__(self, job: Job, rank: int):
        start = os.environ.get("SLURM_RESTART_COUNT") or "0"
        self._folder, self._rank = job.folder, rank
        self._suffix = f"{own_slurm_id()}-{start}"

    def read(self) -> str:
        """The reason of a process that failed, or an empty string."""
        paths = sorted(self._folder.glob(f".dead-{self._suffix}-*"))
        return paths[0].read_text() if paths else ""

    def write(self, reason: str) -> None:
        """Tell process 0 that this process failed."""
        part = self._folder / f".dying-{self._suffix}-{self._rank}"
        part.write_text(f"process {self._rank} on {runner.node()}: {reason}")
        part.rename(self._folder / f".dead-{self._suffix}-{self._rank}")


def _run_other_process(job: Job, failures: FailureFiles, environment: Mapping[str, str], signals: RunnerSignals) -> str:
    """Run the training in a process other than 0; returns the name of its state."""
    if job.state.state == "FINISHED":
        return "FINISHED"
    with TrainingProcess(job, f"log.{environment['RANK']}.txt", environment) as training:
        training.wait(lambda: "")
    state, reason = training.process_state()
    if state == "FAILED":
        failures.write(reason)
        signals.wait(PARTNER_SECONDS)
        raise JobFailed(reason)
    if state == "INTERRUPTED":
        signals.wait(REQUEUE_SECONDS)  # process 0 requeues
        os._exit(0)
    return state


def _rendezvous(processes: int) -> dict[str, str]:
    """The variables by which torch.distributed finds the other processes of this job."""
    import submitit

    job_environment = submitit.JobEnvironment()
    slurm_id, start = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {
        "MASTER_ADDR": job_environment.hostnames[0],
        # Below the ephemeral ports; another one after a requeue, because the earlier process may still hold its port.
        "MASTER_PORT": str(20000 + (slurm_id * 7 + start) % 12000),
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(processes // job_environment.num_nodes),
    }
