"""How far a run folder has been mirrored (tracking.json), and the locks on the folder.

Two files with one writer each, so that a training step never waits for a mirror that waits for a server:
`tracking.json` is changed only under `mirroring`; `metrics.durable` belongs to the process that trains.
"""

import errno
import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from filelock import FileLock, Timeout

from twoviews import foreign
from twoviews.errors import BadInput
from twoviews.ranges import Total
from twoviews.signatures import complaint


@dataclass
class State:
    """What MLflow has of one run."""

    uri: str | None = None  # None: the default store
    experiment: str = "twoviews"
    run_key: str = ""  # ours, random, known before MLflow answers: finds a run whose id was never written down
    run_id: str | None = None
    experiment_id: str | None = None
    sent_bytes: Total = 0  # of metrics.jsonl
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
        recorded, kinds = foreign.load(path), get_type_hints(cls, include_extras=True)
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

    @staticmethod
    def written(folder: Path) -> int:
        """When tracking.json was replaced last, in ns; 0 where there is none."""
        path = folder / "tracking.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def forget_run(self) -> None:
        """Start over in a store that does not know the run; `run_key` stays, so that a way back finds it again."""
        self.run_id = self.experiment_id = None
        self.sent_bytes, self.status = 0, ""
        self.files, self.already = {}, {}


def durable_bytes(folder: Path) -> int:
    """Size in bytes of the part of metrics.jsonl that the last checkpoint keeps; 0 before the first."""
    path = folder / "metrics.durable"
    try:
        return int(path.read_text()) if path.exists() else 0
    except (OSError, ValueError) as error:
        raise foreign.damaged(path, error) from None


def replace(path: Path, content: str | bytes) -> None:
    """Write text in UTF-8, or bytes, so that a crash leaves the old file or the new one, whole.

    Bytes of file names that are no UTF-8 are spelt out as \\udcfc, from which JSON makes the name again.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class FolderLock:
    """A lock on a run folder; the system releases it however the process that holds it ends, `kill -9` included.

    It belongs to the path: who waits while `fresh=true` renames the folder gets the lock of the folder that is there
    afterwards. filelock's would be the one of the renamed folder.

    Args:
        path: of the lock's file.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, -1

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Whether the lock could be had within `timeout_s` seconds.

        Raises:
            BadInput: the file is a link or a folder.
        """
        end = time.monotonic() + timeout_s
        while not self._try():
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True

    def _try(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder is being renamed
            return False
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise BadInput(f"{self._path} is no file that a run wrote; delete it.") from error
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), self._path.stat()):
                self._file, file = file, -1
        except (BlockingIOError, PermissionError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(
                f"the file system of {self._path.parent} has no locks; use it for one command at a time", stacklevel=4
            )
            self._file, file = file, -1
        finally:
            if file != -1:
                os.close(file)
        return self._file != -1

    def release(self) -> None:
        """Let others have it."""
        if self._file != -1:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Let others have it, and leave no file behind."""
        self._path.unlink(missing_ok=True)  # who waits with that file sees that it is not at the path any more
        self.release()

    def __enter__(self) -> "FolderLock":
        while not self.acquire(3600):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def writer_lock(folder: Path) -> FolderLock:
    """Held by the process that trains."""
    return FolderLock(folder / ".writer.lock")


def evaluation_lock(folder: Path) -> FolderLock:
    """Held by the process that evaluates the encoder or clusters images by it."""
    return FolderLock(folder / ".evaluation.lock")


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
    if not (folder / ".writer.lock").exists():
        return False
    lock = writer_lock(folder)
    free = lock.acquire()
    lock.release()
    return not free


@contextmanager
def mirroring(folder: Path, timeout_s: float = 120.0) -> Iterator[None]:
    """One mirror of `folder` at a time.

    Raises:
        BadInput: another one did not end within `timeout_s` seconds.
    """
    lock = FolderLock(folder / ".mirror.lock")
    if not lock.acquire(timeout_s):
        raise BadInput(
            f"another process has been sending {folder} to MLflow for {timeout_s:g} s; try again when it has ended."
        )
    try:
        yield
    finally:
        lock.release()
