"""An MLflow server on PostgreSQL, for sweeps whose points run on many nodes: SQLite is for one machine.

Both are started in the foreground and end together. The database listens on a socket in its folder only, which nobody else
may enter; MLflow logs in with a password that changes at each start, as a role without rights elsewhere.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from twoviews.errors import BadInput
from twoviews.tracking.client import prepare_environment
from twoviews.tracking.uris import require_mlflow

DATABASE_S = 60.0  # for PostgreSQL to answer
# To the database, of each worker of the server: more than it answers requests at once. With the 15 it has otherwise,
# 64 runs that start together get errors.
CONNECTIONS = 80
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


def serve(folder: Path, host: str, port: int, workers: int) -> int:
    """Run until a signal comes; the exit code of the server.

    Args:
        folder: of database and artifacts, made at the first start; nobody else may look into it.
        host: address that the server listens on; 0.0.0.0 for other machines, in a network that is trusted.
        port: of the server.
        workers: processes of the server.

    Raises:
        BadInput: there is no MLflow, no PostgreSQL or no driver for it, or the database does not start.
    """
    require_mlflow()
    prepare_environment()
    programs, folder = _programs(), folder.absolute()
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise BadInput("MLflow needs a driver for PostgreSQL; install it: pip install 'psycopg[binary]'.") from error
    data, sockets = folder / "database", folder / "sockets"
    for place in (folder, sockets, folder / "artifacts"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder, sockets):
        place.chmod(0o700)
    user = _user(folder, sockets)
    owner = user or pwd.getpwuid(os.getuid()).pw_name
    access = data / "pg_hba.conf"
    if not (data / "PG_VERSION").exists():
        options = ("--auth-local=peer", "--auth-host=reject", "--encoding=UTF8", "--locale=C")
        _run(user, "", programs / "initdb", "-D", data, "-U", owner, *options)
    elif re.search(r"^[^#]*\btrust\b", access.read_text(), re.MULTILINE):
        raise BadInput(
            f"the database in {folder} is of an earlier version, which let every user of this machine in; name another "
            "--folder, and send the runs again with `python -m twoviews.tracking sync --uri`."
        )
    access.write_text(f'local all "{owner}" peer\nlocal mlflow mlflow scram-sha-256\n')
    # -k: the database listens on a socket in this folder, and nowhere else.
    limits = ("-c", "listen_addresses=", "-c", f"max_connections={workers * CONNECTIONS + 20}")
    database = subprocess.Popen(
        _as(user, programs / "postgres", "-D", data, "-k", sockets, *limits),
        stdout=(folder / "database.log").open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait(database, programs, sockets, owner, folder)
        address = f"postgresql+psycopg://mlflow@/mlflow?host={sockets}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
        command += ["--workers", str(workers), "--backend-store-uri", address]
        command += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
        environment = {
            **os.environ,
            "PGPASSFILE": str(_login(user, programs, sockets, owner, folder)),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves a gigabyte
            "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(CONNECTIONS // 4),
            "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(CONNECTIONS - CONNECTIONS // 4),
        }
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        if not (host == "localhost" or host.startswith("127.") or host == "::1"):
            print(
                f"warning: MLflow asks for no password: whoever reaches {host}:{port} can read, change and delete all runs.",
                flush=True,
            )
        print(f"train with tracking.uri=http://{host}:{port}; Ctrl-C ends server and database.", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os.killpg(server.pid, signal.SIGTERM))
        return max(server.wait(), 0)
    finally:
        database.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        database.wait()


def _login(user: str | None, programs: Path, sockets: Path, owner: str, folder: Path) -> Path:
    """A file with a new password of the role that MLflow has: it owns its database, and may do nothing else."""
    password, file = secrets.token_hex(24), folder / "password"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(f"*:*:mlflow:mlflow:{password}\n")  # as libpq reads it
    commands = f"""
        SET log_min_error_statement = panic;  -- or a statement that fails is logged with the password
        SET password_encryption = 'scram-sha-256';
        SELECT 'CREATE ROLE mlflow' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \\gexec
        ALTER ROLE mlflow LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD '{password}';
        SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \\gexec
    """
    quiet = ("-X", "-q", "-v", "ON_ERROR_STOP=1")
    _run(user, commands, programs / "psql", "-h", sockets, "-U", owner, "-d", "postgres", *quiet)
    return file


def _programs() -> Path:
    """Where PostgreSQL is.

    Raises:
        BadInput: nowhere.
    """
    found = [path for place in PLACES for path in sorted(Path("/").glob(place[1:])) if (path / "initdb").exists()]
    if not found and (initdb := shutil.which("initdb")):
        found = [Path(initdb).resolve().parent]
    if not found:
        raise BadInput("there is no PostgreSQL on this machine; install it, for example apt-get install postgresql.")
    return found[-1]


def _user(*owned: Path) -> str | None:
    """Who PostgreSQL runs as: it refuses root; None is whoever this is.

    Raises:
        BadInput: this is root, and there is nobody else.
    """
    if os.getuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError as error:
        raise BadInput(
            "PostgreSQL does not run as root, and there is no user postgres; start this as another user."
        ) from error
    for place in owned:
        shutil.chown(place, "postgres", "postgres")
    return "postgres"


def _as(user: str | None, *command: object) -> list[str]:
    words = [str(word) for word in command]
    return words if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *words]


def _run(user: str | None, text: str, *command: object) -> None:
    done = subprocess.run(_as(user, *command), input=text, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise BadInput(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def _wait(database: subprocess.Popen, programs: Path, sockets: Path, owner: str, folder: Path) -> None:
    end = time.monotonic() + DATABASE_S
    ready = [str(programs / "pg_isready"), "-q", "-h", str(sockets), "-U", owner, "-d", "postgres"]
    while subprocess.run(ready).returncode:
        if database.poll() is not None or time.monotonic() > end:
            raise BadInput(f"PostgreSQL does not start; {folder / 'database.log'} says why.")
        time.sleep(0.2)
