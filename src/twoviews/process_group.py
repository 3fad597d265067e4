"""The process group of a training: processes started by torchrun find each other, wait for each other, and notice an absence.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; the backend is gloo on CPUs and NCCL on GPUs.
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

import torch
import torch.distributed as dist

from twoviews.distributed import processes, rank
from twoviews.errors import BadInput, Stopped

START_TIMEOUT_S = 600.0  # for all processes to start
START_NOTICE_S = 10.0  # of waiting at the start, after which a process says so
TIMEOUT_S = 600.0  # for all processes to come to a barrier or to an exchange of tensors
REPORT_S = 30.0  # after a timeout, for each process that waited to record that it did
FAILED = 1  # exit code
LEFT_KEY = "left"  # in the store: a process has ended, with an error ("") or for the signal of this number

_barrier_numbers = itertools.count()  # all processes come to the same barriers in the same order
_own_keys: list[str] = []  # keys that this process has set in the store since the last barrier
_stores: list[dist.Store] = []  # keys and values that all processes of the group see; empty outside of it


class MissingProcesses(RuntimeError):
    """Some processes did not come to a barrier or an exchange; the message is a sentence with their hosts.

    Args:
        missing: ranks of those processes.
    """

    def __init__(self, missing: Sequence[int]):
        named = " and ".join(f"process {number} on {_host(number)}" for number in missing)
        self.first = min(set(range(processes())) - set(missing), default=0)  # rank of the first process that waited
        super().__init__(
            f"{named} did not come within {TIMEOUT_S / 60:g} min to where the others wait; look at its output and at that "
            "machine; the same command goes on from the last checkpoint."
        )


class ProcessDied(RuntimeError):
    """Another process ended during an exchange, killed or with an error of its own; the message is a sentence."""


_DIED = (
    "another process has ended, killed or with an error of its own; look at its output and at the memory of its machine; the "
    "same command goes on from the last checkpoint."
)
# Messages of gloo, NCCL and the store in that case.
_BROKEN = re.compile(r"onnection (reset|closed|refused|was likely closed)|Broken pipe|gloo|remote process exited", re.I)


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """The device of this process; inside the block the process belongs to the group, if torchrun started several.

    If a process does not come to a barrier or an exchange, another one names it, and all end with exit code 1.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join(_start(size), size, device)
    try:
        yield device
        # gloo's thread may still hold the tensors of the last exchange; if it lets go of them while Python shuts down, the
        # process aborts. While process 0 evaluates, it has the time; torchrun waits for all of them in any case.
        with contextlib.suppress(RuntimeError):  # the store is gone, because it lived in process 0
            wait_for_first()
    except BaseException as error:
        if not dist.is_initialized():
            raise
        cause = cause_of(error)
        _leave(cause)
        if cause is error:
            raise
        raise cause from error
    finally:
        leave()


def join(store: dist.Store, size: int, device: torch.device) -> None:
    """Make this process, number RANK of the environment, part of a group of `size` processes that share a store."""
    gpu = device if device.type == "cuda" else None
    # NCCL ends a process after this timeout, before it can print anything: the barriers must notice first.
    timeout = timedelta(seconds=(2 if gpu else 1) * TIMEOUT_S)
    # With its device given, NCCL does not have to guess one for the first exchange.
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank(), world_size=size, timeout=timeout, device_id=gpu
    )
    _stores.append(store)
    _store().set(f"host/{rank()}", platform.node())


def leave() -> None:
    """Leave the group, if this process belongs to one."""
    _stores.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(size: int) -> dist.Store:
    """The store of all processes, once all have started.

    torch would wait for the others without handling signals.

    Raises:
        BadInput: some did not start within START_TIMEOUT_S seconds.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    started, noticed, store, reason = time.monotonic(), False, None, ""
    is_server = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun is
    while not (store and store.check([f"came/{number}" for number in range(size)])):
        if not noticed and time.monotonic() - started > START_NOTICE_S:
            noticed = True
            print(
                f"process {rank()} waits at {host}:{port} for the others of {size} (WORLD_SIZE); if there are none, unset "
                "WORLD_SIZE.",
                file=sys.stderr,
                flush=True,
            )
        if time.monotonic() - started > START_TIMEOUT_S or (is_server and reason):
            os.environ.pop("RANK")  # or processes other than the first would not print it
            raise BadInput(
                f"not all of the {size} processes (WORLD_SIZE) came to {host}:{port} within {START_TIMEOUT_S / 60:g} "
                f"min{reason}; start them with torchrun, or unset WORLD_SIZE for a single one."
            )
        if store is None:
            try:
                if not is_server:
                    socket.create_connection((host, port), timeout=2).close()
                timeout = timedelta(seconds=START_TIMEOUT_S)
                store = dist.TCPStore(host, port, size, is_server, timeout, wait_for_workers=False, multi_tenant=True)
                store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                store.set(f"came/{rank()}", "")
            except (RuntimeError, OSError) as error:
                reason = f" ({str(error).splitlines()[0][:200]})"
        time.sleep(0.05)
    return store


def announce_stop(number: int) -> None:
    """Record for the other processes that this one ends for a signal and takes part in no further exchange."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store may be gone
            _store().set(LEFT_KEY, str(number))


def _leave(error: BaseException) -> None:
    """Record for the others that this process ends; do not wait for them after a signal, or if one is missing or died."""
    if isinstance(error, Stopped):
        announce_stop(error.number)
        time.sleep(1 if rank() == 0 else 0)  # the store of all may live in this process
        return
    with contextlib.suppress(RuntimeError):
        _store().set(LEFT_KEY, "")
    if isinstance(error, ProcessDied):
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(FAILED)
    if isinstance(error, MissingProcesses):
        if rank() == error.first:
            print(f"error: {error}", file=sys.stderr)
        time.sleep(1)  # the store of all may live in this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # torch would wait for the exchange


@functools.cache
def cause_of(error: BaseException) -> BaseException:
    """Why an exchange failed: Stopped if another process was, ProcessDied or MissingProcesses; any other error unchanged.

    After a timeout the other processes get REPORT_S seconds to record that they waited.
    """
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return error
    if "imed out" not in str(error):
        return _stopped() or (ProcessDied(_DIED) if _BROKEN.search(str(error)) else error)
    store, ranks, end = _store(), range(processes()), time.monotonic() + REPORT_S
    try:
        store.set(f"waited/{rank()}", "")
        while len(missing := [number for number in ranks if not store.check([f"waited/{number}"])]) > 1:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return MissingProcesses(missing) if missing else error
    except RuntimeError:  # the store is gone
        return error


def _stopped() -> Stopped | None:
    """The signal for which another process left an exchange, which all processes get within a moment; None if there is none."""
    with contextlib.suppress(RuntimeError):  # the store may be gone
        time.sleep(0.5)
        if _store().check([LEFT_KEY]) and (number := _store().get(LEFT_KEY).decode()):
            return Stopped(int(number))
    return None


def _store() -> dist.Store:
    return _stores[-1]


def _host(number: int) -> str:
    store, key = _store(), f"host/{number}"
    return store.get(key).decode() if store.check([key]) else "an unknown host"


def barrier() -> None:
    """Wait for all processes.

    Raises:
        MissingProcesses: some did not come within TIMEOUT_S seconds.
    """
    if dist.is_initialized():
        earlier = list(_own_keys)
        number = _arrive()
        _wait(number, range(processes()), TIMEOUT_S)
        for key in earlier:  # read by all processes, as they have come to this barrier
            _store().delete_key(key)
            _own_keys.remove(key)


def wait_for_first() -> None:
    """Wait until process 0 has come here, however long it decodes images or evaluates alone; process 0 does not wait."""
    if dist.is_initialized():
        if rank() == 0:
            _arrive()
        else:
            _wait(next(_barrier_numbers), [0], math.inf)


def _arrive() -> int:
    """Record that this process has come to the next barrier; the number of that barrier."""
    number = next(_barrier_numbers)
    _own_keys.append(_key(number, rank()))
    _store().set(_own_keys[-1], "")
    return number


def _key(number: int, process: int) -> str:
    return f"meeting/{number}/{process}"


def _wait(number: int, ranks: Sequence[int], seconds: float) -> None:
    """Wait until these processes have come to a barrier; if one has left the group, leave as it did."""
    store, keys = _store(), [_key(number, process) for process in ranks]
    pause, end = 5e-4, time.monotonic() + seconds
    while not store.check(keys):
        if store.check([LEFT_KEY]):
            signal = store.get(LEFT_KEY).decode()
            raise Stopped(int(signal)) if signal else SystemExit(FAILED)  # the process that left has said why
        if time.monotonic() > end:
            raise MissingProcesses(
                [process for process, key in zip(ranks, keys, strict=True) if not store.check([key])]
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
