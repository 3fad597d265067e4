"""Sweeps recorded by an MLflow server on PostgreSQL."""

from pathlib import Path

import pytest
from on_slurm import quiet_cluster  # noqa: F401
from test_collecting import start_at_once
from tracking_server import Server, server  # noqa: F401


@pytest.mark.timeout(1200)
def test_64_points_that_start_at_once_lose_nothing_on_postgresql(tmp_path: Path, server: Server) -> None:  # noqa: F811
    start_at_once(tmp_path / "s", server.uri, 64)
