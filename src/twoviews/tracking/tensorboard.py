"""TensorBoard's event files from metrics.jsonl; MLflow is not involved."""

from collections.abc import Sequence
from pathlib import Path

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.tracking.metrics import METRICS_FILE, lines, measured
from twoviews.tracking.state import NAME_TAG, UploadState

SUFFIX = ".twoviews"  # of the event files written here


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

    recorded = [line for _, line in lines(run / METRICS_FILE)]
    for earlier in out.glob(f"events.out.tfevents.*{SUFFIX}"):
        earlier.unlink()
    with SummaryWriter(str(out), filename_suffix=SUFFIX) as writer:
        if config := foreign.text(run / "config.yaml"):
            writer.add_text("config", f"```yaml\n{config}\n```", walltime=recorded[0]["time"] if recorded else None)
        for line in recorded:
            for name, value in measured(line).items():
                writer.add_scalar(name, value, line["step"], walltime=line["time"])
    return sum(len(measured(line)) for line in recorded)


def places(runs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The folder below `out` for each run folder: its path from here, with a job's name in place of its digest.

    Raises:
        BadInput: two runs would go into the same folder.
    """
    by_place: dict[Path, Path] = {}
    for run in runs:
        path = run.resolve()
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-2:])
        name = UploadState.load(run).tags.get(NAME_TAG, path.name).replace("/", "_")
        place = out / path.with_name(name)
        if (earlier_run := by_place.setdefault(place, run)) != run:
            raise BadInput(f"{earlier_run} and {run} would both be written to {place}; convert them one by one, --out.")
    return {run: place for place, run in by_place.items()}
