"""MLflow's SQLite file: made whole or not at all, and moved together with its artifacts."""

import contextlib
import importlib.metadata
import sqlite3
import time
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from twoviews.errors import BadInput

SUFFIXES = ("", "-journal", "-wal", "-shm")  # of a database and of SQLite's own files beside it
TIMEOUT_S = 60.0
LOCK_TIMEOUT_S = 300.0  # MLflow takes seconds to make its tables
INCOMPLETE_S = 10.0  # a database without all tables that was written to this recently may still be getting them


def prepare_sqlite(path: Path) -> str:
    """Make MLflow's database where there is none; returns the URI of the folder of artifacts beside it.

    MLflow makes its tables without a lock: of 8 processes that open a new file at once, 7 fail. So one process opens a file
    that is new, or that another release of MLflow opened last, under a lock, and writes the release into the file.

    Raises:
        BadInput: the folder of the database is not there.
    """
    if not path.parent.is_dir():  # as after a checkout was moved: nobody would look into a database made there
        raise BadInput(
            f"the folder of MLflow's database {path} is not there; name the database where it is now with `python -m "
            "twoviews.tracking sync --uri sqlite:///<path>` or, in training, tracking.uri=."
        )
    artifacts = path.parent / "mlartifacts"
    if not _is_current(path):
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
            if not _is_current(path):
                _make(path, artifacts)
                _update(path, artifacts)
    _move_artifacts(path, artifacts)
    return artifacts.as_uri()


def _is_complete(path: Path) -> bool:
    """Whether the file has MLflow's tables: MLflow adds its first experiment after the last of them."""
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database:
        try:
            return bool(database.execute("select 1 from experiments limit 1").fetchall())
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


def _release() -> int:
    """A number for MLflow's release, which SQLite keeps for us as the file's user_version."""
    return zlib.crc32(importlib.metadata.version("mlflow").encode()) & 0x7FFFFFFF


def _is_current(path: Path) -> bool:
    """Whether the file has the tables of the MLflow that is installed."""
    if not _is_complete(path):
        return False
    with contextlib.closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database:
        return database.execute("pragma user_version").fetchone() == (_release(),)


def _update(path: Path, artifacts: Path) -> None:
    """Let MLflow add the tables that its release has and the file lacks, and record the release.

    MLflow refuses a file in which a table has changed since; its error names the command for that, `mlflow db upgrade`.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{path}", artifacts.as_uri()).engine.dispose()
    with contextlib.closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database:
        database.execute(f"pragma user_version = {_release()}")


def _make(path: Path, artifacts: Path) -> None:
    """Make the database, unless another process has made it meanwhile.

    MLflow cannot use a file in which it was killed while it made its tables, so they are made in another file, which is
    renamed. A file without experiments, which another program left there, is renamed to <name>.incomplete.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    while path.exists() and not _is_complete(path) and time.time() - path.stat().st_mtime < INCOMPLETE_S:
        time.sleep(0.2)  # `mlflow ui` may be making it at this moment
    if _is_complete(path):
        return
    new = path.with_name(f".{path.name}.new")
    for suffix in SUFFIXES:  # a journal that stays would be applied to the new database
        if (file := Path(f"{path}{suffix}")).exists():
            file.replace(f"{path}.incomplete{suffix}")
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{new}", artifacts.as_uri()).engine.dispose()
    new.replace(path)


def _move_artifacts(path: Path, artifacts: Path) -> None:
    """Point a database that was moved or copied to the artifacts beside it, as MLflow never changes their addresses.

    A folder of the same name elsewhere is where they were before. Experiments whose artifacts a user put elsewhere stay as
    they are, and so do runs whose artifacts were not moved.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database, database:
        for (old,) in database.execute("select distinct artifact_location from experiments").fetchall():
            address = urlsplit(old or "")
            before = Path(unquote(address.path))
            if address.scheme != "file" or before.name != artifacts.name or before.resolve() == artifacts.resolve():
                continue
            update = "update experiments set artifact_location = ? where artifact_location = ?"
            database.execute(update, (artifacts.as_uri(), old))
            runs = "select run_uuid, artifact_uri from runs where substr(artifact_uri, 1, ?) = ?"
            for run, uri in database.execute(runs, (len(old) + 1, f"{old}/")).fetchall():
                rest = unquote(uri[len(old) + 1 :])
                if (artifacts / rest).exists() or not (before / rest).exists():
                    moved = f"{artifacts.as_uri()}{uri[len(old) :]}"
                    database.execute("update runs set artifact_uri = ? where run_uuid = ?", (moved, run))
