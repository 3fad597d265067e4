"""Tests on a real SLURM: the cluster of virtual nodes that `tests/slurm/cluster` starts. Never on any other cluster."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def cluster(*command: str) -> None:
    """A command of tests/slurm/cluster."""
    subprocess.run([str(HERE / "cluster"), *command], check=True, stdin=subprocess.DEVNULL, timeout=120)


def slurm(*command: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.strip()


def wait_for(what: Callable[[], object], seconds: float = 90.0) -> None:
    """Until it is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.3)


@pytest.fixture(autouse=True)
def quiet_cluster() -> Iterator[None]:
    """Every test begins with all nodes up and leaves no job behind."""
    if slurm("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() != ["idle"] * 4:
        cluster("start")
        wait_for(lambda: set(slurm("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()) == {"idle"}, 60)
    yield
    subprocess.run(["scancel", "--user=root"], stdin=subprocess.DEVNULL)
    wait_for(lambda: not slurm("squeue", "-h"), 60)


VALUES: dict[str, object] = {
    "timeout_min": 10,
    "signal_delay_s": 120,
    "array_parallelism": 16,
    "cpus_per_task": 1,
    "gpus_per_node": None,
    "mem_gb": None,
    "partition": None,
    "account": None,
    "nodes": 1,
    "tasks_per_node": 1,
    "setup": [],
    "options": {},
}


def launcher(**more: object):
    """Small jobs that all fit on the nodes at once."""
    from twoviews.sweeps.slurm import Slurm

    return Slurm(**{**VALUES, **more})  # type: ignore[arg-type]


def states(jobs: Sequence) -> list[str]:
    """The states of these jobs, with what sweep.json has of them now."""
    from twoviews.sweeps.folder import Sweep
    from twoviews.sweeps.job_states import current_states

    wanted = {job.digest for job in jobs}
    now = current_states([job for job in Sweep(jobs[0].folder.parent).jobs if job.digest in wanted])
    return [now[job.digest].state for job in jobs]
