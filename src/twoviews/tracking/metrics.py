"""metrics.jsonl, the record of a run: one JSON object a line with `step`, `epoch`, `time` (unix s) and numbers by name.

JSON has no number for NaN and the infinities, so they stand as the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back and every JSON parser accepts.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.tracking.state import FolderLock, State, durable_bytes, evaluation_lock, mirroring, replace, writer_lock

NAME = "metrics.jsonl"
HEAD = ("step", "epoch", "time")  # of each line; everything else in it is a measured number
LONGEST = 2**20  # bytes of a line
PATIENCE_S = 15.0  # a process that was killed may take a while to be gone, and `sync` looks at the lock for a moment

_encode = json.JSONEncoder(allow_nan=False).encode


class Metrics:
    """The only writer of metrics.jsonl in `folder`, on the thread that trains.

    `commit` is called by the thread that writes checkpoints.

    Opening it means that the run goes on: the result.json of an earlier stretch is removed, and lines after
    `kept_bytes`, which come from steps that will be computed again, are cut off. Their time stamps are remembered, so
    that a point computed again is the same point, not a second one.

    Args:
        folder: the run folder; it exists.
        kept_bytes: what `mark` returned for the checkpoint that is resumed; 0 for a new run.
        say: where a sentence for the user goes.
        lock: from `lock_for_training`, where it is held already.

    Raises:
        BadInput: another process uses `folder`.
    """

    def __init__(
        self, folder: Path, kept_bytes: int = 0, say: Callable[[str], None] = print, lock: FolderLock | None = None
    ):
        self._folder, self._path = folder, folder / NAME
        foreign.refuse_links(folder)
        self._lock = lock or lock_for_training(folder)
        self._path.touch()
        whole = self._path.stat().st_size
        if kept_bytes > whole:
            say(f"{self._path} has {whole} bytes but had {kept_bytes} at the checkpoint: the points between are lost.")
            kept_bytes = max((end for end, _ in lines(self._path)), default=0)
        self._times = self._cut(kept_bytes)
        self._file = self._path.open("ab", buffering=1 << 16)
        self._flushed = 0.0

    def log(self, step: int, epoch: float | int, values: Mapping[str, float | int]) -> None:
        """Add one line; it reaches the file within about a second of the next call, and the disk at `mark`.

        Raises:
            OSError: the disk is full.
        """
        now = time.time()
        name = next(iter(values))
        line = {"step": step, "epoch": epoch, "time": round(self._times.get((step, name), now), 3)}
        line.update((key, float(value)) for key, value in values.items())
        try:
            text = _encode(line)
        except ValueError:
            text = _encode({key: value if math.isfinite(value) else _spelt(value) for key, value in line.items()})
        self._file.write(text.encode() + b"\n")
        if now - self._flushed > 1:
            self._file.flush()
            self._flushed = now

    def mark(self) -> int:
        """Size of the file in bytes, all of it on the disk: what a checkpoint written now keeps."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def commit(self, size: int) -> None:
        """The checkpoint that holds `size` (from `mark`) is on the disk, so the mirror may send up to there."""
        replace(self._folder / "metrics.durable", str(size))

    def close(self) -> None:
        """Write what is buffered and let others train into the folder; call it after `Mirror.close`."""
        try:
            self._file.close()
        finally:
            self._lock.release()

    def _cut(self, kept_bytes: int) -> dict[tuple[int, str], float]:
        """The first time stamps, by step and name, of the points after `kept_bytes`, which are cut off."""
        times = {}
        with mirroring(self._folder):
            state = State.load(self._folder)
            for end, line in lines(self._path, kept_bytes):
                names = [name for name in line if name not in HEAD]
                times.update(((line["step"], name), line["time"]) for name in names)
                if end <= state.sent_bytes:
                    state.already.setdefault(str(line["step"]), []).extend(names)
            # In this order a crash in between is repeated, not half done.
            if state.sent_bytes > kept_bytes:
                state.sent_bytes = kept_bytes
                state.save(self._folder)
            self.commit(kept_bytes)
            os.truncate(self._path, kept_bytes)
            (self._folder / "result.json").unlink(missing_ok=True)
        return times


def lock_for_training(folder: Path) -> FolderLock:
    """The writer's lock, held; waits for a process that is about to end, as after a requeue.

    Raises:
        BadInput: another process uses `folder`.
    """
    lock, evaluation = writer_lock(folder), evaluation_lock(folder)
    if not lock.acquire(PATIENCE_S):
        raise BadInput(
            f"another process is training into {folder}; wait for its end, or name another folder: hydra.run.dir=..."
        )
    if not evaluation.acquire(PATIENCE_S):
        lock.release()
        raise BadInput(
            f"evaluate.py or cluster.py is working on {folder}; wait for its end, or name another folder: hydra.run.dir=..."
        )
    evaluation.remove()  # another evaluation sees that the folder is trained into
    return lock


def read(folder: Path) -> Iterator[dict[str, float]]:
    """The lines of metrics.jsonl in `folder`, numbers as numbers: {"step", "epoch", "time", name: value, ...}.

    Each line has the names measured together, so seldom all; none where the file does not exist.
    """
    for _, line in lines(folder / NAME):
        yield {key: value if key == "step" else float(value) for key, value in line.items()}


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict]]:
    """(byte after it, line) of each whole line from byte `start` on, as far as no crash tore the file.

    Raises:
        BadInput: it is no file, or a line is damaged that was on the disk before the last checkpoint was.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise BadInput(f"{path} is no regular file, and none that a run wrote; put the file back that the run wrote.")
    with path.open("rb") as file:
        file.seek(start)
        while text := file.readline(LONGEST):
            if (line := _line(text)) is None:
                if start < durable_bytes(path.parent):
                    raise BadInput(
                        f"{path} is damaged at byte {start:,}: {foreign.short(text.decode(errors='replace'))!r} is no line of "
                        "numbers; put the file back that the run wrote, or start over with fresh=true."
                    )
                return
            start += len(text)
            yield start, line


def _line(text: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is none."""
    try:
        line = json.loads(text)
        [float(value) for value in line.values()]
    except (AttributeError, RecursionError, TypeError, ValueError):
        return None
    whole = text.endswith(b"\n") and line.keys() >= set(HEAD) and type(line["step"]) is int
    return line if whole else None


def _spelt(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
