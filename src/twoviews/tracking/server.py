"""An MLflow server on PostgreSQL, for runs on many machines: an SQLite file is for one machine.

Server and database run in the foreground and end together. The database listens only on a socket in its folder, which only
its owner may enter; MLflow logs in with a password that changes at each start, as a role that owns nothing but its database.
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

DATABASE_TIMEOUT_S = 60.0  # for PostgreSQL to answer
# Connections of each server process to the database. With MLflow's default of 15, 64 runs that start together get errors.
CONNECTIONS_PER_WORKER = 80
PROGRAM_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


def serve(folder: Path, host: str, port: int, workers: int) -> int:
    """Run until a signal comes; returns the exit code of the server.

    Args:
        folder: for database and artifacts, made at the first start; only its owner may enter it.
        host: address that the server listens on; 0.0.0.0 for other machines, in a network that is trusted.
        port: that the server listens on.
        workers: number of server processes.

    Raises:
        BadInput: there is no MLflow, no PostgreSQL or no driver for it, or the database does not start.
    """
    require_mlflow()
    prepare_environment()
    programs, folder = postgres_programs(), folder.absolute()
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise BadInput("MLflow needs a driver for PostgreSQL; install it: pip install 'psycopg[binary]'.") from error
    data, sockets = folder / "database", folder / "sockets"
    for private in (folder, sockets, folder / "artifacts"):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    for private in (folder, sockets):
        private.chmod(0o700)
    user = _user(folder, sockets)
    owner = user or pwd.getpwuid(os.getuid()).pw_name
    _make_database(user, programs, data, owner)
    # -k: the database listens on a socket in this folder, and nowhere else.
    limits = ("-c", "listen_addresses=", "-c", f"max_connections={workers * CONNECTIONS_PER_WORKER + 20}")
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
            "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(CONNECTIONS_PER_WORKER // 4),
            "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(CONNECTIONS_PER_WORKER - CONNECTIONS_PER_WORKER // 4),
        }
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        if not (host == "localhost" or host.startswith("127.") or host == "::1"):
            risk = f"whoever reaches {host}:{port} can read, change and delete all runs."
            print(f"warning: MLflow asks for no password: {risk}", flush=True)
        print(f"train with tracking.uri=http://{host}:{port}; Ctrl-C ends server and database.", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os.killpg(server.pid, signal.SIGTERM))
        return max(server.wait(), 0)
    finally:
        database.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        database.wait()


def _make_database(user: str | None, programs: Path, data: Path, owner: str) -> None:
    """Make the database, if there is none, and let in its owner and MLflow's role only.

    Raises:
        BadInput: the database is of an earlier version, which let everybody in.
    """
    access = data / "pg_hba.conf"
    if not (data / "PG_VERSION").exists():
        options = ("--auth-local=peer", "--auth-host=reject", "--encoding=UTF8", "--locale=C")
        _run(user, "", programs / "initdb", "-D", data, "-U", owner, *options)
    elif re.search(r"^[^#]*\btrust\b", access.read_text(), re.MULTILINE):
        raise BadInput(
            f"the database in {data.parent} is of an earlier version, which let every user of this machine in; name another "
            "--folder, and send the runs again with `python -m twoviews.tracking sync --uri`."
        )
    access.write_text(f'local all "{owner}" peer\nlocal mlflow mlflow scram-sha-256\n')


def _login(user: str | None, programs: Path, sockets: Path, owner: str, folder: Path) -> Path:
    """Give MLflow's role a new password; returns the file with it, in the format that libpq reads."""
    password, file = secrets.token_hex(24), folder / "password"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(f"*:*:mlflow:mlflow:{password}\n")
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


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs, the newest version.

    Raises:
        BadInput: PostgreSQL is not installed.
    """
    found = [initdb for pattern in PROGRAM_FOLDERS for initdb in sorted(Path("/").glob(f"{pattern[1:]}/initdb"))]
    if not found and (initdb := shutil.which("initdb")):
        found = [Path(initdb).resolve()]
    if not found:
        raise BadInput("there is no PostgreSQL on this machine; install it, for example apt-get install postgresql.")
    return found[-1].parent


def _user(*owned: Path) -> str | None:
    """The user that PostgreSQL runs as, which must not be root, and who is given these folders; None is the present user.

    Raises:
        BadInput: the present user is root, and there is no user postgres.
    """
    if os.getuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError as error:
        raise BadInput(
            "PostgreSQL does not run as root, and there is no user postgres; start this as another user."
        ) from error
    for path in owned:
        shutil.chown(path, "postgres", "postgres")
    return "postgres"


def _as(user: str | None, *command: object) -> list[str]:
    words = [str(word) for word in command]
    return words if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *words]


def _run(user: str | None, text: str, *command: object) -> None:
    result = subprocess.run(_as(user, *command), input=text, capture_output=True, text=True, cwd="/")
    if result.returncode:
        raise BadInput(f"{command[0]} failed: {(result.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def _wait(database: subprocess.Popen, programs: Path, sockets: Path, owner: str, folder: Path) -> None:
    end = time.monotonic() + DATABASE_TIMEOUT_S
    ready = [str(programs / "pg_isready"), "-q", "-h", str(sockets), "-U", owner, "-d", "postgres"]
    while subprocess.run(ready).returncode:
        if database.poll() is not None or time.monotonic() > end:
            raise BadInput(f"PostgreSQL does not start; {folder / 'database.log'} says why.")
        time.sleep(0.2)
