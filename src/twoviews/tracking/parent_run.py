"""A sweep in MLflow: a parent run, made before any job begins, with the jobs' runs as its children."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twoviews.tracking import uris
from twoviews.tracking.client import MAX_KEY_LENGTH, MAX_TAG_LENGTH, connect, get_or_create_run, mlflow_key
from twoviews.tracking.state import PARENT_TAG, set_target


def open_parent_run(uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str]) -> str:
    """MLflow's id of the parent run, which is made once however often this is called and gets the status RUNNING.

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
    client, experiment_id = connect(uris.resolve(uri), experiment)
    from mlflow.entities import RunTag

    run_id = get_or_create_run(client, experiment_id, key, tags={}, run_name=name).info.run_id
    client.log_batch(
        run_id, tags=[RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in tags.items()], synchronous=True
    )
    client.update_run(run_id, status="RUNNING")
    return run_id


def end_parent_run(uri: str | None, experiment: str, run_id: str, status: str) -> None:
    """Set the final status of a sweep: FINISHED, FAILED or KILLED.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    client, _ = connect(uris.resolve(uri), experiment)
    client.set_terminated(run_id, status)


def log_files(
    uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str], files: Sequence[Path]
) -> str:
    """MLflow's id of a run that only holds files, such as a comparison; another call with the same key replaces them.

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: MLflow does not answer or refuses.
    """
    run_id = open_parent_run(uri, experiment, name, key, tags)
    client, _ = connect(uris.resolve(uri), experiment)
    for file in files:
        client.log_artifact(run_id, str(file))
    end_parent_run(uri, experiment, run_id, "FINISHED")
    return run_id


def attach_parent(folder: Path, uri: str | None, experiment: str, parent: str, values: Mapping[str, Any]) -> None:
    """Record in a run folder its target, its parent run and its varying values, which become tags."""
    set_target(folder, uri, experiment, {PARENT_TAG: parent, **value_tags(values)})


def value_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """MLflow's tags for varying values by key."""
    return {mlflow_key(f"axis.{key}")[:MAX_KEY_LENGTH]: str(value)[:MAX_TAG_LENGTH] for key, value in values.items()}
