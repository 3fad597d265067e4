"""A sweep in MLflow: one parent run, made before any of its points begins, and the points as its children."""

import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews.tracking import stores
from twoviews.tracking.sending import KEY_LENGTH, PARENT, TAG_LENGTH, aiming, open_once

if TYPE_CHECKING:
    from mlflow import MlflowClient


def new_key() -> str:
    """What a parent run is found by, when a crash kept its id from being written down."""
    return uuid.uuid4().hex


def open_parent(uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str]) -> str:
    """MLflow's id of the parent run, which is made once however often this is called; it is RUNNING afterwards.

    Args:
        uri: MLflow's store.
        experiment: made where it is missing.
        name: the sweep's.
        key: from `new_key`, the same for all calls for this sweep.
        tags: set anew.

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: the store does not answer or refuses.
    """
    client, experiment_id = stores.connect(stores.resolved(uri), experiment)
    run = open_once(client, experiment_id, key, tags={}, run_name=name)
    _tag(client, run.info.run_id, tags)
    client.update_run(run.info.run_id, status="RUNNING")
    return run.info.run_id


def end_parent(uri: str | None, experiment: str, run_id: str, status: str) -> None:
    """Tell MLflow how a sweep ended: FINISHED, FAILED or KILLED.

    Raises:
        MlflowException: the store does not answer or refuses.
    """
    client, _ = stores.connect(stores.resolved(uri), experiment)
    client.set_terminated(run_id, status)


def publish(
    uri: str | None, experiment: str, name: str, key: str, tags: Mapping[str, str], files: Sequence[Path]
) -> str:
    """MLflow's id of a run that only holds files, such as a comparison; the same key replaces them.

    Raises:
        BadInput: the experiment was deleted in MLflow.
        MlflowException: the store does not answer or refuses.
    """
    run_id = open_parent(uri, experiment, name, key, tags)
    client, _ = stores.connect(stores.resolved(uri), experiment)
    for file in files:
        client.log_artifact(run_id, str(file))
    end_parent(uri, experiment, run_id, "FINISHED")
    return run_id


def adopt(folder: Path, uri: str | None, experiment: str, parent: str, axes: Mapping[str, Any]) -> None:
    """Write down in a run folder where it is to be sent, below which parent and with which values as tags."""
    with aiming(folder, uri, experiment) as state:
        tags = {PARENT: parent, **axis_tags(axes)}
        if state.tags != tags:
            # What MLflow was told last is forgotten, so that a run which is there already is opened and gets them.
            state.tags, state.status = tags, ""


def axis_tags(axes: Mapping[str, Any]) -> dict[str, str]:
    """Values by key as MLflow's tags."""
    return {
        re.sub(r"[^\w\-./: ]", "_", f"axis.{key}")[:KEY_LENGTH]: str(value)[:TAG_LENGTH] for key, value in axes.items()
    }


def _tag(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()], synchronous=True)
