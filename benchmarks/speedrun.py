"""A rung of the speed-run ladder, as benchmarks/speedrun.md has its rules: three trainings, seconds and kNN of each.

    python benchmarks/speedrun.py 80 --json benchmarks/results/speedrun_80.json
    OMP_NUM_THREADS=1 python benchmarks/speedrun.py 50 data=folder data.root=<cifar10>

Runs experiment=speedrun_cifar10_<rung>, or one of its other candidates, with seeds 0, 1 and 2 through train.py, one after the
other, into --folder, and reads their run folders. Overrides are those of train.py. The same command again goes on where it was
interrupted; a training that was interrupted keeps its pause on the clock.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recording import record
from scipy.stats import ttest_1samp

from twoviews.run import Run
from twoviews.tracking.metrics import read

ROOT = Path(__file__).resolve().parents[1]
RUNGS = (50, 80, 85, 90)
SEEDS = (0, 1, 2)
SIGNIFICANCE = 0.05
IMAGES = {"train": 50_000, "memory": 50_000, "test": 10_000}  # of CIFAR-10
CLASSES = 10
JUDGE = {"k": 200, "temperature": 0.1}


def train(experiment: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One training as a user starts it, and what it came to."""
    chosen = [f"experiment={experiment}", "tracking=files", *overrides]
    command = [sys.executable, str(ROOT / "train.py"), *chosen, f"seed={seed}", f"hydra.run.dir={folder}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    if code := _ended(subprocess.Popen(command)):
        sys.exit(code)  # it has said why
    wall, after, run = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN), Run.existing(folder)
    if broken := broken_rules(run):
        raise SystemExit(f"error: {'; '.join(broken)}: this is no run of the ladder (benchmarks/speedrun.md).")
    if not run.read("command.json"):  # else it was finished before, and took no time now
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        run.write("command.json", {"whole_command_s": wall, "whole_command_cpu_s": cpu})
    return {"seed": seed, **result(folder), **run.read("command.json")}


def _ended(child: subprocess.Popen) -> int:
    """The exit code of a training, which a Ctrl-C reaches as well, and which then writes a checkpoint."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return child.wait()


def broken_rules(run: Run) -> list[str]:
    """Sentences about what a run does otherwise than the rules that can be read from its folder."""
    config, data = run.config(), run.read("data.json")
    images, classes, found = data["images"], len(data["classes"]), []
    if images != IMAGES or classes != CLASSES:
        found.append(f"the images are {images} of {classes} classes, not CIFAR-10's {IMAGES} of {CLASSES}")
    if config["method"]["_target_"].endswith(".Supervised"):
        found.append("the method learns from labels")
    judge = {key: config.get("protocol", {}).get("knn", {}).get(key) for key in JUDGE}
    if judge != JUDGE:
        found.append(f"kNN is measured with {judge}, not with {JUDGE}")
    if run.read("result.json").get("state") != "finished":
        found.append("the training has not finished")
    return found


def result(folder: Path) -> dict[str, float]:
    """KNN at the end, and the seconds from the line before the first step to that of the last one."""
    lines = list(read(folder))
    begin = next(line["time"] for line in lines if "baseline/untrained_knn_top1" in line)
    last = next(line for line in reversed(lines) if "train/loss" in line)
    judged = next(line for line in reversed(lines) if "knn/top1" in line)
    assert judged["step"] == last["step"]
    return {
        "knn_top1": judged["knn/top1"],
        "seconds": last["time"] - begin,
        "steps": last["step"],
        "epochs": last["epoch"],
    }


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where things lie."""
    groups = {key: dict(node) if isinstance(node, dict) else node for key, node in config.items() if key != "tracking"}
    return groups | {"data": {key: value for key, value in config["data"].items() if key not in ("root", "cache")}}


def processor() -> str:
    """What the system calls it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(": ")[2] if names else "CPU"


def summary(rung: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and whether the rung is reached: a one-sided t-test over seeds, at 5 %."""
    accuracies, seconds = [row["knn_top1"] for row in rows], [row["seconds"] for row in rows]
    p_value = float(ttest_1samp(accuracies, rung, alternative="greater").pvalue)
    return {
        "knn_mean": statistics.mean(accuracies),
        "knn_deviation": statistics.stdev(accuracies),
        "seconds_mean": statistics.mean(seconds),
        "seconds_deviation": statistics.stdev(seconds),
        "p_value": p_value,
        "reached": p_value <= SIGNIFICANCE,
    }


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rung", type=int, choices=RUNGS, help="per cent")
    parser.add_argument(
        "--candidate", help="of experiment=speedrun_cifar10_<rung>_<candidate>, in place of the rung's own"
    )
    parser.add_argument("--folder", type=Path, help="of the three runs; default: outputs/speedrun_cifar10_<rung>")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of train.py")
    options = parser.parse_intermixed_args()
    experiment = "_".join(filter(None, ["speedrun_cifar10", str(options.rung), options.candidate]))
    folder = (options.folder or Path("outputs") / experiment).absolute()
    rows = []
    for seed in SEEDS:
        rows.append(train(experiment, seed, options.overrides, folder / f"seed{seed}"))
        print(f"seed {seed}: kNN {rows[-1]['knn_top1']:.2f} %, {rows[-1]['seconds']:.1f} s", flush=True)
    codes = {tuple(_text(folder / f"seed{seed}" / name) for name in ("commit.txt", "diff.patch")) for seed in SEEDS}
    if len(codes) > 1:
        raise SystemExit(f"error: the trainings in {folder} are of different code; start over with fresh=true.")
    found = summary(options.rung, rows)
    print(
        f"mean {found['knn_mean']:.2f} ± {found['knn_deviation']:.2f} % in {found['seconds_mean']:.1f} ± "
        f"{found['seconds_deviation']:.1f} s: {options.rung} % is {'reached' if found['reached'] else 'not reached'} (p = "
        f"{found['p_value']:.3f}, one-sided)"
    )
    environment = json.loads((folder / "seed0" / "environment.json").read_text())
    hardware = environment["gpu"] or f"{processor()}, {environment['threads']} thread(s)"
    facts = {"rung": options.rung, **found, "hardware": hardware, "processes": environment["processes"]}
    commit, config = (folder / "seed0" / "commit.txt").read_text().strip(), Run(folder / "seed0").config()
    code = {"commit": commit, "changed": (folder / "seed0" / "diff.patch").exists(), "config": without_paths(config)}
    named = ["data.root=<cifar10>" if one.startswith("data.root=") else one for one in options.overrides]
    named = [f"--candidate {options.candidate}", *named] if options.candidate else named
    record(options.json, " ".join(["speedrun.py", str(options.rung), *named]), rows, **facts, **code)


if __name__ == "__main__":
    main()
