"""Where MLflow keeps things: which addresses are right, whether the store answers, and opening it."""

import contextlib
import functools
import http.client
import importlib.metadata
import importlib.util
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from twoviews import launched
from twoviews.errors import BadInput, without_secrets
from twoviews.tracking import database

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASES = ("postgresql", "mysql", "mssql")
PLAIN_KEYS = {"host", "port", "user", "sslmode", "sslrootcert", "connect_timeout", "charset", "driver"}  # of a query
ANSWER_S = 5.0  # for a server to answer anything at all
loaded = threading.Event()  # mlflow is imported, which takes seconds
HINT = "use sqlite:///<path> or http(s)://<host>:<port>"


def checkout() -> Path:
    """The root of this checkout, where mlflow.db lies by default."""
    return Path(__file__).resolve().parents[3]


def resolved(uri: str | None) -> str:
    """The full address for `tracking.uri`: mlflow.db at the root of the checkout for None; SQLite paths absolute.

    Raises:
        BadInput: nothing MLflow can keep runs in, or an address with a password in it.
    """
    if uri is None:
        return f"sqlite:///{checkout() / 'mlflow.db'}"
    scheme, path, shown = uri.partition(":")[0].partition("+")[0], uri.partition(":///")[2], _shown(uri)
    if _holds_secrets(uri, scheme):
        raise BadInput(
            f"tracking.uri={shown} may hold credentials, which a run would record in plain text; give them in the environment: "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for PostgreSQL PGPASSWORD or a "
            "PGPASSFILE."
        )
    if scheme == "sqlite":
        if not path or path.startswith(":") or path.endswith("/"):
            raise BadInput(
                f"tracking.uri={shown} names no file; write sqlite:///<path>, for example sqlite:///mlflow.db."
            )
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if scheme == "file" or "://" not in uri:
        raise BadInput(
            f"tracking.uri={shown} is a folder or unknown, and MLflow no longer keeps runs in plain folders; {HINT}."
        )
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError:  # whose words may hold a part of the address
        host = None
    if scheme not in ("http", "https", *DATABASES) or not host:
        raise BadInput(f"tracking.uri={shown} is not an address of MLflow; {HINT}.")
    if "+" in uri.partition(":")[0]:
        _check_driver(uri.partition(":")[0], shown)
    return uri.rstrip("/")


def remember(uri: str | None) -> None:
    """Somebody has named this store on a command line; `connect` takes only such."""
    launched.remember(f"store {resolved(uri)}")


def known(uri: str | None) -> bool:
    """Whether it is the default store, or somebody has named it on a command line."""
    return resolved(uri) == resolved(None) or launched.remembered(f"store {resolved(uri)}")


def refuse_unknown(uri: str | None) -> None:
    """Refuse a store that only a run folder names: it may come from anywhere, and the store would get credentials.

    Raises:
        BadInput: nobody has named it on a command line.
    """
    if not known(uri):
        raise BadInput(
            f"the folder names {_shown(str(uri))}, and nothing was sent there from here before; if you know it, name it once: "
            f"`python -m twoviews.tracking sync <folder> --uri {_shown(str(uri))}`, in train.py tracking.uri=."
        )


def _check_driver(scheme: str, shown: str) -> None:
    """Whether SQLAlchemy, by which MLflow opens databases, knows the driver of a scheme such as mysql+pymysql.

    Raises:
        BadInput: it does not.
    """
    from sqlalchemy.engine.url import URL
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        URL.create(scheme).get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise BadInput(
            f"tracking.uri={shown} names no driver that SQLAlchemy knows; use for example postgresql+psycopg2 or "
            "mysql+pymysql."
        ) from None


def installed() -> None:
    """Find out, without importing it, that MLflow is installed.

    Raises:
        BadInput: it is not.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise BadInput(
            "MLflow is not installed in this environment; install it (python -m pip install mlflow), or train with "
            "tracking=files and send the run later, from where it is, with `python -m twoviews.tracking sync`."
        )


def _holds_secrets(uri: str, scheme: str) -> bool:
    """Whether there may be credentials in an address, be it right or not; a user's name alone is none of a database."""
    address, mark, query = uri.partition("?")
    before, at, _ = address.rpartition("@")
    if scheme == "sqlite":
        return bool(mark) or not uri.partition(":")[2].startswith("///") and bool(at)
    named = scheme in DATABASES and re.fullmatch(r"[\w+]+://[^:/@]*", before)
    keys = {part.partition("=")[0] for part in query.split("&")} if mark else set()
    return bool(at) and not named or not keys <= (PLAIN_KEYS if scheme in DATABASES else set()) or "#" in uri


def _shown(uri: str) -> str:
    """An address without what may be credentials in it."""
    before, at, after = re.split("[?#]", uri)[0].rpartition("@")
    front = re.match(r"[A-Za-z][\w+.-]*://", before)
    return without_secrets((front[0] if front else "") + "…@" + after if at else after)


def check(uri: str | None) -> None:
    """Find out, without importing mlflow, that the store can be used; a database server is taken at its word.

    Raises:
        BadInput: it cannot; with what was tried and the remedy.
    """
    installed()
    uri = resolved(uri)
    if uri.startswith("sqlite:"):
        _check_file(_database(uri))
    elif uri.startswith("http"):
        _check_server(uri)


def _check_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") if path.exists() else open(os.devnull, "rb") as file:  # noqa: PTH123
            head = file.read(16)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be MLflow's database ({error.strerror}); name another with tracking.uri=."
        ) from error
    if head and head != b"SQLite format 3\0":
        raise BadInput(f"{path} is not an SQLite database; name another file with tracking.uri=sqlite:///<path>.")
    if not all(os.access(place, os.W_OK) for place in (path, path.parent) if place.exists()):
        raise BadInput(f"{path} cannot be written; name another file with tracking.uri=sqlite:///<path>.")


def _silent(uri: str) -> str:
    """Why nothing answers at the address of a server, within seconds; empty if something does."""
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=ANSWER_S).close()
        return ""
    except urllib.error.HTTPError as error:
        # Below 500 something answers: a server that wants a login, or a gateway without /health.
        return f"status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        # what answers may be no server of pages at all
        return str(getattr(error, "reason", error)) or type(error).__name__


def _check_server(uri: str) -> None:
    if not (reason := _silent(uri)):
        return
    raise BadInput(
        f"no MLflow answers at {uri}/health ({reason}); start it, give another tracking.uri=, or train with "
        "tracking=files and send the run later with `python -m twoviews.tracking sync`."
    )


@functools.cache
def connect(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """A client for the resolved `uri` and the id of the experiment, made where it is missing.

    Takes seconds the first time: mlflow is imported here and a fresh SQLite file gets its tables.

    Raises:
        BadInput: the experiment was deleted in MLflow, MLflow is not installed, nobody has named the store, or the database's
            folder is gone.
        ConnectionError: the server does not answer.
        MlflowException: the store does not answer or refuses.
    """
    refuse_unknown(uri)
    installed()
    prepare_environment()
    from mlflow import MlflowClient

    loaded.set()
    if not uri.startswith("sqlite:"):
        if uri.startswith("http") and (reason := _silent(uri)):  # mlflow would wait for minutes
            raise ConnectionError(f"{uri} does not answer ({reason})")
        client = MlflowClient(uri)
        return client, _experiment(client, experiment, None)
    path = _database(uri)
    if not path.parent.is_dir():  # as after a checkout was moved: what is made there would not be looked at
        raise BadInput(
            f"the folder of MLflow's database {path} is not there; name the database where it is now with `python -m "
            "twoviews.tracking sync --uri sqlite:///<path>` or, in training, tracking.uri=."
        )
    made, version, artifacts = Path(f"{path}.made"), importlib.metadata.version("mlflow"), path.parent / "mlartifacts"
    # MLflow creates its tables without a lock: of 8 processes that open a fresh file at once, 7 fail. It takes each of
    # them seconds to open one, so once the tables are there they need not queue for it.
    there = database.complete(path) and made.exists() and made.read_text() == version
    with contextlib.nullcontext() if there else FileLock(f"{path}.lock", timeout=300):
        if not there:
            database.make(path, artifacts.as_uri())
        client = MlflowClient(uri)
        experiment_id = _experiment(client, experiment, artifacts.as_uri())
        if not there:
            made.write_text(version)
    if client.get_experiment(experiment_id).artifact_location != artifacts.as_uri():
        with FileLock(f"{path}.lock", timeout=300):
            database.move_artifacts(path, artifacts)
    return client, experiment_id


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise BadInput(
            f"experiment {name} was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or name another: tracking.experiment=."
        )
    return found.experiment_id


def _database(uri: str) -> Path:
    return Path(re.sub(r"^sqlite(\+\w+)?:///", "", uri))


def prepare_environment() -> None:
    """Before mlflow is imported: no telemetry, no chatter, and failures within seconds instead of minutes."""
    # DO_NOT_TRACK=1 would not do: mlflow compares with "true".
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Longer than any answer seen from a server that 64 runs come to at once, or it would get the same batches for ever.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "git", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
