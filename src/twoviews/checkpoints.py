"""Checkpoints of a training: files that survive a crash at any moment, written while the training goes on.

A checkpoint is written to new.pt, flushed to the disk and renamed to last.pt; the one before becomes previous.pt. So
whenever a process dies, one whole checkpoint is there.
"""

import io
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twoviews import distributed, foreign
from twoviews.errors import BadInput
from twoviews.files import sync
from twoviews.ranges import Total
from twoviews.signatures import mismatch
from twoviews.tracking.metrics import Metrics, read_durable_bytes

LAST, PREVIOUS, NEW = "last.pt", "previous.pt", "new.pt"
CHECKPOINT_FILES = (LAST, PREVIOUS)
CHECKPOINT_KEYS = ("method", "optimizer", "scaler", "position", "metrics_bytes", "latest")

# ------------------------------------------------------------------------------------------------------------------ files


def has_checkpoint(folder: Path) -> bool:
    """Whether the run has a checkpoint, damaged ones included."""
    return any((folder / name).exists() for name in CHECKPOINT_FILES)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Make `state` the last checkpoint of the run and keep the one before as previous.pt."""
    new = folder / NEW
    # Through memory: when torch writes a file itself, it reports a full disk as an error of its own.
    content = io.BytesIO()
    torch.save(state, content)
    try:
        with new.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise
    _rotate(folder)


def load_last_checkpoint(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The last whole checkpoint of the run, on the CPU; None where there never was one.

    A damaged last.pt is renamed to damaged.pt, with a message, and the checkpoint before it is used.

    Raises:
        BadInput: all checkpoints are damaged, or they were deleted.
    """
    if distributed.rank() == 0:
        _finish_save(folder)
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in CHECKPOINT_FILES):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
            if missing := [key for key in CHECKPOINT_KEYS if key not in state]:
                raise ValueError(f"{missing[0]} is missing")
            if wrong := mismatch(state["metrics_bytes"], Total):
                raise ValueError(f"metrics_bytes {wrong}")
        except (OSError, ValueError) as error:
            damaged[path] = str(error).splitlines()[0]
            continue
        for bad, reason in damaged.items():
            if distributed.rank() == 0:
                # Renamed, or the next save would keep it in place of the whole one.
                bad.replace(kept := _unused_name(folder, "damaged"))
                say(f"warning: {bad} is damaged ({reason}) and kept as {kept.name}; the one before it is used.")
        return state
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise BadInput(
            f"no checkpoint in {folder} is whole ({reasons}); put one back, or start over with fresh=true, which keeps "
            "the old results beside it."
        )
    if read_durable_bytes(folder) or (folder / "damaged.pt").exists():
        raise BadInput(
            f"the checkpoints of {folder} are gone ({' and '.join(CHECKPOINT_FILES)}); put one back, or start over with "
            "fresh=true, which keeps the old results beside it."
        )
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, whose checksums are compared.

    Raises:
        ValueError: the file is damaged or not a checkpoint.
        OSError: the file cannot be read.
    """
    if path.is_dir() or not zipfile.is_zipfile(path):
        raise ValueError("not a complete file")
    try:
        refuse_compressed(path)
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types; with weights_only, a file can do no more than fail to be read
        raise ValueError(foreign.short(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("method"), dict):
        raise ValueError("not a checkpoint of a run")
    return state


def refuse_compressed(path: Path) -> None:
    """Refuse an archive that torch did not write: torch compresses nothing, and a small compressed file can fill the memory.

    Raises:
        ValueError: a member is compressed, or members overlap.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or size > path.stat().st_size:
        raise ValueError("it is not an archive that torch.save wrote")


def _rotate(folder: Path) -> None:
    last = folder / LAST
    if last.exists():
        last.replace(folder / PREVIOUS)
    (folder / NEW).replace(last)
    sync(folder)


def _finish_save(folder: Path) -> None:
    """Finish a save that was killed: a whole new.pt becomes the last checkpoint, an incomplete one is deleted."""
    new, last = folder / NEW, folder / LAST
    if not new.exists():
        return
    try:
        load_checkpoint(new)
    except ValueError:
        if last.exists() or not (folder / PREVIOUS).exists():
            new.unlink()
        else:  # killed between the two renames, so it was whole and has been damaged since
            new.replace(last)
    except OSError:  # it may be whole, and readable at another time
        return
    else:
        _rotate(folder)


def _unused_name(folder: Path, stem: str) -> Path:
    """The first of <stem>.pt, <stem>.2.pt, … that does not exist."""
    names = itertools.chain([f"{stem}.pt"], (f"{stem}.{number}.pt" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / name).exists())


# ----------------------------------------------------------------------------------------------------------- asynchronous


class Checkpointer:
    """Writes checkpoints to the run folder, from a thread.

    On a CPU the thread also copies the weights and what the optimizer keeps for them, and the next update must wait for
    that (`wait_for_copy`); buffers, which forward passes and E-steps change, are copied at once. On a GPU everything is
    copied to pinned memory by the stream that computes, in its turn, and nothing waits for the copy.

    Args:
        folder: the run folder.
        metrics: told how many of its bytes a written checkpoint keeps.
        copy: of a state, by which the memory of an older copy is used again; see `copied`.
    """

    def __init__(self, folder: Path, metrics: Metrics | None, copy: Callable[[Any, Any], Any] | None = None):
        self.folder, self.metrics, self.copy = folder, metrics, copy or copied
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._copy: dict[str, Any] = {}  # kept, because new memory takes as long to get as to fill

    def save(self, state: dict[str, Any], weights: Iterable[str]) -> None:
        """Begin to write a checkpoint.

        Args:
            state: of the training, with "method" and "optimizer" in it.
            weights: names of the entries of "method" that only an update changes.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        self.wait()
        names = set(weights)
        constant = {name: value for name, value in state["method"].items() if name in names}
        changing = {name: value for name, value in state["method"].items() if name not in names}
        later = {"method": constant, "optimizer": state["optimizer"]}
        now = {key: value for key, value in state.items() if key not in later} | {"buffers": changing}
        self._add(now)
        if any(tensor.is_cuda for tensor in constant.values()):
            self._add(later)
            done = torch.cuda.Event()
            done.record()
            # The next update need not wait: the stream keeps the order of the copies and of what comes after them.
            self._writing = self._thread.submit(self._write, self._thread.submit(done.synchronize))
        else:
            self._copying = self._thread.submit(self._add, later)
            self._writing = self._thread.submit(self._write, self._copying)

    def wait_for_copy(self) -> None:
        """Wait until the last state is copied and weights may change."""
        copying, self._copying = self._copying, None
        if copying:
            copying.result()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _add(self, state: dict[str, Any]) -> None:
        self._copy |= self.copy(state, self._copy)

    def _write(self, copying: "Future[None]") -> None:
        copying.result()  # raises if the copy failed: an incomplete state must not be written
        state = {key: value for key, value in self._copy.items() if key != "buffers"}
        save_checkpoint(self.folder, {**state, "method": {**self._copy["method"], **self._copy["buffers"]}})
        if self.metrics:
            self.metrics.commit(state["metrics_bytes"])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return math.isfinite(torch.stack(list(norms)).sum().item())


def copied(tree: Any, old: Any = None) -> Any:
    """Nested dictionaries and lists with copies of their tensors in CPU memory; copies from a GPU may not be done yet.

    Args:
        tree: what is copied.
        old: an earlier copy, whose memory is used where it has a tensor of the same shape and type at the same place.
    """
    if isinstance(tree, Tensor):
        reused = isinstance(old, Tensor) and (old.shape, old.dtype) == (tree.shape, tree.dtype)
        # Without pinned memory the host would wait for a copy from a GPU.
        target = old if reused else torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        return target.copy_(tree.detach(), non_blocking=True)
    if isinstance(tree, dict):
        return {key: copied(value, old.get(key) if isinstance(old, dict) else None) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        olds = old if isinstance(old, list | tuple) and len(old) == len(tree) else [None] * len(tree)
        return type(tree)(copied(value, old_value) for value, old_value in zip(tree, olds, strict=True))
    return tree
