"""What every benchmark leaves behind: its numbers, with the command and the machine they are from."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException

from twoviews.config.entry import BAD_INPUT
from twoviews.errors import BadInput


def record(
    path: Path | None, command: str, rows: list[dict[str, Any]], device: torch.device | None = None, **facts: Any
) -> None:
    """Write them to a JSON file, for example below benchmarks/results/; nothing without a path.

    Args:
        path: of the file.
        command: after python benchmarks/, with <placeholders> for what differs between machines.
        rows: the numbers.
        device: that was measured; None: a CPU.
        facts: what else they depend on.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = "OMP_NUM_THREADS=1 " if os.environ.get("OMP_NUM_THREADS") == "1" else ""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    about = {
        "date": date.today().isoformat(),
        "command": f"{threads}python benchmarks/{command}",
        "machine": torch.cuda.get_device_name(device) if device and device.type == "cuda" else machine,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**about, **facts, "rows": rows}, indent=1) + "\n")


def run(main: Callable[[], None]) -> None:
    """Call it; what a user can put right is said in a sentence, with exit code 2."""
    try:
        main()
    except (BadInput, HydraException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one call, by this process: what other programs disturb least."""
    start = time.process_time()
    function()
    return time.process_time() - start


def arguments(description: str | None, rounds: int, steps: int) -> argparse.Namespace:
    """The command line of a benchmark of trainings: rounds, steps a round, json, and overrides, as train.py takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="a round")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="data.root=<folder of images>, as of train.py"
    )
    return parser.parse_intermixed_args()  # options and overrides in any order


def medians(what: str, cpu: Sequence[float], wall: Sequence[float], ratios: Sequence[float]) -> dict[str, Any]:
    """A row: what was timed, its seconds, and its ratio to something else within each round, with the extremes."""
    return {
        "what": what,
        "cpu_seconds": statistics.median(cpu),
        "wall_seconds": statistics.median(wall),
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }
