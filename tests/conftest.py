"""What several test files share: commands run as a user runs them, and a small training."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

gc.disable()  # while torch and thousands of tests are imported, which are no garbage; see `pytest_collection_finish`

import torch  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for train.py and evaluate.py
sys.path.insert(0, str(ROOT / "tests" / "sweeps"))  # for fake.py
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: see interpreted.py


def _untracked_methods() -> list[str]:
    """Methods whose files git does not track; none where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--others", "--", "conf/method/*.yaml"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(line).stem for line in done.stdout.splitlines()]


# They need no recorded losses and no row in docs/results.md.
UNTRACKED_METHODS = _untracked_methods()


# Files of more than a minute, which are begun first, so that none of them is left alone at the end.
LONG_FILES = (
    *("resume", "train", "foreign", "on_gpu", "damaged", "tracking", "optuna_search", "bad_input", "distributed"),
    *("fused_norm", "launching", "mlflow_sync", "step", "batch_size", "report", "kernel_cuda", "evaluate"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none, and begin with the longest files."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but do not look for it among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let Triton's objects be freed at the end, which would print a warning for each otherwise."""
    gc.unfreeze()


# A view with every operation.
STRONG = {
    "scale": [0.08, 1],
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.2,
    "blur": 0.5,
    "solarize": 0.2,
}

# Only where tests/slurm/cluster was started for them, never on any other cluster.
SLURM_IS_THERE = "TWOVIEWS_CLUSTER" in os.environ
collect_ignore_glob = [] if SLURM_IS_THERE else ["slurm/test_*.py"]


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what was left out."""
    if not SLURM_IS_THERE:
        terminalreporter.write_line("LEFT OUT: tests/slurm, which need a SLURM cluster; `make test-slurm` starts one.")


# A training of a few seconds: 3 epochs of 4 steps on real digits.
SMALL = (
    "data.train_images=256",
    "epochs=3",
    "batch_size=64",
    "backbone.width=4",
    "backbone.depths=[1,1]",
    "optimizer=sgd_short",
    "runtime.log_every=2",
    "runtime.checkpoint_seconds=0",
    "runtime.device=cpu",
    "tracking=files",
)
SMALL_MOCO = (*SMALL, "method.queue_size=128", "method.embed_dim=16")


@dataclass
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """What the last line of standard output names."""
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("run: "), self.out + self.err
        return Path(last.removeprefix("run: "))


def refused(finished: Finished, *parts: str) -> None:
    """It ended with exit code 2 and one sentence, which has these parts."""
    assert finished.code == 2, finished.out + finished.err
    assert "Traceback" not in finished.err
    error = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and finished.err.strip().endswith(error[0]), finished.err
    for part in parts:
        assert part in error[0], f"{part!r} is not in {error[0]!r}"


@pytest.fixture(autouse=True, scope="session")
def resolvers() -> None:
    """What files of conf/ interpolate, as in the commands."""
    from twoviews.config.composition import register_resolvers

    register_resolvers()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., Finished]:
    """command("train", "method=moco", ...): the entry point in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> Finished:
        import importlib

        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capfd.readouterr()
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as exit_:
            module.main()
        out, err = capfd.readouterr()
        return Finished(int(exit_.value.code or 0), out, err)

    return call


def start(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen:
    """A command as a process of its own, in `folder`, with its output in files there."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (folder / name for name in ("stdout.txt", "stderr.txt"))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=out.open("a"),
        stderr=err.open("a"),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every number of a run's last checkpoint that training depends on, by name."""
    from twoviews.checkpoints import load_checkpoint

    state = load_checkpoint(folder / "last.pt")
    flat: dict[str, torch.Tensor] = dict(state["method"])
    for index, buffers in state["optimizer"]["state"].items():
        flat.update(
            {
                f"optimizer.{index}.{name}": torch.as_tensor(value)
                for name, value in buffers.items()
                if value is not None
            }
        )
    return flat


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
