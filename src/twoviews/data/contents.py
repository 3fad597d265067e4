"""What is in files, as a digest: two data sets may share a store only if that is the same."""

import contextlib
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twoviews.console import progress_of
from twoviews.files import write_atomic

# A file that was written so short a time ago may be written again without a change of its times, which are multiples of
# two seconds on some file systems, and come from another clock on those of a network.
SETTLED_S = 30.0
READERS = 16  # threads, which wait for the disk
CHUNK = 256  # files


def contents(paths: Sequence[str], cache: str) -> str:
    """The digest of the files, in this order; they are read unless they are known to be the ones that were read before.

    They are known by place, inode, size and times; of these the time of the last change is set by the system alone, so
    that neither an archive nor a copy brings it along. What is known is kept in `<cache>/contents`.
    """
    stamps = [_stamp(path) for path in paths]
    known = (
        Path(cache).expanduser()
        / "contents"
        / hashlib.blake2b(repr([paths, stamps]).encode(), digest_size=16).hexdigest()
    )
    with contextlib.suppress(OSError):
        return known.read_text()
    started, digest = time.time(), hashlib.blake2b(digest_size=16)
    shown = (
        progress_of("Reading", len(paths), "images", at_end=True)
        if len(paths) > CHUNK
        else contextlib.nullcontext(lambda _: None)
    )
    with ThreadPoolExecutor(READERS) as pool, shown as advance:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            for file_digest in pool.map(_digest, chunk):
                digest.update(file_digest)
            advance(len(chunk))
    if max(max(stamp) for _, *stamp in stamps) < (started - SETTLED_S) * 1e9:
        with contextlib.suppress(OSError):  # of a cache that cannot be written: whoever writes the store says so
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, digest.hexdigest())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[str, int, int]:
    """Inode and size, and the times in ns at which content and file were changed; all 0 for a link that leads nowhere."""
    try:
        status = Path(path).stat()
    except OSError:
        return "", 0, 0
    return f"{status.st_ino} {status.st_size}", status.st_mtime_ns, status.st_ctime_ns


def _digest(path: str) -> bytes:
    """Of one file; of one that cannot be read, which decoding it will say, nothing."""
    try:
        if not Path(path).is_file():
            return bytes(16)
        with open(path, "rb") as file:  # noqa: PTH123
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return bytes(16)
