"""What `make train` ends with: each suggestion is a command that works as printed."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from twoviews.tracking.state import WORKFLOW

LINES = subprocess.run(
    ["make", "--no-print-directory", "suggestions"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
COMMANDS = {line.partition("#")[2].strip(): shlex.split(line.partition("#")[0]) for line in LINES[1:]}


def test_there_are_four_and_the_last_is_a_target_of_make() -> None:
    assert len(COMMANDS) == 4
    assert [words[0] for words in COMMANDS.values()] == 3 * [".venv/bin/python"] + ["make"]
    assert re.search(rf"^{[*COMMANDS.values()][-1][1]}: .*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "port"),
    [("", 5000), ("--port 5001", 5001), ("--host 0.0.0.0 --port=5002 --workers 2", 5002), ("-p 5003", 5003)],
)
def test_make_mlflow_says_the_port_that_it_uses(arguments: str, port: int) -> None:
    words = ["make", "--no-print-directory", "mlflow-address", f"ARGS={arguments}"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"http://127.0.0.1:{port}/#/experiments?{WORKFLOW}\n"
    assert re.search(r"^mlflow: .*\bmlflow-address\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("meaning", [name for name, words in COMMANDS.items() if words[0] != "make"])
def test_a_suggestion_is_accepted(command, tmp_path: Path, meaning: str) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(20):
                path = tmp_path / "photos" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(path)
    shutil.copytree(ROOT / "tests" / "folders" / "v0" / "finished", tmp_path / "outputs" / "finished")
    script, *arguments = COMMANDS[meaning][1:]
    name = script.removesuffix(".py")
    # The view sheet in place of the training, which would take minutes.
    more = ["preview=true", "hydra.run.dir=preview"] if name == "train" else []
    more += ["data.cache=cache"] if "data=folder" in arguments else []
    done = command(name, *arguments, *more)
    assert done.code == 0, done.err
    assert name != "train" or (tmp_path / "preview" / "views.png").exists()
    assert name != "evaluate" or [*tmp_path.rglob("map.png")]
