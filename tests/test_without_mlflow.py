"""tracking=files in an environment that has everything but MLflow."""

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_MOCO, Finished, refused


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """python("train.py", ...): with links to all packages but MLflow, in one working directory."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("mlflow", "__editable__")) and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> Finished:
        command = [str(place / "bin" / "python"), *arguments]
        done = subprocess.run(command, cwd=place, env=here, capture_output=True, text=True, timeout=300)
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


def test_a_run_is_trained_and_judged(python: Callable[..., Finished]) -> None:
    done = python(str(ROOT / "train.py"), *SMALL_MOCO, "protocol=knn")
    assert done.code == 0, done.err
    environment = json.loads((done.folder / "environment.json").read_text())
    assert environment["torch"] and environment["mlflow"] is None
    judged = python(str(ROOT / "evaluate.py"), f"run={done.folder}", "protocol=knn")
    assert judged.code == 0 and "knn/top1" in judged.out, judged.err


@pytest.mark.slow
def test_a_sweep_runs(python: Callable[..., Finished]) -> None:
    swept = python(
        str(ROOT / "train.py"), "-m", *SMALL_MOCO, "protocol=knn", "hydra/launcher=pool", "seed=0,1", "sweep.name=two"
    )
    assert swept.code == 0, swept.out + swept.err
    for command in ("status", "report"):
        done = python("-m", "twoviews.sweep", command, "two")
        assert done.code == 0, done.err
    refused(python("-m", "twoviews.sweep", "collect", "two"), "MLflow is not installed")


@pytest.mark.parametrize("more", [(), ("-m", "seed=0,1")])
def test_tracking_by_mlflow_is_refused(more: tuple[str, ...], python: Callable[..., Finished]) -> None:
    remedy = ("python -m pip install mlflow", "tracking=files")
    refused(python(str(ROOT / "train.py"), *SMALL_MOCO, "tracking=mlflow", *more), *remedy)


@pytest.mark.parametrize("command", ["sync", "serve"])
def test_what_sends_to_mlflow_is_refused(command: str, python: Callable[..., Finished]) -> None:
    done = python("-m", "twoviews.tracking", command)
    assert done.code == 2 and "python -m pip install mlflow" in done.err and "Traceback" not in done.err
