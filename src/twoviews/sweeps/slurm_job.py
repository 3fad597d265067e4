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
from dataclasses import replace
from pathlib import Path

from submitit import JobEnvironment

from twoviews.files import write_atomic
from twoviews.sweeps import runner
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobState
from twoviews.sweeps.job_states import RESUME_HINT, current_states, run_slurm, squeue_states
from twoviews.sweeps.mlflow_sync import is_due
from twoviews.sweeps.runner import STOP_SIGNALS

REQUEUE_SECONDS = 600.0  # longest wait for the controller to answer a job that has to be requeued
KILL_SECONDS = 120.0  # longest wait for SLURM to end a job that it requeues
MLFLOW_SECONDS = 120.0  # longest wait for MLflow to take the end of a job or of the sweep
PARTNER_SECONDS = 30.0  # for process 0 to write down why another one failed, before SLURM ends the job


class JobFailed(Exception):
    """The training failed; raised so that SLURM reports FAILED as well."""


def run_job(folder: str, submitted: float) -> str:
    """Run a job; called in each process of its SLURM job, returns the name of its state.

    Args:
        folder: of the job.
        submitted: time of the submission, unix seconds.

    Raises:
        JobFailed: the training failed.
    """
    # While no training runs: submitit's handlers would requeue or end the job. Child processes inherit this.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    job, process = Job(Path(folder), {}), JobEnvironment()
    start = os.environ.get("SLURM_RESTART_COUNT") or "0"
    environment = _rendezvous(process, int(start)) if process.num_tasks > 1 else {}
    # The other processes write into these files why they failed, and process 0 reads them: its training, which may wait for
    # theirs in a collective operation, would not notice.
    failed = f".dead-{process.job_id}-{start}"
    if process.global_rank > 0:
        return _run_other_process(job, environment, job.folder / f"{failed}-{process.global_rank}.txt")

    def failure() -> str:
        paths = sorted(job.folder.glob(f"{failed}-*.txt"))
        return paths[0].read_text() if paths else ""

    state = runner.run(job, submitted, environment, process.job_id, failure)
    if state.state == "INTERRUPTED":
        _requeue(job, state, process.job_id)
    _tell_mlflow(job)
    if state.state in ("FAILED", "OUT_OF_MEMORY"):
        raise JobFailed(state.reason)
    if state.state != "FINISHED" and process.num_tasks > 1:
        raise JobFailed("another SLURM job runs this job")  # or the other processes would wait for this one
    return state.state


def _run_other_process(job: Job, environment: dict[str, str], failed: Path) -> str:
    """Run the training in a process other than 0; returns the name of its state."""
    if job.state.state == "FINISHED":
        return "FINISHED"
    state, reason = runner.train(job, f"log.{environment['RANK']}.txt", environment)
    if state == "FAILED":
        write_atomic(failed, f"process {environment['RANK']} on {runner.node()}: {reason}")
        _wait_for_signal(PARTNER_SECONDS)
        raise JobFailed(reason)
    if state == "INTERRUPTED":
        _wait_for_signal(REQUEUE_SECONDS)  # process 0 requeues
        os._exit(0)
    return state


def _wait_for_signal(seconds: float) -> None:
    """Wait for the next stop signal, at most so long."""
    signals: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))
    end = time.monotonic() + seconds
    while not signals and time.monotonic() < end:
        time.sleep(0.1)


def _rendezvous(process: JobEnvironment, start: int) -> dict[str, str]:
    """The variables by which torch.distributed finds the other processes of this job."""
    return {
        "MASTER_ADDR": process.hostnames[0],
        # Below the ephemeral ports; another one after a requeue, because the earlier process may still hold its port.
        "MASTER_PORT": str(20000 + (int(process.raw_job_id) * 7 + start) % 12000),
        "RANK": str(process.global_rank),
        "WORLD_SIZE": str(process.num_tasks),
        "LOCAL_RANK": str(process.local_rank),
        "LOCAL_WORLD_SIZE": str(process.num_tasks // process.num_nodes),
    }


def _requeue(job: Job, state: JobState, slurm_id: str) -> None:
    """Put the SLURM job back into the queue, unless SLURM did that or ends it for good. Does not return."""
    if not (shutil.which("scontrol") and shutil.which("squeue")):
        reason = f"{state.reason}, and {runner.node()} has no scontrol or squeue to put it back into the queue; {RESUME_HINT}"
        job.write(replace(state, reason=reason))
        os._exit(1)
    end = time.monotonic() + REQUEUE_SECONDS
    while time.monotonic() < end:
        queued = squeue_states([slurm_id])
        if queued is None:  # the controller does not answer
            time.sleep(5)
            continue
        if slurm_id not in queued or queued[slurm_id].state != "RUNNING":  # requeued or cancelled by others
            os._exit(0)
        # Written before the request: SLURM kills this process at any moment after it.
        job.write(replace(state, state="QUEUED", reason=f"requeued, {state.reason}"))
        if run_slurm("scontrol", "requeue", slurm_id).returncode == 0:
            # Leaving now would end the SLURM job before it is back in the queue.
            _wait_for_signal(KILL_SECONDS)
            os._exit(0)
        time.sleep(2)
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
    # It ignores the signal before a time limit, which reaches all processes of a SLURM job, as `run_job` does.
    with (sweep.folder / "slurm" / "mlflow.log").open("a") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-m", *command], stdout=log, stderr=log, timeout=MLFLOW_SECONDS)
