"""Everything that needs a GPU, the most important first, within some minutes.

    make gpu-check DATA=<cifar10> MINUTES=13
    PYTHONPATH=src python benchmarks/gpu_check.py --data <cifar10> --minutes 13 --out <folder>

<cifar10> is a folder of CIFAR-10's images as data=folder takes it. Neither a package index nor MLflow is needed. The parts:

    checks     a short training: does it use the kernels and the graph, each of which is compared with plain torch first
    tests      pytest -m gpu
    steps      benchmarks/step.py, all methods
    norms      benchmarks/norms.py
    moco       200 epochs of experiment=moco_cifar10 from the command to the result, kNN on features and on projections
    reference  benchmarks/reference.py, ResNet-18
    views      benchmarks/views.py
    knn        benchmarks/knn.py
    kmeans     an E-step of 50,000 images for each k
    smoke      benchmarks/smoke.py: an epoch of every method, a call of every protocol
    ladder     benchmarks/speedrun.py, the rung of 80 %

Each part is a process of its own with a limit of time, and is skipped where less is left than it needs. It prints one line,
and gpu_check.json is written anew after it, so what was measured is kept when the machine is taken away. All their output
is in gpu_check.log. The commit is that of git, or in a copy without git the variable COMMIT. Exit code: 1 if a part failed,
else 0. With --device cpu everything is tiny: to try this script.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 15.0  # for a part to write what it has, between SIGTERM and SIGKILL
PATH = re.compile(r"^(views|norms|step)\s.*?(compiled|tensors|fused|plain|CUDA graph|eager.*)", re.MULTILINE)
FAST = {"views": "compiled", "norms": "fused", "step": "CUDA graph"}


@dataclass(frozen=True)
class Here:
    """What all parts share.

    Args:
        device: cuda or cpu.
        data: folder of the images; None: digits.
        work: folder for what nobody needs afterwards.
        epochs: of the comparison with the reference.
        seeds: of it.
    """

    device: str
    data: Path | None
    work: Path
    epochs: int = 60
    seeds: int = 1

    @property
    def small(self) -> bool:
        """Whether this is a trial of the script."""
        return self.device == "cpu"

    @property
    def images(self) -> list[str]:
        """Overrides."""
        return ["data=folder", f"data.root={self.data}"] if self.data else ["data=digits"]

    @property
    def numbers(self) -> Path:
        """Where a benchmark writes its numbers."""
        return self.work / "numbers.json"

    def script(self, name: str, *arguments: object) -> list[str]:
        """A command."""
        return [sys.executable, str(ROOT / name), *map(str, arguments)]

    def benchmark(self, name: str, *arguments: object) -> list[str]:
        """One that writes numbers."""
        return self.script(f"benchmarks/{name}.py", *arguments, "--json", self.numbers)


@dataclass(frozen=True)
class Ended:
    """What is known of a part when its commands have ended."""

    output: str
    numbers: dict[str, Any]  # that a benchmark wrote
    seconds: list[float]  # of each command

    @property
    def last(self) -> str:
        """The last line of the output."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output").strip()


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Args:
        name: on the command line and in the JSON.
        needs: seconds that it takes on an H100; with fewer left it is not begun.
        limit: seconds after which it is stopped; None: when what is left is only what later parts need.
        commands: one after the other, until one fails; given the seconds that it may take.
        figure: the main result, as it is printed; an exception from here is a failure of the part.
    """

    name: str
    needs: float
    limit: float | None
    commands: Callable[[Here, float], Sequence[Sequence[str]]]
    figure: Callable[[Here, Ended], str] = field(default=lambda here, ended: ended.last)


class Skipped(Exception):
    """There is nothing to do for a part; the message says why."""


# ------------------------------------------------------------------------------------------------------------- the parts


def _checks(here: Here, _: float) -> list[list[str]]:
    small = ["backbone=tiny", "method.queue_size=512", "epochs=1", "protocol=[]", "tracking=files"]
    shared = [f"runtime.device={here.device}", f"hydra.run.dir={here.work / 'checks'}"]
    return [here.script("train.py", "data=digits", "batch_size=64", *small, *shared)]


def _paths(here: Here, ended: Ended) -> str:
    found = dict(PATH.findall(ended.output))
    if not here.small and found != FAST:
        raise RuntimeError(f"expected {FAST}, found {found}")
    return ", ".join(f"{name} {path}" for name, path in found.items()) or "no paths are named"


def _tests(here: Here, _: float) -> list[list[str]]:
    mark = "pytest.mark." + "gpu"
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if mark in path.read_text()]
    if not files:
        raise Skipped("no test has the marker gpu")
    checked = [] if importlib.util.find_spec("beartype") else ["-o", "addopts="]  # which name beartype
    return [[sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", *checked, *files]]


def _steps(here: Here, _: float) -> list[list[str]]:
    tiny = [
        "backbone=tiny",
        "augmentation=digits",
        "batch_size=16",
        "--methods",
        "moco",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    few = tiny if here.small else []
    return [here.benchmark("step", *here.images, f"runtime.device={here.device}", *few)]


def _step_times(_: Here, ended: Ended) -> str:
    rows = [
        f"{row['method']} {1e3 * row['step_seconds']:.1f} ms ({100 * row['of_floor_sum']:.0f} %)"
        for row in ended.numbers["rows"]
    ]
    return ", ".join(rows) + " of the sum of the floors"


def _norms(here: Here, _: float) -> list[list[str]]:
    if not (ROOT / "benchmarks" / "norms.py").exists():
        raise Skipped("there is no benchmarks/norms.py")
    if here.small:
        raise Skipped("it needs a GPU")
    return [here.benchmark("norms")]


def _norm_times(_: Here, ended: Ended) -> str:
    ratios = [row["plain_both_ms"] / row["fused_both_ms"] for row in ended.numbers["rows"]]
    return f"forward and backward {min(ratios):.1f} to {max(ratios):.1f} times as fast as torch's modules"


def _moco(here: Here, _: float) -> list[list[str]]:
    folder = here.work / "moco"
    shared = ["experiment=moco_cifar10", "tracking=files", f"runtime.device={here.device}", f"hydra.run.dir={folder}"]
    tiny = ["backbone=tiny", "epochs=1", "augmentation=digits"] if here.small else []
    judge = ["evaluate.py", f"run={folder}", "protocol=knn"]
    return [
        here.script("train.py", *shared, *here.images, *tiny),
        here.script(*judge),
        here.script(*judge, "feature=projection"),
    ]


def _trained(here: Here, ended: Ended) -> str:
    folder = here.work / "moco"
    result = json.loads((folder / "result.json").read_text())
    ended.numbers.update(result=result, command_seconds=ended.seconds[0])
    found = [f"{result['epoch']:.4g} epochs ({result['state']}) in {ended.seconds[0]:.1f} s"]
    for feature, files in (("features", "evaluation/knn-*"), ("projections", "evaluation/projection/knn-*")):
        for file in folder.glob(f"{files}/evaluation.json"):
            ended.numbers[feature] = json.loads(file.read_text())
            found.append(f"kNN {ended.numbers[feature]['knn/top1']:.2f} % on {feature}")
    return ", ".join(found)


def _reference(here: Here, seconds: float) -> list[list[str]]:
    if not (ROOT / "benchmarks" / "reference.py").exists():
        raise Skipped("there is no benchmarks/reference.py")
    length = ["--epochs", here.epochs, "--seeds", here.seeds, "--minutes", round(seconds / 60, 2)]
    backbone = f"backbone={'tiny' if here.small else 'resnet18_cifar'}"
    return [here.benchmark("reference", *here.images, backbone, f"runtime.device={here.device}", *length)]


def _views(here: Here, _: float) -> list[list[str]]:
    few = ["--images", 8, "--rounds", 1] if here.small else []
    return [here.benchmark("views", "--device", here.device, *few)]


def _kernel_views(_: Here, ended: Ended) -> str:
    best = {row["recipe"]: row for row in ended.numbers["rows"] if row["pipeline"].startswith("twoviews")}
    return ", ".join(f"{name}: {row['pipeline']} {row['images_per_s']:,.0f} images/s" for name, row in best.items())


def _knn(here: Here, _: float) -> list[list[str]]:
    few = ["--bank", 500, "--queries", 100, "--rounds", 1] if here.small else []
    return [here.benchmark("knn", "--device", here.device, *few)]


def _knn_times(_: Here, ended: Ended) -> str:
    rows = [row for row in ended.numbers["rows"] if row["what"] == "kNN, k=200"]
    return ", ".join(
        f"{row['features']} {1e3 * row['seconds']:.1f} ms, {row['of_the_product']:.2f} x the product" for row in rows
    )


def _kmeans(here: Here, _: float) -> list[list[str]]:
    if here.small:
        raise Skipped("on a CPU it wants the features of a training")
    return [here.benchmark("kmeans", "--device", here.device)]


def _smoke(here: Here, _: float) -> list[list[str]]:
    few = ["--only", "knn"] if here.small else []
    return [here.benchmark("smoke", "--device", here.device, *few)]


def _ladder(here: Here, _: float) -> list[list[str]]:
    if here.small:
        raise Skipped("its rules want 50,000 images")
    folder = ["--folder", here.work / "ladder"]
    return [here.benchmark("speedrun", 80, *here.images, f"runtime.device={here.device}", *folder)]


def _seeds(_: Here, ended: Ended) -> str:
    return "; ".join(re.findall(r"^seed \d+: .*", ended.output, re.MULTILINE)) or ended.last


PARTS = (
    Part("checks", 30, 90, _checks, _paths),
    Part("tests", 40, 150, _tests),
    Part("steps", 50, 150, _steps, _step_times),
    Part("norms", 15, 60, _norms, _norm_times),
    Part("moco", 200, 330, _moco, _trained),
    Part("reference", 120, None, _reference),
    Part("views", 20, 60, _views, _kernel_views),
    Part("knn", 15, 60, _knn, _knn_times),
    Part("kmeans", 15, 60, _kmeans),
    Part("smoke", 100, 240, _smoke),
    Part("ladder", 120, None, _ladder, _seeds),
)
LAST = "ladder"  # gets what is left: no other part gives up time for it


# ---------------------------------------------------------------------------------------------------------------- running


def facts() -> dict[str, Any]:
    """When, with which code, on which machine."""
    card = _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader").splitlines()
    name, driver, memory = (*card[0].split(", "), "", "")[:3] if card else (None, None, None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "card": name,
        "driver": driver,
        "memory": memory,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def _commit() -> str | None:
    """The variable COMMIT, which a copy of a checkout needs; else by git, else the file commit.txt."""
    file = ROOT / "commit.txt"
    written = file.read_text().strip() if file.exists() else None
    return os.environ.get("COMMIT") or _said("git", "-C", str(ROOT), "rev-parse", "HEAD").strip() or written


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


class Log:
    """The output of all parts, in one file."""

    def __init__(self, path: Path):
        self.path = path
        path.write_bytes(b"")

    def run(self, command: Sequence[str], deadline: float) -> tuple[int | None, float]:
        """One command with its children: its exit code, None if the time was over, and its seconds."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths_of_python()), "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with self.path.open("ab") as file:
            file.write(f"\n$ {' '.join(command)}\n".encode())
            file.flush()
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                code = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also when this script is interrupted
                _end(child)
        return code, time.monotonic() - start


def _paths_of_python() -> list[str]:
    return [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]


def _end(child: subprocess.Popen) -> None:
    """Stop it with its children; with time to write what they have, if it still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)


def perform(part: Part, here: Here, allowed: float, log: Log) -> dict[str, Any]:
    """Do a part within so many seconds; its row of the JSON."""
    begin, start = log.path.stat().st_size, time.monotonic()
    state, seconds = "ok", []
    here.numbers.unlink(missing_ok=True)
    try:
        commands = part.commands(here, allowed)
    except Skipped as reason:
        return {"state": "skipped", "seconds": 0.0, "figure": str(reason)}
    for command in commands:
        code, taken = log.run(command, start + allowed)
        seconds.append(taken)
        if code != 0:
            state = "timed out" if code is None else "failed"
            break
    with log.path.open("rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace")
    ended = Ended(output, _read(here.numbers), seconds)
    try:
        figure = part.figure(here, ended)
    except Exception as error:  # whatever a part's files lack, the next parts shall have their turn
        figure = f"{type(error).__name__}: {error}" if state == "ok" else ended.last
        state = "failed" if state == "ok" else state
    taken = time.monotonic() - start
    return {"state": state, "seconds": taken, "figure": figure, "commands": seconds, "numbers": ended.numbers}


def _read(path: Path) -> dict[str, Any]:
    """What a benchmark wrote; nothing, where it did not come to that."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def allowed(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part may take of those left.

    Raises:
        Skipped: it needs more.
    """
    if left < part.needs:
        raise Skipped(f"{left:.0f} s are left, and it needs {part.needs:g}")
    if part.limit is not None:
        return min(part.limit, left)
    return max(part.needs, left - sum(one.needs for one in later if one.name != LAST))


def check(parts: Sequence[Part], here: Here, seconds: float, out: Path) -> bool:
    """Do the parts in their order; whether none failed. Writes gpu_check.json after each, and gpu_check.log."""
    end, rows = time.monotonic() + seconds - GRACE_S, {}
    report = {**facts(), "minutes": seconds / 60, "device": here.device, "parts": rows}
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "gpu_check.log")
    for number, part in enumerate(parts):
        try:
            limit = allowed(part, parts[number + 1 :], end - time.monotonic())
        except Skipped as reason:
            row = {"state": "skipped", "seconds": 0.0, "figure": str(reason)}
        else:
            row = perform(part, here, limit, log)
        rows[part.name] = row
        new = out / "gpu_check.new"
        new.write_text(json.dumps(report, indent=1) + "\n")
        new.replace(out / "gpu_check.json")
        print(f"{part.name:10} {row['state']:9} {row['seconds']:6.1f} s  {row['figure']}", flush=True)
    return all(row["state"] in ("ok", "skipped") for row in rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's images, with train and test in it")
    parser.add_argument("--minutes", type=float, default=13.0, help="altogether")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"), help="folder of gpu_check.json and .log")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help="instead of all")
    parser.add_argument("--epochs", type=int, default=60, help="of the reference")
    parser.add_argument("--seeds", type=int, default=1, help="of the reference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not options.data:
        parser.error("--data is missing; give the folder of CIFAR-10's images: --data <cifar10>.")
    if options.data and not (options.data / "train").is_dir():
        parser.error(f"--data {options.data} has no folder train; give the folder of CIFAR-10's images.")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the part that runs is stopped
    with tempfile.TemporaryDirectory(prefix="gpu_check") as work:
        data = options.data and options.data.resolve()
        here = Here(options.device, data, Path(work), options.epochs, options.seeds)
        chosen = [part for part in PARTS if part.name in options.parts]
        sys.exit(0 if check(chosen, here, 60 * options.minutes, options.out) else 1)


if __name__ == "__main__":
    main()
