"""`make tracking-server` for tests: MLflow on PostgreSQL, which can be killed and started again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from on_slurm import wait_for

from twoviews.errors import BadInput
from twoviews.tracking import uris
from twoviews.tracking.server import _programs


class Server:
    """Its processes are those of a user's command; its folder is below /tmp, where PostgreSQL's own user may go."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = ["serve", "--folder", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twoviews.tracking", *command],
            stdin=subprocess.DEVNULL,
            stdout=(self.folder.parent / "server.txt").open("a"),
            stderr=subprocess.STDOUT,
        )
        wait_for(self.answers, 180)

    def answers(self) -> bool:
        assert self.process and self.process.poll() is None, (self.folder.parent / "server.txt").read_text()
        try:
            uris.check_reachable(self.uri)
        except BadInput:
            return False
        return True

    def kill(self) -> None:
        """As when the power fails: server, its workers and the database at once."""
        assert self.process
        victims = [*below(self.process.pid)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


def below(process: int) -> Iterator[int]:
    """A process and its descendants."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from below(int(child))


@pytest.fixture
def server() -> Iterator[Server]:
    """Running."""
    try:
        _programs()
    except BadInput as error:
        pytest.skip(f"LEFT OUT: MLflow on PostgreSQL. {error}")
    place = Path("/tmp") / f"twoviews-server-{os.getpid()}"
    place.mkdir()
    place.chmod(0o755)
    one = Server(place / "served")
    try:
        one.start()
        yield one
    finally:
        one.stop()
        shutil.rmtree(place)
