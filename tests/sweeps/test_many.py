"""Two thousand jobs: what is asked of the disk, of the scheduler and of MLflow does not grow with every look."""

import subprocess
from pathlib import Path

import pytest

from twoviews.console import ROWS, Console
from twoviews.sweep import main as sweep_command
from twoviews.sweeps import job_states
from twoviews.sweeps import plan as planning
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import Job, JobSpec, JobState
from twoviews.sweeps.machine import Local
from twoviews.sweeps.plan import Cost, plan

COUNT = 2000


@pytest.fixture
def new() -> list[JobSpec]:
    parameters = [{"method.temperature": 0.01 * (number // 20), "seed": number % 20} for number in range(COUNT)]
    return [JobSpec(f"{number:08x}", one, [], "epochs: 10\nseed: 0\n") for number, one in enumerate(parameters)]


def test_a_plan_measures_one_of_them(tmp_path: Path, new: list[JobSpec], monkeypatch, capsys) -> None:
    measured: list[str] = []

    def measure(job: JobSpec, console: Console) -> Cost:
        measured.append(job.digest)
        return Cost(10.0, 9.0, 1_000_000, "CPU", 2, "as measured")

    monkeypatch.setattr(planning, "_measured_cost", measure)
    plan(tmp_path / "s", new, {}, Local(), Console())
    out = capsys.readouterr().out
    assert "s: 2,000 jobs (the first 40 of 2,000)" in out and "2,000 new; 2,000 to run" in out
    assert len(measured) == 1 and "55 h 33 min one after the other; 111 core-hours" in out


def test_status_asks_slurm_once_and_reads_what_it_shows(
    tmp_path: Path, new: list[JobSpec], monkeypatch, capsys
) -> None:
    sweep = Sweep(tmp_path / "s")
    made = sweep.add(new)
    facts = [submission(f"{7 + n // 1000}_{n % 1000}", 100.0) for n in range(len(made))]
    sweep.mark(dict(zip((job.digest for job in made), facts, strict=True)))
    for job in made[:50]:
        job.write(JobState("FINISHED", submitted=100.0))
    made[50].write(JobState("RUNNING", slurm_id="7_50", node="n1", submitted=100.0, started=101.0))
    asked, read = [], []

    def squeue(*command: str) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        states = {50: "RUNNING|n1|None", 1999: "FAILED|n2|NonZeroExitCode"}
        jobs = [f"{7 + n // 1000}_{n % 1000}|{states.get(n, 'PENDING||Priority')}" for n in range(50, COUNT)]
        return subprocess.CompletedProcess(command, 0, "\n".join(jobs), "")

    monkeypatch.setattr(job_states, "run_slurm", squeue)
    metrics = Job.metrics
    monkeypatch.setattr(Job, "metrics", lambda job: (read.append(job.digest), metrics(job))[1])
    assert sweep_command(["status", str(sweep.folder)]) == 3
    out = capsys.readouterr().out
    assert "1 FAILED, 50 FINISHED, 1,948 QUEUED, 1 RUNNING" in out and "s (the first 40 of 2,000)" in out
    assert len(asked) == 1 and len(read) == ROWS and read[:2] == [made[1999].digest, made[50].digest]
