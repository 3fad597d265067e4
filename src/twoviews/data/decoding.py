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
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twoviews.data.files import decode
from twoviews.data.progress import say
from twoviews.errors import BadInput

PREFETCH = 4  # chunks that each worker has ready
CHUNK = 32  # canvases per unit of work: small, so that all workers share in the first batch


class Read(NamedTuple):
    """What came of decoding some files."""

    pixels: UInt8[Tensor, "b C S S"]
    sizes: Int[Tensor, "b 2"]  # original height and width in px
    rows: Int[Tensor, "b"]  # the files these come from
    broken: list[tuple[int, str]]  # the other files, and what is wrong with them
    unreadable: str = ""  # the sentence, when a file could not be opened at all


class Decoded:
    """Pictures that lie in files and are decoded when they are asked for, by workers that stay.

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

    def subset(self, index: Int[Tensor, "n"]) -> "Decoded":
        """Those of the pictures that `index` names."""
        paths = [self.paths[row] for row in index.tolist()]
        return Decoded(paths, size=self.size, channels=self.channels, workers=self.workers)

    def read(self, chunks: Iterable[Int[Tensor, "_"]]) -> Iterator[Read]:
        """What came of decoding each chunk of rows, in order; later chunks are decoded meanwhile.

        Raises:
            BadInput: a file could not be opened.
        """
        # A second reader, while one is at work, gets workers of its own.
        workers, self._idle = self._idle or _Workers(self), None
        try:
            for read in workers.run(list(chunks)):
                if read.unreadable:
                    raise BadInput(read.unreadable)
                yield read
        finally:
            self._idle = workers

    def batches(self, parts: Sequence[Int[Tensor, "_"]]) -> Iterator[UInt8[Tensor, "_ C S S"]]:
        """The canvases of each part, in order.

        Raises:
            BadInput: a file that was sound when the data were indexed is not any more.
        """
        chunks = [part.split(CHUNK) for part in parts]
        reads = self.read([chunk for part in chunks for chunk in part])
        for part in chunks:
            done = [next(reads) for _ in part]
            for read in done:
                for row, reason in read.broken:
                    raise BadInput(f"{self.paths[row]} was a sound picture when the data were indexed, now {reason}.")
            yield done[0].pixels if len(done) == 1 else torch.cat([read.pixels for read in done])


class _Workers:
    """A DataLoader over `decode` whose list of work is exchanged between passes, so that its processes can stay."""

    def __init__(self, files: Decoded):
        self.work: list[Tensor] = []
        piped = files.workers > 0 and not _room(files)
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

    def run(self, work: list[Tensor]) -> Iterator[Read]:
        self.work[:] = work
        for pixels, sizes, rows, broken, unreadable in self.loader:
            yield Read(*map(torch.as_tensor, (pixels, sizes, rows)), broken=broken, unreadable=unreadable)  # type: ignore[misc]


def _room(files: Decoded) -> bool:
    """Whether the machine has shared memory for what workers have ready, as small containers have not; says so if not."""
    shared = Path("/dev/shm")  # noqa: S108
    if not shared.is_dir():
        return True
    need = 2 * files.workers * PREFETCH * CHUNK * files.channels * files.size**2  # some is on its way
    free = shutil.disk_usage(shared).free
    if need > free:
        say(
            f"{shared} has {free / 1e6:,.0f} MB left and {files.workers} workers want {need / 1e6:,.0f} MB: images come from "
            "them by pipes, which is slower (a container gets more by --shm-size)."
        )
    return need <= free


def worker_trouble(error: RuntimeError) -> str:
    """A sentence for what torch raises when a process that decodes is gone; empty for other errors."""
    text = " ".join(str(error).split())
    if not re.search(r"DataLoader worker \(pid|shared memory|ancdata", text):
        return ""
    found = re.search(r"DataLoader worker \(pid[^)]*\) (?:is|exited)[^.]*|[^.:]*(?:shared memory|ancdata)[^.]*", text)
    why = found[0] if found else text[:200]
    return (
        f"a process that decodes images is gone ({why}); if memory is used up, use fewer (workers=1, or 0 for none); the "
        "same command goes on from the last checkpoint."
    )


@atexit.register
def _end_workers() -> None:
    """What hangs on a disk does not hear that it is to end, and would be waited for."""
    for child in multiprocessing.active_children():
        child.kill()


class _Decode(Dataset[Read]):
    """What a worker process holds.

    Args:
        paths: the files.
        size: S, side of the canvas in px.
        channels: C.
        piped: give arrays, which come through a pipe, instead of tensors, which come in shared memory.
    """

    def __init__(self, paths: list[str], size: int, channels: int, piped: bool):
        self.paths, self.size, self.channels, self.piped = paths, size, channels, piped

    def __getitem__(self, rows: Int[Tensor, "n"]) -> Read:  # the sampler hands out tensors of rows
        canvases, sizes, good, broken = [], [], [], []
        unreadable = ""
        for row in rows.tolist():
            try:
                canvas, height_width = decode(self.paths[row], self.size, self.channels)
            except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError ...
                nowhere = isinstance(error, FileNotFoundError) and Path(self.paths[row]).is_symlink()
                if isinstance(error, OSError) and error.errno not in (None, errno.ELOOP) and not nowhere:
                    # No fault of the picture, nor a link that leads nowhere, so not kept as broken.
                    unreadable = unreadable or f"{self.paths[row]} cannot be read: {error.strerror}."
                broken.append((row, " ".join(str(error).replace(repr(self.paths[row]), "").split())))
                continue
            canvases.append(canvas)
            sizes.append(height_width)
            good.append(row)
        pixels = np.stack(canvases) if canvases else np.empty((0, self.channels, self.size, self.size), np.uint8)
        arrays = pixels, np.array(sizes, np.int64).reshape(-1, 2), np.array(good, np.int64)
        kept = arrays if self.piped else map(torch.from_numpy, arrays)
        return Read(*kept, broken, unreadable)  # type: ignore[arg-type]


def _unchanged(item):
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """SLURM and Ctrl-C signal every process of a job; the parent still needs its workers to finish the step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
