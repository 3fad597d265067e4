"""How a training ends becomes the state of its job, whatever it ends of."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake import FINISH, starts, sweep

from twoviews.locks import is_held
from twoviews.sweeps import runner
from twoviews.sweeps.job import Job


def runner_process(job: Job, submitted: float = 1.0, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "twoviews.sweeps.runner", str(job.folder), str(submitted)]
    return subprocess.Popen(command, env={**os.environ, **environment})


def wait_for(what, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("plan", "state", "reason"),
    [
        (FINISH, "FINISHED", ""),
        ("print('error: lr=9 is too much; lower it.', file=sys.stderr); sys.exit(2)", "FAILED", "lr=9 is too much; lower it."),
        ("raise RuntimeError('no such kernel')", "FAILED", "RuntimeError: no such kernel"),
        ("result('failed', reason='the loss is nan'); sys.exit(1)", "FAILED", "the loss is nan"),
        ("sys.exit(0)", "FAILED", "train.py ended without a result"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "FAILED", "killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "FAILED", "killed by SIGSEGV"),
        ("checkpoint(); os.kill(os.getpid(), signal.SIGUSR2)", "INTERRUPTED", "stopped by SIGUSR2"),
        ("result('finished'); os.kill(os.getpid(), signal.SIGKILL)", "FINISHED", ""),
    ],
)  # fmt: skip
def test_exit_codes_become_states(tmp_path: Path, plan: str, state: str, reason: str) -> None:
    (job,) = sweep(tmp_path, plan)
    found = runner.run(job, submitted=1.0)
    assert (found.state, found.reason) == (state, found.reason) and reason in found.reason
    assert job.state == found and found.starts == 1 and found.ended
    assert "--- " in (job.folder / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_next_start_goes_on(tmp_path: Path, number: int) -> None:
    (job,) = sweep(
        tmp_path, f"if (folder / 'last.pt').exists():\n    {FINISH}; sys.exit()\nstop_when_told(); until('never')"
    )
    process = runner_process(job)
    wait_for(lambda: starts(job))
    time.sleep(0.3)  # until the stand-in listens
    process.send_signal(number)
    process.wait(20)
    assert job.state.state == "INTERRUPTED" and signal.Signals(number).name in job.state.reason
    assert runner.run(job, submitted=1.0).state == "FINISHED"
    assert len(starts(job)) == 2 and job.state.starts == 2


def test_a_finished_job_is_left_alone(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, FINISH)
    runner.run(job, submitted=1.0)
    assert runner.run(job, submitted=2.0).submitted == 1.0 and len(starts(job)) == 1


def test_starts_without_a_checkpoint_are_given_up(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, "sys.exit(128 + signal.SIGUSR2)")
    assert [runner.run(job, submitted=1.0).state for _ in range(3)] == ["INTERRUPTED"] * 3
    state = runner.run(job, submitted=1.0)
    assert state.state == "FAILED" and "3 starts in a row ended before they wrote a checkpoint" in state.reason
    assert len(starts(job)) == 3
    assert runner.run(job, submitted=2.0).state == "INTERRUPTED", "a new submission counts anew"


def test_starts_with_a_checkpoint_go_on_for_ever(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, "checkpoint(); sys.exit(128 + signal.SIGUSR2)")
    assert {runner.run(job, submitted=1.0).state for _ in range(6)} == {"INTERRUPTED"}


def test_a_training_does_not_outlive_its_runner(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, "stop_when_told(); until('never')")
    process = runner_process(job)
    wait_for(lambda: starts(job))
    time.sleep(0.3)
    process.kill()
    process.wait()
    wait_for(lambda: job.result.get("state") == "interrupted")
    assert job.checkpoint() and not is_held(job.lock)


def test_a_second_runner_waits_and_finds_it_finished(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, f"until('go'); {FINISH}")
    first = runner_process(job)
    wait_for(lambda: starts(job))
    second = runner_process(job, 2.0)
    time.sleep(0.5)
    assert len(starts(job)) == 1
    (tmp_path / "go").touch()
    assert first.wait(20) == 0 and second.wait(20) == 0
    assert len(starts(job)) == 1


def test_a_training_that_has_to_end_is_ended_with_the_reason(tmp_path: Path) -> None:
    (job,) = sweep(tmp_path, "until('never')")
    state = runner.run(job, 1.0, failure=lambda: "process 1 is dead" if starts(job) else "")
    assert (state.state, state.reason) == ("FAILED", "process 1 is dead")


def test_the_training_gets_frozen_code_and_variables_and_none_of_a_torchrun_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = sweep(
        tmp_path,
        "(folder / 'seen').write_text(repr([os.environ.get(one) for one in ('RANK', 'MINE', 'PYTHONPATH')]))\n"
        + FINISH,
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    runner.run(job, 1.0, {"MINE": "yes"})
    code = tmp_path / "code" / "fake" / "src"
    assert eval((job.folder / "seen").read_text()) == [None, "yes", f"{code}:/elsewhere"]


def test_a_runner_imports_nothing_heavy() -> None:
    code = "import sys, twoviews.sweeps.runner; assert not {'torch', 'mlflow', 'hydra', 'submitit'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
