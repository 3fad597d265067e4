"""Uploads a run folder to MLflow: parameters, tags, metrics, artifacts and status.

Only MLflow's client is used, never its fluent interface, and every call can be repeated: MLflow drops a value that it has
(same name, step, time stamp and value), sets a tag or an artifact again, and the run is found by a key of ours.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.files import write_atomic
from twoviews.locks import locked_for_upload
from twoviews.tracking.client import (
    MAX_KEY_LENGTH,
    get_or_create_run,
    metric_name,
    open_experiment,
    runs_with_key,
    set_status,
    shortened,
)
from twoviews.tracking.description import DESCRIPTION_FILES, describe
from twoviews.tracking.metrics import METRICS_FILE, lines, metric_values, read_durable_bytes
from twoviews.tracking.state import NAME_TAG, STATE_FILE, UploadState, new_run_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACTS = (*DESCRIPTION_FILES, "diff.patch", "encoder.json")
ARTIFACT_PATTERNS = ("*.png", "*.pdf", "clusters*.json", "clusters*.npz", "evaluation/**/*.*")
ENCODER_FILE = "encoder.safetensors"  # the largest artifact, sent last
VALUES_PER_CALL = 1000  # MLflow's limit for a request; what was sent is recorded after each request
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # by "state" of result.json


def upload(folder: Path, training_ended: bool) -> int:
    """Bring MLflow up to date with `folder`; returns the number of values sent. Uses no network if nothing is new.

    Args:
        folder: the run folder.
        training_ended: if true, all lines are sent, and the run gets the status that result.json has, or KILLED without one;
            if false, only the lines that the last checkpoint keeps.

    Raises:
        BadInput: the run or its experiment was deleted in MLflow, or a file of the folder is not one that a run wrote.
        MlflowException, OSError: MLflow does not answer or refuses; what was sent until then is recorded.
    """
    foreign.refuse_links(folder)
    with locked_for_upload(folder):
        state = UploadState.load(folder)
        if _is_current(folder, state, training_ended):
            return 0
        status = _status(folder, training_ended)
        client, experiment_id = open_experiment(state.uri, state.experiment)
        run = _open_run(client, experiment_id, folder, state)
        _write_run_id(folder, run.info.run_id)
        changed = _changed_artifacts(folder, state)
        if status != state.status or changed.keys() & {*DESCRIPTION_FILES}:
            describe(client, run, folder, state.tags)
        sent = _upload_values(client, folder, state, training_ended)
        if status != state.status:
            _upload_status(client, run, folder, state, status)
        for name, version in changed.items():
            client.log_artifact(run.info.run_id, str(folder / name), name.rpartition("/")[0] or None)
            state.files[name] = version
            state.save(folder)
        return sent


def is_uploaded(folder: Path) -> bool:
    """Whether MLflow has all of a run whose training has ended, its status included; tracking.json says so, not MLflow."""
    return _is_current(folder, UploadState.load(folder), training_ended=True)


def pending_artifact_bytes(folder: Path) -> int:
    """Size of the artifacts that MLflow does not have of a run whose end it has; 0 before."""
    state = UploadState.load(folder)
    if state.status not in MLFLOW_STATUS.values():
        return 0
    return sum(size for _, size in _changed_artifacts(folder, state).values())


def pending_values(folder: Path) -> int:
    """Number of values in metrics.jsonl that MLflow does not have."""
    unsent = _unsent_lines(folder, UploadState.load(folder), training_ended=True)
    return sum(len(metric_values(line)) for _, line in unsent)


def _unsent_lines(folder: Path, state: UploadState, training_ended: bool) -> Iterator[tuple[int, dict]]:
    """(byte behind it, content) of each line to send; while the run is trained no more than its last checkpoint keeps."""
    limit = math.inf if training_ended else read_durable_bytes(folder)
    return itertools.takewhile(lambda line: line[0] <= limit, lines(folder / METRICS_FILE, state.sent_bytes))


def _changed_artifacts(folder: Path, state: UploadState) -> dict[str, list[int]]:
    """[mtime in ns, bytes] by name of the artifacts of which MLflow does not have the present version."""
    paths = [*(folder / name for name in ARTIFACTS)]
    paths += sorted(path for pattern in ARTIFACT_PATTERNS for path in folder.glob(pattern) if path.is_file())
    # That of an interrupted run is not the trained one, and the seconds after a signal are for the values.
    if state.encoder and foreign.load(folder / "result.json").get("state") == "finished":
        paths.append(folder / ENCODER_FILE)
    versions = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            versions[path.relative_to(folder).as_posix()] = [stat.st_mtime_ns, stat.st_size]
    return {name: version for name, version in versions.items() if state.files.get(name) != version}


def _status(folder: Path, training_ended: bool) -> str:
    if not training_ended:
        return "RUNNING"
    return MLFLOW_STATUS.get(foreign.load(folder / "result.json").get("state", ""), "KILLED")


def _is_current(folder: Path, state: UploadState, training_ended: bool) -> bool:
    status = _status(folder, training_ended)
    if not state.run_id or state.status != status or any(_unsent_lines(folder, state, training_ended)):
        return False
    return not _changed_artifacts(folder, state)


def _open_run(client: "MlflowClient", experiment_id: str, folder: Path, state: UploadState) -> "Run":
    """The run in MLflow, made once however often this is interrupted."""
    from mlflow.exceptions import MlflowException

    run = None
    if state.run_id:
        try:
            run = client.get_run(state.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            state.forget_run()  # the database was replaced by another
    if run and run.info.lifecycle_stage != "active":
        raise BadInput(
            f"run {state.run_id} was deleted in MLflow; restore it with `mlflow runs restore --run-id {state.run_id}`, or "
            f"delete {folder / STATE_FILE} to send it as a new one"
        )
    if run is None:
        state.run_key = state.run_key or new_run_key()
        state.save(folder)
        first = next((line["time"] for _, line in lines(folder / METRICS_FILE)), time.time())
        name = state.tags.get(NAME_TAG) or shortened(folder.resolve().name, MAX_KEY_LENGTH)
        options = {"run_name": name, "start_time": int(first * 1000)}
        run = get_or_create_run(client, experiment_id, state.run_key, state.tags, **options)
        state.run_id, state.experiment_id, state.status = run.info.run_id, experiment_id, run.info.status
        state.save(folder)
    # A database from elsewhere could have artifacts written into a folder that is not the run's.
    address = urlsplit(run.info.artifact_uri or "")
    artifacts = Path(unquote(address.path)).resolve()
    if address.scheme in ("", "file") and artifacts.parts[-2:] != (run.info.run_id, "artifacts"):
        raise BadInput(
            f"MLflow names {artifacts} for the files of run {run.info.run_id}, which is not a folder of that run; name another "
            "database with `python -m twoviews.tracking sync --uri`."
        )
    return run


def _write_run_id(folder: Path, run_id: str) -> None:
    """Add the id to result.json, which may be older than MLflow's answer; its mtime remains that of the run's end."""
    path = folder / "result.json"
    result = foreign.load(path)
    if result and result.get("mlflow_run_id") != run_id:
        stat = path.stat()
        write_atomic(path, json.dumps({**result, "mlflow_run_id": run_id}, indent=2) + "\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _upload_values(client: "MlflowClient", folder: Path, state: UploadState, training_ended: bool) -> int:
    """Send the lines that MLflow does not have; the number of values sent."""
    from mlflow.entities import Metric

    sent, values = 0, []
    for end, line in _unsent_lines(folder, state, training_ended):
        step, time_ms, already = line["step"], round(line["time"] * 1000), state.already.get(str(line["step"]), [])
        new = {name: value for name, value in metric_values(line).items() if name not in already}
        if len(values) + len(new) > VALUES_PER_CALL:
            client.log_batch(str(state.run_id), values, synchronous=True)
            state.save(folder)
            values = []
        # NaN is stored as NaN, an infinity as the largest double: MLflow's own rule.
        values += [Metric(metric_name(name), value, time_ms, step) for name, value in new.items()]
        sent, state.sent_bytes = sent + len(new), end
        state.already.pop(str(step), None)
        if left := [name for name in already if name not in line]:
            state.already[str(step)] = left
    if values:
        client.log_batch(str(state.run_id), values, synchronous=True)
    state.save(folder)
    return sent


def _upload_status(client: "MlflowClient", run: "Run", folder: Path, state: UploadState, status: str) -> None:
    """Set the status of the run, with the time of the last file that was written as that of its end."""
    for other in runs_with_key(client, run.info.experiment_id, state.run_key):
        if other.info.run_id != run.info.run_id:  # a slow server made it after all
            client.delete_run(other.info.run_id)
    last = next((path for name in ("result.json", METRICS_FILE) if (path := folder / name).exists()), None)
    set_status(client, run.info.run_id, status, last.stat().st_mtime if last else None)
    state.status = status
    state.save(folder)
