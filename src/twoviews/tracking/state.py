"""How far a run folder has been mirrored (tracking.json), and the two locks on the folder.

Two files with one writer each, so that a training step never waits for a mirror that waits for a server:
`tracking.json` is changed only under `mirroring`; `metrics.durable` belongs to the process that trains.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from filelock import FileLock, Timeout

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.signatures import complaint


@dataclass
class State:
    """What MLflow has of one run."""

    uri: str | None = None  # None: the default store
    experiment: str = "twoviews"
    run_key: str = ""  # ours, random, known before MLflow answers: finds a run whose id was never written down
    run_id: str | None = None
    experiment_id: str | None = None
    sent_bytes: int = 0  # of metrics.jsonl
    status: str = ""  # as MLflow was told last
    files: dict[str, list[int]] = field(default_factory=dict)  # name: [mtime in ns, bytes] of the artifact sent
    tags: dict[str, str] = field(default_factory=dict)  # of the run: in a sweep its parent and the values of the axes
    # Points that were sent and then cut from metrics.jsonl, because an earlier checkpoint is resumed: step -> names.
    # They are computed again, perhaps not to the last digit (images_per_s never is), and must not appear twice.
    already: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "State":
        """The state in `folder`, or that of a run nothing was sent of.

        Raises:
            BadInput: tracking.json is not ours.
        """
        path = folder / "tracking.json"
        recorded, kinds = foreign.load(path), get_type_hints(cls)
        wrong = [f"there is no {key}" for key in recorded if key not in kinds]
        wrong += [
            f"{key} {why}" for key, kind in kinds.items() if key in recorded and (why := complaint(recorded[key], kind))
        ]
        if wrong:
            raise BadInput(
                f"{path} cannot be read ({wrong[0]}); delete it, and the run is sent to MLflow as a new one."
            )
        return cls(**recorded)

    def save(self, folder: Path) -> None:
        """Replace tracking.json."""
        replace(folder / "tracking.json", json.dumps(asdict(self), indent=1))

    def forget_run(self) -> None:
        """Start over in a store that does not know the run; `run_key` stays, so that a way back finds it again."""
        self.run_id = self.experiment_id = None
        self.sent_bytes, self.status = 0, ""
        self.files, self.already = {}, {}


def durable_bytes(folder: Path) -> int:
    """Size in bytes of the part of metrics.jsonl that the last checkpoint keeps; 0 before the first."""
    path = folder / "metrics.durable"
    return int(path.read_text()) if path.exists() else 0


def replace(path: Path, text: str) -> None:
    """Write `text` in UTF-8 so that a crash leaves the old file or the new one, whole.

    Bytes of file names that are no UTF-8 are spelt out as \\udcfc, from which JSON makes the name again.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def writer_lock(folder: Path) -> FileLock:
    """Held by the process that trains; the system releases it however the process ends, `kill -9` included."""
    return FileLock(folder / ".writer.lock")


def held(lock: FileLock) -> bool:
    """Whether somebody holds it, this process by another lock object included."""
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def is_written(folder: Path) -> bool:
    """Some process, this one included, is training into `folder`."""
    return held(writer_lock(folder))


@contextmanager
def mirroring(folder: Path, timeout_s: float = 120.0) -> Iterator[None]:
    """One mirror of `folder` at a time.

    Raises:
        BadInput: another one did not end within `timeout_s` seconds.
    """
    lock = FileLock(folder / ".mirror.lock", timeout=timeout_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise BadInput(
            f"another process has been sending {folder} to MLflow for {timeout_s:g} s; try again when it has ended."
        ) from error
    try:
        yield
    finally:
        lock.release()
