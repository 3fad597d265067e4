"""Tracking URIs: which ones MLflow can use, which ones the user trusts, and whether they can be reached; without MLflow."""

import http.client
import importlib.util
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from twoviews import launched
from twoviews.config.groups import ROOT
from twoviews.errors import BadInput, without_secrets

SQLITE = "sqlite:///"  # with an absolute path behind it: what `resolve` makes of every SQLite URI
ANSWER_TIMEOUT_S = 5.0  # for a server to answer anything at all
# URIs that cannot hold credentials: paths of SQLite files, and addresses without a user, a query and a fragment. Those of
# databases may have the name of a user, without a password, and a query of the keys below.
_DATABASES = "postgresql|mysql|mssql"
_PLAIN_QUERY = r"\?((host|port|user|sslmode|sslrootcert|connect_timeout|charset|driver)=[^&#]*(&|$))+"
_NO_CREDENTIALS = re.compile(
    rf"sqlite[^:]*:///[^?]*|[^@?#]*|({_DATABASES})(\+\w+)?://([^:/@?#]*@)?[^@?#]*({_PLAIN_QUERY})?"
)


def resolve(uri: str | None) -> str:
    """The complete tracking URI: mlflow.db at the root of the checkout for None; paths of SQLite files absolute.

    Raises:
        BadInput: MLflow cannot keep runs there, or the URI may hold credentials.
    """
    if uri is None:
        return f"{SQLITE}{ROOT / 'mlflow.db'}"
    scheme, shown = uri.partition(":")[0], _without_credentials(uri)
    kind, plus, _ = scheme.partition("+")
    if not _NO_CREDENTIALS.fullmatch(uri):
        raise BadInput(
            f"tracking.uri={shown} may hold credentials, which a run would record in plain text; give them in the environment: "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for PostgreSQL PGPASSWORD or a "
            "PGPASSFILE."
        )
    if kind == "sqlite":
        path = uri.partition(":///")[2]
        if not path or path.startswith(":") or path.endswith("/"):
            raise BadInput(
                f"tracking.uri={shown} names no file; write sqlite:///<path>, for example sqlite:///mlflow.db."
            )
        return f"{SQLITE}{Path(path).expanduser().absolute()}"
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text may hold a part of the URI
        host = None
    if not host or not re.fullmatch(f"https?|{_DATABASES}", kind):
        raise BadInput(
            f"tracking.uri={shown} is not an address of MLflow, which no longer keeps runs in plain folders; use "
            "sqlite:///<path> or http://<host>:5000."
        )
    if plus and not _has_driver(scheme):
        raise BadInput(
            f"tracking.uri={shown} names no driver that SQLAlchemy has; use for example postgresql+psycopg2 or mysql+pymysql."
        )
    return uri.rstrip("/")


def _has_driver(scheme: str) -> bool:
    """Whether SQLAlchemy, by which MLflow opens databases, has the driver of a scheme such as mysql+pymysql."""
    from sqlalchemy.engine.url import URL
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        URL.create(scheme).get_dialect()
    except (ArgumentError, NoSuchModuleError):
        return False
    return True


def _without_credentials(uri: str) -> str:
    """The URI for a message, without what may be credentials in it."""
    front, at, rest = re.split("[?#]", uri)[0].rpartition("@")
    scheme = re.match(r"[A-Za-z][\w+.-]*://", front)
    return without_secrets((scheme[0] if scheme else "") + "…@" + rest if at else rest)


def trust(uri: str | None) -> None:
    """Remember that a user named this URI on a command line; only such URIs are connected to."""
    launched.remember(f"store {resolve(uri)}")


def is_trusted(uri: str | None) -> bool:
    """Whether it is the default URI, or a user has named it on a command line."""
    return resolve(uri) == resolve(None) or launched.remembered(f"store {resolve(uri)}")


def refuse_untrusted(uri: str | None) -> None:
    """Refuse a URI that only a run folder names: the folder may come from anywhere, and the server would get credentials.

    Raises:
        BadInput: no user has named it on a command line.
    """
    if not is_trusted(uri):
        shown = _without_credentials(str(uri))
        raise BadInput(
            f"the folder names {shown}, and nothing was sent there from here before; if you know it, name it once: "
            f"`python -m twoviews.tracking sync <folder> --uri {shown}`, in train.py tracking.uri=."
        )


def require_mlflow() -> None:
    """Check, without importing it, that MLflow is installed.

    Raises:
        BadInput: it is not.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise BadInput(
            "MLflow is not installed in this environment; install it (python -m pip install mlflow), or train with "
            "tracking=files and send the run later, from where it is, with `python -m twoviews.tracking sync`."
        )


def check_reachable(uri: str | None) -> None:
    """Check, without importing MLflow, that an SQLite file can be written or a server answers; databases are not tried.

    Raises:
        BadInput: it is not so, or MLflow is not installed.
    """
    require_mlflow()
    uri = resolve(uri)
    if uri.startswith(SQLITE):
        _check_file(Path(uri.removeprefix(SQLITE)))
    elif uri.startswith("http") and (reason := health_error(uri)):
        raise BadInput(
            f"no MLflow answers at {uri}/health ({reason}); start it, give another tracking.uri=, or train with "
            "tracking=files and send the run later with `python -m twoviews.tracking sync`."
        )


def health_error(uri: str) -> str:
    """Why a server does not answer within ANSWER_TIMEOUT_S; empty if it does."""
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=ANSWER_TIMEOUT_S).close()
        return ""
    except urllib.error.HTTPError as error:
        # Below 500 something answers: a server that asks for a login, or a gateway without /health.
        return f"status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # it may not speak HTTP at all
        return str(getattr(error, "reason", error)) or type(error).__name__


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
    if not all(os.access(each, os.W_OK) for each in (path, path.parent) if each.exists()):
        raise BadInput(f"{path} cannot be written; name another file with tracking.uri=sqlite:///<path>.")
