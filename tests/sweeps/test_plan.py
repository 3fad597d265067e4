"""What a plan says: jobs, what is finished, time from measured steps or finished jobs, disk; and it starts nothing."""

import json
import re
from pathlib import Path

import pytest
from conftest import SMALL_MOCO

from twoviews.console import Console
from twoviews.sweeps import plan as planning
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobSpec, JobState
from twoviews.sweeps.machine import Local, Pool
from twoviews.sweeps.plan import Cost, NotMeasured, plan
from twoviews.sweeps.slurm import Slurm

SLURM = {
    "timeout_min": 1,
    "signal_delay_s": 30,
    "array_parallelism": 4,
    "cpus_per_task": 2,
    "gpus_per_node": 1,
    "mem_gb": None,
    "partition": "low",
    "account": None,
    "nodes": 1,
    "tasks_per_node": 1,
    "setup": [],
    "options": {},
}


def jobs(*parameters: dict) -> list[JobSpec]:
    return [
        JobSpec(f"{n:08x}", one, [], f"epochs: {one.get('epochs', 10)}\nseed: 0\n") for n, one in enumerate(parameters)
    ]


def measured(seconds: float, calls: list[str]):
    def measure(job: JobSpec, console: Console) -> Cost:
        calls.append(job.digest)
        return Cost(10.0, seconds, 1_000_000, "CPU", 2, "as measured")

    return measure


def test_jobs_that_cost_alike_are_measured_once(tmp_path: Path, monkeypatch, capsys) -> None:
    calls: list[str] = []
    monkeypatch.setattr(planning, "_measured_cost", measured(9.0, calls))
    new = jobs(*({"method.temperature": t, "seed": s} for t in (0.1, 0.2) for s in (0, 1, 2)))
    plan(tmp_path / "s", new, {}, Local(), Console())
    out = capsys.readouterr().out
    assert calls == ["00000000"] and not (tmp_path / "s").exists()
    assert "6 new; 6 to run" in out and "about 1 min 40 s per job, 10 min 0 s one after the other" in out
    assert "0.333 core-hours" in out and "about 6 MB, 1 MB per job" in out and "nothing was submitted" in out


def test_longer_jobs_take_longer_and_other_networks_are_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    calls: list[str] = []
    monkeypatch.setattr(planning, "_measured_cost", measured(9.0, calls))
    new = jobs(*({"backbone.width": w, "epochs": e} for w in (8, 16, 32, 64) for e in (10, 20)))
    plan(tmp_path / "s", new, {}, Pool(at_once=2, jobs_per_gpu=1, cores_per_job=1), Console())
    out = capsys.readouterr().out
    assert len(calls) == 3  # of four widths
    assert "about 1 min 40 s to 3 min 10 s per job" in out
    assert "1 more kind of jobs taken to cost as much as the most expensive of these" in out


def test_finished_jobs_are_better_than_a_measurement(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(planning, "_measured_cost", lambda *_: pytest.fail("measured"))
    sweep, new = Sweep(tmp_path / "s"), jobs({"seed": 0}, {"seed": 1}, {"seed": 2})
    done, _ = sweep.add(new[:2])
    lines = [{"step": 5 * e, "epoch": e, "time": 100.0 + e, "knn/top1": 1.0} for e in range(11)]
    (done.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (done.folder / "result.json").write_text(json.dumps({"state": "finished", "knn/top1": 1.0, "seconds": 120.0}))
    now = {"00000000": JobState("FINISHED"), "00000001": JobState("FAILED")}
    plan(sweep.folder, new, now, Local(), Console())
    out = capsys.readouterr().out
    assert "1 FAILED, 1 FINISHED, 1 new; 2 to run" in out and "about 2 min 0 s per job, 4 min 0 s" in out
    assert "as finished jobs of this sweep took" in out


def test_what_slurm_would_be_asked_and_what_does_not_fit(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(planning, "_measured_cost", measured(9.0, []))
    plan(tmp_path / "s", jobs({"seed": 0}), {}, Slurm(**SLURM), Console())
    out = capsys.readouterr().out
    assert "would be asked for 1 job, each: 2 cores per process, 1 GPU per node, time limit 1 min" in out
    assert "1 of them need longer than timeout_min=1" in out and "says little" in out


def test_every_process_of_a_job_costs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(planning, "_measured_cost", measured(9.0, []))
    plan(tmp_path / "s", jobs({"seed": 0}), {}, Slurm(**{**SLURM, "nodes": 2, "tasks_per_node": 3}), Console())
    out = capsys.readouterr().out
    assert "about 1 min 40 s per job" in out and "0.333 core-hours" in out  # 100 s x 2 threads x 6 processes
    assert "counted as if 6 processes per job were no faster than that one" in out


def test_a_job_that_does_not_train_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    def measure(*_) -> Cost:
        raise NotMeasured("there are no images in nowhere")

    monkeypatch.setattr(planning, "_measured_cost", measure)
    plan(tmp_path / "s", jobs({"seed": 0}), {}, Local(), Console())
    assert "time      not known: there are no images in nowhere" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_job_is_measured_and_nothing_is_left(command, tmp_path: Path) -> None:
    typed = [
        *SMALL_MOCO,
        "method=moco",
        "data=digits",
        "protocol=[knn_small]",
        "method.temperature=0.1,0.2",
        "seed=0,1",
    ]
    finished = command("train", "-m", *typed, "sweep.plan=true")
    assert finished.code == 0, finished.err
    assert (
        "4 new; 4 to run" in finished.out
        and "measuring the first steps of method.temperature=0.1 seed=0" in finished.out
    )
    assert re.search(r"time +about .* per job", finished.out) and "core-hours" in finished.out
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("sweep.json"))
