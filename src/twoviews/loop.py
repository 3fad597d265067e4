"""The training loop: everything it needs is given to it, built; it knows neither the configuration nor any method."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from twoviews import distributed
from twoviews.console import Console, duration
from twoviews.data.loader import Batch
from twoviews.features import Pixels
from twoviews.methods.method import Progress
from twoviews.protocols.protocol import verdicts
from twoviews.randomness import seed_of
from twoviews.run import Run
from twoviews.runtime import StopSignal, autocast, peak_memory
from twoviews.tracking import Metrics

if TYPE_CHECKING:
    from twoviews.assembly import Parts  # which reads configurations; nothing here does

FORECAST_STEPS = 50  # after so many steps of a process it says how long the rest will take
SHOWN = {"loss": "train/loss", "spread": "train/spread", "lr": "lr", "img/s": "images_per_s", "kNN": "knn/top1"}
COLLAPSED = 0.1  # spread below this share of an even one calls for advice


class NotFinite(ArithmeticError):
    """The loss became infinite or not a number; the message says where and what to do."""


@dataclass
class Position:
    """Where training stands; everything else in a checkpoint is state of the parts."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent by this run in all its processes' lives


def _copied(tree: Any, old: Any = None) -> Any:
    """Nested dictionaries and lists with copies of their tensors, on the CPU.

    They take the memory of an `old` copy where it has a tensor of the same shape at the same place: to be given fresh
    memory takes as long as to fill it.
    """
    if isinstance(tree, torch.Tensor):
        if isinstance(old, torch.Tensor) and (old.shape, old.dtype) == (tree.shape, tree.dtype):
            return old.copy_(tree.detach())
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value, old.get(key) if isinstance(old, dict) else None) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        others = old if isinstance(old, list | tuple) and len(old) == len(tree) else [None] * len(tree)
        return type(tree)(_copied(value, other) for value, other in zip(tree, others, strict=True))
    return tree


class Training:
    """A training that can stop after any step and go on from there, bit for bit.

    Args:
        parts: what is trained, on what and how.
        run: the folder for checkpoints.
        metrics: the lines to write; only process 0 writes.
        console: where a person looks.
        epochs: length of the training.
        seed: of all randomness after initialisation.
    """

    def __init__(self, parts: "Parts", *, run: Run, metrics: Metrics | None, console: Console, epochs: int, seed: int):
        self.method, self.loader = parts.method, parts.loader
        self.optimizer, self.schedule = parts.optimizer, parts.schedule
        self.runtime, self.protocols = parts.runtime, parts.protocols
        self.judge, self.embed, self.score = parts.judge, parts.embed, parts.score
        self.run, self.metrics, self.console, self.epochs, self.seed = run, metrics, console, epochs, seed
        self.device = parts.device
        self.dtype = self.runtime.dtype(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.position = Position()
        self.latest: dict[str, float] = {}
        self._started, self._checkpointed = time.monotonic(), time.monotonic()
        self._advised = self._forecasted = False
        self._watch_seconds = 0.0
        self._stepping = [0, 0.0]  # steps, and seconds they took, without those before the first log line
        self._first_step = 0
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._copy: dict[str, Any] = {}  # of the state at the last checkpoint

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.position.step / len(self.loader)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of what follows the schedule."""
        return next(group["lr"] for group in self.optimizer.param_groups if not group.get("fixed_lr"))

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; order, views and dropout are functions of (seed, epoch, step)."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {**vars(self.position), "seconds": self.seconds()},
            "metrics_bytes": self.metrics.mark() if self.metrics else 0,
            "latest": self.latest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.latest = dict(state["latest"])

    def seconds(self) -> float:
        """Time spent on this run, interruptions not counted."""
        return self.position.seconds + time.monotonic() - self._started

    def save(self) -> None:
        """Begin to write a checkpoint, on process 0; the training goes on while its state is copied and written.

        What a forward pass or an E-step changes, which are buffers, is copied at once. Weights and what the optimizer keeps
        for them stay as they are until the next step of the optimizer, which waits until they are copied.

        Raises:
            NotFinite: the weights are not, so the checkpoint before this one is kept.
            OSError: the checkpoint before this one could not be written.
        """
        # Of those that are trained: moving averages of finite weights are finite.
        norms = torch._foreach_norm([weight.detach() for weight in self.method.parameters() if weight.requires_grad])
        if not math.isfinite(torch.stack(list(norms)).sum().item()):
            raise self._not_finite("weights are not finite")
        if distributed.rank() == 0:
            self._written()
            state = self.state()
            weights = {name for name, _ in self.method.named_parameters()}
            constant, changing = {}, {}
            for name, value in state.pop("method").items():
                (constant if name in weights else changing)[name] = value
            later = {"method": constant, "optimizer": state.pop("optimizer")}
            self._copy |= _copied({**state, "buffers": changing}, self._copy)
            self._copying = self._writer.submit(self._copy_later, later)
            self._writing = self._writer.submit(self._write, self._copying)
        self._checkpointed = time.monotonic()

    def _copy_later(self, state: dict[str, Any]) -> None:
        self._copy |= _copied(state, self._copy)

    def _copied_all(self) -> None:
        """Wait until the state of the last checkpoint is copied, and may change."""
        copying, self._copying = self._copying, None
        if copying:
            copying.result()

    def _write(self, copying: "Future[None]") -> None:
        copying.result()  # half a copy is none
        state = {key: value for key, value in self._copy.items() if key != "buffers"}
        self.run.save({**state, "method": {**self._copy["method"], **self._copy["buffers"]}})
        if self.metrics:  # from now on the tracker may send what the checkpoint covers
            self.metrics.commit(state["metrics_bytes"])

    def _written(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    # ------------------------------------------------------------------------------------------------------------- loop

    def fit(self, stop: StopSignal) -> bool:
        """Train to the end, True, or to the step after a stop signal, False; either way the last step is saved.

        Raises:
            NotFinite: the loss is infinite or not a number; the last checkpoint is from before that.
        """
        wrapped = self._wrapped()
        self.method.train()
        steps = len(self.loader)
        self._first_step = self.position.step
        if self.position.step == 0 and not self.latest:
            self._baselines()
            self.save()
        self.console.start(steps * self.epochs, self.position.step)
        try:
            while self.position.step < steps * self.epochs:
                if stop.received(self.device):
                    return False
                epoch = self.position.step // steps
                if self.position.step % steps == 0:
                    self._before_epoch(epoch)
                self.loader.set_epoch(epoch, start=self.position.step - epoch * steps)
                if self._train_epoch(wrapped, stop):
                    self._watch(epoch + 1)
                self.save()
            return True
        finally:
            self.console.stop()
            self._written()

    def _before_epoch(self, epoch: int) -> None:
        """The method's E-step, if it has one, with its seconds and scores.

        Nothing is saved between this and the first step of the epoch: an interrupted E-step is done again, from the
        weights and centroids that it began with.
        """
        start = time.monotonic()
        clustered = self.method.before_epoch(epoch, self.embed, seed_of(self.seed, "e-step", epoch))
        if clustered:
            values = {"time/e_step": time.monotonic() - start}
            self._log({**values, **(self.score(clustered) if distributed.rank() == 0 else {})})
            distributed.wait_for_first()  # which scores them alone

    def _wrapped(self) -> Callable:
        wrapped: Any = self.method
        if self.runtime.compile:
            wrapped = torch.compile(wrapped)
        if distributed.processes() > 1:
            wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False)
        return wrapped

    def _train_epoch(self, wrapped: Callable, stop: StopSignal) -> bool:
        """The rest of an epoch; False when a stop signal ended it early."""
        steps, log_every = len(self.loader), self.runtime.log_every
        clock, clock_step = time.monotonic(), self.position.step
        for batch in self.loader:
            loss, values = self._step(wrapped, batch)
            step = self.position.step
            logged = step % log_every == 0 or step % steps == 0
            if logged:
                loss_and_values = self._read(loss, values)
                seconds = time.monotonic() - clock
                rate = (step - clock_step) * self.loader.batch_size / seconds
                if clock_step > self._first_step:  # the first steps load, and may compile
                    self._stepping[0] += step - clock_step
                    self._stepping[1] += seconds
                clock, clock_step = time.monotonic(), step
                self._log({**loss_and_values, "images_per_s": rate})
            if not self._forecasted and step - self._first_step >= FORECAST_STEPS and logged:
                counted, seconds = self._stepping
                self._forecast(counted * self.loader.batch_size / seconds if counted else self.latest["images_per_s"])
            if step % steps == 0:
                return True
            # Processes must ask together, and asking makes them wait for each other.
            if (logged or distributed.processes() == 1) and stop.received(self.device):
                return False
            if 0 < self.runtime.checkpoint_minutes < (time.monotonic() - self._checkpointed) / 60:
                self.save()
        return True

    def _step(self, wrapped: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One optimizer step over a batch, in `accumulate` micro-batches."""
        torch.manual_seed(seed_of(self.seed, "step", self.position.step, distributed.rank()))
        factor = self.schedule(self.epoch)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr if group.get("fixed_lr") else lr * factor
        parts, losses, metrics = self.runtime.accumulate, [], {}
        for part in range(parts):
            views = [self._on_device(view.chunk(parts)[part]) for view in batch.views]
            with ExitStack() as stack:
                if distributed.processes() > 1 and part < parts - 1:
                    stack.enter_context(wrapped.no_sync())
                with autocast(self.device, self.dtype):
                    output = wrapped(views, batch.index.chunk(parts)[part].to(self.device))
                self.scaler.scale(output.loss / parts).backward()
            losses.append(output.loss.detach())
            metrics = output.metrics
        self._copied_all()
        self.method.before_step(Progress(self.position.step, len(self.loader), self.epochs))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.method.after_step(Progress(self.position.step, len(self.loader), self.epochs))
        return torch.stack(losses).mean(), metrics

    def _on_device(self, view: torch.Tensor) -> torch.Tensor:
        form = torch.channels_last if self.runtime.channels_last else torch.contiguous_format
        return view.to(self.device, memory_format=form, non_blocking=True)

    # ------------------------------------------------------------------------------------------------- watching it learn

    def _read(self, loss: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over processes: the only wait for the device between two log lines."""
        distributed.barrier()  # which names a process that does not come
        numbers = {"train/loss": distributed.mean(loss).item()}
        numbers.update({f"train/{name}": distributed.mean(value).item() for name, value in values.items()})
        if not math.isfinite(numbers["train/loss"]):
            raise self._not_finite(f"loss is {numbers['train/loss']}")
        spread = numbers.get("train/spread", 1.0)
        if spread < COLLAPSED and self.epoch >= 1 and not self._advised:
            self._advised = True
            self.console.say(
                f"advice: the embeddings' spread is {spread:.3f} (1 is even, 0 is one point): they are collapsing. Lower "
                "optimizer.lr, check that the views are not too alike (preview=true), and give the batch norms larger batches."
            )
        return {**numbers, "lr": self.lr}

    def _not_finite(self, what: str) -> NotFinite:
        return NotFinite(
            f"the {what} at step {self.position.step} (epoch {self.epoch:.2f}) with lr {self.lr:.4g}; the last good "
            f"checkpoint is {self.run.folder / 'last.pt'}: lower optimizer.lr, lengthen schedule.warmup_epochs, or use "
            "runtime.precision=fp32."
        )

    def _log(self, values: dict[str, float]) -> None:
        self.latest.update(values)
        if self.metrics:
            self.metrics.log(self.position.step, self.epoch, values)
        shown = {name: self.latest[key] for name, key in SHOWN.items() if key in self.latest}
        self.console.progress(self.position.step, self.epoch, shown)

    def _forecast(self, rate: float) -> None:
        self._forecasted = True
        epoch = len(self.loader) * self.loader.batch_size / rate
        watching = sum(p.every_epochs > 0 for p in self.protocols.values()) * self._watch_seconds
        every = min((p.every_epochs for p in self.protocols.values() if p.every_epochs), default=self.epochs)
        left = self.epochs - self.epoch
        self.console.say(
            f"{rate:.0f} images/s: an epoch takes {duration(epoch)}, the rest of the run about "
            f"{duration(left * (epoch + self.latest.get('time/e_step', 0)) + left / every * watching)}."
        )

    def _baselines(self) -> None:
        """KNN of the untrained encoder and of raw pixels: a method that does not beat both has learnt nothing."""
        if "knn" not in self.protocols:
            return
        self.console.say("measuring kNN of raw pixels and of the untrained encoder …")
        knn, start = {"knn": self.protocols["knn"]}, time.monotonic()
        untrained = self.judge(self.method.encoder)
        found = {"untrained": verdicts(knn, untrained)}
        self._watch_seconds = time.monotonic() - start
        found["pixels"] = verdicts(knn, self.judge(Pixels(untrained.data.channels, untrained.data.size)))
        if distributed.rank() == 0:
            self._log({f"baseline/{name}_knn_top1": one["knn"].values["top1"] for name, one in found.items()})

    def _watch(self, epoch: int) -> None:
        """Measure what is due after that many epochs; at the end, everything."""
        due = {
            name: protocol
            for name, protocol in self.protocols.items()
            if epoch == self.epochs or (protocol.every_epochs and epoch % protocol.every_epochs == 0)
        }
        values: dict[str, float] = {}
        if due:
            found = verdicts(due, self.judge(self.method.encoder))
            values = {f"{name}/{key}": v for name, verdict in found.items() for key, v in verdict.values.items()}
        if epoch == self.epochs:
            values.update(peak_memory(self.device))
        if values:
            self._log(values)
