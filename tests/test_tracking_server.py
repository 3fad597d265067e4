"""`python -m twoviews.tracking serve` on a real PostgreSQL: who may enter the database, and as whom."""

import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from twoviews.errors import BadInput
from twoviews.tracking import uris
from twoviews.tracking.server import _programs


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def begin(folder: Path, port: int, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "twoviews.tracking", "serve", "--folder", str(folder), "--port", str(port), *more],
        stdin=subprocess.DEVNULL,
        stdout=(folder.parent / "server.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def said(folder: Path) -> str:
    return (folder.parent / "server.txt").read_text()


def until_it_answers(folder: Path, process: subprocess.Popen, port: int) -> None:
    for _ in range(600):
        assert process.poll() is None, said(folder)
        try:
            return uris.check_reachable(f"http://127.0.0.1:{port}")
        except BadInput:
            time.sleep(0.5)
    pytest.fail(said(folder))


@pytest.fixture(scope="module")
def served() -> Iterator[Path]:
    """The folder of a server that runs, below /tmp, where PostgreSQL's own user may go."""
    pytest.importorskip("psycopg")
    try:
        _programs()
    except BadInput as error:
        pytest.skip(f"LEFT OUT: MLflow on PostgreSQL. {error}")
    place = Path("/tmp") / f"twoviews-served-{os.getpid()}"
    place.mkdir()
    place.chmod(0o755)
    folder, port = place / "served", free_port()
    process = begin(folder, port, "--workers", "1")
    try:
        until_it_answers(folder, process, port)
        (place / "port").write_text(str(port))
        yield folder
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        shutil.rmtree(place)


def psql(folder: Path, role: str, database: str, sql: str, user: str | None = None, **environment: str):
    """What psql says, started by this user or another one."""
    where = ["-h", folder / "sockets", "-U", role, "-d", database]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    other = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    return subprocess.run(
        [_programs() / "psql", "-w", "-X", "-A", "-t", *where, "-c", sql],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        cwd="/",
        **other,
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_who_has_the_password_enters(served: Path) -> None:
    assert mode(served) == mode(served / "sockets") == 0o700 and mode(served / "password") == 0o600
    me = pwd.getpwuid(os.getuid()).pw_name
    for role, database in (
        ("mlflow", "mlflow"),
        ("mlflow", "postgres"),
        ("postgres", "postgres"),
        ("root", "postgres"),
    ):
        done = psql(served, role, database, "SELECT 1")
        assert done.returncode and (role == me or "1" not in done.stdout), (role, database, done)
    if os.getuid() == 0:
        done = psql(served, "mlflow", "mlflow", "SELECT 1", "nobody")
        assert "Permission denied" in done.stderr, done


def test_mlflows_role_owns_its_database_and_nothing_else(served: Path) -> None:
    def asked(sql: str, database: str = "mlflow") -> subprocess.CompletedProcess[str]:
        return psql(served, "mlflow", database, sql, PGPASSFILE=str(served / "password"))

    rights = asked(
        "SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication FROM pg_roles WHERE rolname = current_user"
    )
    assert rights.stdout.strip() == "f|f|f|f", rights.stderr
    assert int(asked("SELECT count(*) FROM experiments").stdout) >= 1, "MLflow's tables are there"
    for sql in (
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "COPY (SELECT 1) TO '/tmp/x'",
        "SELECT pg_read_file('/etc/passwd')",
    ):
        assert re.search("permission denied|must be superuser", asked(sql).stderr), sql
    assert asked("SELECT 1", "postgres").returncode, "no other database"


def test_the_password_is_in_its_file_alone(served: Path) -> None:
    password = (served / "password").read_text().strip().rpartition(":")[2]
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert password.encode() not in process.read_bytes()
        except OSError:
            continue
    for log in (served / "database.log", served.parent / "server.txt"):
        assert password not in log.read_text()


def test_it_listens_on_this_machine_unless_told_otherwise(served: Path) -> None:
    assert "warning" not in said(served)
    port = int((served.parent / "port").read_text())
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [one for one in listening if one.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_starts_again_warns_about_other_hosts_and_refuses_what_was_open(served: Path) -> None:
    folder, port = served.parent / "more" / "served", free_port()
    folder.parent.mkdir(mode=0o755)
    for host in ("127.0.0.1", "0.0.0.0"):
        process = begin(folder, port, "--workers", "1", "--host", host)
        try:
            until_it_answers(folder, process, port)
            assert ("warning: MLflow asks for no password" in said(folder)) == (host == "0.0.0.0")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    access = folder / "database" / "pg_hba.conf"
    access.write_text("local all all trust\n")
    process = begin(folder, port)
    assert process.wait(60) == 2 and "of an earlier version" in said(folder)
