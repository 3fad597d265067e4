"""MLflow's client for a tracking URI; an SQLite file is made whole or not at all, and moved together with its artifacts."""

import contextlib
import functools
import getpass
import importlib.metadata
import logging
import os
import re
import sqlite3
import time
import traceback
from collections.abc import Mapping
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from twoviews.errors import BadInput, without_secrets
from twoviews.files import write_atomic
from twoviews.tracking import uris

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "twoviews.run_key"
# MLflow's limits, in characters and in items per call.
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_DATASET_DIGEST_LENGTH = 250, 6000, 8000, 36
MAX_PARAMS_PER_CALL, MAX_VALUES_PER_CALL = 100, 1000  # parameters, and tags; values of metrics
ERROR_LOG, NO_ANSWER = "mlflow.log", "it does not answer"
MAX_ERROR_LENGTH = 300  # characters of an error in a message
# MLflow has a section of charts for each beginning of a metric's name, in alphabetical order. With these names kNN, linear
# accuracy and the losses come first.
METRIC_NAMES = {"baseline/pixels_knn_top1": "knn/top1_pixels", "baseline/untrained_knn_top1": "knn/top1_untrained"}
SQLITE_SUFFIXES = ("", "-journal", "-wal", "-shm")  # of a database and of SQLite's own files beside it
SQLITE_TIMEOUT_S = 60.0
DATABASE_LOCK_TIMEOUT_S = 300.0  # MLflow takes seconds to make its tables
INCOMPLETE_S = 10.0  # a database without all tables that changed within this time may be in the making


@functools.cache
def connect(uri: str | None, experiment: str) -> tuple["MlflowClient", str]:
    """A client for a tracking URI, and the id of the experiment, which is made where it is missing.

    The first call takes seconds: it imports MLflow, and a new SQLite file gets its tables.

    Raises:
        BadInput: the experiment was deleted in MLflow, MLflow is not installed, the URI is not trusted, or the database's
            folder is gone.
        ConnectionError: the server does not answer.
        MlflowException: MLflow does not answer or refuses.
    """
    uris.refuse_untrusted(uri)
    uris.require_mlflow()
    uri = uris.resolve(uri)
    prepare_environment()
    from mlflow import MlflowClient

    if uri.startswith("sqlite:"):
        return _connect_sqlite(uri, experiment)
    if uri.startswith("http") and (reason := uris.health_error(uri)):  # MLflow's client would wait for minutes
        raise ConnectionError(f"{uri} does not answer ({reason})")
    client = MlflowClient(uri)
    return client, _experiment_id(client, experiment)


def prepare_environment() -> None:
    """Set what MLflow reads when it is imported: no telemetry, no log, and failures within seconds instead of minutes."""
    # DO_NOT_TRACK=1 would not do: MLflow compares with "true".
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Longer than the slowest answer of a server that 64 runs used at once, or it would get the same batches for ever.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # those of its pages for language models
    for name in ("alembic", "git", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _experiment_id(client: "MlflowClient", name: str, artifacts: str | None = None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # another process was first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise BadInput(
            f"experiment {name} was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` or name another: tracking.experiment=."
        )
    return experiment.experiment_id


def _connect_sqlite(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    from mlflow import MlflowClient

    path = uris.sqlite_path(uri)
    if not path.parent.is_dir():  # as after a checkout was moved: nobody would look into a database made there
        raise BadInput(
            f"the folder of MLflow's database {path} is not there; name the database where it is now with `python -m "
            "twoviews.tracking sync --uri sqlite:///<path>` or, in training, tracking.uri=."
        )
    made, version, artifacts = Path(f"{path}.made"), importlib.metadata.version("mlflow"), path.parent / "mlartifacts"
    # MLflow makes its tables without a lock: of 8 processes that open a new file at once, 7 fail. Opening takes each of
    # them seconds, so once the tables are there they do not queue for it.
    ready = _is_complete(path) and made.exists() and made.read_text() == version
    with contextlib.nullcontext() if ready else FileLock(f"{path}.lock", timeout=DATABASE_LOCK_TIMEOUT_S):
        if not ready:
            _make_database(path, artifacts.as_uri())
        client = MlflowClient(uri)
        experiment_id = _experiment_id(client, experiment, artifacts.as_uri())
        if not ready:
            made.write_text(version)
    if client.get_experiment(experiment_id).artifact_location != artifacts.as_uri():
        with FileLock(f"{path}.lock", timeout=DATABASE_LOCK_TIMEOUT_S):
            _move_artifacts(path, artifacts)
    return client, experiment_id


def _is_complete(path: Path) -> bool:
    """Whether the file has MLflow's tables: MLflow adds its first experiment after the last of them."""
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_S)) as database:
        try:
            return bool(database.execute("select 1 from experiments limit 1").fetchall())
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


def _make_database(path: Path, artifacts: str) -> None:
    """Make a database with MLflow's tables, if there is none; one process at a time calls it.

    MLflow cannot use a file in which it was killed while it made its tables, so they are made in another file, which is
    renamed.

    Args:
        path: where it goes. A file without experiments, which another program left there, is renamed to <name>.incomplete.
        artifacts: URI of the artifacts of MLflow's first experiment.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    while path.exists() and not _is_complete(path) and time.time() - path.stat().st_mtime < INCOMPLETE_S:
        time.sleep(0.2)  # `mlflow ui` may be making it at this moment
    if _is_complete(path):
        return
    new = path.with_name(f".{path.name}.new")
    for suffix in SQLITE_SUFFIXES:  # a journal that stays would be applied to the new database
        if (file := Path(f"{path}{suffix}")).exists():
            file.replace(f"{path}.incomplete{suffix}")
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{new}", artifacts).engine.dispose()
    new.replace(path)


def _move_artifacts(path: Path, artifacts: Path) -> None:
    """Point a database that was moved or copied to the artifacts beside it, as MLflow never changes their addresses.

    Experiments whose artifacts a user put elsewhere stay as they are.

    Args:
        path: the database.
        artifacts: the folder beside it; a folder of the same name elsewhere is where it was before.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_S)) as database, database:
        for (old,) in database.execute("select distinct artifact_location from experiments").fetchall():
            address = urlsplit(old or "")
            place = Path(unquote(address.path))
            if address.scheme != "file" or place.name != artifacts.name or place.resolve() == artifacts.resolve():
                continue
            update = "update experiments set artifact_location = ? where artifact_location = ?"
            database.execute(update, (artifacts.as_uri(), old))
            runs = "select run_uuid, artifact_uri from runs where substr(artifact_uri, 1, ?) = ?"
            for run, uri in database.execute(runs, (len(old) + 1, f"{old}/")).fetchall():
                rest = uri[len(old) :]
                if (place / unquote(rest[1:])).exists() and not (artifacts / unquote(rest[1:])).exists():
                    continue  # the database was moved without them
                new = (f"{artifacts.as_uri()}{rest}", run)
                database.execute("update runs set artifact_uri = ? where run_uuid = ?", new)


def get_or_create_run(
    client: "MlflowClient", experiment_id: str, key: str, tags: Mapping[str, str], **options: Any
) -> "Run":
    """The run with this key, made if there is none; if the server's answer is lost, no second run is made.

    Args:
        client: of MLflow.
        experiment_id: of the run.
        key: from `new_run_key`.
        tags: of a new run.
        options: of `MlflowClient.create_run`.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    if runs := runs_with_key(client, experiment_id, key):
        return runs[0]
    before = RETRIES.get()
    RETRIES.set(0)  # MLflow's client would repeat the request, whether the first one made a run or not
    try:
        return client.create_run(experiment_id, tags={RUN_KEY_TAG: key, "mlflow.user": _user(), **tags}, **options)
    finally:
        RETRIES.set(before)


def runs_with_key(client: "MlflowClient", experiment_id: str, key: str) -> "list[Run]":
    """Runs with this key, the oldest first; seldom more than one."""
    return client.search_runs(
        [experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", order_by=["attributes.start_time ASC"]
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no variable names one, and the system does not know the id, as in containers
        return "unknown"


def metric_name(name: str) -> str:
    """The name in MLflow of a metric of metrics.jsonl; the same for most."""
    return f"train/{name}" if name.startswith(("e_step/", "memory/")) else METRIC_NAMES.get(name, name)


def mlflow_key(text: str) -> str:
    """`text` with "_" for each character that MLflow does not allow in a key, and no longer than it allows."""
    return shortened(re.sub(r"[^\w\-./: ]", "_", text), MAX_KEY_LENGTH)


def mlflow_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them: keys as `mlflow_key` makes them, values as text of a length that it allows."""
    return {mlflow_key(key): shortened(str(value), MAX_TAG_LENGTH) for key, value in tags.items()}


def shortened(text: str, length: int) -> str:
    """`text`, or its beginning and a digest, so that two long values that differ stay different.

    Bytes of file names that are not UTF-8, which MLflow refuses, are written as escapes.
    """
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= length:
        return text
    end = f"... sha256 {sha256(text.encode()).hexdigest()[:16]}"
    return text[: length - len(end)] + end


def short_error(error: Exception) -> str:
    """One short line for an error of MLflow."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Max retries exceeded" in text or "timed out" in text or _connection_failed(error):
        return NO_ANSWER
    text = without_secrets(text)
    return text if len(text) <= MAX_ERROR_LENGTH else text[:MAX_ERROR_LENGTH] + "…"


def _connection_failed(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from or during, is of the connection: a server may end in mid-answer."""
    while error is not None:
        if isinstance(error, (ConnectionError, HTTPException)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def logged_error(error: Exception, folder: Path) -> str:
    """`short_error`, and the name of the file in the run folder with all of it: MLflow's errors may be pages long."""
    short = short_error(error)
    if isinstance(error, BadInput) or short == NO_ANSWER:
        return short
    with contextlib.suppress(OSError):  # the disk may be full
        write_atomic(folder / ERROR_LOG, without_secrets("".join(traceback.format_exception(error))))
        return f"{short}; all of it is in {folder / ERROR_LOG}"
    return short
