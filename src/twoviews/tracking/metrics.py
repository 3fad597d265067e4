"""metrics.jsonl, the record of a run: one JSON object a line with `step`, `epoch`, `time` (unix s) and numbers by name.

JSON has no number for NaN and the infinities, so they are written as the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back and every JSON parser accepts.

`metrics.durable` holds the size in bytes that metrics.jsonl had at the last checkpoint; a checkpoint has the same number as
metrics_bytes. A mirror uploads no more than that, because an interrupted run continues from there and writes the lines behind it
again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.files import write_atomic
from twoviews.locks import FolderLock, lock_for_training, locked_for_upload
from twoviews.tracking.state import UploadState

METRICS_FILE = "metrics.jsonl"
DURABLE_FILE = "metrics.durable"
POSITION_KEYS = ("step", "epoch", "time")  # in every line; all other keys are names of measured values
MAX_LINE_BYTES = 2**20
FLUSH_SECONDS = 1.0


class Metrics:
    """The only writer of metrics.jsonl, used by the training thread; `commit` is called by the one that writes checkpoints.

    Opening it continues the run: the result.json of an earlier part is removed, and the lines behind `durable_bytes`, whose steps
    will be computed again, are cut off. The new lines of these steps get the time stamps of the old ones, by which MLflow
    recognises a value that it has.

    Args:
        folder: the run folder; it exists.
        durable_bytes: what `flush` returned when the checkpoint that is resumed was written; 0 for a new run.
        say: prints a sentence for the user.
        lock: from `lock_for_training`, where it is held already.

    Raises:
        BadInput: another process uses `folder`.
    """

    def __init__(
        self, folder: Path, durable_bytes: int = 0, say: Callable[[str], None] = print, lock: FolderLock | None = None
    ):
        self._folder, self._path = folder, folder / METRICS_FILE
        foreign.refuse_links(folder)
        self._lock = lock or lock_for_training(folder)
        self._path.touch()
        size = self._path.stat().st_size
        if durable_bytes > size:
            say(f"{self._path} has {size} bytes but had {durable_bytes} at the checkpoint: the lines between are lost.")
            durable_bytes = max((end for end, _ in lines(self._path)), default=0)
        self._times = self._cut(durable_bytes)
        self._file = self._path.open("ab", buffering=1 << 16)
        self._flushed_at = 0.0

    def log(self, step: int, epoch: float | int, values: Mapping[str, float | int]) -> None:
        """Append one line; the system gets it within about a second of the next call, the disk at `flush`.

        Raises:
            OSError: the disk is full.
        """
        now = time.time()
        stamp = round(self._times.get((step, next(iter(values))), now), 3)
        numbers = {name: float(value) for name, value in values.items()}
        spelt = {name: value if math.isfinite(value) else json.dumps(value) for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "epoch": epoch, "time": stamp, **spelt}).encode() + b"\n")
        if now - self._flushed_at > FLUSH_SECONDS:
            self._file.flush()
            self._flushed_at = now

    def flush(self) -> int:
        """Write everything to the disk; returns the size of the file in bytes, which a checkpoint written now keeps."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def commit(self, size: int) -> None:
        """Record that the checkpoint that keeps `size` bytes (from `flush`) is on the disk."""
        write_atomic(self._folder / DURABLE_FILE, str(size))

    def close(self) -> None:
        """Flush and release the training lock; call it after `Mirror.close`."""
        try:
            self._file.close()
        finally:
            self._lock.release()

    def _cut(self, durable_bytes: int) -> dict[tuple[int, str], float]:
        """Cut off the lines behind `durable_bytes`; returns their time stamps by step and name.

        What MLflow has of them is recorded before they are cut off. After a crash between the two, the next start does both
        again; in the other order the record would never be written.
        """
        cut = [*lines(self._path, durable_bytes)]
        with locked_for_upload(self._folder):
            state = UploadState.load(self._folder)
            for end, line in cut:
                if end <= state.sent_bytes:
                    state.already.setdefault(str(line["step"]), []).extend(metric_values(line))
            if state.sent_bytes > durable_bytes:
                state.sent_bytes = durable_bytes
                state.save(self._folder)
            self.commit(durable_bytes)
            os.truncate(self._path, durable_bytes)
            (self._folder / "result.json").unlink(missing_ok=True)
        return {(line["step"], name): line["time"] for _, line in cut for name in metric_values(line)}


def log_metrics(folder: Path, values: Mapping[str, float]) -> None:
    """Append values measured after the training, such as an evaluation's, as a line at the run's last step.

    The caller holds the evaluation lock. Values that are not finite, and those that are the last recorded ones already, are
    left out. An interrupted run that goes on cuts the line off again, like everything after its last checkpoint.
    """
    size, position, last = 0, {"step": 0, "epoch": 0}, {}
    for end, line in lines(folder / METRICS_FILE):
        size, position = end, {"step": line["step"], "epoch": float(line["epoch"])}
        last |= {name: (line["step"], value) for name, value in metric_values(line).items()}
    new = {
        name: value
        for name, value in values.items()
        if math.isfinite(value) and last.get(name) != (position["step"], value)
    }
    if new:
        with (folder / METRICS_FILE).open("ab") as file:
            file.truncate(size)  # a line that a crash left incomplete
            file.write(json.dumps({**position, "time": round(time.time(), 3), **new}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> Iterator[dict[str, float]]:
    """The lines of metrics.jsonl in `folder`, as {"step", "epoch", "time", name: value, ...}.

    A line has the values that were measured together, seldom all there are; there are none where the file does not exist.
    """
    for _, line in lines(folder / METRICS_FILE):
        yield {key: value if key == "step" else float(value) for key, value in line.items()}


def metric_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line of metrics.jsonl by name, without its position in the training."""
    return {name: float(value) for name, value in line.items() if name not in POSITION_KEYS}


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict]]:
    """(byte behind it, content) of each whole line from byte `start` on; ends at a line that a crash left incomplete.

    Raises:
        BadInput: it is not a file, or a line is damaged that was on the disk before the last checkpoint was.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise BadInput(f"{path} is not a regular file that a run wrote; put the file back that the run wrote.")
    with path.open("rb") as file:
        file.seek(start)
        while text := file.readline(MAX_LINE_BYTES):
            if (line := _parsed(text)) is None:
                if start < read_durable_bytes(path.parent):
                    raise BadInput(
                        f"{path} is damaged at byte {start:,}: {foreign.short(text.decode(errors='replace'))!r} is not a line "
                        "of numbers; put the file back that the run wrote, or start over with fresh=true."
                    )
                return
            start += len(text)
            yield start, line


def read_durable_bytes(folder: Path) -> int:
    """Size in bytes of the part of metrics.jsonl that the last checkpoint keeps; 0 before the first."""
    path = folder / DURABLE_FILE
    try:
        return int(path.read_text()) if path.exists() else 0
    except (OSError, ValueError) as error:
        raise foreign.damaged(path, error) from None


def _parsed(text: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is not one."""
    try:
        line = json.loads(text)
        [float(value) for value in line.values()]
    except (AttributeError, RecursionError, TypeError, ValueError):
        return None
    complete = text.endswith(b"\n") and line.keys() >= set(POSITION_KEYS) and type(line["step"]) is int
    return line if complete else None
