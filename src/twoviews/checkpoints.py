"""Checkpoints that are copied and written while the training goes on."""

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from twoviews.run import Run
from twoviews.tracking.metrics import Metrics


class Checkpoints:
    """Writes the state of a training to the run folder, from a thread.

    On a CPU, weights and what the optimizer keeps for them are copied by that thread, too, which the next update must wait
    for (`wait_for_copy`); buffers, which forward passes and E-steps change, are copied at once. On a GPU everything is
    copied to pinned memory by the stream that computes, in its turn, and no copy is waited for.

    Args:
        run: the run folder.
        metrics: told how many of its bytes a written checkpoint covers.
    """

    def __init__(self, run: Run, metrics: Metrics | None):
        self.run, self.metrics = run, metrics
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._copy: dict[str, Any] = {}  # of the last state: to be given new memory takes as long as to fill it

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
        self._copy |= copied(now, self._copy)
        if any(tensor.is_cuda for tensor in constant.values()):
            self._copy |= copied(later, self._copy)
            done = torch.cuda.Event()
            done.record()
            # The next update needs no waiting: the stream keeps the order of the copies and of what comes after them.
            self._writing = self._writer.submit(self._write, self._writer.submit(done.synchronize))
        else:
            self._copying = self._writer.submit(self._copy_later, later)
            self._writing = self._writer.submit(self._write, self._copying)

    def _copy_later(self, state: dict[str, Any]) -> None:
        self._copy |= copied(state, self._copy)

    def wait_for_copy(self) -> None:
        """Wait until the last state is copied, and weights may change."""
        copying, self._copying = self._copying, None
        if copying:
            copying.result()

    def _write(self, copying: "Future[None]") -> None:
        copying.result()  # half a copy is none
        state = {key: value for key, value in self._copy.items() if key != "buffers"}
        self.run.save({**state, "method": {**self._copy["method"], **self._copy["buffers"]}})
        if self.metrics:  # from now on the tracker may send what the checkpoint covers
            self.metrics.commit(state["metrics_bytes"])

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return math.isfinite(torch.stack(list(norms)).sum().item())


def copied(tree: Any, old: Any = None) -> Any:
    """Nested dictionaries and lists with copies of their tensors in the CPU's memory; those of a GPU are under way.

    They take the memory of an `old` copy where it has a tensor of the same shape at the same place.
    """
    if isinstance(tree, Tensor):
        reused = isinstance(old, Tensor) and (old.shape, old.dtype) == (tree.shape, tree.dtype)
        # Without pinned memory a GPU's copy would be waited for.
        target = old if reused else torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        return target.copy_(tree.detach(), non_blocking=True)
    if isinstance(tree, dict):
        return {key: copied(value, old.get(key) if isinstance(old, dict) else None) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        others = old if isinstance(old, list | tuple) and len(old) == len(tree) else [None] * len(tree)
        return type(tree)(copied(value, other) for value, other in zip(tree, others, strict=True))
    return tree
