"""Estimates of the least memory that a training needs, compared with the free memory before anything is allocated."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.overrides import TorchFunctionMode

from twoviews.console import in_bytes
from twoviews.data.views import Views
from twoviews.errors import BadInput
from twoviews.methods.method import Method

MAX_BYTES = 2**63  # that torch can count
COPIES = 3  # of a trained weight: the weight, its gradient and the optimizer's state


class TooLarge(BadInput):
    """There is not enough memory for the networks or the views."""


class _WithoutValues(TorchFunctionMode):
    """Leaves out what only changes the values of new tensors, and not their sizes.

    Tensors without memory have no values, and torch would import its compiler for these functions: half a second at each start.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_, nnf.normalize):
            return args[0]
        kwargs = kwargs or {}
        if func in (torch.rand, torch.randn) and kwargs.get("device") is None:
            func, kwargs = torch.empty, {key: value for key, value in kwargs.items() if key != "generator"}
        return func(*args, **kwargs)


def check_networks(make: Callable[[], Method], device: torch.device, sizes: str) -> None:
    """Refuse networks for which there is no memory, before they are made.

    Args:
        make: builds the method; called on torch's meta device, where tensors have sizes but no memory.
        device: of the training.
        sizes: the configuration values with most influence on the memory, for the message.

    Raises:
        TooLarge: weights, gradients, the optimizer's state and buffers need more than is free.
        BadInput: whatever `make` finds wrong.
    """
    try:
        with torch.device("meta"), _WithoutValues():
            method = make()
        needed = sum(COPIES * p.nbytes if p.requires_grad else p.nbytes for p in method.parameters())
        needed += sum(buffer.nbytes for buffer in method.buffers())
    except (RuntimeError, OverflowError, TypeError) as error:
        if not any(word in str(error) for word in ("overflow", "out of range", "too large", "must be tuple of ints")):
            raise
        needed = MAX_BYTES
    _compare(needed, device, "weights, gradients, the optimizer's state and buffers", sizes)


def check_views(views: Views, batch_size: int, channels: int, device: torch.device) -> None:
    """Refuse views for which there is no memory.

    Args:
        views: makes the views of an image.
        batch_size: images of a step in this process.
        channels: of an image.
        device: of the training.

    Raises:
        TooLarge: a batch of them needs more than is free.
    """
    needed = batch_size * channels * sum(side**2 for side in views.sizes) * 4
    sides = ", ".join(f"{side} px" for side in dict.fromkeys(views.sizes))
    sizes = f"views.<name>.size= and views.<name>.count= ({len(views)} views, side: {sides}) or batch_size={batch_size}"
    _compare(min(needed, MAX_BYTES), device, "the views of a batch", sizes)


def _compare(needed: int, device: torch.device, what: str, sizes: str) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif sys.platform == "linux":
        free = free_memory()
    else:
        return
    if needed > free:
        more = "more than " if needed >= MAX_BYTES else ""
        raise TooLarge(
            f"{what} need {more}{in_bytes(needed)} of memory, and {in_bytes(free)} are free on this machine; choose smaller "
            f"ones: {sizes}."
        )


def ran_out(error: BaseException) -> bool:
    """Whether an exception of torch, or of a library that it calls, means that there is no memory left."""
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def free_memory() -> int:
    """Free memory in bytes of this machine and of the control groups of this process, whichever is less; Linux only."""
    free = [kib(Path("/proc/meminfo"), "MemAvailable")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            root, names, cached = Path("/sys/fs/cgroup"), ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for ancestor in (group, *group.parents):
            with contextlib.suppress(
                OSError, ValueError
            ):  # the root group has no limit; the limit of others may be "max"
                limit, used = (int((ancestor / name).read_text()) for name in names)
                stat = (line.split() for line in (ancestor / "memory.stat").read_text().splitlines())
                # The page cache is freed when memory is needed.
                free.append(limit - used + sum(int(value) for name, value in stat if name == cached))
    return min(free)


def kib(path: Path, name: str) -> int:
    """The value in bytes of a line such as "VmData:  1024 kB"."""
    return next(1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
