"""Several processes that together compute what one process would on the whole batch.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment); gloo on CPUs, NCCL on GPUs. Row r of process p is
row r * processes + p of the whole batch, everywhere.
"""

import contextlib
import functools
import itertools
import math
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from twoviews.errors import BadInput, Stopped

if TYPE_CHECKING:
    from twoviews.runtime import Runtime

PATIENCE_S = 600.0  # for the other processes to come to a barrier or to an exchange
GRACE_S = 30.0  # for those who waited in an exchange, too, to say so
FAILED = 1  # exit code
LEFT = "left"  # key of the store: a process has left, with an error or for the signal of this number
START_S = 600.0  # for the other processes to come to the start
ALONE_S = 10.0  # after which a process that waits for the others at the start says so

_meetings = itertools.count()  # all processes come to the same ones, in the same order
_own: list[str] = []  # keys of those since the last barrier


class Absent(RuntimeError):
    """Some processes did not come; the message is a sentence with their hosts.

    Args:
        missing: numbers of those processes.
    """

    def __init__(self, missing: Sequence[int]):
        named = " and ".join(f"process {one} on {_host(one)}" for one in missing)
        self.first = min(set(range(processes())) - set(missing), default=0)  # of those who waited
        super().__init__(
            f"{named} did not come within {PATIENCE_S / 60:g} min to where the others wait; look at its output and at that "
            "machine; the same command goes on from the last checkpoint."
        )


class Gone(RuntimeError):
    """Another process has ended in the middle of an exchange, killed or with an error of its own; the message is a sentence."""


# What gloo, NCCL and the store say then.
_GONE = (
    "another process has ended, killed or with an error of its own; look at its output and at the memory of its machine; the "
    "same command goes on from the last checkpoint."
)
_BROKEN = re.compile(r"onnection (reset|closed|refused|was likely closed)|Broken pipe|gloo|remote process exited", re.I)


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes share the batch; 1 outside `group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def group(runtime: "Runtime") -> Iterator[torch.device]:
    """The device of this process, and around its use the company of the other processes if torchrun started several.

    Where one does not come to a barrier or an exchange, one of the others says which, and all end with exit code 1.
    """
    device = runtime.torch_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        gpu = device if device.type == "cuda" else None
        # NCCL ends a process whose time is over, before it can say anything: the barriers shall notice first.
        patience = timedelta(seconds=(2 if gpu else 1) * PATIENCE_S)
        store, size = _meet(), int(os.environ["WORLD_SIZE"])
        # Told its device, NCCL need not guess one for the first exchange.
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank(), world_size=size, timeout=patience, device_id=gpu
        )
        _store().set(f"host/{rank()}", platform.node())
    try:
        yield device
        # gloo's thread may still hold the tensors of the last exchange; if it lets go of them while Python shuts down, the
        # process aborts. While process 0 evaluates, it has the time; torchrun waits for all of them in any case.
        with contextlib.suppress(RuntimeError):  # the store is gone, because it lived in process 0
            wait_for_first()
    except BaseException as error:
        if not dist.is_initialized():
            raise
        why = explained(error)
        _leave(why)
        if why is error:
            raise
        raise why from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet() -> dist.Store:
    """The store of all processes, when all have come to it: torch would wait for the others without looking at signals.

    Raises:
        BadInput: some did not come within START_S seconds.
    """
    host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    begun, said, store, why = time.monotonic(), False, None, ""
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun does
    while not (store and store.check([f"came/{one}" for one in range(size)])):
        if not said and time.monotonic() - begun > ALONE_S:
            said = True
            print(
                f"process {rank()} waits at {host}:{port} for the others of {size} (WORLD_SIZE); if there are none, unset "
                "WORLD_SIZE.",
                file=sys.stderr,
                flush=True,
            )
        if time.monotonic() - begun > START_S or (serves and why):
            os.environ.pop("RANK")  # or processes other than the first would not say it
            raise BadInput(
                f"not all of the {size} processes (WORLD_SIZE) came to {host}:{port} within {START_S / 60:g} min{why}; start "
                "them with torchrun, or unset WORLD_SIZE for a single one."
            )
        if store is None:
            try:
                if not serves:
                    socket.create_connection((host, port), timeout=2).close()
                store = dist.TCPStore(
                    host, port, size, serves, timedelta(seconds=START_S), wait_for_workers=False, multi_tenant=True
                )
                store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                store.set(f"came/{rank()}", "")
            except (RuntimeError, OSError) as error:
                why = f" ({str(error).splitlines()[0][:200]})"
        time.sleep(0.05)
    return store


def tell_stopped(number: int) -> None:
    """Tell the other processes that this one leaves for a signal, and takes part in no exchange any more."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store may be gone
            _store().set(LEFT, str(number))


def _leave(error: BaseException) -> None:
    """Tell the others that this process ends; where it was stopped, or another is absent, end without waiting for them."""
    if isinstance(error, Stopped):
        tell_stopped(error.number)
        time.sleep(1 if rank() == 0 else 0)  # the store of all may live in this process
        return
    with contextlib.suppress(RuntimeError):
        _store().set(LEFT, "")
    if isinstance(error, Gone):
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(FAILED)
    if isinstance(error, Absent):
        if rank() == error.first:
            print(f"error: {error}", file=sys.stderr)
        time.sleep(1)  # the store of all may live in this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # torch would wait for the exchange


@functools.cache
def explained(error: BaseException) -> BaseException:
    """What ended an exchange: `Stopped` if another process was, `Gone` if one died, `Absent` if one did not come.

    Any other error as it is.

    Where the time of an exchange was over, the others get time to say that they waited.
    """
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return error
    if "imed out" not in str(error):
        return _stopped() or (Gone(_GONE) if _BROKEN.search(str(error)) else error)
    store, everyone, end = _store(), range(processes()), time.monotonic() + GRACE_S
    try:
        store.set(f"waited/{rank()}", "")
        while len(missing := [one for one in everyone if not store.check([f"waited/{one}"])]) > 1:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return Absent(missing) if missing else error
    except RuntimeError:  # the store is gone
        return error


def _stopped() -> Stopped | None:
    """Why an exchange broke, if another process left it for a signal, which comes to all of them within a moment."""
    with contextlib.suppress(RuntimeError):  # the store may be gone
        time.sleep(0.5)
        if _store().check([LEFT]) and (number := _store().get(LEFT).decode()):
            return Stopped(int(number))
    return None


def _store() -> dist.Store:
    """Keys and values that all processes of the group see: torch's own, which it has no public name for."""
    return dist.distributed_c10d._get_default_store()


def _host(process: int) -> str:
    store, key = _store(), f"host/{process}"
    return store.get(key).decode() if store.check([key]) else "an unknown host"


def barrier() -> None:
    """Wait for all processes.

    Raises:
        Absent: some did not come within PATIENCE_S seconds.
    """
    if dist.is_initialized():
        earlier = list(_own)
        number = _arrive()
        _wait(number, range(processes()), PATIENCE_S)
        for key in earlier:  # all have been there, as they have come here
            _store().delete_key(key)
            _own.remove(key)


def wait_for_first() -> None:
    """Wait until process 0 has come here, however long it decodes images or measures accuracy alone; it does not wait."""
    if dist.is_initialized():
        if rank() == 0:
            _arrive()
        else:
            _wait(next(_meetings), [0], math.inf)


def _arrive() -> int:
    number = next(_meetings)
    _own.append(_key(number, rank()))
    _store().set(_own[-1], "")
    return number


def _key(number: int, process: int) -> str:
    return f"meeting/{number}/{process}"


def _wait(number: int, whom: Sequence[int], seconds: float) -> None:
    """Until these processes have arrived; leaves when another has left, with exit code 1 if that had an error."""
    store, keys, pause, end = _store(), [_key(number, one) for one in whom], 5e-4, time.monotonic() + seconds
    while not store.check(keys):
        if store.check([LEFT]):
            signal = store.get(LEFT).decode()
            raise Stopped(int(signal)) if signal else SystemExit(FAILED)  # it has said why
        if time.monotonic() > end:
            raise Absent([one for one, key in zip(whom, keys, strict=True) if not store.check([key])])
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[b, ...] of each process to [B, ...] of all, in the order of the whole batch and the memory format; without gradient."""
    count = processes()
    if count == 1:
        return x
    channels_last = x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1
    rows = (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()
    parts = rows.new_empty(count * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(parts, rows)
    everyone = parts.unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)
    return everyone.permute(0, 3, 1, 2) if channels_last else everyone


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
