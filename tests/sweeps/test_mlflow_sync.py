"""A sweep in MLflow: one parent, a child for each job, nothing twice, and nothing left running that is dead."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twoviews.errors import BadInput
from twoviews.sweep import main as sweep_command
from twoviews.sweeps import mlflow_sync
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job, JobSpec, JobState
from twoviews.sweeps.mlflow_sync import BackgroundReport, attach_jobs, flush, is_due
from twoviews.tracking import uris
from twoviews.tracking.__main__ import main as tracking_command
from twoviews.tracking.metrics import Metrics
from twoviews.tracking.state import set_target
from twoviews.tracking.upload import upload

CONFIG = "epochs: 2\ntracking:\n  uri: {uri}\n  experiment: sweeps\n  mirror: false\nseed: {seed}\n"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    uris.trust(uri)  # as the command does that names it
    return uri


def jobs(sweep: Sweep, uri: str, count: int) -> list[Job]:
    made = [
        JobSpec(f"{seed:08x}", {"seed": seed, "method.t@x": 0.5}, [], CONFIG.format(uri=uri, seed=seed))
        for seed in range(count)
    ]
    return sweep.add(made, command=f"python train.py -m 'seed=range({count})'")


def trained(job: Job, state: str = "finished") -> None:
    """As a training leaves its folder; "killed" leaves no result."""
    metrics = Metrics(job.folder)
    for step in range(1, 6):
        metrics.log(step, step / 5, {"train/loss": 1.0 / step, "knn/top1": 10.0 * step})
    metrics.commit(metrics.flush())
    metrics.close()
    if state != "killed":
        (job.folder / "result.json").write_text(json.dumps({"state": state, "seconds": 1.0}))
    job.write(JobState("FINISHED" if state == "finished" else "FAILED"))


def runs(uri: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sweeps")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def history(uri: str, run: str) -> list[int]:
    from mlflow import MlflowClient

    return [one.step for one in MlflowClient(uri).get_metric_history(run, "train/loss")]


def test_collect_brings_jobs_below_one_parent_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = Sweep("multirun/s")
    made = jobs(sweep, uri, 3)
    trained(made[0])
    trained(made[1], "killed")
    assert sweep_command(["collect", "s"]) == 0
    assert sweep_command(["collect", "s"]) == 0
    found = {run.info.run_name: run for run in runs(uri)}
    assert found.keys() == {"s", "seed=0 t@x=0.5", "seed=1 t@x=0.5"}, "a job that never began has no run"
    parent, one, killed = found["s"], found["seed=0 t@x=0.5"], found["seed=1 t@x=0.5"]
    assert sweep.record["parent"] == parent.info.run_id
    for child in (one, killed):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert history(uri, child.info.run_id) == [1, 2, 3, 4, 5]
    assert one.data.tags["axis.seed"] == "0" and one.data.tags["axis.method.t_x"] == "0.5"
    assert (one.info.status, killed.info.status, parent.info.status) == ("FINISHED", "KILLED", "FAILED")
    trained(made[2])
    (made[1].folder / "result.json").write_text(json.dumps({"state": "finished", "seconds": 1.0}))
    made[1].write(JobState("FINISHED"))
    assert sweep_command(["collect", "s"]) == 0
    assert {run.info.status for run in runs(uri)} == {"FINISHED"} and len(runs(uri)) == 4


def test_a_parent_whose_id_was_not_written_down_is_found_again(tmp_path: Path, uri: str) -> None:
    sweep = Sweep(tmp_path / "s")
    made, tracking = jobs(sweep, uri, 1), {"uri": uri, "experiment": "sweeps"}
    attach_jobs(sweep, made, tracking)
    parent = sweep.record["parent"]
    with sweep.update() as record:
        record["parent"] = None  # killed in between
    attach_jobs(sweep, made, tracking)
    assert sweep.record["parent"] == parent and len(runs(uri)) == 1


def test_a_job_that_begins_while_mlflow_is_away_has_its_name_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    sweep = Sweep(tmp_path / "s")
    (job,) = jobs(sweep, uri, 1)
    attach_jobs(sweep, [job], {"uri": uri, "experiment": "sweeps"})
    with monkeypatch.context() as away:
        away.setattr("twoviews.tracking.upload.open_experiment", lambda *_: pytest.fail("MLflow is asked"))
        trained(job)
    assert tracking_command(["sync", str(job.folder)]) == 0
    assert {run.info.run_name for run in runs(uri)} == {"s", "seed=0 t@x=0.5"}


def test_names_follow_what_later_launches_vary(tmp_path: Path, uri: str) -> None:
    sweep, tracking = Sweep(tmp_path / "s"), {"uri": uri, "experiment": "sweeps"}
    for lr in ("0.1", "0.2"):  # fixed in each launch
        config = CONFIG.format(uri=uri, seed=0) + f"optimizer:\n  lr: {lr}\n"
        spec = JobSpec(f"a{lr[-1]}", {"seed": 0}, ["seed=0", f"optimizer.lr={lr}"], config, {"choices": {}})
        (job,) = sweep.add([spec], command=f"python train.py -m seed=0 optimizer.lr={lr}")
        attach_jobs(sweep, [job], tracking)
        trained(job)
        upload(job.folder, training_ended=True)
        names = {run.info.run_name for run in runs(uri)}
    assert names == {"s", "seed=0", "seed=0 lr=0.2"}
    flush(sweep, print)
    assert {run.info.run_name for run in runs(uri)} == {"s", "seed=0 lr=0.1", "seed=0 lr=0.2"}


def test_the_parent_has_the_results(tmp_path: Path, uri: str, capsys: pytest.CaptureFixture) -> None:
    from mlflow import MlflowClient

    sweep = Sweep(tmp_path / "s")
    made = jobs(sweep, uri, 2)
    trained(made[0])
    assert sweep_command(["collect", str(sweep.folder)]) == 0
    assert "?workflowType=machine_learning" in capsys.readouterr().out
    parent = next(run for run in runs(uri) if run.info.run_name == "s")
    assert (parent.data.metrics["sweep/jobs_finished"], parent.data.metrics["knn/top1_best"]) == (1, 50)
    assert "1 of 2 jobs finished" in parent.data.tags["mlflow.note.content"]
    trained(made[1])
    flush(sweep, print)
    parent = MlflowClient(uri).get_run(parent.info.run_id)
    assert (parent.data.metrics["sweep/jobs_finished"], parent.data.metrics["knn/top1_mean"]) == (2, 50)
    note = parent.data.tags["mlflow.note.content"]
    assert (
        note.startswith("## Result\n\nkNN **50.00 (2 equal seeds)** over 2 seeds")
        and "| jobs | kNN | training per job |" in note
    )
    assert "`python train.py -m 'seed=range(2)'`" in note and "\n    " not in note
    files = {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id, "report")}
    assert files >= {"report/report.md", "report/report.csv"}


def test_the_report_grows_while_jobs_run(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)  # or it waits for whatever else this machine does
    sweep, growing = Sweep(tmp_path / "s"), BackgroundReport()
    made = jobs(sweep, uri, 2)
    trained(made[0])
    growing.update(sweep)
    growing.stop()
    assert not (sweep.folder / "report.md").exists(), "it has no page in MLflow"
    attach_jobs(sweep, made, {"uri": uri, "experiment": "sweeps"})
    growing.update(sweep)
    end = time.monotonic() + 240
    while not (parent := next(run for run in runs(uri) if run.info.run_name == "s")).data.metrics:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)
    assert parent.data.metrics["sweep/jobs_finished"] == 1 and parent.info.status == "RUNNING"
    assert not is_due(sweep)
    growing.stop()


def test_a_run_that_was_there_before_becomes_a_child(tmp_path: Path, uri: str) -> None:

    sweep = Sweep(tmp_path / "s")
    (job,) = jobs(sweep, uri, 1)
    trained(job)
    set_target(job.folder, uri, "sweeps")
    upload(job.folder, training_ended=True)
    (before,) = runs(uri)
    assert sweep_command(["collect", str(sweep.folder)]) == 0
    child = next(run for run in runs(uri) if run.info.run_id == before.info.run_id)
    assert child.data.tags["mlflow.parentRunId"] == sweep.record["parent"] and len(runs(uri)) == 2


def test_a_store_that_does_not_answer_refuses_the_sweep(tmp_path: Path) -> None:
    sweep, uri = Sweep(tmp_path / "s"), "http://127.0.0.1:9"
    uris.trust(uri)
    with pytest.raises(BadInput, match="MLflow does not accept the sweep .* tracking=files"):
        attach_jobs(sweep, jobs(sweep, uri, 1), {"uri": uri, "experiment": "sweeps"})


def test_what_mlflow_has_is_not_sent_again(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, said = Sweep(tmp_path / "s"), []
    made = jobs(sweep, uri, 2)
    attach_jobs(sweep, made, {"uri": uri, "experiment": "sweeps"})
    flush(sweep, said.append)
    assert len(runs(uri)) == 1, "no job has begun"
    for job in made:
        trained(job)
    flush(sweep, said.append)
    assert all(line.startswith(("Result: ", "report: ")) for line in said)
    assert {run.info.status for run in runs(uri)} == {"FINISHED"}
    said.clear()
    with monkeypatch.context() as nothing_new:
        nothing_new.setattr(mlflow_sync, "collect", lambda *_: pytest.fail("MLflow is asked"))
        flush(sweep, said.append)
    (made[0].folder / "views.png").write_bytes(b"picture")
    with sweep.update() as record:
        record["tracking"]["uri"] = "http://127.0.0.1:9"
    uris.trust("http://127.0.0.1:9")
    flush(sweep, said.append)
    assert "MLflow does not accept the sweep" in said[0] and "python -m twoviews.sweep collect s" in said[1]


MANY = """
import os, sys, time
import mlflow
from pathlib import Path
from test_mlflow_sync import trained
from twoviews.sweeps.folder import Sweep
from twoviews.tracking.upload import upload

jobs = Sweep(sys.argv[1]).jobs
children = []
begin = time.time() + 3  # all at the same moment
for job in jobs:
    if (child := os.fork()) == 0:
        time.sleep(max(0, begin - time.time()))
        trained(job)
        upload(job.folder, training_ended=False)
        os._exit(0 if upload(job.folder, training_ended=True) == 0 else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert codes == [0] * len(jobs), codes
"""


def start_at_once(folder: Path, uri: str, count: int) -> None:
    """Jobs that are trained and sent by a process each, all at the same moment: none is lost, none is there twice."""
    sweep = Sweep(folder)
    uris.trust(uri)
    attach_jobs(sweep, jobs(sweep, uri, count), {"uri": uri, "experiment": "sweeps"})
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(sweep.folder)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = runs(uri)
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == sweep.record["parent"]]
    names = sorted(f"seed={seed} t@x=0.5" for seed in range(count))
    assert len(found) == count + 1 and sorted(str(run.info.run_name) for run in children) == names
    for child in children:
        assert history(uri, child.info.run_id) == [1, 2, 3, 4, 5] and child.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_jobs_that_start_at_once_lose_nothing(tmp_path: Path, uri: str) -> None:
    # 64 take minutes on two cores; tests/slurm starts so many on PostgreSQL.
    start_at_once(tmp_path / "s", uri, int(os.environ.get("TWOVIEWS_STARTS", "8")))
