"""Runs of MLflow that no training writes: the parent run of a sweep, made before any job begins, and comparisons."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from twoviews.tracking.client import get_or_create_run, mlflow_tags, open_experiment, set_status
from twoviews.tracking.description import set_note


def open_parent_run(uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str]) -> tuple[str, str]:
    """MLflow's ids of a run that is RUNNING from now on, and of its experiment; made once for each key (`new_run_key`).

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: MLflow does not answer or refuses.
    """
    client, experiment_id = open_experiment(uri, experiment)
    run_id = get_or_create_run(client, experiment_id, key, tags={}, run_name=name).info.run_id
    update_run(uri, experiment, run_id, status="RUNNING", tags=tags)
    return run_id, experiment_id


def update_run(
    uri: str | None,
    experiment: str,
    run_id: str,
    *,
    status: str = "",
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    step: int = 0,
    note: str = "",
    files: Sequence[Path] = (),
    artifact_folder: str | None = None,
) -> None:
    """Send what is given to a run from `open_parent_run`.

    Args:
        uri: the tracking URI.
        experiment: of the run.
        run_id: MLflow's id of it.
        status: RUNNING, FINISHED, FAILED or KILLED.
        tags: set in each call.
        metrics: values by name; those that MLflow has already are left out.
        step: of the metrics.
        note: the description of the run, in Markdown.
        files: become artifacts, in place of earlier versions.
        artifact_folder: the folder of the files among the artifacts.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    client, _ = open_experiment(uri, experiment)
    from mlflow.entities import Metric, RunTag

    run, now = client.get_run(run_id), int(time.time() * 1000)
    new = [
        Metric(name, value, now, step) for name, value in (metrics or {}).items() if run.data.metrics.get(name) != value
    ]
    client.log_batch(run_id, new, tags=[RunTag(*tag) for tag in mlflow_tags(tags or {}).items()], synchronous=True)
    if note:
        set_note(client, run, note)
    for file in files:
        client.log_artifact(run_id, str(file), artifact_folder)
    if status:
        set_status(client, run_id, status)
