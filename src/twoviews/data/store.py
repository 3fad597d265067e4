"""Store: a data set prepared once, in a folder that runs and machines share.

    <cache>/<name>-<key>/pixels.npy   uint8 [N, C, S, S], memory-mapped; not there when pictures are decoded on demand
                         arrays.npz   sizes [N, 2], labels [N] (-1: none), rows [N] (position in the listing)
                         meta.json    splits, classes, channels, size, mean, std, digest, broken files, notes

The key is a digest of everything that the content depends on. A store is written beside its final name and renamed,
so that it is whole or not there; a lock lets one process build it while the others wait.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from twoviews.console import in_bytes, progress_of, say_on_stderr
from twoviews.errors import BadInput
from twoviews.files import file_errors, sync

FORMAT = 1  # in every key: raise it when the meaning of a store's files changes
SPARE = 2**24  # bytes wanted beside the pixels, for labels, sizes and the file system's own use


class Chunk(NamedTuple):
    """Some images of a listing, read or decoded."""

    rows: Int[Tensor, " b"]  # position in the listing
    pixels: UInt8[Tensor, "b C S S"]
    sizes: Int[Tensor, "b 2"]  # original height and width in px
    broken: Sequence[tuple[int, str]] = ()  # other rows of the listing, each with the reason why it cannot be decoded
    unreadable: str = ""  # a sentence, if a file could not be opened at all


@dataclass(frozen=True)
class Recipe:
    """Everything that a store is built from.

    Splits are ranges of rows [start, stop) of the listing; mean and std are computed over the split `train`.
    """

    splits: dict[str, tuple[int, int]]
    labels: Int[np.ndarray, " N"]  # by row of the listing, -1: none
    classes: tuple[str, ...]
    channels: int
    size: int
    chunks: Iterable[Chunk]
    keep_pixels: bool = True
    names: tuple[str, ...] = ()  # by row, to name broken files
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """The content of a store; `rows` are the positions in the listing of the images that could be decoded."""

    pixels: UInt8[Tensor, "N C S S"] | None
    sizes: Int[Tensor, "N 2"]
    labels: Int[Tensor, " N"]
    rows: Int[Tensor, " N"]
    meta: dict[str, Any]


def stored(cache: str, name: str, key: dict[str, Any], recipe: Callable[[], Recipe]) -> Store:
    """The store of this name and key, built from `recipe()` if it is not there yet.

    Raises:
        BadInput: the cache cannot be written, or has no room.
    """
    from filelock import FileLock, Timeout

    digest = hashlib.blake2b(json.dumps([FORMAT, key], sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = Path(cache).expanduser() / f"{name}-{digest}"
    if not folder.is_dir():
        with file_errors(folder.parent, "choose another folder with cache="):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock")
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                say_on_stderr(f"Waiting for another process to finish {folder} ...")
                held = lock.acquire()
            with held:
                if not folder.is_dir():
                    _build(folder, name, recipe())
    return _load(folder)


def _build(folder: Path, name: str, recipe: Recipe) -> None:
    """Write the store beside `folder`, then rename it."""
    beside = folder.with_name(folder.name + ".building")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed: we hold the lock, so nobody is at it
    count = len(recipe.labels)
    need = SPARE + (count * recipe.channels * recipe.size**2 if recipe.keep_pixels else 0)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise BadInput(
            f"The disk of {folder.parent} has {in_bytes(free)} left and the decoded images need {in_bytes(need)}: free some "
            "room or choose another folder with cache=."
        )
    try:
        beside.mkdir()
        _write(beside, name, recipe)
        for path in (*beside.iterdir(), beside):
            sync(path)
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write(folder: Path, name: str, recipe: Recipe) -> None:
    count, shape = len(recipe.labels), (recipe.channels, recipe.size, recipe.size)
    train, hashes = recipe.splits["train"], hashlib.blake2b(digest_size=16)
    histogram = torch.zeros(recipe.channels, 256, dtype=torch.int64)
    rows, sizes, broken = [], [], []
    title = f"{'Decoding' if recipe.keep_pixels else 'Checking'} {name}"
    # Plain writes: a mapped file on a full disk ends in SIGBUS, a written one in an error that can be said.
    with (folder / "pixels.npy").open("wb") as file, progress_of(title, count, "images", at_end=True) as advance:
        _header(file, (count, *shape))
        for chunk in recipe.chunks:
            values = np.ascontiguousarray(chunk.pixels.numpy()).data
            hashes.update(values)
            if recipe.keep_pixels:
                file.write(values)
            histogram += _histogram(chunk.pixels[(chunk.rows >= train[0]) & (chunk.rows < train[1])])
            rows.append(chunk.rows)
            sizes.append(chunk.sizes)
            broken += chunk.broken
            advance(len(chunk.rows) + len(chunk.broken))
        file.seek(0)
        rows = torch.cat(rows).numpy()
        _header(file, (len(rows), *shape))  # numpy pads headers, so that the first number may change
    if not recipe.keep_pixels:
        (folder / "pixels.npy").unlink()
    sizes, labels = torch.cat(sizes).numpy(), recipe.labels[rows].astype(np.int64)
    np.savez(folder / "arrays.npz", sizes=sizes, labels=labels, rows=rows)
    splits = {key: [int(x) for x in np.searchsorted(rows, bounds)] for key, bounds in recipe.splits.items()}
    for facts in (sizes.tobytes(), labels.tobytes(), json.dumps([splits, recipe.classes]).encode()):
        hashes.update(facts)
    mean, std = _moments(histogram)
    meta = {
        "pixels": recipe.keep_pixels,
        "splits": splits,
        "classes": recipe.classes,
        "channels": recipe.channels,
        "size": recipe.size,
        "mean": mean,
        "std": std,
        "digest": hashes.hexdigest(),
        "broken": [[recipe.names[row], reason] for row, reason in broken],
        "notes": recipe.notes,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _header(file, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _load(folder: Path) -> Store:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = np.load(folder / "arrays.npz")
        sizes, labels, rows = (torch.from_numpy(arrays[key]) for key in ("sizes", "labels", "rows"))
        pixels = None
        if meta["pixels"]:
            # Mode "c" maps the file privately: nothing is ever written back, and torch takes the mapping as writable.
            pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c"))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder} is damaged ({error}): delete it, and it is made anew.") from None
    return Store(pixels, sizes, labels, rows, meta)


def _histogram(pixels: UInt8[Tensor, "b C S S"]) -> Int[Tensor, "C 256"]:
    """How often each value occurs in each channel: integers, so that no order of summing matters."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)])


def _moments(histogram: Int[Tensor, "C 256"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; std is at least 1/255, one step of a pixel."""
    shares = histogram.double() / histogram.sum(1, keepdim=True)
    values = torch.arange(256).double() / 255
    mean = shares @ values
    std = ((shares @ values**2) - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def statistics(pixels: UInt8[Tensor, "N C S S"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    return _moments(_histogram(pixels))
