"""Several processes that together compute what one process would on the whole batch.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment); gloo on CPUs, NCCL on GPUs. Row r of process p is
row r * processes + p of the whole batch, everywhere.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from twoviews.runtime import Runtime


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes share the batch; 1 outside `group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def group(runtime: "Runtime") -> Iterator[torch.device]:
    """The device of this process, and around its use the company of the other processes if torchrun started several."""
    device = runtime.torch_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Long, because process 0 alone decodes images and measures accuracy while the others wait.
        patience, gpu = timedelta(days=1), device if device.type == "cuda" else None
        # Told its device, NCCL need not guess one for the first barrier.
        dist.init_process_group("nccl" if gpu else "gloo", timeout=patience, device_id=gpu)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def _interleave(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[b, ...] of each process to [B, ...] of all, in the order of the whole batch; without gradient."""
    if processes() == 1:
        return x
    x = x.contiguous()  # all_gather promises nothing for tensors in channels_last
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x)
    return _interleave(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each process's loss depends on every process's rows: the gradient of my rows is the sum over all losses.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() :: processes()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """`gather`, with the gradient of every process's loss flowing back into its rows."""
    return x if processes() == 1 else _Gather.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def sum_with_gradient(x: Tensor) -> Tensor:
    """The sum over processes; its gradient is the sum of theirs."""
    return x if processes() == 1 else _Sum.apply(x)


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """The sum over processes, without gradient."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean over processes, without gradient."""
    return total(x.detach()) / processes()


@torch.no_grad()
def largest(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if processes() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


@torch.no_grad()
def from_first(x: Tensor) -> Tensor:
    """Process 0's value, everywhere."""
    if processes() > 1:
        dist.broadcast(x, 0)
    return x


def local_rows(x: Tensor) -> Tensor:
    """The rows of this process out of the whole batch."""
    return x[rank() :: processes()] if processes() > 1 else x
