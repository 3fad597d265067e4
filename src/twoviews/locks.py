"""Locks on a run folder: one process trains into it, one evaluates it, one uploads it to MLflow."""

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from twoviews.errors import BadInput

TRAINING_LOCK_TIMEOUT_S = 15.0  # a killed process takes a moment to end, and `sync` holds the lock for an instant
UPLOAD_LOCK_TIMEOUT_S = 120.0
POLL_SECONDS = 0.05


class FolderLock:
    """An exclusive lock file in a run folder; the system releases it when the process ends, `kill -9` included.

    The lock belongs to the path, not to the inode: a process that waits while `fresh=true` renames the folder gets the lock
    in the new folder. With filelock it would get the one in the renamed folder.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, -1

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Try for `timeout_s` seconds; returns whether the lock was acquired.

        Raises:
            BadInput: the lock file is a link or a folder.
        """
        deadline = time.monotonic() + timeout_s
        while not self._try():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _try(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder is being renamed
            return False
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise BadInput(f"{self._path} is not a file that a run wrote; delete it.") from error
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), self._path.stat()):
                self._file, file = file, -1
        except (BlockingIOError, PermissionError, FileNotFoundError):
            pass  # another process has the lock, or has removed the file since it was opened
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
        """Release the lock; the file stays."""
        if self._file != -1:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Release the lock and delete its file."""
        self._path.unlink(missing_ok=True)  # a process waiting for it sees that the path has another file, or none
        self.release()

    def __enter__(self) -> "FolderLock":
        while not self.acquire(3600):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def training_lock(folder: Path) -> FolderLock:
    """The lock that the training process holds."""
    return FolderLock(folder / ".writer.lock")


def evaluation_lock(folder: Path) -> FolderLock:
    """The lock that evaluate.py and cluster.py hold."""
    return FolderLock(folder / ".evaluation.lock")


def is_training(folder: Path) -> bool:
    """Whether some process, this one included, is training into `folder`."""
    if not (folder / ".writer.lock").exists():
        return False
    lock = training_lock(folder)
    acquired = lock.acquire()
    lock.release()
    return not acquired


def try_acquire(lock: FileLock) -> bool:
    """Acquire a lock without waiting; returns whether no other process, or other lock object of this one, holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def is_held(lock: FileLock) -> bool:
    """Whether some process, this one included through another lock object, holds the lock."""
    if not Path(lock.lock_file).exists():
        return False
    if acquired := try_acquire(lock):
        lock.release()
    return not acquired


def lock_for_training(folder: Path) -> FolderLock:
    """Acquire the training lock; waits for a process that is about to end, as after a requeue.

    Raises:
        BadInput: another process trains into `folder` or evaluates it.
    """
    lock, evaluation = training_lock(folder), evaluation_lock(folder)
    if not lock.acquire(TRAINING_LOCK_TIMEOUT_S):
        raise BadInput(
            f"another process is training into {folder}; wait for its end, or name another folder: hydra.run.dir=..."
        )
    if not evaluation.acquire(TRAINING_LOCK_TIMEOUT_S):
        lock.release()
        raise BadInput(
            f"evaluate.py or cluster.py is working on {folder}; wait for its end, or name another folder: hydra.run.dir=..."
        )
    evaluation.remove()  # an evaluation that starts now sees the training lock
    return lock


@contextmanager
def locked_for_evaluation(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the evaluation lock of a run, or of another folder of results; waits for other evaluations of it.

    Raises:
        BadInput: the run is being trained, so its encoder is about to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = evaluation_lock(folder)
    if not lock.acquire():
        say(f"waiting for another command that evaluates {folder} …")
        while not lock.acquire(60):
            pass
    try:
        if is_training(folder):
            raise BadInput(f"{folder} is being trained at this moment; wait for its end, or interrupt it (Ctrl-C).")
        yield
    finally:
        lock.remove()


@contextmanager
def locked_for_upload(folder: Path) -> Iterator[None]:
    """Hold the upload lock: one process at a time sends `folder` to MLflow.

    Raises:
        BadInput: another process held it for all of UPLOAD_LOCK_TIMEOUT_S.
    """
    lock = FolderLock(folder / ".mirror.lock")
    if not lock.acquire(UPLOAD_LOCK_TIMEOUT_S):
        raise BadInput(
            f"another process has been sending {folder} to MLflow for {UPLOAD_LOCK_TIMEOUT_S:g} s; try again when it has ended."
        )
    try:
        yield
    finally:
        lock.release()
