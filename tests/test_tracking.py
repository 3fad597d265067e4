"""Tracking on real parts: real SQLite files, real processes and a real MLflow server that is killed and comes back."""

import json
import math
import os
import re
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from twoviews.errors import BadInput
from twoviews.locks import FolderLock
from twoviews.tracking import state, uris
from twoviews.tracking.__main__ import main
from twoviews.tracking.client import RUN_KEY_TAG, get_or_create_run, logged_error, open_experiment, prepare_environment
from twoviews.tracking.metrics import Metrics, read
from twoviews.tracking.mirror import Mirror, Tracking, flush
from twoviews.tracking.state import UploadState, run_id, run_page, set_target
from twoviews.tracking.upload import pending_values, upload

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One SQLite store for all tests: making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"
    uris.trust(uri)
    return uri


@pytest.fixture
def run(tmp_path, uri, request):
    """A run folder that is aimed at the store, each at an experiment of its own."""
    return targeted(tmp_path / "moco-digits", uri, request.node.name)


def targeted(folder, uri, experiment):
    folder.mkdir()
    set_target(folder, uri, experiment)
    return folder


def steps(metrics, first, last, slow=0.0):
    for step in range(first, last):
        metrics.log(step, step / 10, {"train/loss": 1 / (step + 1), "images_per_s": time.perf_counter()})
        time.sleep(slow)


def client_of(folder):
    state = UploadState.load(folder)
    return open_experiment(state.tracking_uri, state.experiment)[0]


def history(folder, name):
    """[(step, value, time stamp in ms)] as MLflow has it."""
    found = client_of(folder).get_metric_history(run_id(folder), name)
    return sorted((point.step, point.value, point.timestamp) for point in found)


def in_file(folder, name):
    return [(line["step"], line[name], round(line["time"] * 1000)) for line in read(folder) if name in line]


def wait_for(condition, timeout_s=90.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# metrics.jsonl


def test_lines_come_back(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log(3, 0.5, {"train/loss": 1.25, "lr": 1})
    metrics.log(3, 0.5, {"knn/top1": 88.0})
    size = metrics.flush()
    assert size == (tmp_path / "metrics.jsonl").stat().st_size
    first, second = read(tmp_path)
    assert first | {"time": 0} == {"step": 3, "epoch": 0.5, "time": 0, "train/loss": 1.25, "lr": 1.0}
    assert abs(first["time"] - time.time()) < 60
    assert second["knn/top1"] == 88.0
    metrics.close()


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log(1, 0.1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (line,) = read(tmp_path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], line["d"]) == (math.inf, -math.inf, 2)


def test_log_costs_nothing(tmp_path):
    metrics = Metrics(tmp_path)
    values = {"train/loss": 0.1234567, "train/spread": 0.9, "lr": 0.03, "images_per_s": 12345.6}
    start = time.process_time()
    for step in range(5000):
        metrics.log(step, step / 390, values)
    cost = (time.process_time() - start) / 5000
    metrics.close()
    assert cost < 200e-6  # measured: 17 us while four processes shared two cores


def test_resume_cuts_what_the_checkpoint_does_not_hold_and_keeps_time_stamps(tmp_path):
    metrics = Metrics(tmp_path)
    steps(metrics, 0, 10)
    kept = metrics.flush()
    steps(metrics, 10, 20)
    metrics.close()
    before = in_file(tmp_path, "train/loss")
    (tmp_path / "metrics.jsonl").open("ab").write(b'{"step": 20, "epo')  # kill -9 in the middle of a write
    (tmp_path / "result.json").write_text('{"state": "interrupted"}')

    time.sleep(0.01)
    metrics = Metrics(tmp_path, kept)
    assert in_file(tmp_path, "train/loss") == before[:10]
    assert not (tmp_path / "result.json").exists()
    steps(metrics, 10, 22)
    metrics.close()
    after = in_file(tmp_path, "train/loss")
    assert after[:20] == before
    assert [step for step, *_ in after] == list(range(22))


def test_a_file_shorter_than_its_checkpoint_is_said_and_goes_on(tmp_path):
    metrics = Metrics(tmp_path)
    steps(metrics, 0, 3)
    kept = metrics.flush()
    metrics.close()
    os.truncate(tmp_path / "metrics.jsonl", kept - 5)
    said = []
    metrics = Metrics(tmp_path, kept, say=said.append)
    steps(metrics, 3, 5)
    metrics.close()
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 3, 4]
    assert "lost" in said[0]


def test_two_writers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("twoviews.locks.TRAINING_LOCK_TIMEOUT_S", 0.2)
    code = f"import time, pathlib; from twoviews.tracking.metrics import Metrics; m = Metrics(pathlib.Path({str(tmp_path)!r})); "
    other = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"], stdout=-1)
    other.stdout.readline()
    with pytest.raises(BadInput, match=r"another process is training into .* hydra\.run\.dir="):
        Metrics(tmp_path)
    other.kill()
    other.wait()
    Metrics(tmp_path).close()


def test_who_waits_while_a_folder_is_set_aside_gets_the_lock_of_the_new_one(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first, second, third = (FolderLock(folder / "lock") for _ in range(3))
    assert first.acquire() and not second.acquire()
    waiting = threading.Thread(target=second.acquire, args=(60,))
    waiting.start()
    time.sleep(0.2)
    folder.rename(tmp_path / "run.1")
    folder.mkdir()
    waiting.join(60)
    assert not third.acquire()
    second.release()
    assert third.acquire() and (folder / "lock").exists()


def test_a_link_for_a_lock_is_a_sentence(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="delete it"):
        FolderLock(tmp_path / "lock").acquire()
    assert not (tmp_path / "elsewhere").exists()


# What MLflow has


def describe(folder):
    config = {
        "method": {"_target_": "twoviews.methods.moco.MoCo", "temperature": 0.1, "queue": None},
        "augmentation": {"views": {"a": {"scale": [0.2, 1.0]}}, "none": {}, "flip": True},
        "long": "x" * 20_000,
        "k" * 300: 1,
    } | {f"many{n}": n for n in range(150)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text('{"host": "node7", "digest": "ab"}')
    (folder / "data.json").write_text(json.dumps({"name": "digits", "digest": "ab" * 32}))
    (folder / "commit.txt").write_text("1234abcd\n")
    for name in ("diff.patch", "views.png", "curves.png", "encoder.json"):
        (folder / name).write_bytes(b"content of " + name.encode())


def test_a_finished_run_is_whole(run):
    describe(run)
    said = []
    metrics, mirror = Metrics(run), Mirror(run, said.append, interval_s=0.1)
    steps(metrics, 0, 700)
    metrics.log(700, 70.0, {"bad": math.nan, "worse": -math.inf, "knn/top1": 91.5})
    metrics.commit(metrics.flush())
    wait_for(lambda: pending_values(run) == 0)
    (run / "result.json").write_text('{"state": "finished", "knn/top1": 91.5}')
    assert mirror.close() == 0
    metrics.close()
    assert said == []

    found = client_of(run).get_run(run_id(run))
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "moco-digits"
    assert history(run, "train/loss") == in_file(run, "train/loss")
    assert history(run, "images_per_s") == in_file(run, "images_per_s")
    assert found.data.metrics["knn/top1"] == 91.5
    assert math.isnan(found.data.metrics["bad"])
    assert found.data.metrics["worse"] < -1e308
    params, tags = found.data.params, found.data.tags
    assert (params["method.temperature"], params["method.queue"]) == ("0.1", "null")
    assert (params["augmentation.views.a.scale"], params["augmentation.none"]) == ("[0.2, 1.0]", "{}")
    assert params["many149"] == "149"
    assert len(params) == 158
    assert re.fullmatch(r"x{5000,}\.\.\. sha256 [0-9a-f]{16}", params["long"])
    assert (tags["method"], tags["data"], tags["data.digest"], tags["host"]) == ("moco", "digits", "ab" * 32, "node7")
    assert (tags["folder"], tags["mlflow.source.git.commit"]) == (str(run), "1234abcd")
    assert [given.dataset.name for given in found.inputs.dataset_inputs] == ["digits"]
    artifacts = {artifact.path for artifact in client_of(run).list_artifacts(run_id(run))}
    assert artifacts == {
        *("config.yaml", "environment.json", "data.json", "commit.txt", "diff.patch", "encoder.json", "result.json"),
        *("views.png", "curves.png"),
    }
    assert "mlartifacts" in found.info.artifact_uri
    place = rf"/#/experiments/\d+/runs/{run_id(run)}\?workflowType=machine_learning$"
    assert re.search(rf"true '?/.*mlflow'? ui .*sqlite:///.*\n +http://127\.0\.0\.1:5000{place}", run_page(run))


def test_pages_of_the_default_store_are_served_by_make_where_it_has_made_the_environment(tmp_path, monkeypatch):
    for module in (state, uris):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    address = "http://127.0.0.1:5000/#/experiments/1/runs/ab?workflowType=machine_learning"
    assert state.page(uri, "1", "ab").splitlines()[0].endswith(f"ui --workers 1 --backend-store-uri {uri}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "train").touch()
    assert state.page(uri, "1", "ab").split() == ["make", "-C", str(tmp_path), "mlflow", address]
    monkeypatch.chdir(tmp_path)
    assert state.page(uri, "1", "ab") == f"make mlflow\n        {address}"
    assert " ui --workers 1 " in state.page("sqlite:////elsewhere.db", "1", "ab")


def test_only_what_the_checkpoint_holds_is_sent_and_nothing_doubles_after_resume(run):
    metrics = Metrics(run)
    steps(metrics, 0, 10)
    older = metrics.flush()
    steps(metrics, 10, 20)
    newer = metrics.flush()
    metrics.commit(newer)
    steps(metrics, 20, 30)
    metrics.flush()
    assert upload(run, training_ended=False) == 40
    assert history(run, "train/loss")[-1][0] == 19
    assert upload(run, training_ended=False) == 0
    first = history(run, "images_per_s")
    metrics.close()

    # The answer to the last batch never came: it is sent again.
    state = UploadState.load(run)
    state.sent_bytes = older
    state.save(run)
    assert upload(run, training_ended=False) == 20
    assert history(run, "images_per_s") == first

    # The last checkpoint is damaged and the one before it is resumed, twice; speed is never measured the same.
    for _ in range(2):
        metrics = Metrics(run, older)
        steps(metrics, 10, 25)
        metrics.commit(metrics.flush())
        upload(run, training_ended=False)
        metrics.close()
    assert history(run, "train/loss") == in_file(run, "train/loss")
    assert [step for step, *_ in history(run, "images_per_s")] == list(range(25))
    assert history(run, "images_per_s")[:20] == first


def test_a_run_whose_id_was_never_written_down_is_found(run):
    Metrics(run).close()
    upload(run, training_ended=False)
    made, state = run_id(run), UploadState.load(run)
    state.run_id, state.status = None, ""
    state.save(run)
    upload(run, training_ended=False)
    assert run_id(run) == made


def test_status_follows_the_run_and_a_changed_value_is_told(run):
    (run / "config.yaml").write_text("epochs: 2\n")
    Metrics(run).close()
    (run / "result.json").write_text('{"state": "failed"}')
    upload(run, training_ended=True)
    assert client_of(run).get_run(run_id(run)).info.status == "FAILED"
    metrics = Metrics(run)
    (run / "config.yaml").write_text("epochs: 40\n")
    upload(run, training_ended=False)
    found = client_of(run).get_run(run_id(run))
    assert (found.info.status, found.data.params["epochs"]) == ("RUNNING", "2")
    assert found.data.tags["changed.epochs"] == "40"
    metrics.close()


def test_a_deleted_run_is_a_sentence_and_another_store_gets_everything(run, tmp_path):
    metrics = Metrics(run)
    steps(metrics, 0, 5)
    metrics.close()
    upload(run, training_ended=True)
    client_of(run).delete_run(run_id(run))
    (run / "views.png").write_bytes(b"new")
    with pytest.raises(BadInput, match="was deleted in MLflow; restore it with"):
        upload(run, training_ended=True)
    set_target(run, UploadState.load(run).uri, "another-experiment")
    assert upload(run, training_ended=True) == 10


def test_a_killed_run_is_closed_by_sync(run, capsys):
    code = (
        "import sys, time, pathlib; from twoviews.tracking.metrics import Metrics\n"
        "m = Metrics(pathlib.Path(sys.argv[1])); m.log(1, .1, {'a': 1.}); m.commit(m.flush())\n"
        "m.log(2, .2, {'a': 2.}); m.flush(); print(1, flush=True); time.sleep(300)"
    )
    training = subprocess.Popen([sys.executable, "-c", code, run], stdout=-1)
    training.stdout.readline()
    assert main(["sync", str(run)]) == 1
    assert "1 value sent, still training: 1 value to follow" in capsys.readouterr().out
    assert client_of(run).get_run(run_id(run)).info.status == "RUNNING"
    training.kill()
    training.wait()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "ep')
    assert main(["sync", str(run)]) == 0
    assert client_of(run).get_run(run_id(run)).info.status == "KILLED"
    assert history(run, "a") == in_file(run, "a")
    assert main(["sync", str(run)]) == 0
    assert f"run {run_id(run)}, 0 values sent" in capsys.readouterr().out


def test_sync_finds_the_runs_and_names_bad_input(tmp_path, uri, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sync"]) == 2
    assert main(["sync", "nowhere"]) == 2
    assert main(["sync", "--uri", "./mlruns"]) == 2
    for name in ("outputs/one", "multirun/sweep/0"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        metrics = Metrics(folder)
        steps(metrics, 0, 3)
        metrics.close()
    capsys.readouterr()
    assert main(["sync", "--uri", uri, "--experiment", "later"]) == 0
    assert capsys.readouterr().out.count("6 values sent") == 2


EIGHT = """
import os, pathlib, sys, threading
from twoviews.tracking.client import prepare_environment
from twoviews.tracking.metrics import Metrics
from twoviews.tracking.state import set_target
from twoviews.tracking.upload import upload

prepare_environment()
import mlflow.store.tracking.sqlalchemy_store  # once for all: it takes seconds of a core
from mlflow.telemetry.utils import is_telemetry_disabled

def job(name):
    folder = pathlib.Path(name)
    folder.mkdir()
    set_target(folder, sys.argv[1], "sweep")
    metrics = Metrics(folder)
    for step in range(50):
        metrics.log(step, 0.1, {"a": step})
    metrics.commit(metrics.flush())
    (folder / "result.json").write_text('{"state": "finished"}')
    upload(folder, training_ended=True)
    assert is_telemetry_disabled() and not any("elemetry" in thread.name for thread in threading.enumerate())

children = []
for name in sys.argv[2:]:
    children.append(os.fork())
    if children[-1] == 0:
        job(name)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_processes_on_a_fresh_file_and_on_one_of_an_earlier_release(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folders = [tmp_path / f"run{n}" for n in range(8)]
    for some in (folders[:5], folders[5:]):
        done = subprocess.run([sys.executable, "-c", EIGHT, uri, *some], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        if some[0] == folders[0]:
            with sqlite3.connect(tmp_path / "mlflow.db") as database:
                database.execute("drop table trace_metrics")  # as before the release that added it
                database.execute("pragma user_version = 0")
    for folder in folders:
        assert len(history(folder, "a")) == 50
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (8,)
        assert database.execute("select count(*) from experiments where name = 'sweep'").fetchone() == (1,)


KILLED = """
import os, signal, sys
from sqlalchemy import Engine, event
from twoviews.tracking import uris
from twoviews.tracking.client import open_experiment

left = int(sys.argv[2])

@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *_):
    global left
    left -= "CREATE TABLE" in statement
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

uris.trust(sys.argv[1])
open_experiment(uris.resolve(sys.argv[1]), "x")
"""


def test_killed_again_and_again_while_mlflow_makes_its_tables(tmp_path):
    fresh = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for tables in (2, 25):
        killed = subprocess.run([sys.executable, "-c", KILLED, fresh, str(tables)], capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists()
    metrics = Metrics(targeted(tmp_path / "run", fresh, "x"))
    steps(metrics, 0, 3)
    metrics.close()
    assert upload(tmp_path / "run", training_ended=True) == 6
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"run", "mlflow.db", "mlflow.db.made", "mlflow.db.lock", "mlartifacts"}


def test_a_database_without_all_tables_is_kept_beside_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:  # as MLflow's own commands leave it when they are killed
        database.execute("create table metrics (key text)")
    (tmp_path / "mlflow.db-journal").write_bytes(b"")
    monkeypatch.setattr("twoviews.tracking.sqlite_file.INCOMPLETE_S", 0.5)
    uris.trust(f"sqlite:///{path}")
    client, experiment_id = open_experiment(f"sqlite:///{path}", "x")
    assert client.create_run(experiment_id).info.status == "RUNNING"
    with sqlite3.connect(tmp_path / "mlflow.db.incomplete") as database:
        assert database.execute("select name from sqlite_master").fetchall() == [("metrics",)]


def moved_store(uri, tmp_path):
    """A copy of the store in a folder that was renamed after a run was sent to it: (run, folder before, folder now)."""
    shutil.copytree(Path(uri.removeprefix("sqlite:///")).parent, tmp_path / "here")
    run = targeted(tmp_path / "run", f"sqlite:///{tmp_path / 'here' / 'mlflow.db'}", "moved")
    (run / "views.png").write_bytes(b"picture")
    Metrics(run).close()
    upload(run, training_ended=True)
    assert (tmp_path / "here" / "mlartifacts" / run_id(run) / "artifacts" / "views.png").exists()
    return run, tmp_path / "here", (tmp_path / "here").rename(tmp_path / "there")


def test_files_go_where_the_database_was_moved(run, uri, tmp_path):
    upload(run, training_ended=False)  # so that there is a store to copy
    moved, here, there = moved_store(uri, tmp_path)
    made, address = run_id(moved), f"sqlite:///{there / 'mlflow.db'}"
    (moved / "curves.png").write_bytes(b"another")
    sync = [sys.executable, "-m", "twoviews.tracking", "sync", str(moved), "--uri", address]
    assert subprocess.run(sync).returncode == 0  # a process of its own, because MLflow remembers where files went
    assert run_id(moved) == made and not here.exists()
    assert {path.name for path in (there / "mlartifacts" / made / "artifacts").iterdir()} == {"views.png", "curves.png"}
    assert {file.path for file in client_of(moved).list_artifacts(made)} == {"views.png", "curves.png"}
    new = targeted(tmp_path / "new", address, "moved")
    (new / "views.png").write_bytes(b"picture")
    upload(new, training_ended=True)
    assert (there / "mlartifacts" / run_id(new) / "artifacts" / "views.png").exists() and not here.exists()


def test_a_database_that_was_moved_away_is_not_made_again(run, uri, tmp_path, capsys):
    upload(run, training_ended=False)
    moved, here, _ = moved_store(uri, tmp_path)
    open_experiment.cache_clear()  # as in another process
    (moved / "curves.png").write_bytes(b"another")
    assert main(["sync", str(moved)]) == 2
    assert re.search(r"error: the folder of .*here/mlflow\.db is not there; .*sync --uri", capsys.readouterr().err)
    assert not here.exists()


def test_an_experiment_with_a_place_of_its_own_keeps_it(uri, tmp_path):
    client, _ = open_experiment(uri, "any")
    own = (tmp_path / "large disk").as_uri()
    client.create_experiment("own place", artifact_location=own)
    assert client.get_experiment(open_experiment(uri, "own place")[1]).artifact_location == own


# A server


class LosingAnswers(BaseHTTPRequestHandler):
    """Runs of MLflow's REST interface: the answer to the first that is made never comes."""

    def do_POST(self):  # noqa: N802
        body, made = self.rfile.read(int(self.headers["Content-Length"])), self.server.made
        if self.path.endswith("/runs/create"):
            made.append(json.loads(body))
            if len(made) == 1:
                self.close_connection = True
                return
        runs = [self.run(number, given) for number, given in enumerate(made)]
        content = json.dumps({"runs": runs} if self.path.endswith("/search") else {"run": runs[-1]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def run(self, number, given):
        info = {"run_id": f"run{number}", "experiment_id": "1", "status": "RUNNING", "start_time": 1}
        return {"info": info, "data": {"tags": given["tags"]}}

    def log_message(self, *_):
        pass


def test_a_lost_answer_makes_no_second_run():
    prepare_environment()
    from mlflow import MlflowClient

    with ThreadingHTTPServer(("127.0.0.1", 0), LosingAnswers) as server:
        server.made = []
        threading.Thread(target=server.serve_forever).start()
        client = MlflowClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(Exception, match="onnection"):
            get_or_create_run(client, "1", "key", tags={"a": "b"})
        assert get_or_create_run(client, "1", "key", tags={"a": "b"}).info.run_id == "run0"
        server.shutdown()
    assert len(server.made) == 1


OK = "HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "sent",
    ["", "HTTP/1.1 20", f"{OK}Content-Length: 900\r\n\r\n{{", f"{OK}Transfer-Encoding: chunked\r\n\r\n9\r\n{{"],
    ids=["before", "in the header", "in the body", "in a chunk"],
)
def test_a_server_that_dies_in_mid_answer_does_not_answer(sent, tmp_path):
    prepare_environment()
    from mlflow import MlflowClient

    class Dying(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(sent.encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dying) as server:
        threading.Thread(target=server.serve_forever).start()
        with pytest.raises(Exception) as error:
            MlflowClient(f"http://127.0.0.1:{server.server_address[1]}").get_run("0" * 32)
        server.shutdown()
    assert logged_error(error.value, tmp_path) == "it does not answer"
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_no_missing_answer_whatever_was_tried_before(tmp_path):
    try:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            raise ValueError("the name is taken") from None
    except ValueError as error:
        assert logged_error(error, tmp_path).startswith("the name is taken; all of it is in")


def test_a_run_that_was_made_after_all_is_removed(run):
    Metrics(run).close()
    upload(run, training_ended=False)
    client, state = client_of(run), UploadState.load(run)
    late = client.create_run(state.experiment_id, tags={RUN_KEY_TAG: state.run_key}).info.run_id
    upload(run, training_ended=True)
    assert client.get_run(late).info.lifecycle_stage == "deleted"
    assert client.get_run(run_id(run)).info.status == "KILLED"


class Server:
    """A real MLflow server on one SQLite file; it can be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        mlflow = Path(sys.executable).with_name("mlflow")
        store = f"sqlite:///{self.folder / 'server.db'}"
        self.process = subprocess.Popen(
            [mlflow, "server", "--backend-store-uri", store, "--port", str(self.port), "--workers", "1"],
            cwd=self.folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self.answers, 180)

    def answers(self):
        try:
            uris.check_reachable(self.uri)
        except BadInput:
            return False
        return True

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers too
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_every_point_once(tmp_path, server):
    said = []
    run, other = targeted(tmp_path / "run", server.uri, "x"), targeted(tmp_path / "other", server.uri, "x")
    (run / "views.png").write_bytes(b"picture")
    metrics, mirror = Metrics(run), Mirror(run, said.append, interval_s=0.05)
    steps(metrics, 0, 300)
    metrics.commit(metrics.flush())
    wait_for(lambda: pending_values(run) == 0)
    for start in range(300, 900, 20):  # killed in the middle of this
        steps(metrics, start, start + 20, slow=0.001)
        metrics.commit(metrics.flush())
        if start == 500:
            server.kill()
    wait_for(lambda: said)

    # A run that ends while the server is away, and one more that is refused at the start.
    short, mirror_of_short = Metrics(other), Mirror(other, said.append)
    steps(short, 0, 7)
    short.flush()
    assert mirror_of_short.close(30) == 14
    short.close()
    assert re.search(rf"\(it does not answer; 14 values left\); `python -m twoviews.tracking sync {other}", said[-1])
    assert main(["sync", str(other)]) == 1
    with pytest.raises(BadInput, match=r"no MLflow answers at .*start it.*tracking=files"):
        Tracking(server.uri, "x", mirror=True).check(optional=False)
    Tracking(server.uri, "x", mirror=True).check(optional=True, say=said.append)
    assert "goes on without MLflow" in said[-1]

    server.start()
    wait_for(lambda: pending_values(run) == 0)
    (run / "result.json").write_text('{"state": "interrupted"}')
    assert mirror.close() == 0
    metrics.close()
    assert main(["sync", str(other)]) == 0
    for folder, count in ((run, 900), (other, 7)):
        assert len(history(folder, "train/loss")) == count
        assert history(folder, "train/loss") == in_file(folder, "train/loss")
        assert history(folder, "images_per_s") == in_file(folder, "images_per_s")
    assert client_of(run).get_run(run_id(run)).info.status == "KILLED"
    assert [file.path for file in client_of(run).list_artifacts(run_id(run))] == ["result.json", "views.png"]
    assert sum("takes nothing now (it does not answer)" in line for line in said) == 1
    assert sum("takes values again" in line for line in said) == 1
    place = f"/#/experiments/{UploadState.load(run).experiment_id}/runs/{run_id(run)}?workflowType=machine_learning"
    assert run_page(run) == server.uri + place


ENDING = """
import pathlib, sys, time
from twoviews.tracking.metrics import Metrics
from twoviews.tracking.mirror import Mirror

folder = pathlib.Path(sys.argv[1])
metrics, mirror = Metrics(folder), Mirror(folder, interval_s=0.1)
metrics.log(1, 0.1, {"a": 1.0})
metrics.commit(metrics.flush())
print(mirror.pid, flush=True)
time.sleep(300)
"""


def test_a_mirror_ignores_the_signals_of_a_job_and_ends_with_its_training(run):
    """As SLURM signals all processes of a job, and as the kernel kills a training that takes too much memory."""
    training = subprocess.Popen([sys.executable, "-c", ENDING, run], stdout=-1)
    mirror = int(training.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(mirror, number)
    wait_for(lambda: pending_values(run) == 0)
    training.kill()
    training.wait()
    command = Path(f"/proc/{mirror}/cmdline")
    wait_for(lambda: not command.exists() or not command.read_bytes(), 30)  # a process that nobody waits for has none
    assert main(["sync", str(run)]) == 0
    assert client_of(run).get_run(run_id(run)).info.status == "KILLED"


def test_a_mirror_that_was_killed_is_said_and_sync_sends_the_rest(run):
    said = []
    metrics, mirror = Metrics(run), Mirror(run, said.append)
    steps(metrics, 0, 2)
    metrics.flush()
    os.kill(mirror.pid, signal.SIGKILL)
    assert mirror.close() == 4 and "(the mirror has ended; 4 values left)" in said[-1]
    metrics.close()
    assert main(["sync", str(run)]) == 0


def test_a_mirror_that_is_closed_before_it_has_started_is_not_said_to_be_silent(run):
    said = []
    metrics, mirror = Metrics(run), Mirror(run, said.append)
    steps(metrics, 0, 1)
    metrics.flush()
    assert mirror.close(0.01) == 2
    assert "(the process that sends it was still starting after 0.01 s; 2 values left)" in said[-1]
    metrics.close()


def test_a_training_imports_no_mlflow(run):
    code = ENDING.replace("time.sleep(300)", "mirror.close(); metrics.close(); print('mlflow' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["False"] and pending_values(run) == 0


class Silent(socketserver.ThreadingTCPServer):
    """Takes every connection and answers nothing, or only that it is healthy."""

    daemon_threads, block_on_close = True, False

    def __init__(self, healthy: bool):
        outer = self
        self.asked = threading.Event()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if healthy and b"/health" in self.request.recv(1000):
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")
                    return
                outer.asked.set()
                outer.ended.wait(300)

        super().__init__(("127.0.0.1", 0), Handler)
        self.ended, self.uri = threading.Event(), f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """No connection is held any more."""
        self.ended.set()
        self.shutdown()
        self.server_close()


@pytest.mark.parametrize("healthy", [False, True])
def test_a_server_that_never_answers_is_given_up_within_seconds(tmp_path, healthy, monkeypatch):
    """At the end of a run, after an evaluation, by sync: none waits for what MLflow's own patience would be."""
    monkeypatch.setattr(uris, "ANSWER_TIMEOUT_S", 1.0)
    said, server = [], Silent(healthy)
    folder = targeted(tmp_path / "moco-digits", server.uri, "x")
    try:
        metrics, mirror = Metrics(folder), Mirror(folder, said.append, interval_s=0.1)
        steps(metrics, 0, 3)
        metrics.flush()
        assert server.asked.wait(60)
        begun = time.monotonic()
        assert mirror.close() == 6 and time.monotonic() - begun < 30
        metrics.close()
        later = f"python -m twoviews.tracking sync {folder}"
        assert re.search(rf"6 values left\).*{later}", said[-1])
        begun = time.monotonic()
        flush(folder, mirror=True, say=said.append)
        assert time.monotonic() - begun < 30
        assert "does not have all of this run (" in said[-1] and later in said[-1]
        if not healthy:
            assert main(["sync", str(folder)]) == 1
            with pytest.raises(BadInput, match="no MLflow answers at"):
                Tracking(server.uri, "x", mirror=True).check(optional=False)
    finally:
        server.close()


# Configuration


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("file:/tmp/mlruns", "plain folders; use sqlite:///"),
        ("./mlruns", "plain folders; use sqlite:///"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("http://", "not an address"),
        ("http://host:port", "not an address"),
        ("gopher://host", "not an address of MLflow"),
        ("https://me:secret@host", "MLFLOW_TRACKING_PASSWORD"),
        ("http://127.0.0.1:9", "no MLflow answers at http://127.0.0.1:9/health"),
        ("sqlite:///{tmp}/text/x.db", "cannot be MLflow's database"),
        ("sqlite:///{tmp}/text", "is not an SQLite database"),
    ],
)
def test_bad_addresses_are_sentences(tmp_path, bad, says):
    (tmp_path / "text").write_text("a text that is longer than sixteen bytes")
    with pytest.raises(BadInput, match=re.escape(says)) as error:
        Tracking(bad.format(tmp=tmp_path), "x", mirror=True).check(optional=False)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot be written"):
        Tracking(f"sqlite:///{tmp_path}/mlflow.db", "x", mirror=True).check(optional=False)


def test_the_default_store_is_at_the_root_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert uris.resolve(None) == f"sqlite:///{CONF.parent / 'mlflow.db'}"
    assert uris.resolve("sqlite:///runs.db") == f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "tracking").glob("*.yaml")))
def test_every_config_builds_and_files_needs_no_mlflow(name, tmp_path):
    from hydra.utils import instantiate

    tracking = instantiate(yaml.safe_load((CONF / "tracking" / f"{name}.yaml").read_text()), _convert_="all")
    assert isinstance(tracking, Tracking)
    assert tracking.mirror == (name == "mlflow")
    if not tracking.mirror:
        tracking.check(optional=False)
        assert tracking.start(tmp_path) is None
        assert UploadState.load(tmp_path).experiment == "twoviews"
