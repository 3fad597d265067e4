"""The signals that stop a command."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from twoviews import distributed
from twoviews.errors import Stopped


class StopSignal:
    """SIGTERM, SIGUSR2 and Ctrl-C raise `Stopped`; within `deferred` they are remembered. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember a signal until `received` is called, because there is state to save first."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`, raise `Stopped` at once after all: around work that takes long and can be repeated.

        Raises:
            Stopped: a signal came, before the block or during it.
        """
        before, self._deferred = self._deferred, False
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._deferred = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.number = not self.number, number
        if distributed.rank() == 0 and first:
            # Not print, which the signal may have interrupted.
            os.write(2, f"{self.name}: stopping as soon as the state can be saved\n".encode())
        # SLURM sends two signals, and the second one must not interrupt the handling of the first.
        if first and not self._deferred:
            raise Stopped(number)

    @property
    def name(self) -> str:
        """Name of the signal that came, such as SIGTERM; empty if none did."""
        return signal.Signals(self.number).name if self.number else ""

    def received(self, device: torch.device) -> bool:
        """Whether any process got a signal; all processes must call this together."""
        self.number = distributed.max_over_processes(self.number, device)
        return self.number != 0
