"""What a real SLURM does to jobs, and what is then said of them. The trainings are stand-ins that take no time."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake import FINISH, starts, sweep
from on_slurm import VALUES, cluster, launcher, quiet_cluster, slurm, states, wait_for  # noqa: F401

from twoviews import launched
from twoviews.code import copy_digest
from twoviews.errors import BadInput
from twoviews.sweep import chosen, retry_jobs, show_logs, show_status
from twoviews.sweep import main as sweep_command
from twoviews.sweeps import job_states
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job_states import NO_CONTROLLER, current_states
from twoviews.sweeps.mlflow_sync import attach_jobs
from twoviews.sweeps.slurm import cancel
from twoviews.tracking import uris

# The first start waits to be stopped with a checkpoint, or killed; the next one finishes.
TWICE = (
    f"if (folder / 'starts').read_text().count('\\n') > 1:\n    {FINISH}; sys.exit()\nstop_when_told(); until('never')"
)
CHECKPOINTED = TWICE.replace("stop_when_told();", "checkpoint(); stop_when_told();")


def latest(jobs):
    """As sweep.json knows them now."""
    return Sweep(jobs[0].folder.parent).jobs


def test_how_jobs_end_is_told_truly(tmp_path: Path, capsys) -> None:
    jobs = sweep(
        tmp_path / "s",
        FINISH,
        "raise RuntimeError('no such kernel')",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "checkpoint(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(1)",  # its runner
        "sys.exit(128 + signal.SIGUSR2)",  # wants to be requeued each time, without getting anywhere
    )
    begun = time.monotonic()
    launcher().submit(jobs)
    assert time.monotonic() - begun < 15
    jobs = latest(jobs)
    assert len({job.slurm_id for job in jobs}) == 5 and len(slurm("squeue", "-hr").splitlines()) == 5
    wait_for(lambda: states(jobs)[:4] == ["FINISHED", "FAILED", "FAILED", "FAILED"])
    assert show_status(Sweep(tmp_path / "s"), jobs) == 3
    now = [*current_states(jobs).values()]
    assert now[0].node in ("n1", "n2", "n3", "n4") and now[0].slurm_id == jobs[0].slurm_id
    assert now[1].reason == "RuntimeError: no such kernel" and "killed by SIGKILL" in now[2].reason
    assert "SLURM reports FAILED" in now[3].reason
    wait_for(lambda: states(jobs)[4] == "FAILED")
    assert "3 starts in a row" in jobs[4].state.reason and len(starts(jobs[4])) == 3
    wait_for(lambda: not slurm("squeue", "-h"))
    accounting = ("sacct", "-X", "-n", "-P", "--format=State", "-j", str(jobs[0].slurm_id).partition("_")[0])
    # SLURM must not say otherwise; its accounting is some moments behind its queue.
    wait_for(lambda: slurm(*accounting).split("\n") == ["COMPLETED", "FAILED", "FAILED", "FAILED", "FAILED"])
    capsys.readouterr()
    assert show_logs(Sweep(tmp_path / "s"), jobs) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_cancelled_jobs_are_told_apart_and_the_rest_goes_on(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", TWICE, TWICE, f"time.sleep(5); {FINISH}")
    launcher(array_parallelism=1).submit(jobs)
    wait_for(lambda: starts(jobs[0]))
    jobs = latest(jobs)
    slurm("scancel", str(jobs[1].slurm_id))  # still inside the array: SLURM may keep no record of it at all
    time.sleep(1)
    cancel(jobs[:1])
    wait_for(lambda: states(jobs) == ["CANCELLED", "CANCELLED", "FINISHED"])
    assert jobs[0].checkpoint(), "it had a moment to write one"
    with Sweep(tmp_path / "s").update() as record:
        record["launcher"] = {"_target_": "twoviews.sweeps.slurm.Slurm", **VALUES}
        launched.remember(json.dumps(record["launcher"], sort_keys=True))
    launched.remember(copy_digest(tmp_path / "s" / "code" / "fake"))
    assert retry_jobs(Sweep(tmp_path / "s"), chosen(jobs, ["seed=0", "seed=1"])) == 3
    wait_for(lambda: states(jobs)[0] == "FINISHED")
    assert len(starts(jobs[2])) == 1


# Its run in MLflow is begun, and then it must be killed: nothing else ends it.
MIRRORED = """
from twoviews.tracking.metrics import Metrics
from twoviews.tracking.upload import upload
metrics = Metrics(folder)
metrics.log(1, 1.0, {"train/loss": 0.5})
metrics.commit(metrics.flush())
upload(folder, training_ended=False)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
until("never")
"""


def test_no_run_in_mlflow_outlives_a_job_that_was_cancelled(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder, uri = tmp_path / "s", f"sqlite:///{tmp_path}/mlflow.db"
    jobs = sweep(folder, MIRRORED, MIRRORED, MIRRORED, f"until('{tmp_path}/go'); {FINISH}")
    with Sweep(folder).update() as record:
        record["commands"] = ["train.py"]
    uris.trust(uri)
    attach_jobs(Sweep(folder), jobs, {"uri": uri, "experiment": "x"})

    def told() -> dict[str, str]:
        client = MlflowClient(uri)
        (experiment,) = [one for one in client.search_experiments() if one.name == "x"]
        return {str(run.info.run_name): run.info.status for run in client.search_runs([experiment.experiment_id])}

    one, by_hand, last = (f"seed={number}" for number in range(3))
    launcher().submit(jobs)
    wait_for(lambda: told() == {"s": "RUNNING", one: "RUNNING", by_hand: "RUNNING", last: "RUNNING"}, 120)
    assert sweep_command(["cancel", str(folder), "seed=0"]) == 0
    assert told() == {"s": "RUNNING", one: "KILLED", by_hand: "RUNNING", last: "RUNNING"}
    slurm("scancel", str(latest(jobs)[1].slurm_id))
    wait_for(lambda: states(jobs)[1] == "CANCELLED")
    assert sweep_command(["collect", str(folder)]) == 0
    assert told() == {"s": "RUNNING", one: "KILLED", by_hand: "KILLED", last: "RUNNING"}
    slurm("scancel", str(latest(jobs)[2].slurm_id))
    wait_for(lambda: states(jobs)[2] == "CANCELLED")
    (tmp_path / "go").touch()  # the last job that ends looks after the others, even if its own time is nearly over
    wait_for(lambda: (folder / "slurm" / "mlflow.log").exists())
    slurm("scancel", "--signal=USR2", str(latest(jobs)[3].slurm_id))
    wait_for(lambda: told()["s"] == "FAILED", 120)
    assert told()[last] == "KILLED"


def test_preempted_jobs_are_requeued_and_go_on(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", TWICE)
    launcher(options={"nodelist": "n1"}).submit(jobs)
    wait_for(lambda: starts(jobs[0]))
    time.sleep(1)
    urgent = slurm(
        "sbatch", "--parsable", "-p", "high", "-w", "n1", "--exclusive", "--wrap", "sleep 5", "-o", "/dev/null"
    )
    wait_for(lambda: jobs[0].checkpoint())
    wait_for(lambda: states(jobs) == ["QUEUED"])
    assert show_status(Sweep(tmp_path / "s"), jobs) == 3
    wait_for(lambda: states(jobs) == ["FINISHED"], 120)
    assert len(starts(jobs[0])) == 2 and jobs[0].state.starts == 2
    slurm("scancel", urgent)


@pytest.mark.parametrize("command", [["scontrol", "requeue"], ["scancel", "--signal=USR2"]])
def test_a_job_that_is_requeued_or_told_to_stop_goes_on(tmp_path: Path, command: list[str]) -> None:
    jobs = sweep(tmp_path / "s", TWICE)
    launcher().submit(jobs)
    wait_for(lambda: starts(jobs[0]))
    time.sleep(1)
    slurm(*command, str(latest(jobs)[0].slurm_id))
    wait_for(lambda: states(jobs) == ["FINISHED"])
    assert len(starts(jobs[0])) == 2 and jobs[0].checkpoint()


def test_a_node_that_dies_takes_no_job_with_it(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", CHECKPOINTED, CHECKPOINTED)
    launcher(options={"exclude": "n3,n4", "exclusive": True}).submit(jobs)
    wait_for(lambda: all(starts(job) for job in jobs))
    node = current_states(latest(jobs))[jobs[0].digest].node
    cluster("kill-node", str(node))
    try:
        wait_for(lambda: len(starts(jobs[0])) == 2 or states(jobs)[0] == "QUEUED")
        assert len(starts(jobs[1])) == 1 and states(jobs)[1] == "RUNNING"
    finally:
        cluster("revive-node", str(node))
    wait_for(lambda: states(jobs)[0] == "FINISHED")


def test_a_controller_that_dies_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = sweep(tmp_path / "s", f"until('{tmp_path}/go'); {FINISH}", f"until('{tmp_path}/go'); {FINISH}")
    launcher().submit(jobs)
    wait_for(lambda: all(starts(job) for job in jobs))
    time.sleep(6)  # or it has not yet written down that they run, and starts them again
    cluster("kill-controller")
    monkeypatch.setattr(job_states, "ANSWER_SECONDS", 5.0)  # squeue tries for longer than a test should
    now = current_states(latest(jobs))
    assert {state.state for state in now.values()} == {"RUNNING"}
    assert {state.reason for state in now.values()} == {NO_CONTROLLER}
    with pytest.raises(BadInput, match="sbatch refused"):
        launcher().submit(sweep(tmp_path / "other", FINISH))
    (tmp_path / "go").touch()
    wait_for(lambda: [job.state.state for job in jobs] == ["FINISHED", "FINISHED"], 20)
    assert states(jobs) == ["FINISHED", "FINISHED"], "what is settled needs no controller"
    cluster("start-controller")
    assert [len(starts(job)) for job in jobs] == [1, 1]


def test_a_time_limit_of_a_minute_is_enough_to_get_there(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", TWICE)
    launcher(timeout_min=1).submit(jobs)
    wait_for(lambda: jobs[0].checkpoint(), 80)
    wait_for(lambda: states(jobs) == ["FINISHED"], 60)
    assert len(starts(jobs[0])) == 2


def test_a_killed_launcher_leaves_jobs_that_are_not_started_twice(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", *[f"until('{tmp_path}/go'); {FINISH}"] * 2)
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from on_slurm import launcher
from twoviews.sweeps.folder import Sweep
Sweep.mark = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # after sbatch, before it is written down
launcher().submit(Sweep({str(tmp_path / "s")!r}).jobs)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    wait_for(lambda: all(starts(job) for job in jobs))
    assert states(jobs) == ["RUNNING", "RUNNING"], "they are known by what their runners wrote"
    launcher().submit(latest(jobs))  # what a launch would do that came before they began
    (tmp_path / "go").touch()
    wait_for(lambda: states(jobs) == ["FINISHED", "FINISHED"])
    wait_for(lambda: not slurm("squeue", "-h"))
    assert [len(starts(job)) for job in jobs] == [1, 1] and states(jobs) == ["FINISHED", "FINISHED"]


def test_submitting_from_inside_a_job_hands_on_none_of_its_variables(tmp_path: Path, monkeypatch) -> None:
    seen = "(folder / 'seen').write_text(os.environ.get('SLURM_JOB_ID', '') + ' ' + os.environ.get('SLURM_CPUS_ON_NODE', ''))\n"
    jobs = sweep(tmp_path / "s", seen + FINISH)
    for name, value in {"SLURM_JOB_ID": "999999", "SLURM_CPUS_PER_TASK": "7", "RANK": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    launcher().submit(jobs)
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name)
    wait_for(lambda: states(jobs) == ["FINISHED"])
    assert (jobs[0].folder / "seen").read_text() == f"{latest(jobs)[0].slurm_id} 1"


def test_what_slurm_refuses_is_one_sentence(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", FINISH)
    with pytest.raises(BadInput, match="sbatch refused: (.*)nvalid partition"):
        launcher(partition="nowhere").submit(jobs)
    assert [path.name for path in (tmp_path / "s" / "slurm").iterdir()] == []
    (job,) = latest(jobs)
    now = current_states([job])[job.digest]
    assert now.state == "FAILED" and "nvalid partition" in now.reason
    launcher().submit([job])  # the same command with another partition
    wait_for(lambda: states(jobs) == ["FINISHED"])


RANKED = "(folder / f\"rank{os.environ['RANK']}\").write_text(os.environ['WORLD_SIZE'] + os.environ['MASTER_ADDR'])\n"


def test_a_dead_process_of_several_ends_the_job_with_the_reason(tmp_path: Path) -> None:
    dies = RANKED + "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    jobs = sweep(tmp_path / "s", dies, RANKED + "if os.environ['RANK'] == '0': checkpoint(); result('finished')")
    begun = time.monotonic()
    launcher(nodes=2).submit(jobs)
    wait_for(lambda: states(jobs) == ["FAILED", "FINISHED"], 60)
    assert time.monotonic() - begun < 60
    assert jobs[0].state.reason.startswith("process 1 on n") and "SIGKILL" in jobs[0].state.reason
    assert (jobs[0].folder / "rank1").read_text().startswith("2n")
    wait_for(lambda: not slurm("squeue", "-h"), 40)


def test_several_processes_stop_and_go_on_together(tmp_path: Path) -> None:
    jobs = sweep(tmp_path / "s", TWICE.replace("> 1", "> 2"))  # two starts each time
    launcher(nodes=2).submit(jobs)
    wait_for(lambda: len(starts(jobs[0])) == 2)
    time.sleep(1)
    slurm("scancel", "--signal=USR2", str(latest(jobs)[0].slurm_id))
    wait_for(lambda: states(jobs) == ["FINISHED"])
    # The first process may have ended before the other one had written down its start.
    assert len(starts(jobs[0])) in (3, 4) and jobs[0].state.starts == 2
