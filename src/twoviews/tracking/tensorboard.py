"""TensorBoard's event files from metrics.jsonl; MLflow is not involved."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.tracking.metrics import METRICS_FILE, POSITION_KEYS, lines
from twoviews.tracking.state import NAME_TAG, UploadState

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SUFFIX = ".twoviews"  # of the event files written here


def require_tensorboard() -> None:
    """Check, without importing it, that TensorBoard is installed.

    Raises:
        BadInput: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "TensorBoard is not installed in this environment; install it: python -m pip install tensorboard."
        )


def convert(run: Path, out: Path) -> int:
    """Write the metrics of a run into an event file, in place of one of an earlier call; returns the number of values.

    Steps and times are those of metrics.jsonl. TensorBoard keeps values in single precision. The configuration is the text
    `config`.

    Args:
        run: the run folder.
        out: folder of the event file; files of others in it stay.

    Raises:
        BadInput: metrics.jsonl is damaged.
    """
    from torch.utils.tensorboard import SummaryWriter

    found = [line for _, line in lines(run / METRICS_FILE)]
    for earlier in out.glob(f"events.out.tfevents.*{SUFFIX}"):
        earlier.unlink()
    with SummaryWriter(str(out), filename_suffix=SUFFIX) as writer:
        if config := foreign.text(run / "config.yaml"):
            writer.add_text("config", f"```yaml\n{config}\n```", walltime=found[0]["time"] if found else None)
        return sum(_write(writer, line) for line in found)


def _write(writer: "SummaryWriter", line: dict) -> int:
    """Write the values of a line of metrics.jsonl; returns their number."""
    names = [name for name in line if name not in POSITION_KEYS]
    for name in names:
        writer.add_scalar(name, float(line[name]), line["step"], walltime=line["time"])
    return len(names)


def places(runs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The folder below `out` for each run folder: its path from here, with a job's name in place of its digest.

    Raises:
        BadInput: two runs would go into the same folder.
    """
    found: dict[Path, Path] = {}
    for run in runs:
        path = run.resolve()
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-2:])
        name = UploadState.load(run).tags.get(NAME_TAG, path.name).replace("/", "_")
        place = out / path.with_name(name)
        if place in found:
            raise BadInput(
                f"{found[place]} and {run} would both be written to {place}; convert them one by one, --out."
            )
        found[place] = run
    return {run: place for place, run in found.items()}
