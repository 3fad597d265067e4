"""Decoding by worker processes: pictures as uint8 canvases, in order, whatever the number of workers."""

import atexit
import errno
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twoviews.console import say_on_stderr
from twoviews.data.picture_files import decode
from twoviews.data.store import Chunk
from twoviews.errors import BadInput

PREFETCH = 4  # chunks that each worker decodes ahead
CHUNK_SIZE = 32  # canvases per unit of work: small, so that all workers share in the first batch


class Decoded:
    """Picture files that are decoded each time they are read, by worker processes that stay alive.

    Args:
        paths: the files.
        size: S, side of the canvas in px.
        channels: C, 1 or 3.
        workers: processes that decode; 0 is this process.
    """

    def __init__(self, paths: list[str], *, size: int, channels: int, workers: int):
        self.paths, self.size, self.channels, self.workers = paths, size, channels, workers
        self._idle: _Workers | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Int[Tensor, " n"]) -> "Decoded":
        """The pictures of these rows, in this order."""
        paths = [self.paths[row] for row in index.tolist()]
        return Decoded(paths, size=self.size, channels=self.channels, workers=self.workers)

    def read(self, chunks: Iterable[Int[Tensor, " _"]]) -> Iterator[Chunk]:
        """Each chunk of rows, decoded, in order; later chunks are decoded meanwhile.

        Raises:
            BadInput: a file could not be opened.
        """
        # A second reader, while one is at work, gets workers of its own.
        workers, self._idle = self._idle or _Workers(self), None
        try:
            for chunk in workers.run(list(chunks)):
                if chunk.unreadable:
                    raise BadInput(chunk.unreadable)
                yield chunk
        finally:
            self._idle = workers

    def batches(self, parts: Sequence[Int[Tensor, " _"]]) -> Iterator[UInt8[Tensor, "_ C S S"]]:
        """The canvases of each part, in order.

        Raises:
            BadInput: a file that was sound when the data were indexed is not any more.
        """
        splits = [part.split(CHUNK_SIZE) for part in parts]
        decoded = self.read([rows for split in splits for rows in split])
        for split in splits:
            chunks = [next(decoded) for _ in split]
            for chunk in chunks:
                for row, reason in chunk.broken:
                    raise BadInput(f"{self.paths[row]} was a sound picture when the data were indexed, now {reason}.")
            yield chunks[0].pixels if len(chunks) == 1 else torch.cat([chunk.pixels for chunk in chunks])


class _Workers:
    """A DataLoader over `decode` that gets a new list of rows for each pass, so that its processes can stay alive."""

    def __init__(self, files: Decoded):
        self.work: list[Tensor] = []
        piped = files.workers > 0 and not _fits_shared_memory(files)
        self.loader = DataLoader(
            _Decode(files.paths, files.size, files.channels, piped),
            batch_size=None,
            sampler=self.work,
            num_workers=files.workers,
            collate_fn=_unchanged,
            prefetch_factor=PREFETCH if files.workers else None,
            persistent_workers=files.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # or each pass would draw from the global generator that resuming restores
        )

    def run(self, work: list[Tensor]) -> Iterator[Chunk]:
        self.work[:] = work
        for rows, pixels, sizes, broken, unreadable in self.loader:
            yield Chunk(*map(torch.as_tensor, (rows, pixels, sizes)), broken=broken, unreadable=unreadable)  # type: ignore[misc]


def _fits_shared_memory(files: Decoded) -> bool:
    """Whether shared memory can hold the chunks that workers decode ahead; if not, as in small containers, print why."""
    shared = Path("/dev/shm")  # noqa: S108
    if not shared.is_dir():
        return True
    need = 2 * files.workers * PREFETCH * CHUNK_SIZE * files.channels * files.size**2  # twice, for chunks in transit
    free = shutil.disk_usage(shared).free
    if need > free:
        say_on_stderr(
            f"{shared} has {free / 1e6:,.0f} MB left and {files.workers} workers need {need / 1e6:,.0f} MB: images come from "
            "them by pipes, which is slower (a container gets more by --shm-size)."
        )
    return need <= free


def worker_trouble(error: RuntimeError) -> str:
    """A sentence for torch's error when a process that decodes has died; empty for other errors."""
    text = " ".join(str(error).split())
    if not re.search(r"DataLoader worker \(pid|shared memory|ancdata", text):
        return ""
    match = re.search(r"DataLoader worker \(pid[^)]*\) (?:is|exited)[^.]*|[^.:]*(?:shared memory|ancdata)[^.]*", text)
    why = match[0] if match else text[:200]
    return (
        f"a process that decodes images is gone ({why}); if memory is used up, use fewer (workers=1, or 0 for none); the "
        "same command goes on from the last checkpoint."
    )


@atexit.register
def _end_workers() -> None:
    """Kill workers: one that hangs on a disk ignores the request to end, and Python would wait for it."""
    for child in multiprocessing.active_children():
        child.kill()


class _Decode(Dataset[Chunk]):
    """Decodes chunks of rows in a worker process.

    Args:
        paths: the files.
        size: S, side of the canvas in px.
        channels: C.
        piped: give arrays, which come through a pipe, instead of tensors, which come in shared memory.
    """

    def __init__(self, paths: list[str], size: int, channels: int, piped: bool):
        self.paths, self.size, self.channels, self.piped = paths, size, channels, piped

    def __getitem__(self, rows: Int[Tensor, " n"]) -> Chunk:  # the sampler hands out tensors of rows
        canvases, sizes, decoded, broken = [], [], [], []
        unreadable = ""
        for row in rows.tolist():
            try:
                canvas, height_width = decode(self.paths[row], self.size, self.channels)
            except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError ...
                dangling_link = isinstance(error, FileNotFoundError) and Path(self.paths[row]).is_symlink()
                if isinstance(error, OSError) and error.errno not in (None, errno.ELOOP) and not dangling_link:
                    # The system's fault, not the picture's, so the store must not record it as broken.
                    unreadable = unreadable or f"{self.paths[row]} cannot be read: {error.strerror}."
                broken.append((row, " ".join(str(error).replace(repr(self.paths[row]), "").split())))
                continue
            canvases.append(canvas)
            sizes.append(height_width)
            decoded.append(row)
        pixels = np.stack(canvases) if canvases else np.empty((0, self.channels, self.size, self.size), np.uint8)
        arrays = np.array(decoded, np.int64), pixels, np.array(sizes, np.int64).reshape(-1, 2)
        values = arrays if self.piped else map(torch.from_numpy, arrays)
        return Chunk(*values, broken, unreadable)  # type: ignore[arg-type]


def _unchanged(item):
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals: SLURM and Ctrl-C signal every process of a job, and the parent needs its workers to finish the step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
