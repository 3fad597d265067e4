"""Stores and folders that MLflow's client cannot work with: one line says so, and the run keeps what was measured."""

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Finished

from twoviews.tracking.__main__ import main
from twoviews.tracking.metrics import Metrics

ANSWERS = {  # status, type and body of every answer
    "page": (200, "text/html", "<!DOCTYPE html><html><body>Sign in</body></html>" * 100),
    "text": (200, "application/json", '{"experiment": '),
    "list": (200, "application/json", "[1, 2]"),
    "types": (200, "application/json", '{"experiment": "x", "runs": 3, "run": [1]}'),
    "empty": (200, "application/json", "{}"),
    "nothing": (200, "application/json", ""),
    "error": (500, "text/html", "<pre>Traceback (most recent call last):\n" + "  File x\n" * 500 + "</pre>"),
    "forbidden": (403, "text/html", "<html>no</html>"),
    "elsewhere": (302, "text/html", ""),
    "deleted": (200, "application/json", '{"experiment": {"experiment_id": "1", "lifecycle_stage": "deleted"}}'),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a line of metrics."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (folder := tmp_path / "run").mkdir()
    metrics = Metrics(folder)
    metrics.log(1, 0.1, {"train/loss": 1.0})
    metrics.close()
    (folder / "result.json").write_text(json.dumps({"state": "finished"}))
    return folder


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Answers everything with its `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, kind, body = self.server.answer  # type: ignore[attr-defined]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status == 302:
                self.send_header("Location", "/login")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def sync(capfd: pytest.CaptureFixture, *arguments: str) -> Finished:
    capfd.readouterr()
    code = main(["sync", *arguments])
    return Finished(code, *capfd.readouterr())


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_server_that_is_no_mlflow(run: Path, server, capfd: pytest.CaptureFixture, kind: str) -> None:
    server.answer = ANSWERS[kind]
    done = sync(capfd, str(run), "--uri", f"http://127.0.0.1:{server.server_port}")
    assert done.code in (1, 2), done
    (line,) = (done.out + done.err).splitlines()
    assert len(line) < 700 and "Traceback" not in line, line
    assert ("1 value left" in line) if done.code == 1 else line.startswith("error: ")
    log = run / "mlflow.log"
    assert str(log) not in line or "Traceback" in log.read_text()


def test_a_socket_that_speaks_no_http(run: Path, capfd: pytest.CaptureFixture) -> None:
    import socketserver

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"220 mail.example ESMTP\r\n" * 3)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = sync(capfd, str(run), "--uri", f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert done.code == 2 and done.err.startswith("error: no MLflow answers at"), done


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path, left: int) -> None:
    """Write until so many bytes are left."""
    free = os.statvfs(place)
    (place / "rest").write_bytes(bytes(free.f_bavail * free.f_bsize - left))


def test_a_folder_that_is_full(run: Path, small: Path, capfd: pytest.CaptureFixture) -> None:
    folder = small / "x"
    subprocess.run(["cp", "-r", str(run), str(folder)], check=True)
    fill(small, 0)
    done = sync(capfd, str(folder), "--uri", f"sqlite:///{run.parent / 'mlflow.db'}")
    assert done.code == 2 and done.err.startswith(f"error: {folder} cannot be sent"), done
    assert "no space left" in done.err and len(done.err.splitlines()) == 1
    (small / "rest").unlink()
    assert sync(capfd, str(folder)).code == 0


def test_a_store_that_is_full(run: Path, small: Path, capfd: pytest.CaptureFixture) -> None:
    fill(small, 2**17)
    done = sync(capfd, str(run), "--uri", f"sqlite:///{small / 'mlflow.db'}")
    line = (done.out + done.err).splitlines()[-1]  # MLflow's log may be on by another test
    assert done.code == 1 and "1 value left" in line and "full" in line, done
    assert sync(capfd, str(run), "--uri", f"sqlite:///{run.parent / 'mlflow.db'}").code == 0


def test_a_folder_that_is_read_only(run: Path, small: Path, capfd: pytest.CaptureFixture) -> None:
    subprocess.run(["cp", "-r", str(run), str(small / "x")], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    done = sync(capfd, str(small / "x"), "--uri", f"sqlite:///{run.parent / 'mlflow.db'}")
    assert done.code == 2 and "read-only file system" in done.err and len(done.err.splitlines()) == 1, done


def test_a_folder_of_somebody_else(run: Path, capfd: pytest.CaptureFixture) -> None:
    (run / "commit.txt").write_bytes(b"\xff\xfe")
    (run / "config.yaml").write_text("method: {_target_: twoviews.methods.moco.MoCo}\nepochs: 3\n")
    for name in ("a\udcff.png", "[x].png", f"{'n' * 250}.png"):
        (run / name).write_bytes(b"1")
    store = ("--uri", f"sqlite:///{run.parent / 'mlflow.db'}")
    odd = run.rename(run.with_name("[r]\udcff" + "n" * 200))
    done = sync(capfd, str(odd), *store)
    assert done.code == 0, done
    (odd / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "time": 1e300, "a": 1}\n')
    (odd / "tracking.json").unlink()
    done = sync(capfd, str(odd), *store)
    assert done.code in (0, 1) and len((done.out + done.err).splitlines()) == 1, done
