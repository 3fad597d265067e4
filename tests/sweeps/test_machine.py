"""Jobs on one machine: in sequence, several at once with leases, and stopped without loss."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake import FINISH, starts, sweep
from test_runner import wait_for

from twoviews.errors import BadInput
from twoviews.locks import try_acquire
from twoviews.sweeps import machine
from twoviews.sweeps.folder import Sweep, submission
from twoviews.sweeps.job import JobState
from twoviews.sweeps.job_states import NO_CONTROLLER, current_states
from twoviews.sweeps.machine import Local, Pool, gpus
from twoviews.sweeps.slurm import cancel


def overlap(jobs: int = 1) -> str:
    """A plan that waits until so many jobs run at once, for ten seconds at most, and writes how many did."""
    return f"""
here = folder.parent / f"on{{folder.name}}"
here.touch()
end = time.monotonic() + 10
while (company := len(list(folder.parent.glob("on*")))) < {jobs} and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)
(folder / "company").write_text(str(max(company, len(list(folder.parent.glob("on*"))))))
here.unlink()
checkpoint(); result("finished")
"""


@pytest.fixture(autouse=True)
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of other tests must not be in the way."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def company(jobs) -> int:
    return max(int((job.folder / "company").read_text()) for job in jobs)


def states(jobs) -> list[str]:
    return [state.state for state in current_states(jobs).values()]


def test_in_sequence_and_a_failure_keeps_no_other_from_running(tmp_path: Path, capsys) -> None:
    jobs = sweep(tmp_path / "s", overlap(), "sys.exit('broken')", overlap())
    Local().submit(jobs)
    assert states(jobs) == ["FINISHED", "FAILED", "FINISHED"]
    assert company([jobs[0], jobs[2]]) == 1
    assert "[2/3] seed=1: FAILED: broken" in capsys.readouterr().out


def test_a_job_that_slurm_once_had_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Whatever its old state says; one that another process has submitted meanwhile does not."""
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")  # a controller that does not answer
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    old, submitted = sweep(tmp_path / "s", FINISH, FINISH)
    old.write(JobState("QUEUED", submitted=1.0, slurm_id="12_0"))
    made = Sweep(tmp_path / "s")
    made.mark({old.digest: submission(None, 2.0)})
    Local().submit(made.named([old.digest]))
    assert states([old]) == ["FINISHED"]
    before = made.named([submitted.digest])
    made.mark({submitted.digest: submission("7", time.time())})  # by another process
    Local().submit(before)
    assert not starts(submitted) and f"left out: seed=1, QUEUED: {NO_CONTROLLER}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_job_whose_runner_is_killed_is_lost_and_runs_again(tmp_path: Path) -> None:
    killed = (
        "if len((folder / 'starts').read_text().split()) == 1: os.kill(os.getppid(), signal.SIGKILL); sys.exit(1)\n"
    )
    (job,) = sweep(tmp_path / "s", killed + FINISH)
    batches = iter([[job], []])

    def source(_: int) -> list | None:
        if job.state.state == "LOST" or len(starts(job)) > 1:
            return None
        return next(batches, [])

    Local().serve(Sweep(tmp_path / "s"), source)
    assert "its runner was killed" in job.state.reason
    Local().submit([job])
    assert states([job]) == ["FINISHED"]


def test_a_pool_runs_several_but_no_more_than_fit(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", *[overlap(2)] * 4)
    Pool(at_once=None, jobs_per_gpu=1, cores_per_job=2).submit(jobs)
    assert states(jobs) == ["FINISHED"] * 4 and company(jobs) == 2


def test_at_once_is_a_limit(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", *[overlap()] * 3)
    Pool(at_once=1, jobs_per_gpu=1, cores_per_job=1).submit(jobs)
    assert states(jobs) == ["FINISHED"] * 3 and company(jobs) == 1


def test_gpus_are_shared_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    jobs = sweep(
        tmp_path / "s", *["(folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n" + overlap(4)] * 4
    )
    Pool(at_once=None, jobs_per_gpu=2, cores_per_job=1).submit(jobs)
    assert sorted((job.folder / "gpu").read_text() for job in jobs) == ["0", "0", "3", "3"]
    assert company(jobs) == 4


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf '0\\n1\\n'", ["0", "1"]),
        ("echo NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.; exit 9", []),
    ],
)
def test_gpus_are_those_of_the_driver(
    script: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == found


def test_a_gpu_that_cannot_be_named_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pool = Pool(at_once=1, jobs_per_gpu=1, cores_per_job=1)
    for driver, count in ((tmp_path, 1), (tmp_path / "none", 0)):
        monkeypatch.setattr(machine, "DRIVER", driver)
        pool.slots()
        assert capsys.readouterr().out.count("this machine has a GPU, and nvidia-smi") == count


def test_two_pools_do_not_lease_the_same(tmp_path: Path) -> None:
    pool = Pool(at_once=None, jobs_per_gpu=1, cores_per_job=4)
    (slot,), (same,) = pool.slots(), pool.slots()
    assert try_acquire(slot.lease) and not try_acquire(same.lease)
    slot.lease.release()
    assert try_acquire(same.lease)
    same.lease.release()


def test_more_cores_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cores_per_job=5, but this machine has 4"):
        Pool(at_once=None, jobs_per_gpu=1, cores_per_job=5).slots()


LAUNCH = """
import sys
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import JobState
from twoviews.sweeps.machine import Local
Local().submit(Sweep(sys.argv[1]).jobs)
"""
STOPPABLE = f"if (folder / 'last.pt').exists():\n    {FINISH}; sys.exit()\nstop_when_told(); until('never')"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_loses_nothing(tmp_path: Path, number: int) -> None:
    jobs = sweep(tmp_path / "s", STOPPABLE, FINISH)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path / "s")], start_new_session=True)
    wait_for(lambda: starts(jobs[0]))
    assert states(jobs) == ["RUNNING", "QUEUED"]
    time.sleep(0.3)
    os.killpg(launcher.pid, number)  # as a terminal does it: to the whole group
    assert launcher.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: jobs[0].state.state == "INTERRUPTED")
    jobs = Sweep(tmp_path / "s").jobs
    assert states(jobs) == ["INTERRUPTED", "LOST"] and not starts(jobs[1])
    Local().submit(jobs)
    assert states(jobs) == ["FINISHED", "FINISHED"] and len(starts(jobs[0])) == 2


def test_a_stopped_launcher_stops_its_last_job(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", STOPPABLE)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path / "s")])
    wait_for(lambda: starts(jobs[0]))
    time.sleep(0.5)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 128 + signal.SIGINT and states(jobs) == ["INTERRUPTED"]


def test_cancelled_jobs_keep_a_checkpoint_and_the_next_one_runs(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", STOPPABLE, FINISH)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path / "s")])
    wait_for(lambda: starts(jobs[0]))
    time.sleep(0.3)
    cancel(jobs[:1])
    assert launcher.wait(20) == 0
    assert states(Sweep(tmp_path / "s").jobs) == ["INTERRUPTED", "FINISHED"] and jobs[0].checkpoint()
