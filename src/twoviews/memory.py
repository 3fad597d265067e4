"""What a training needs at least, compared with the memory that is free before any of it is taken."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from twoviews.console import in_bytes
from twoviews.data.views import Views
from twoviews.errors import BadInput
from twoviews.methods.method import Method

LARGEST = 2**63  # bytes; torch counts no more
KEPT = 3  # of a weight that is trained: itself, its gradient, and what the optimizer remembers of it


class TooLarge(BadInput):
    """There is not enough memory for it."""


def check_networks(make: Callable[[], Method], device: torch.device, sizes: str) -> None:
    """Refuse networks for which there is no memory, before they are made.

    Args:
        make: makes them; it is called where tensors have sizes and no memory.
        device: that they will be on.
        sizes: the values that decide on it, for the user.

    Raises:
        TooLarge: weights, gradients, the optimizer's state and buffers need more than is free.
        BadInput: whatever `make` finds wrong.
    """
    try:
        with torch.device("meta"):
            method = make()
        needed = sum(KEPT * one.nbytes if one.requires_grad else one.nbytes for one in method.parameters())
        needed += sum(one.nbytes for one in method.buffers())
    except (RuntimeError, OverflowError, TypeError) as error:
        if not any(word in str(error) for word in ("overflow", "out of range", "too large", "must be tuple of ints")):
            raise
        needed = LARGEST
    _compare(needed, device, "weights, gradients, the optimizer's state and buffers", sizes)


def check_views(views: Views, batch_size: int, channels: int, device: torch.device) -> None:
    """Refuse views for which there is no memory.

    Args:
        views: of an image.
        batch_size: images whose views this process has at a time.
        channels: of an image.
        device: that they will be on.

    Raises:
        TooLarge: a batch of them needs more than is free.
    """
    needed = batch_size * channels * sum(side**2 for side in views.sizes) * 4
    sides = ", ".join(f"{side} px" for side in dict.fromkeys(views.sizes))
    sizes = f"views.<name>.size= and views.<name>.count= ({len(views)} views, side: {sides}) or batch_size={batch_size}"
    _compare(min(needed, LARGEST), device, "the views of a batch", sizes)


def _compare(needed: int, device: torch.device, what: str, sizes: str) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif sys.platform == "linux":
        free = free_memory()
    else:
        return
    if needed > free:
        more = "more than " if needed >= LARGEST else ""
        raise TooLarge(
            f"{what} need {more}{in_bytes(needed)} of memory, and {in_bytes(free)} are free on this machine; choose smaller "
            f"ones: {sizes}."
        )


def ran_out(error: BaseException) -> bool:
    """Whether an exception of torch, or of a library that it calls, says that there is no memory left."""
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def free_memory() -> int:
    """Bytes that this machine, and the control groups that this process is in, have left; on Linux."""
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
        for one in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the outermost has no limit, others may say max
                limit, used = (int((one / name).read_text()) for name in names)
                stat = (line.split() for line in (one / "memory.stat").read_text().splitlines())
                # Files that were read go when their place is needed.
                free.append(limit - used + sum(int(value) for name, value in stat if name == cached))
    return min(free)


def kib(path: Path, name: str) -> int:
    """Bytes, of a line such as VmData:  1024 kB."""
    return next(1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
