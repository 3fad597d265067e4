"""MLflow's client for a tracking URI, its limits, and its errors in one line."""

import contextlib
import functools
import getpass
import logging
import os
import re
import time
import traceback
from collections.abc import Mapping
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews.errors import BadInput, printable, without_secrets
from twoviews.files import write_atomic
from twoviews.tracking import uris
from twoviews.tracking.sqlite_file import prepare_sqlite

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "twoviews.run_key"
# MLflow's limits, in characters.
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_DATASET_DIGEST_LENGTH = 250, 6000, 8000, 36
ERROR_LOG, NO_ANSWER = "mlflow.log", "it does not answer"
MAX_ERROR_LENGTH = 300  # characters of an error in a message
# MLflow has a section of charts for each beginning of a metric's name, in alphabetical order. With these names kNN, linear
# accuracy and the losses come first.
METRIC_NAMES = {"baseline/pixels_knn_top1": "knn/top1_pixels", "baseline/untrained_knn_top1": "knn/top1_untrained"}


@functools.cache
def open_experiment(uri: str | None, experiment: str) -> tuple["MlflowClient", str]:
    """MLflow's client for a tracking URI, and the id of the experiment, which is created if it is not there.

    The first call takes seconds: it imports MLflow, and a new SQLite file gets its tables.

    Raises:
        BadInput: the experiment was deleted in MLflow, MLflow is not installed, the URI is not trusted, or the database's
            folder is gone.
        ConnectionError: the server does not answer.
        MlflowException: MLflow does not answer or refuses.
    """
    uris.refuse_untrusted(uri)
    uris.require_mlflow()
    uri, artifacts = uris.resolve(uri), None
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith(uris.SQLITE):
        artifacts = prepare_sqlite(Path(uri.removeprefix(uris.SQLITE)))
    elif uri.startswith("http") and (reason := uris.health_error(uri)):  # MLflow's client would wait for minutes
        raise ConnectionError(f"{uri} does not answer ({reason})")
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise BadInput(
            f"experiment {experiment} was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or name another: tracking.experiment=."
        )
    return client, found.experiment_id


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


def get_or_create_run(
    client: "MlflowClient", experiment_id: str, key: str, tags: Mapping[str, str], **options: Any
) -> "Run":
    """The run with this key (`new_run_key`); if there is none, a new one with these tags and options of `create_run`.

    If the server's answer is lost, no second run is made.

    Raises:
        MlflowException: MLflow does not answer or refuses.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    if runs := runs_with_key(client, experiment_id, key):
        return runs[0]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no variable names one, and the system does not know the id, as in containers
        user = "unknown"
    before = RETRIES.get()
    RETRIES.set(0)  # MLflow's client would repeat the request, whether the first one made a run or not
    try:
        return client.create_run(experiment_id, tags={RUN_KEY_TAG: key, "mlflow.user": user, **tags}, **options)
    finally:
        RETRIES.set(before)


def runs_with_key(client: "MlflowClient", experiment_id: str, key: str) -> "list[Run]":
    """Runs with this key, the oldest first; seldom more than one."""
    return client.search_runs(
        [experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", order_by=["attributes.start_time ASC"]
    )


def set_status(client: "MlflowClient", run_id: str, status: str, ended: float | None = None) -> None:
    """Set a status of MLflow; of one that is final `ended` (unix s, now if it is None) is the time."""
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status, end_time=int(1000 * (ended or time.time())))


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
    text = printable(text)
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
