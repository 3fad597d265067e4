"""A notebook can import the loop, runs and features without what only the command line needs."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, SMALL_MOCO

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


TRAINING = """
import runpy, sys

try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print(*sorted({"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"} & {*sys.modules}))
"""


@pytest.mark.parametrize("method", ["moco", "dino"])
def test_a_training_does_not_import_the_compiler(method: str, tmp_path: Path) -> None:
    """It would take half as long as torch itself, also where weights are counted before memory is taken for them."""
    script = f"import sys; sys.argv = [{str(ROOT / 'train.py')!r}, *sys.argv[1:]]\n{TRAINING}"
    own = {"moco": SMALL_MOCO, "dino": [*SMALL, "method.embed_dim=16", "method.prototypes=16"]}[method]
    arguments = [*own, f"method={method}", "epochs=1", "protocol=[]", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "", done.stdout
