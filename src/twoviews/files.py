"""Files that are replaced as a whole, and errors of the file system as sentences for the user."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from twoviews.errors import BadInput, system_reason

# Errors that a user can put right by making room or by choosing another folder; any other is a defect.
FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.EIO, errno.ESTALE, errno.EILSEQ, errno.EBUSY, errno.ENAMETOOLONG),
)


READABLE = "make it readable and writable"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file so that a crash leaves the old content or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text, which is written in UTF-8. Bytes of file names that are not UTF-8 are written as \\udcfc,
            from which JSON makes the name again.

    Raises:
        OSError: the content cannot be written; the old file stays.
    """
    with open_atomic(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def shortened(path: Path) -> Path:
    """A path for messages: relative to the working directory if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of `path` when the block ends without an error, as in `write_atomic`.

    The content goes to `<path>.part`, which is flushed to the disk before it is renamed. Its permissions are those of the
    umask. After an error nothing is left of it. Two processes must not replace the same path at the same time.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_error(error: OSError, path: Path | str, remedy: str = READABLE) -> str | None:
    """The sentence for an error that a user can put right; None for any other.

    Args:
        error: raised by the system.
        path: named where the error does not name one itself.
        remedy: what the user can do about `path` and what is in it, such as "choose another folder with data.cache=".
    """
    if isinstance(path, Path) and error.filename and not _related(Path(os.fsdecode(error.filename)), path):
        remedy = READABLE  # an input, say, which another folder for the output would not help
    path = error.filename or path
    if error.errno in FULL:
        return f"no space is left on the device of {path}; free some, or {remedy}."
    if error.errno == errno.ENAMETOOLONG:
        reason = "a name in it is too long: most file systems allow 255 bytes"
        return f"{str(path)[:80]}… cannot be used ({reason}); shorten it."
    if error.errno in UNUSABLE:
        return f"{path} cannot be used ({system_reason(error)}); {remedy}."
    return None


def _related(file: Path, path: Path) -> bool:
    """Whether a file is below a path, or above it."""
    file, path = file.absolute(), path.absolute()
    return file.is_relative_to(path) or path.is_relative_to(file)


@contextmanager
def file_errors(path: Path | str, remedy: str = READABLE) -> Iterator[None]:
    """Turn errors of the file system that a user can put right into BadInput, by `file_error`."""
    try:
        yield
    except OSError as error:
        if (sentence := file_error(error, path, remedy)) is None:
            raise
        raise BadInput(sentence) from None
