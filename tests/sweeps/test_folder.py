"""The folder of a sweep: made whole, changed by one process at a time, and telling the truth about who is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from twoviews.errors import BadInput
from twoviews.sweep import main as sweep_command
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import JobSpec, JobState
from twoviews.sweeps.job_states import current_states


def new(digest: str, **parameters: object) -> JobSpec:
    overrides = [f"{key}={value}" for key, value in parameters.items()]
    return JobSpec(digest, parameters, overrides, f"seed: {parameters.get('seed', 0)}\n", {"cwd": "/somewhere"})


def test_jobs_are_run_folders_that_know_their_values(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "moco-digits-1")
    jobs = sweep.add([new("aa", seed=0), new("bb", seed=1)], command="-m seed=0,1")
    assert [job.digest for job in jobs] == ["aa", "bb"]
    assert (jobs[1].folder / "config.yaml").read_text() == "seed: 1\n"
    assert jobs[1].description == {
        "digest": "bb",
        "axes": {"seed": 1},
        "overrides": ["seed=1"],
        "cwd": "/somewhere",
    }
    assert jobs[1].label == "seed=1"
    assert jobs[0].state == JobState() and jobs[0].result == {} and jobs[0].metrics() == []
    assert sweep.commands == ["-m seed=0,1"]


def test_values_are_added_and_what_is_there_stays(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    sweep.add([new("aa", seed=0)])
    (sweep.folder / "aa" / "last.pt").write_text("checkpoint")
    sweep.mark({"aa": submission("12_0", 5.0)})
    sweep.add([new("aa", seed=0), new("bb", seed=1)])
    assert sweep.record["axes"] == {"seed": [0, 1]}
    assert (sweep.folder / "aa" / "last.pt").read_text() == "checkpoint"
    assert json.loads((sweep.folder / "sweep.json").read_text())["points"]["aa"]["job"] == "12_0", "as it always was"
    assert [(job.digest, job.slurm_id) for job in sweep.jobs] == [("aa", "12_0"), ("bb", None)]


def test_what_goes_on_with_newer_code_has_its_options(tmp_path: Path) -> None:
    """A job that an earlier version began; what is finished keeps the configuration that it was trained with."""
    sweep = Sweep(tmp_path / "s")
    sweep.add([new("aa", seed=0), new("bb", seed=1)])
    for digest, state in (("aa", "interrupted"), ("bb", "finished")):
        (sweep.folder / digest / "config.yaml").write_text("seed: 9  # as written before\n")
        (sweep.folder / digest / "result.json").write_text(json.dumps({"state": state}))
    sweep.add([new("aa", seed=0), new("bb", seed=1)])
    assert (sweep.folder / "aa" / "config.yaml").read_text() == "seed: 0\n"
    assert (sweep.folder / "bb" / "config.yaml").read_text() == "seed: 9  # as written before\n"


def test_launches_at_once_lose_no_job(tmp_path: Path) -> None:
    code = """
import sys
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobSpec
sweep, number = Sweep(sys.argv[1]), int(sys.argv[2])
for index in range(10):
    digest = f"{number}{index}"
    sweep.add([JobSpec(digest, {"seed": int(digest)}, [], "")])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s"), str(one)]) for one in (1, 2, 3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    sweep = Sweep.existing(tmp_path / "s")
    assert sorted(int(job.digest) for job in sweep.jobs) == [*range(10, 40)]
    assert sorted(sweep.record["axes"]["seed"]) == [*range(10, 40)]


def test_a_folder_torn_by_a_crash_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep.add([new("aa", seed=0)])
    assert sweep.jobs == [] and not (sweep.folder / "aa").exists()
    assert sweep.add([new("aa", seed=0)])[0].description["digest"] == "aa"


def test_a_sweep_is_found_by_folder_by_name_or_as_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="there is no sweep in"):
        Sweep.existing()
    one, other = Sweep("multirun/one"), Sweep("multirun/other")
    one.add([new("aa", seed=0)])
    assert Sweep.existing().name == "one" and Sweep.existing("other").folder == other.folder
    assert Sweep.existing(tmp_path / "multirun" / "one").folder == one.folder
    with pytest.raises(BadInput, match="no sweep 'othr'. Did you mean 'other'"):
        Sweep.existing("othr")


def test_the_latest_sweep_is_shown_with_the_names_of_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["newest", *(f"s{number}" for number in range(9))]):
        Sweep(f"multirun/{name}").add([new("aa", seed=0)])
        os.utime(f"multirun/{name}/sweep.json", (1000.0 - age, 1000.0 - age))
    sweep_command(["status"])
    out = capsys.readouterr().out
    assert "multirun/newest: 1 LOST" in out
    assert "others can be named: s0, s1, s2, s3, s4, s5, s6, s7 and 1 more\n" in out
    sweep_command(["status", "s3"])
    assert "others" not in capsys.readouterr().out, "whoever names one knows"


def test_whose_process_is_gone_is_lost(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    jobs = sweep.add([new(digest, seed=int(digest)) for digest in "0123"])
    sweep.mark(dict.fromkeys("0123", submission(None, 5.0)))
    jobs = sweep.jobs
    jobs[0].write(JobState("FINISHED", submitted=jobs[0].submitted))
    jobs[1].write(JobState("RUNNING", submitted=jobs[1].submitted))
    jobs[2].write(JobState("FAILED", submitted=0.0))  # of an earlier submission
    code = f"""
from pathlib import Path
from twoviews.sweeps.folder import Sweep
sweep = Sweep({str(sweep.folder)!r})
locks = [sweep.launcher_lock, sweep.jobs[1].lock]
for lock in locks:
    lock.acquire()
print("held", flush=True); input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    assert [state.state for state in current_states(jobs).values()] == ["FINISHED", "RUNNING", "QUEUED", "QUEUED"]
    holder.kill()
    holder.wait()
    assert [state.state for state in current_states(jobs).values()] == ["FINISHED", "LOST", "LOST", "LOST"]
    assert "runner was killed" in current_states(jobs)["1"].reason


def test_state_json_may_know_more_than_this_version(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    (job,) = sweep.add([new("aa", seed=0)])
    (job.folder / "state.json").write_text(json.dumps({"state": "FAILED", "mood": "bad"}))
    assert job.state == JobState("FAILED")


def test_the_id_of_a_slurm_job_has_the_key_that_it_always_had(tmp_path: Path) -> None:
    (job,) = Sweep(tmp_path / "s").add([new("aa", seed=0)])
    job.write(JobState("RUNNING", slurm_id="12_0"))
    written = json.loads((job.folder / "state.json").read_text())
    assert written["job"] == "12_0" and "slurm_id" not in written
    assert job.state == JobState("RUNNING", slurm_id="12_0")
