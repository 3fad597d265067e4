"""Decoding by worker processes: pictures as uint8 canvases, in order, whatever the number of workers."""

import errno
import os
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
from twoviews.errors import BadInput

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
        self.loader = DataLoader(
            _Decode(files.paths, files.size, files.channels),
            batch_size=None,
            sampler=self.work,
            num_workers=files.workers,
            collate_fn=_unchanged,
            prefetch_factor=4 if files.workers else None,
            persistent_workers=files.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # or each pass would draw from the global generator that resuming restores
        )

    def run(self, work: list[Tensor]) -> Iterator[Read]:
        self.work[:] = work
        for pixels, *rest in self.loader:
            yield Read(pixels, *rest)


class _Decode(Dataset[Read]):
    """What a worker process holds."""

    def __init__(self, paths: list[str], size: int, channels: int):
        self.paths, self.size, self.channels = paths, size, channels

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
        sizes = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
        return Read(torch.from_numpy(pixels), sizes, torch.tensor(good, dtype=torch.int64), broken, unreadable)


def _unchanged(item):
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """SLURM and Ctrl-C signal every process of a job; the parent still needs its workers to finish the step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
