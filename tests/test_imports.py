"""A notebook can import the loop, runs and features without what only the command line needs."""

import subprocess
import sys

import pytest

CODE = """
import importlib, sys

importlib.import_module(sys.argv[1])
print(*sorted({"hydra", "omegaconf", "mlflow"} & {name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("module", ["loop", "run", "features", "checkpoints", "encoder_file", "tracking.metrics"])
def test_imports_neither_hydra_nor_mlflow(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"twoviews.{module}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
