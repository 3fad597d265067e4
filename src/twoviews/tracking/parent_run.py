"""A sweep in MLflow: a parent run, made before any job begins, with the jobs' runs as its children."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twoviews.tracking.client import MAX_KEY_LENGTH, connect, get_or_create_run, mlflow_tags, shortened
from twoviews.tracking.description import set_note
from twoviews.tracking.state import NAME_TAG, PARENT_TAG, set_target


def open_parent_run(uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str]) -> tuple[str, str]:
    """MLflow's ids of the parent run and its experiment; the run is made once however often this is called.

    It gets the status RUNNING.

    Args:
        uri: the tracking URI.
        experiment: MLflow's experiment, made where it is missing.
        name: of the sweep.
        key: from `new_run_key`, the same for all calls for this sweep.
        tags: set in each call.

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: MLflow does not answer or refuses.
    """
    client, experiment_id = connect(uri, experiment)
    from mlflow.entities import RunTag

    run_id = get_or_create_run(client, experiment_id, key, tags={}, run_name=name).info.run_id
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in mlflow_tags(tags).items()], synchronous=True)
    client.update_run(run_id, status="RUNNING")
    return run_id, experiment_id


def end_parent_run(uri: str | None, experiment: str, run_id: str, status: str) -> None:
    """Set the final status of a sweep: FINISHED, FAILED or KILLED.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    client, _ = connect(uri, experiment)
    client.set_terminated(run_id, status)


def log_files(
    uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str], files: Sequence[Path]
) -> str:
    """MLflow's id of a run that only holds files, such as a comparison; another call with the same key replaces them.

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: MLflow does not answer or refuses.
    """
    run_id, _ = open_parent_run(uri, experiment, name, key, tags)
    client, _ = connect(uri, experiment)
    for file in files:
        client.log_artifact(run_id, str(file))
    end_parent_run(uri, experiment, run_id, "FINISHED")
    return run_id


def log_report(
    uri: str | None,
    experiment: str,
    run_id: str,
    note: str,
    files: Sequence[Path],
    metrics: Mapping[str, float],
    step: int,
    tags: Mapping[str, str],
) -> None:
    """Send the report of a sweep to its parent run.

    Args:
        uri: the tracking URI.
        experiment: MLflow's experiment.
        run_id: of the parent run.
        note: the description of the run, in Markdown.
        files: become artifacts, in place of earlier versions.
        metrics: values by name; those that MLflow has already are left out.
        step: number of finished jobs.
        tags: of the run.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    client, _ = connect(uri, experiment)
    from mlflow.entities import Metric, RunTag

    run, now = client.get_run(run_id), int(time.time() * 1000)
    new = [Metric(name, value, now, step) for name, value in metrics.items() if run.data.metrics.get(name) != value]
    client.log_batch(run_id, metrics=new, tags=[RunTag(*tag) for tag in mlflow_tags(tags).items()], synchronous=True)
    set_note(client, run, note)
    for file in files:
        client.log_artifact(run_id, str(file), "report")


def attach_parent(
    folder: Path, uri: str | None, experiment: str, parent: str, name: str, values: Mapping[str, Any]
) -> None:
    """Record in a run folder its target, its parent run, its name and its varying values, which become tags."""
    tags = {PARENT_TAG: parent, NAME_TAG: shortened(name, MAX_KEY_LENGTH), **value_tags(values)}
    set_target(folder, uri, experiment, tags)


def value_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """MLflow's tags for varying values by key."""
    return mlflow_tags({f"axis.{key}": value for key, value in values.items()})
