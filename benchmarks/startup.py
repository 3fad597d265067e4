"""Start-up: --help, a configuration that is refused and the first training step, against `import torch`.

    OMP_NUM_THREADS=1 python benchmarks/startup.py --rounds 7 --json benchmarks/results/startup.json

Each is a fresh process; in every round all are started once, in turns. What counts are CPU seconds over those of
`python -c "import torch"` in the same round, because seconds differ from machine to machine: half a second where torch
takes 1.9 s is a ratio of 0.26. Before any timing --help and the refusal are run once with the list of what they import,
and torch must not be in it. The first step is that of `train.py data=digits backbone=tiny`, as a user starts it, with
MLflow; the process leaves right after it. By default a run measures kNN of raw pixels and of the untrained encoder before
its first step: the row without protocols is start-up alone.

Then the 1,000 jobs of a sweep are composed and checked, some of them compared with what Hydra composes.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf
from recording import medians, record

from twoviews.config.composition import register_resolvers
from twoviews.config.groups import CONF, ROOT
from twoviews.sweeps.composing import Composer, job_specs

TRAIN = str(ROOT / "train.py")
HALF_A_SECOND = 0.26  # of `import torch`
FIRST_STEP = 1.5
SECONDS = 5.0  # for 1,000 jobs

# Everything as in `python train.py ...`, but the process ends after one step.
ONE_STEP = """
import os, runpy, sys
from twoviews.loop import Training
step = Training.train_on_batch
def one_step(self, batch):
    step(self, batch)
    os._exit(77)
Training.train_on_batch = one_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DIGITS = ["data=digits", "backbone=tiny", "tracking.uri=sqlite:///mlflow.db", "hydra.run.dir=run", "fresh=true"]

# name: (arguments of python, exit code, goal)
COMMANDS: dict[str, tuple[list[str], int, float | None]] = {
    "import torch": (["-c", "import torch"], 0, None),
    "python": (["-c", "pass"], 0, None),
    "train.py --help": ([TRAIN, "--help"], 0, HALF_A_SECOND),
    "a value that is refused": ([TRAIN, "method=moco", "epochs=many"], 2, HALF_A_SECOND),
    "first step": (["-c", ONE_STEP, TRAIN, *DIGITS, "protocol=[]"], 77, FIRST_STEP),
    "first step after the baselines' kNN": (["-c", ONE_STEP, TRAIN, *DIGITS], 77, None),
}


def seconds(arguments: list[str], code: int, folder: str) -> tuple[float, float]:
    """CPU and wall seconds of a process that has to end with this code."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with (Path(folder) / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    wall, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
    assert process.returncode == code, (
        f"{process.args} ended with {process.returncode}: {Path(output.name).read_text()}"
    )
    return usage.ru_utime + usage.ru_stime, wall


def imported(arguments: list[str]) -> set[str]:
    """Top packages that a command imports."""
    listing = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True).stderr
    lines = [line for line in listing.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def processes(rounds: int) -> list[dict[str, Any]]:
    """One row for each command: seconds, and times `import torch`, medians and extremes."""
    for name in ("train.py --help", "a value that is refused"):
        assert not {"torch", "mlflow", "numpy"} & imported(COMMANDS[name][0]), f"{name} imports what it should not"
    names, times = list(COMMANDS), {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(-1, rounds):
            for offset in range(len(names)):
                current = names[(turn + offset) % len(names)]
                taken = seconds(*COMMANDS[current][:2], folder)
                if turn >= 0:  # files are read and compiled in the round before the first
                    times[current].append(taken)
    rows = []
    for name, (_, _, goal) in COMMANDS.items():
        ratios = [own[0] / torch[0] for own, torch in zip(times[name], times["import torch"], strict=True)]
        cpu, wall = zip(*times[name], strict=True)
        row = {**medians(name, cpu, wall, ratios), "goal": goal}
        rows.append(row)
        verdict = "" if goal is None else f"{'reaches' if row['ratio'] <= goal else 'misses'} {goal}"
        print(f"{name:36} {row['cpu_seconds']:6.2f} s of CPU {row['ratio']:5.2f} x import torch  {verdict}", flush=True)
    return rows


def jobs(count: int) -> dict[str, Any]:
    """Seconds to compose and check the jobs of a sweep."""
    axes = ("method.temperature", "optimizer.lr", "seed")
    side = round(count ** (1 / 3))
    values = ([0.05 + 0.01 * i for i in range(side)], [0.03 * (i + 1) for i in range(side)], range(side))
    combinations = [
        [f"{key}={value:g}" for key, value in zip(axes, one, strict=True)] for one in itertools.product(*values)
    ]
    register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):

        def compose(overrides: list[str]) -> Any:
            return hydra.compose("train", overrides)

        composer = Composer(compose)
        for combination in combinations[:: count // 5]:
            whole = OmegaConf.to_container(compose(combination), resolve=True)
            assert composer(combination).config == whole, "not what Hydra composes"
        start = time.process_time()
        new = job_specs(Composer(compose), combinations, axes)
        taken = time.process_time() - start
    assert len(new) == len(combinations)
    verdict = "reaches" if taken <= SECONDS else "misses"
    print(f"{len(new):,} jobs of a sweep composed and checked in {taken:.2f} s of CPU, {verdict} {SECONDS:g}")
    return {"what": f"{len(new):,} jobs composed", "cpu_seconds": taken, "goal": SECONDS}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    rows = [*processes(options.rounds), jobs(1000)]
    record(options.json, f"startup.py --rounds {options.rounds}", rows)


if __name__ == "__main__":
    main()
