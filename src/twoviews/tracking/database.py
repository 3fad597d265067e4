"""An SQLite file of MLflow: made whole or not at all, and moved together with the files of its runs."""

import contextlib
import sqlite3
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

BESIDE = ("-journal", "-wal", "-shm")  # ends of the names of SQLite's own files beside a database
UNFINISHED_S = 10.0  # a database without all tables that changed within this time may still get them


def complete(path: Path) -> bool:
    """Whether the file has MLflow's tables: MLflow makes its first experiment after the last of them."""
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
        try:
            return bool(database.execute("select 1 from experiments limit 1").fetchall())
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


def make(path: Path, artifacts: str) -> None:
    """Make a database with MLflow's tables, if there is none; one process at a time calls it.

    MLflow cannot use tables that it was killed in the middle of making. They are made in another file, which is renamed.

    Args:
        path: where it goes. A file that has no experiments, which another program left, becomes <name>.incomplete.
        artifacts: address of the files of MLflow's first experiment.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    while path.exists() and not complete(path) and time.time() - path.stat().st_mtime < UNFINISHED_S:
        time.sleep(0.2)  # `mlflow ui` may be making it at this moment
    if complete(path):
        return
    for end in ("", *BESIDE):  # those of a database that is gone would be applied to the new one
        if (file := Path(f"{path}{end}")).exists():
            file.replace(f"{path}.incomplete{end}")
    new = path.with_name(f".{path.name}.new")
    for end in ("", *BESIDE):
        Path(f"{new}{end}").unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{new}", artifacts).engine.dispose()
    new.replace(path)


def move_artifacts(path: Path, artifacts: Path) -> None:
    """Let a database that was moved, or copied, have the files of its runs beside it. MLflow never changes their addresses.

    Experiments that were given another place by hand stay as they are.

    Args:
        path: of the database.
        artifacts: the folder beside it; one of this name elsewhere is where it was.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database, database:
        for (old,) in database.execute("select distinct artifact_location from experiments").fetchall():
            address = urlsplit(old or "")
            place = Path(unquote(address.path))
            if address.scheme != "file" or place.name != artifacts.name or place.resolve() == artifacts.resolve():
                continue
            update = "update experiments set artifact_location = ? where artifact_location = ?"
            database.execute(update, (artifacts.as_uri(), old))
            of_runs = "select run_uuid, artifact_uri from runs where substr(artifact_uri, 1, ?) = ?"
            for run, uri in database.execute(of_runs, (len(old) + 1, f"{old}/")).fetchall():
                rest = uri[len(old) :]
                if (place / unquote(rest[1:])).exists() and not (artifacts / unquote(rest[1:])).exists():
                    continue  # the database was moved without them
                new = (f"{artifacts.as_uri()}{rest}", run)
                database.execute("update runs set artifact_uri = ? where run_uuid = ?", new)
