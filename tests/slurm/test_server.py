"""Sweeps recorded by an MLflow server on PostgreSQL."""

from pathlib import Path

import pytest
from on_slurm import quiet_cluster, states, wait_for  # noqa: F401
from test_mlflow_sync import start_at_once
from test_sweep import SLURM, SMALL, jobs, recorded, train, under_way
from tracking_server import Server, server  # noqa: F401

from twoviews.sweep import main as sweep_command


@pytest.mark.timeout(1200)
def test_64_jobs_that_start_at_once_lose_nothing_on_postgresql(tmp_path: Path, server: Server) -> None:  # noqa: F811
    start_at_once(tmp_path / "s", server.uri, 64)


def test_a_server_that_is_killed_in_the_middle_gets_everything_once(
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_at_once = [*SLURM, "hydra.launcher.array_parallelism=2"]
    sweep = [*SMALL, "epochs=60", "method.temperature=0.1,0.2", "seed=0,1", f"tracking.uri={server.uri}", *two_at_once]
    assert train(tmp_path, *sweep).wait(60) == 0
    first, second, *others = found = jobs(tmp_path)
    wait_for(lambda: under_way([first, second]), 120)
    server.kill()
    assert [job.state.starts for job in others] == [0, 0], "they begin while it is away"
    wait_for(lambda: states(found) == ["FINISHED"] * 4, 300)
    server.start()
    assert train(tmp_path, *sweep).wait(120) == 0, (tmp_path / "out.txt").read_text()
    recorded(server.uri, found)
    assert [job.state.starts for job in found] == [1] * 4
    monkeypatch.chdir(tmp_path)
    assert sweep_command(["collect"]) == 0
    recorded(server.uri, found)
