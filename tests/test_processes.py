"""Variables that launchers set: several processes where they are complete, else a single one."""

import os
from pathlib import Path

import pytest
from conftest import SMALL_MOCO, Finished, refused

from twoviews.processes import PLACE

COMPLETE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Only these, until the end of the test, whatever the command does to the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in COMPLETE:
        os.environ.pop(name, None)
    os.environ.update(variables)


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}, "MASTER_PORT"),
    ],
)
def test_an_incomplete_set_means_a_single_process(command, monkeypatch, variables: dict, missing: str) -> None:
    given(monkeypatch, **variables)
    done: Finished = command("train", *SMALL_MOCO, "epochs=1", "protocol=[]")
    assert done.code == 0 and (done.folder / "encoder.safetensors").exists()
    said = f"of the environment without {missing}: this is a single process; for several use torchrun."
    assert done.err.count(said) == 1 and "processes: 1" in done.out
    assert not {*PLACE} & {*os.environ}, "of which the processes that it starts would hear"


def test_a_single_process_of_torchrun_is_no_news(command, monkeypatch) -> None:
    given(monkeypatch, **COMPLETE | {"WORLD_SIZE": "1"})
    done: Finished = command("train", "preview=true")
    assert done.code == 0 and "WORLD_SIZE" not in done.err


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "5"}, ["RANK=5", "from 0 to 1"]),
        ({"RANK": "first"}, ["RANK=first", "torchrun"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "at least 1"]),
        ({"RANK": "1", "MASTER_PORT": "http"}, ["MASTER_PORT=http", "from 1 to 65535"]),
        ({"LOCAL_RANK": "7"}, ["LOCAL_RANK=7"]),
    ],
)
def test_numbers_that_make_no_sense(command, monkeypatch, variables: dict, parts: list[str]) -> None:
    given(monkeypatch, **COMPLETE | variables)
    refused(command("train"), *parts)


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("train", ["-m", "seed=0,1"], "hydra/launcher=slurm_ddp"),
        ("train", ["seed=0,1", "--multirun"], "a sweep is launched by one process"),
        ("evaluate", ["run=latest"], "evaluate.py is one process"),
        ("cluster", ["run=latest"], "cluster.py is one process"),
    ],
)
def test_commands_for_one_process(command, monkeypatch, name: str, arguments: list[str], part: str) -> None:
    given(monkeypatch, **COMPLETE)
    refused(command(name, *arguments), part, "WORLD_SIZE=2")
    assert not Path("multirun").exists()
