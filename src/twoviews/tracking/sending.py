"""A run folder, sent to MLflow.

Only MLflow's client is used, never its fluent state, and every call can be repeated: MLflow drops a point it has
(same name, step, time stamp and value), sets a tag or a file again, and the run is found by a key of our own.
"""

import contextlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.tracking import stores
from twoviews.tracking.metrics import HEAD, NAME, lines
from twoviews.tracking.state import State, durable_bytes, mirroring
from twoviews.tracking.state import replace as replace_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DESCRIPTION = ("config.yaml", "environment.json", "data.json", "commit.txt")
FILES = (*DESCRIPTION, "diff.patch", "encoder.json", "result.json")
PATTERNS = ("*.png", "clusters*.json", "clusters*.npz", "evaluation/**/*.*")
RUN_KEY, PARENT = "twoviews.run_key", "mlflow.parentRunId"  # tags: ours, and the one by which MLflow nests runs
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# MLflow's limits, in characters and in items a call.
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH, DATASET_DIGEST_LENGTH = 250, 6000, 8000, 36
PARAMS_A_CALL, POINTS_A_CALL = 100, 1000


def send(folder: Path, closed: bool) -> int:
    """Bring MLflow up to date with `folder`; returns the number of points sent. Without network if nothing is new.

    Args:
        folder: the run folder.
        closed: nothing more comes: all lines are sent and the run ends as result.json says, or as killed without one.
            Otherwise only what the last checkpoint keeps is sent.

    Raises:
        BadInput: the run or its experiment was deleted in MLflow, or a file of the folder is none of a run.
        MlflowException, OSError: the store does not answer or refuses; what was sent until then is recorded.
    """
    foreign.refuse_links(folder)
    with mirroring(folder):
        state = State.load(folder)
        limit = None if closed else durable_bytes(folder)
        if _knows(folder, state, closed, limit):
            return 0
        status = _status(folder, closed)
        client, experiment_id = stores.connect(stores.resolved(state.uri), state.experiment)
        run = _open_run(client, experiment_id, folder, state)
        _write_run_id(folder, run.info.run_id)
        changed = _changed_files(folder, state)
        _check_place(run)
        if changed.keys() & set(DESCRIPTION):
            _describe(client, run, folder)
        sent = _send_points(client, run.info.run_id, folder, state, limit)
        if status != state.status:
            _tell_status(client, run.info.run_id, folder, state, status)
        for name, stamp in changed.items():
            within = str(Path(name).parent)
            client.log_artifact(run.info.run_id, str(folder / name), None if within == "." else within)
            state.files[name] = stamp
            state.save(folder)
        return sent


def known(folder: Path) -> bool:
    """Whether MLflow has all of a run that nobody trains any more, its end included; without asking it."""
    return _knows(folder, State.load(folder), closed=True, limit=None)


def _knows(folder: Path, state: State, closed: bool, limit: int | None) -> bool:
    end = next((end for end, _ in lines(folder / NAME, state.sent_bytes)), None)
    points_wait = end is not None and (limit is None or end <= limit)
    told = bool(state.run_id) and state.status == _status(folder, closed)
    return told and not points_wait and not _changed_files(folder, state)


def aim(folder: Path, uri: str | None, experiment: str) -> None:
    """Write down where `folder` is to be sent, as somebody wants it; a store other than before gets the whole run.

    Raises:
        BadInput: the address is wrong.
    """
    with aiming(folder, uri, experiment):
        pass


@contextmanager
def aiming(folder: Path, uri: str | None, experiment: str) -> Iterator[State]:
    """As `aim`, with more to write down at once: what is changed in the state is saved."""
    stores.remember(uri)
    with mirroring(folder):
        state = State.load(folder)
        before = replace(state) if (folder / "tracking.json").exists() else None
        if (stores.resolved(uri), experiment) != (stores.resolved(state.uri), state.experiment):
            state.forget_run()
        state.uri, state.experiment = None if uri is None else stores.resolved(uri), experiment
        yield state
        if state != before:
            state.save(folder)


def unsent(folder: Path) -> int:
    """Number of points in metrics.jsonl that MLflow does not have."""
    state = State.load(folder)
    return sum(len(line) - len(HEAD) for _, line in lines(folder / NAME, state.sent_bytes))


def _open_run(client: "MlflowClient", experiment_id: str, folder: Path, state: State) -> "Run":
    """The run, made once however often this is interrupted."""
    from mlflow.exceptions import MlflowException

    if state.run_id:
        try:
            run = client.get_run(state.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            state.forget_run()  # the database was replaced by another
        else:
            if run.info.lifecycle_stage == "active":
                return _tagged(client, run, state)
            raise BadInput(
                f"run {state.run_id} was deleted in MLflow; restore it with `mlflow runs restore --run-id "
                f"{state.run_id}`, or delete {folder / 'tracking.json'} to send it as a new one"
            )
    state.run_key = state.run_key or uuid.uuid4().hex
    state.save(folder)
    first = next((line["time"] for _, line in lines(folder / NAME)), time.time())
    tags = {"mlflow.user": os.environ.get("USER", "unknown"), **state.tags}
    name = _fitted(folder.resolve().name, KEY_LENGTH)
    run = open_once(client, experiment_id, state.run_key, tags=tags, run_name=name, start_time=int(first * 1000))
    state.run_id, state.experiment_id, state.status = run.info.run_id, experiment_id, run.info.status
    state.save(folder)
    return _tagged(client, run, state)


def open_once(client: "MlflowClient", experiment_id: str, key: str, tags: Mapping[str, str], **given: Any) -> "Run":
    """The run with this key, made if there is none; a lost answer of a server does not make a second one.

    Raises:
        MlflowException: the store does not answer or refuses.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    if found := _with_key(client, experiment_id, key):
        return found[0]
    before = RETRIES.get()
    RETRIES.set(0)  # MLflow's client would send the request again, whether the first made a run or not
    try:
        return client.create_run(experiment_id, tags={RUN_KEY: key, **tags}, **given)
    finally:
        RETRIES.set(before)


def _with_key(client: "MlflowClient", experiment_id: str, key: str) -> "list[Run]":
    """Usually one; the first that was made comes first."""
    return client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", order_by=["attributes.start_time ASC"])


def _write_run_id(folder: Path, run_id: str) -> None:
    """Put it into result.json, which may be older than MLflow's answer; the time of the file stays the run's end."""
    path = folder / "result.json"
    result = foreign.load(path)
    if result and result.get("mlflow_run_id") != run_id:
        stat = path.stat()
        replace_file(path, json.dumps({**result, "mlflow_run_id": run_id}, indent=2) + "\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _tagged(client: "MlflowClient", run: "Run", state: State) -> "Run":
    """The run, which may have been made before it was a point of a sweep."""
    for key, value in state.tags.items():
        if run.data.tags.get(key) != value:
            client.set_tag(run.info.run_id, key, value)
    return run


def _check_place(run: "Run") -> None:
    """Refuse a store that would have files written into a folder that is not the run's: the store may be a foreign one.

    Raises:
        BadInput: it would.
    """
    place = urlsplit(run.info.artifact_uri or "")
    path = Path(unquote(place.path)).resolve()
    if place.scheme in ("", "file") and path.parts[-2:] != (run.info.run_id, "artifacts"):
        raise BadInput(
            f"the store has {path} for the files of run {run.info.run_id}, which is no folder of that run; name another store "
            "with `python -m twoviews.tracking sync --uri`."
        )


def _describe(client: "MlflowClient", run: "Run", folder: Path) -> None:
    """Parameters, tags and data set of the run. MLflow never changes a parameter: a new value becomes a tag."""
    from mlflow.entities import Dataset, DatasetInput, Param, RunTag

    config, data, environment = (
        foreign.load(folder / name) for name in ("config.yaml", "data.json", "environment.json")
    )
    params = dict(_flat(config))
    tags = {
        "folder": str(folder.resolve()),
        "host": environment.get("host", platform.node()),
        "method": config.get("method", {}).get("_target_", "").rpartition(".")[0].rpartition(".")[2],
        "data": data.get("name", ""),
        "data.digest": data.get("digest", ""),
        "mlflow.source.name": "train.py",
        "mlflow.source.git.commit": _text(folder / "commit.txt"),
    }
    known = run.data.params
    for key, value in params.items():
        if known.get(key, value) != value or f"changed.{key}" in run.data.tags:
            tags[f"changed.{key}"] = value
    new = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), PARAMS_A_CALL):
        client.log_batch(run.info.run_id, params=new[start : start + PARAMS_A_CALL], synchronous=True)
    filled = [RunTag(_fitted(key, KEY_LENGTH), _fitted(str(value), TAG_LENGTH)) for key, value in tags.items() if value]
    for start in range(0, len(filled), PARAMS_A_CALL):
        client.log_batch(run.info.run_id, tags=filled[start : start + PARAMS_A_CALL], synchronous=True)
    if data.get("name") and data.get("digest"):
        digest = str(data["digest"])[:DATASET_DIGEST_LENGTH]
        dataset = Dataset(data["name"], digest, source_type="local", source=json.dumps({"name": data["name"]}))
        client.log_inputs(run.info.run_id, [DatasetInput(dataset, [])])


def _send_points(client: "MlflowClient", run_id: str, folder: Path, state: State, limit: int | None) -> int:
    """Send the lines that end at byte `limit` or before; the number of points sent."""
    from mlflow.entities import Metric

    sent, batch = 0, []

    def flush() -> None:
        if batch:
            client.log_batch(run_id, metrics=batch, synchronous=True)
        state.save(folder)

    for end, line in lines(folder / NAME, state.sent_bytes):
        if limit is not None and end > limit:
            break
        step, stamp, already = line["step"], round(line["time"] * 1000), state.already.get(str(line["step"]), [])
        names = [name for name in line if name not in HEAD and name not in already]
        if len(batch) + len(names) + 1 > POINTS_A_CALL:
            flush()
            batch = []
        # NaN is stored as NaN, an infinity as the largest double: MLflow's own rule.
        batch.extend(Metric(name, float(line[name]), stamp, step) for name in names)
        sent += len(names)
        state.sent_bytes = end
        if already:
            state.already[str(step)] = [name for name in already if name not in line]
    flush()
    return sent


def _tell_status(client: "MlflowClient", run_id: str, folder: Path, state: State, status: str) -> None:
    for other in _with_key(client, state.experiment_id, state.run_key) if state.experiment_id and state.run_key else ():
        if other.info.run_id != run_id:  # a server that was slow to answer made it after all
            client.delete_run(other.info.run_id)
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        last = folder / "result.json"
        last = last if last.exists() else folder / NAME
        ended = last.stat().st_mtime if last.exists() else time.time()
        client.set_terminated(run_id, status, end_time=int(ended * 1000))
    state.status = status
    state.save(folder)


def _status(folder: Path, closed: bool) -> str:
    return STATUS.get(foreign.load(folder / "result.json").get("state", ""), "KILLED") if closed else "RUNNING"


def _changed_files(folder: Path, state: State) -> dict[str, list[int]]:
    """Name -> [mtime in ns, bytes] of the artifacts that MLflow does not have as they are now."""
    found = {}
    more = sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file())
    for path in [*(folder / name for name in FILES), *more]:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found[path.relative_to(folder).as_posix()] = [stat.st_mtime_ns, stat.st_size]
    return {name: stamp for name, stamp in found.items() if state.files.get(name) != stamp}


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as on the command line) of every leaf, cut to MLflow's lengths with a digest of the whole."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield _fitted(re.sub(r"[^\w\-./: ]", "_", f"{prefix}{key}"), KEY_LENGTH), _fitted(text, PARAM_LENGTH)


def _fitted(text: str, length: int) -> str:
    """`text`, or its beginning and a digest, so that two long values that differ stay different.

    Bytes of names that are no UTF-8, which MLflow does not take, are spelt out.
    """
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= length:
        return text
    end = f"... sha256 {sha256(text.encode()).hexdigest()[:16]}"
    return text[: length - len(end)] + end


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.is_file() else ""
