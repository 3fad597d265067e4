"""Sends a run folder to MLflow: parameters, tags, metrics, artifacts and status.

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
    MAX_VALUES_PER_CALL,
    connect,
    get_or_create_run,
    metric_name,
    runs_with_key,
    shortened,
)
from twoviews.tracking.description import describe
from twoviews.tracking.metrics import METRICS_FILE, durable_bytes, lines, measured
from twoviews.tracking.state import NAME_TAG, UploadState, new_run_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DESCRIPTION_FILES = ("config.yaml", "environment.json", "data.json", "commit.txt")  # parameters and tags are in these
ARTIFACT_FILES = (*DESCRIPTION_FILES, "diff.patch", "encoder.json", "result.json")
ENCODER_FILE = "encoder.safetensors"  # the largest artifact, sent last
ARTIFACT_PATTERNS = ("*.png", "*.pdf", "clusters*.json", "clusters*.npz", "evaluation/**/*.*")
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # by "state" of result.json


def upload(folder: Path, closed: bool) -> int:
    """Bring MLflow up to date with `folder`; returns the number of values sent. Uses no network if nothing is new.

    Args:
        folder: the run folder.
        closed: nobody trains the run: all lines are sent, and the run gets the status in result.json, or KILLED without
            one. Otherwise only what the last checkpoint keeps is sent.

    Raises:
        BadInput: the run or its experiment was deleted in MLflow, or a file of the folder is not one that a run wrote.
        MlflowException, OSError: MLflow does not answer or refuses; what was sent until then is recorded.
    """
    foreign.refuse_links(folder)
    with locked_for_upload(folder):
        state = UploadState.load(folder)
        if _is_current(folder, state, closed):
            return 0
        status = _status(folder, closed)
        client, experiment_id = connect(state.uri, state.experiment)
        run = _open_run(client, experiment_id, folder, state)
        _write_run_id(folder, run.info.run_id)
        changed = _changed_artifacts(folder, state)
        _check_artifact_folder(run)
        if status != state.status or changed.keys() & {*DESCRIPTION_FILES, "result.json"}:
            describe(client, run, folder)
        sent = _send_values(client, run.info.run_id, folder, state, closed)
        if status != state.status:
            _send_status(client, run.info.run_id, folder, state, status)
        for name, stamp in changed.items():
            subfolder = str(Path(name).parent)
            client.log_artifact(run.info.run_id, str(folder / name), None if subfolder == "." else subfolder)
            state.files[name] = stamp
            state.save(folder)
        return sent


def is_uploaded(folder: Path) -> bool:
    """Whether MLflow has all of a run that nobody trains any more, its status included; without asking MLflow."""
    return _is_current(folder, UploadState.load(folder), closed=True)


def pending_artifact_bytes(folder: Path) -> int:
    """Size of the artifacts that MLflow does not have of a run whose end it has; 0 before."""
    state = UploadState.load(folder)
    if state.status not in MLFLOW_STATUS.values():
        return 0
    return sum(size for _, size in _changed_artifacts(folder, state).values())


def pending_values(folder: Path) -> int:
    """Number of values in metrics.jsonl that MLflow does not have."""
    return sum(len(measured(line)) for _, line in _unsent_lines(folder, UploadState.load(folder), closed=True))


def _unsent_lines(folder: Path, state: UploadState, closed: bool) -> Iterator[tuple[int, dict]]:
    """(byte behind it, content) of each line to send; while the run is trained no more than its last checkpoint keeps."""
    limit = math.inf if closed else durable_bytes(folder)
    return itertools.takewhile(lambda line: line[0] <= limit, lines(folder / METRICS_FILE, state.sent_bytes))


def _is_current(folder: Path, state: UploadState, closed: bool) -> bool:
    has_status = bool(state.run_id) and state.status == _status(folder, closed)
    pending = any(True for _ in _unsent_lines(folder, state, closed))
    return has_status and not pending and not _changed_artifacts(folder, state)


def _open_run(client: "MlflowClient", experiment_id: str, folder: Path, state: UploadState) -> "Run":
    """The run in MLflow with the tags of the state, made once however often this is interrupted."""
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
            f"delete {folder / 'tracking.json'} to send it as a new one"
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
    for key, value in state.tags.items():
        if run.data.tags.get(key) != value:  # it may have become a run of a sweep after it was made
            client.set_tag(run.info.run_id, key, value)
    return run


def _write_run_id(folder: Path, run_id: str) -> None:
    """Add the id to result.json, which may be older than MLflow's answer; its mtime remains that of the run's end."""
    path = folder / "result.json"
    result = foreign.load(path)
    if result and result.get("mlflow_run_id") != run_id:
        stat = path.stat()
        write_atomic(path, json.dumps({**result, "mlflow_run_id": run_id}, indent=2) + "\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _check_artifact_folder(run: "Run") -> None:
    """Refuse a database from elsewhere that would have artifacts written into a folder that is not the run's."""
    place = urlsplit(run.info.artifact_uri or "")
    path = Path(unquote(place.path)).resolve()
    if place.scheme in ("", "file") and path.parts[-2:] != (run.info.run_id, "artifacts"):
        raise BadInput(
            f"MLflow names {path} for the files of run {run.info.run_id}, which is not a folder of that run; name another "
            "database with `python -m twoviews.tracking sync --uri`."
        )


def _send_values(client: "MlflowClient", run_id: str, folder: Path, state: UploadState, closed: bool) -> int:
    """Send the lines that MLflow does not have; the number of values sent."""
    from mlflow.entities import Metric

    sent, batch = 0, []

    def flush() -> None:
        if batch:
            client.log_batch(run_id, metrics=batch, synchronous=True)
        state.save(folder)

    for end, line in _unsent_lines(folder, state, closed):
        step, stamp, already = line["step"], round(line["time"] * 1000), state.already.get(str(line["step"]), [])
        new = {name: value for name, value in measured(line).items() if name not in already}
        if len(batch) + len(new) > MAX_VALUES_PER_CALL:
            flush()
            batch = []
        # NaN is stored as NaN, an infinity as the largest double: MLflow's own rule.
        batch.extend(Metric(metric_name(name), value, stamp, step) for name, value in new.items())
        sent += len(new)
        state.sent_bytes = end
        if already:
            state.already[str(step)] = [name for name in already if name not in line]
    flush()
    return sent


def _send_status(client: "MlflowClient", run_id: str, folder: Path, state: UploadState, status: str) -> None:
    if state.experiment_id and state.run_key:
        for run in runs_with_key(client, state.experiment_id, state.run_key):
            if run.info.run_id != run_id:  # a slow server made it after all
                client.delete_run(run.info.run_id)
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        last = next((path for name in ("result.json", METRICS_FILE) if (path := folder / name).exists()), None)
        ended = last.stat().st_mtime if last else time.time()
        client.set_terminated(run_id, status, end_time=int(ended * 1000))
    state.status = status
    state.save(folder)


def _status(folder: Path, closed: bool) -> str:
    return MLFLOW_STATUS.get(foreign.load(folder / "result.json").get("state", ""), "KILLED") if closed else "RUNNING"


def _changed_artifacts(folder: Path, state: UploadState) -> dict[str, list[int]]:
    """[mtime in ns, bytes] by name of the artifacts of which MLflow does not have the present version."""
    matching = sorted(path for pattern in ARTIFACT_PATTERNS for path in folder.glob(pattern) if path.is_file())
    # That of an interrupted run is not the trained one, and the seconds after a signal are for the values.
    trained = state.encoder and foreign.load(folder / "result.json").get("state") == "finished"
    stamps = {}
    for path in [*(folder / name for name in ARTIFACT_FILES), *matching, *([folder / ENCODER_FILE] if trained else ())]:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            stamps[path.relative_to(folder).as_posix()] = [stat.st_mtime_ns, stat.st_size]
    return {name: stamp for name, stamp in stamps.items() if state.files.get(name) != stamp}
