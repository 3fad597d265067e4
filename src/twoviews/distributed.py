"""Tensors exchanged by several processes that together compute what one process would on the whole batch.

Row r of process p is row r * processes + p of the whole batch, everywhere. The processes are started by torchrun and joined
by process_group.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from twoviews.processes import rank


def processes() -> int:
    """Number of processes that share the batch; 1 outside of `process_group.group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The rows [b, ...] of all processes as [B, ...] in the order of the whole batch, in the same memory format; no gradient."""
    count = processes()
    if count == 1:
        return x
    channels_last = x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1
    rows = (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()
    gathered = rows.new_empty(count * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows)
    whole = gathered.unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)
    return whole.permute(0, 3, 1, 2) if channels_last else whole


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
    """`gather`, through which the gradient of every process's loss flows back into its rows."""
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
    """The sum over processes; the gradient is summed over processes, too."""
    return x if processes() == 1 else _Sum.apply(x)


@torch.no_grad()
def sum_over_processes(x: Tensor) -> Tensor:
    """The sum over processes, without gradient."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over processes, without gradient."""
    return sum_over_processes(x.detach()) / processes()


@torch.no_grad()
def max_over_processes(number: int, device: torch.device) -> int:
    """The largest number of any process."""
    if processes() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


@torch.no_grad()
def broadcast(x: Tensor) -> Tensor:
    """The value of process 0, in every process."""
    if processes() > 1:
        dist.broadcast(x, 0)
    return x


def local_rows(x: Tensor) -> Tensor:
    """The rows of this process out of the whole batch."""
    return x[rank() :: processes()] if processes() > 1 else x
