"""The largest batch that fits: the parts of a training, built for growing batches, each making two real steps.

On a GPU a batch does not fit when torch's allocator says so. On a CPU nobody would say so in time: the kernel promises
more than there is, and later ends whole processes. So a process may ask for what is free now and no more; and because
not every library bears to be refused memory, each size has a process of its own, which may die of it.
"""

import errno
import multiprocessing
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from twoviews import distributed
from twoviews.assembly import load_data, make_parts, make_views
from twoviews.config.building import build
from twoviews.config.parameter_names import qualify
from twoviews.console import Console, in_bytes
from twoviews.data.loader import Batch, Loader
from twoviews.errors import BadInput, Stopped
from twoviews.loop import Training
from twoviews.memory import TooLarge, free_memory, kib, ran_out
from twoviews.runtime import Runtime
from twoviews.step import EAGER_STEPS, eager_reason
from twoviews.stop_signal import StopSignal

EAGER = 2  # steps: the first claims memory, the second has the optimizer's state as well and is the one that is timed
QUARTERS = (0.25, 0.5, 0.75)  # of the way from the largest that fits to the smallest that does not


@dataclass(frozen=True)
class Trial:
    """What became of two steps of `size` images.

    Args:
        size: images a step.
        peak: bytes of the device, or of the process on a CPU.
        rate: images/s.
        refused: why the parts do not take this size.
        failed: what the allocator said.
        images: how many the training data has.
    """

    size: int
    peak: float = 0.0
    rate: float = 0.0
    refused: str = ""
    failed: str = ""
    images: int = 0

    @property
    def fits(self) -> bool:
        """Whether both steps were made."""
        return self.rate > 0

    @property
    def words(self) -> str:
        """What became of it, for a person."""
        if self.refused:
            return f"passed over: {self.refused}"
        return f"{in_bytes(self.peak)}, {self.rate:,.0f} images/s" if self.fits else f"does not fit ({self.failed})"


def find_batch(cfg: DictConfig, device: torch.device, folder: Path) -> int:
    """Say what batches take, and which is the largest that fits; 0.

    Raises:
        BadInput: batch_size itself is refused, nothing fits, or this cannot be found out here.
    """
    if cfg.preview:
        raise BadInput("preview=true and find_batch=true are two questions; ask one at a time.")
    if distributed.processes() > 1:
        raise BadInput(
            "find_batch=true asks for the memory of one process; leave torchrun out: with n processes, n times the batch "
            "that it finds fits."
        )
    if device.type == "cpu" and sys.platform != "linux":
        raise BadInput("find_batch=true on a CPU needs Linux, which can limit the memory of a process; use a GPU.")
    console, free = Console(), free_memory() if device.type == "cpu" else 0
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    console.say(f"memory    {in_bytes(total)} of the GPU" if total else f"memory    {in_bytes(free)} are free")
    with tempfile.TemporaryDirectory(prefix="find_batch-", dir=folder) as scratch:
        largest = _Finder(cfg, free, Path(scratch), console).largest()
    parts = 2 * cfg.runtime.accumulate
    console.say(f"the largest that fits: batch_size={largest.size} ({largest.words}).")
    if 2 * largest.size <= largest.images:
        console.say(
            f"for more: batch_size={2 * largest.size} runtime.accumulate={parts}, which takes as much memory; the loss of a "
            f"method that compares the images of a batch then sees {2 * largest.size // parts} at a time."
        )
    return 0


class _Finder:
    """Tries sizes and says what became of them."""

    def __init__(self, cfg: DictConfig, free: int, scratch: Path, console: Console):
        self.cfg, self.free, self.scratch, self.console = cfg, free, scratch, console

    def largest(self) -> Trial:
        """Of batch_size, its doubles or halves, and the quarters in between.

        Raises:
            BadInput: nothing fits.
        """
        first = best = self.trial(self.cfg.batch_size)
        size, too_large = first.size, first.size if first.failed else None
        while too_large is None and 2 * size <= first.images:
            size *= 2
            trial = self.trial(size)
            best = trial if trial.fits else best
            too_large = size if trial.failed else None
        if too_large is None:
            self.console.say(f"{2 * size:>7,} images: more than the {first.images:,} training images")
        while not best.fits:
            if size < 4:
                raise BadInput(
                    f"no batch from {size} to {first.size} images fits ({best.failed}); choose a smaller backbone or "
                    "smaller views."
                )
            size //= 2
            trial = self.trial(size)
            best = best if trial.refused else trial
            too_large = size if trial.failed else too_large
        low, high = best.size, too_large or best.size
        for size in [round(low + share * (high - low)) for share in QUARTERS] if high > low else []:
            trial = self.trial(size)
            if trial.failed:
                break
            best = trial if trial.fits else best
        return best

    def trial(self, size: int) -> Trial:
        """Two steps of that many images, in a process of its own; what became of them is said.

        Raises:
            BadInput: the parts refuse batch_size itself.
            OSError: for example a full disk.
        """
        processes = multiprocessing.get_context("spawn")  # a fork would share threads and CUDA with this one
        ours, theirs = processes.Pipe(duplex=False)
        # Not resolved, because other values may be as large as the batch.
        content = OmegaConf.to_container(self.cfg, resolve=False) | {"batch_size": size}  # type: ignore[operator]
        process = processes.Process(target=_try, args=(content, self.free, self.scratch, theirs))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which it inherits: this one ends it on Ctrl-C
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        try:
            trial = ours.recv()
        except EOFError:  # it died
            process.join()
            if (code := process.exitcode or 0) >= 0:
                raise RuntimeError(f"the process that tried {size} images ended with exit code {code}") from None
            if -code == signal.SIGTERM:  # to both
                raise Stopped(-code) from None
            trial = Trial(size, failed=f"it died of {signal.Signals(-code).name}")
        except BaseException:
            process.terminate()
            raise
        finally:
            process.join()
        if isinstance(trial, OSError):
            raise trial
        if trial.refused and size == self.cfg.batch_size:
            raise BadInput(trial.refused)
        self.console.say(f"{size:>7,} images: {trial.words}")
        return trial


def _try(content: dict[str, Any], free: int, scratch: Path, answer: Connection) -> None:
    """What a process of `trial` does."""
    cfg = DictConfig({**content, "protocol": {}})  # which two steps do not need
    runtime = build(cfg.runtime)
    device = runtime.torch_device()
    no_memory = torch.OutOfMemoryError if device.type == "cuda" else (RuntimeError, MemoryError)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu":
        limits = [
            kib(Path("/proc/self/status"), "VmData") + free,
            *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY),
        ]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        trial = _two_steps(cfg, runtime, device, scratch)
    except TooLarge as error:
        trial = Trial(cfg.batch_size, failed=str(error))
    except BadInput as error:
        trial = Trial(cfg.batch_size, refused=qualify(str(error)))
    except no_memory as error:
        trial = Trial(cfg.batch_size, failed=shorten(str(error) or type(error).__name__, 100))
    except RuntimeError as error:  # of the libraries beside torch's allocator
        if not ran_out(error):
            raise
        trial = Trial(cfg.batch_size, failed=shorten(str(error), 100))
    except OSError as error:
        trial = Trial(cfg.batch_size, failed=str(error)) if error.errno == errno.ENOMEM else error
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    answer.send(trial)


def _two_steps(cfg: DictConfig, runtime: Runtime, device: torch.device, scratch: Path) -> Trial:
    """A training that ends after two steps, or two captured ones, each of them logged."""
    data, runtime = load_data(cfg).to(device), replace(runtime, log_every=1)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, device)
    parts.loader.small_epochs = 0  # later steps need more memory
    for group in parts.optimizer.param_groups:
        group["lr"] = 0.0  # scaled to so large a batch it might end in numbers that are none
    steps = EAGER if eager_reason(runtime, device) else EAGER_STEPS + 2  # a graph has memory of its own
    parts.loader, parts.protocols = cast(Loader, _FewSteps(parts.loader, steps)), {}
    training = Training(parts, folder=scratch, metrics=None, console=Console(quiet=True), epochs=1, seed=cfg.seed)
    training.fit(StopSignal())
    peak = training.monitor.latest["memory/gpu_mb" if device.type == "cuda" else "memory/process_mb"]
    return Trial(cfg.batch_size, 1e6 * peak, training.monitor.latest["images_per_s"], images=len(data.train))


class _FewSteps:
    """A loader whose epoch ends after a few steps; where the data is not enough for them, it begins again.

    Args:
        loader: of the data.
        steps: how many.
    """

    def __init__(self, loader: Loader, steps: int):
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return islice(chain.from_iterable(repeat(self.loader)), self.steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
