"""Sweeps of real trainings on a real SLURM, with MLflow: what happens to them leaves no trace in their results."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from on_slurm import cluster, quiet_cluster, slurm, states, wait_for  # noqa: F401

from twoviews.sweep import main as sweep_command
from twoviews.sweeps.folder import Sweep
from twoviews.sweeps.job import Job
from twoviews.sweeps.job_states import current_states
from twoviews.sweeps.results import gather
from twoviews.tracking.metrics import read

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.train_images=256",
    "batch_size=64",
    "backbone.width=4",
    "backbone.depths=[1,1]",
    "runtime.device=cpu",
    "runtime.log_every=2",
    "method.queue_size=128",
    "method.embed_dim=16",
    "protocol=knn_small",
)
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.gpus_per_node=null")


def train(folder: Path, *arguments: str) -> subprocess.Popen:
    """`python train.py -m …` in that folder."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=(folder / "out.txt").open("a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def jobs(folder: Path) -> list[Job]:
    """Of the one sweep there."""
    (found,) = folder.glob("multirun/*/sweep.json")
    return Sweep(found.parent).jobs


def curve(job: Job) -> list[tuple[int, float]]:
    """(step, loss) of each line."""
    return [(line["step"], line["train/loss"]) for line in read(job.folder) if "train/loss" in line]  # type: ignore[misc]


def same(one: Path, other: Path) -> None:
    """Every number of the last checkpoints, bit for bit."""
    import torch

    from twoviews.checkpoints import load_checkpoint

    first, second = load_checkpoint(one / "last.pt")["method"], load_checkpoint(other / "last.pt")["method"]
    assert first.keys() == second.keys() and not [key for key in first if not torch.equal(first[key], second[key])]


def under_way(found: Sequence[Job]) -> bool:
    """All have trained some steps."""
    return all(any(line["step"] > 0 for line in read(job.folder)) for job in found)


def recorded(uri: str, found: Sequence[Job]) -> None:
    """MLflow has a run for each of these jobs below one for the sweep, with every number once, and all have ended."""
    from mlflow import MlflowClient

    client, sweep = MlflowClient(uri), Sweep(found[0].folder.parent)
    parent = sweep.record["parent"]
    (experiment,) = [one for one in client.search_experiments() if one.name == "twoviews"]
    runs = {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}
    assert len(client.search_runs([experiment.experiment_id])) == len(runs) == len(found) + 1
    names = {
        job.digest: " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in job.parameters.items())
        for job in found
    }
    assert runs.keys() == {sweep.name, *names.values()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"} and runs[sweep.name].info.run_id == parent
    for job in found:
        run = runs[names[job.digest]]
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.tags["axis.seed"] == str(job.parameters["seed"])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(one.step, one.value) for one in history] == curve(job), "no number lost, none twice"


@pytest.mark.timeout(1500)
def test_all_that_can_happen_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough that the first job has not finished before something happens to it.
    arguments = [*SMALL, "epochs=500", "method.temperature=0.1,0.2", "seed=0,1"]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    # A node for each job, so that each can meet with something else.
    command = [*arguments, *SLURM, f"tracking.uri={uri}", "+hydra.launcher.options.exclusive=true"]
    place = tmp_path / "disturbed"
    launcher = train(place, *command, "sweep.wait=true")
    wait_for(lambda: list(place.glob("multirun/*/sweep.json")) and len(jobs(place)) == 4, 60)
    wait_for(lambda: under_way(jobs(place)), 120)
    launcher.kill()
    preempted, dead, cancelled, requeued = found = jobs(place)
    nodes = {job.digest: str(state.node) for job, state in ((one, current_states([one])[one.digest]) for one in found)}
    assert len(set(nodes.values())) == 4
    cluster("kill-node", nodes[dead.digest])
    wrap = ["--wrap", "sleep 1", "-o", "/dev/null", "--exclusive"]
    urgent = slurm("sbatch", "--parsable", "-p", "high", "-w", nodes[preempted.digest], *wrap)
    slurm("scancel", str(cancelled.slurm_id))
    slurm("scontrol", "requeue", str(requeued.slurm_id))
    wait_for(lambda: states([cancelled]) == ["CANCELLED"])
    cluster("revive-node", nodes[dead.digest])
    monkeypatch.chdir(place)
    assert sweep_command(["status"]) == 3
    again = train(place, *command, "sweep.wait=true")  # attaches to three and submits the cancelled one
    assert again.wait(600) == 0, (place / "out.txt").read_text()
    assert sweep_command(["status"]) == 0
    assert {job.digest for job in jobs(place)} == {job.digest for job in found}
    begun = {job.digest: job.state.starts for job in found}
    assert begun == {job.digest: 2 for job in found}, "each was disturbed once"

    calm = tmp_path / "calm"
    assert train(calm, *arguments, "tracking=files", "hydra/launcher=pool").wait(600) == 0, (
        calm / "out.txt"
    ).read_text()
    for one, other in zip(found, jobs(calm), strict=True):
        assert one.digest == other.digest
        same(one.folder, other.folder)
        assert curve(one) == curve(other)

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    wait_for(lambda: client.get_run(Sweep(found[0].folder.parent).record["parent"]).info.status == "FINISHED", 60)
    recorded(uri, found)
    subprocess.run(["scancel", urgent])


def test_the_shell_is_back_soon_and_two_nodes_train_like_one_process(tmp_path: Path) -> None:
    arguments = [*SMALL, "epochs=2", "method.bn_splits=4", "runtime.log_every=1", "tracking=files", "seed=0"]
    begun = time.monotonic()
    ddp = ["hydra/launcher=slurm_ddp", *SLURM[1:]]
    assert train(tmp_path / "two", *arguments, *ddp).wait(60) == 0
    assert time.monotonic() - begun < 15
    assert train(tmp_path / "one", *arguments).wait(120) == 0
    wait_for(lambda: states(jobs(tmp_path / "two")) == ["FINISHED"], 120)
    (one,), (two,) = jobs(tmp_path / "one"), jobs(tmp_path / "two")
    assert "processes: 2" in (two.folder / "log.txt").read_text()
    counts = [gather(Sweep(job.folder.parent)).jobs["device_count"][job.digest] for job in (one, two)]
    assert counts == [1, 2], "each process costs a core"
    assert (two.folder / "log.1.txt").exists()
    losses = [[loss for _, loss in curve(job)] for job in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 8
