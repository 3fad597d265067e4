"""A sweep in MLflow: its parent run, opened at submission; the upload of what its jobs could not send themselves; and the
report, which is brought up to date beside the trainings while the sweep goes on.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from twoviews import foreign
from twoviews.code import python_path
from twoviews.errors import BadInput, system_reason
from twoviews.sweeps.folder import WRITER_THREADS, Sweep
from twoviews.sweeps.job import Job, JobState, assigned, short_names, with_varying_parameters
from twoviews.sweeps.job_states import current_states
from twoviews.tracking import uris
from twoviews.tracking.client import MAX_KEY_LENGTH, mlflow_tags, short_error, shortened
from twoviews.tracking.metrics import METRICS_FILE
from twoviews.tracking.parent_run import open_parent_run, update_run
from twoviews.tracking.state import NAME_TAG, PARENT_TAG, new_run_key, page, set_target
from twoviews.tracking.upload import is_uploaded, pending_values, upload

PARENT_LOCK_SECONDS = 120.0  # longest wait for another process that opens the parent run
REPORT_SECONDS = 60.0  # between two reports at least


def attach_jobs(sweep: Sweep, jobs: Sequence[Job], tracking: Mapping[str, Any]) -> None:
    """Create the database, the experiment and the parent run before any job begins, and attach the jobs to it.

    Args:
        sweep: its sweep.json gets the id of the parent run.
        jobs: the jobs that become children of it.
        tracking: the node of the configuration that all jobs share.

    Raises:
        BadInput: MLflow does not answer.
    """
    uri, experiment = tracking["uri"], tracking["experiment"]
    target = {"uri": uri, "experiment": experiment}
    with FileLock(sweep.folder / ".parent.lock", timeout=PARENT_LOCK_SECONDS):
        with sweep.update() as record:
            if record.get("tracking") != target:  # at another tracking URI the parent is another run
                record.update(tracking=target, parent=None, parent_key=new_run_key())
        key, tags = record["parent_key"], {"twoviews.sweep": sweep.name, "folder": str(sweep.folder)}
        tags.update(command="\n".join(sweep.commands), **_value_tags(record["axes"]))
        with _mlflow_errors():
            parent, experiment_id = open_parent_run(uri, experiment, sweep.name, key, tags)
        with sweep.update() as record:
            record.update(parent=parent, parent_experiment=experiment_id, parent_status="RUNNING")
    varying = {job.digest: job for job in with_varying_parameters(sweep.jobs)}
    names = short_names(dict.fromkeys(key for job in varying.values() for key in job.parameters))

    def attach(job: Job) -> None:
        values = varying[job.digest].parameters
        name = shortened(assigned(values, names) or job.digest, MAX_KEY_LENGTH)
        set_target(job.folder, uri, experiment, {PARENT_TAG: parent, NAME_TAG: name, **_value_tags(values)})

    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        list(pool.map(attach, jobs))


def collect(sweep: Sweep, jobs: Sequence[Job], say: Callable[[str], None] = print) -> int:
    """Upload what MLflow lacks of these jobs, which may be running; returns the number of jobs that could not be uploaded.

    The MLflow run of a job that is not active gets the final status that result.json has, or KILLED without one. The parent
    run gets a report, and a final status once no job of the sweep is active.

    Raises:
        BadInput: MLflow does not answer.
    """
    states, failed = current_states(sweep.jobs), 0
    tracking = sweep.record.get("tracking") or foreign.load(jobs[0].folder / "config.yaml")["tracking"]
    attach_jobs(sweep, jobs, tracking)
    for job in jobs:
        if not (job.folder / METRICS_FILE).exists():
            continue
        try:
            upload(job.folder, training_ended=not states[job.digest].active)
        except Exception as error:  # an error in one folder must not stop the others
            say(f"{job.digest} {job.label}: {pending_values(job.folder)} numbers left ({short_error(error)})")
            failed += 1
    if end := _parent_status(states):
        with _mlflow_errors():
            update_run(tracking["uri"], tracking["experiment"], sweep.record["parent"], status=end)
        with sweep.update() as record:
            record["parent_status"] = end
    from twoviews.sweeps.report import report  # which takes long to import

    try:
        report(sweep, states, say)
    except (BadInput, OSError) as error:  # the results are in the folders
        reason = system_reason(error) if isinstance(error, OSError) else str(error)
        say(f"there is no report ({reason}); `python -m twoviews.sweep report {shlex.quote(sweep.name)}` makes it.")
    return failed


def sweep_page(sweep: Sweep) -> str | None:
    """How to see the parent run: its address, or the command that serves MLflow's pages; None where there is none."""
    record = sweep.record
    if not (record["parent"] and "parent_experiment" in record):
        return None
    return page(uris.resolve(record["tracking"]["uri"]), record["parent_experiment"], record["parent"])


def flush(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Upload what MLflow lacks of a sweep, if none of its jobs is active; a failure is said, not raised.

    What it lacks follows from what the folders have recorded of earlier uploads; MLflow is not asked.
    """
    jobs, record = sweep.jobs, sweep.record
    if not jobs or not (status := _parent_status(current_states(jobs))):
        return
    ended = record["parent"] and record.get("parent_status") == status
    if ended and all(is_uploaded(job.folder) for job in jobs if (job.folder / METRICS_FILE).exists()):
        return
    try:
        failed = collect(sweep, jobs, say)
    except BadInput as error:
        failed = 1
        say(f"error: {error}")
    if failed:
        name = shlex.quote(sweep.name)
        say(f"MLflow does not have all results; `python -m twoviews.sweep collect {name}` sends them.")


def _value_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """MLflow's tags for varying values by key."""
    return mlflow_tags({f"axis.{key}": value for key, value in values.items()})


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    """A block in which errors of MLflow become a BadInput of one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"MLflow does not accept the sweep ({short_error(error)}); correct the tracking URI, or use tracking=files and "
            "`python -m twoviews.sweep collect` later."
        ) from error


def _parent_status(states: Mapping[str, JobState]) -> str:
    """MLflow's name for the status of the parent run; empty while jobs are active."""
    if any(state.active for state in states.values()):
        return ""
    return "FINISHED" if all(state.finished_or_pruned for state in states.values()) else "FAILED"


def is_due(sweep: Sweep) -> bool:
    """Whether the sweep has a page in MLflow, and its report is not from the last minute."""
    path = sweep.folder / "report.md"
    return bool(sweep.record["parent"]) and not (path.exists() and time.time() < path.stat().st_mtime + REPORT_SECONDS)


class BackgroundReport:
    """A process of low priority that makes the report; nobody waits for it, and what it prints is not shown."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def update(self, sweep: Sweep) -> None:
        """Start the process after a job has ended, if the report is due and not in the making."""
        if (self._process and self._process.poll() is None) or not is_due(sweep):
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twoviews.sweep", "report", str(sweep.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            start_new_session=True,  # Ctrl-C in the terminal is for the jobs
            preexec_fn=lambda: os.nice(19),
        )

    def stop(self) -> None:
        """End the process: the report at the end of the sweep has what this one would have."""
        if self._process:
            self._process.terminate()
            self._process.wait()
