"""What every benchmark leaves behind: its numbers, with the command and the machine they are from."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def record(path: Path | None, command: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write them to a JSON file, for example below benchmarks/results/; nothing without a path.

    Args:
        path: of the file.
        command: after OMP_NUM_THREADS=1 python benchmarks/, with <placeholders> for what differs between machines.
        rows: the numbers.
        facts: what else they depend on.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": date.today().isoformat(),
        "command": f"OMP_NUM_THREADS=1 python benchmarks/{command}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**about, **facts, "rows": rows}, indent=1) + "\n")
