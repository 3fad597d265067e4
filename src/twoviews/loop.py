"""The training loop: everything it needs is given to it, built; it knows neither the configuration nor any method."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from twoviews import distributed, process_group
from twoviews.checkpoints import Checkpoints, finite
from twoviews.console import Console, duration
from twoviews.data.loader import Batch
from twoviews.errors import Stopped
from twoviews.features import Pixels
from twoviews.protocols.protocol import run_protocols
from twoviews.randomness import seed_of
from twoviews.run import Run
from twoviews.runtime import format_name, peak_memory
from twoviews.step import Step, Values
from twoviews.stop_signal import StopSignal
from twoviews.tracking.metrics import Metrics

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
    unmeasured: bool = False  # at the end of an epoch: what is due after it is still to be measured


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
        self.evaluation_context, self.embed, self.score = parts.evaluation_context, parts.embed, parts.score
        self.run, self.metrics, self.console, self.epochs, self.seed = run, metrics, console, epochs, seed
        self.device = parts.device
        self.step = Step(self.method, self.optimizer, self.runtime, self.device, console.say)
        self.dtype = self.step.dtype
        self.checkpoints = Checkpoints(run, metrics)
        self.step.before_update = self.checkpoints.wait_for_copy
        self.position = Position()
        self.latest: dict[str, float] = {}
        self._started, self._saved_at, self._saved_step = time.monotonic(), -math.inf, -1
        self._advised = self._forecasted = False
        self._watch_seconds = 0.0
        self._stepping = [0, 0.0]  # steps, and seconds they took, without those before the first log line
        self._first_step = 0
        self.whole = True  # False within an E-step, which changes the method bit by bit

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.position.step / len(self.loader)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of what follows the schedule."""
        groups = zip(self.optimizer.param_groups, self.step.lrs, strict=True)
        return next(lr for group, lr in groups if not group.get("fixed_lr"))

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; order, views and dropout are functions of (seed, epoch, step)."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.step.optimizer_state(),
            "scaler": self.step.scaler.state_dict(),
            "position": {**vars(self.position), "seconds": self.seconds()},
            "precision": format_name(self.dtype),
            "metrics_bytes": self.metrics.flush() if self.metrics else 0,
            "latest": self.latest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.method.load_state_dict(state["method"])
        self.step.load_optimizer(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.latest = dict(state["latest"])

    def seconds(self) -> float:
        """Time spent on this run, interruptions not counted."""
        return self.position.seconds + time.monotonic() - self._started

    def save(self) -> None:
        """Begin to write a checkpoint, on process 0; the training goes on while its state is copied and written.

        Raises:
            NotFinite: the weights are not, so the checkpoint before this one is kept.
            OSError: the checkpoint before this one could not be written.
        """
        # Of those that are trained: moving averages of finite weights are finite.
        if not finite(weight for weight in self.method.parameters() if weight.requires_grad):
            raise self._not_finite("weights are not finite")
        if distributed.rank() == 0:
            self.checkpoints.save(self.state(), (name for name, _ in self.method.named_parameters()))
        self._saved_at, self._saved_step = time.monotonic(), self.position.step

    def _save_after(self, seconds: float) -> None:
        """Save if the last checkpoint is that old; all processes must call this together."""
        if distributed.largest(int(time.monotonic() - self._saved_at >= seconds), self.device):
            self.save()

    # ------------------------------------------------------------------------------------------------------------- loop

    def fit(self, stop: StopSignal) -> bool:
        """Train to the end, True, or to the step after a stop signal, False; either way the last step is saved.

        What a signal ends that is no step, an E-step or a measurement, is done again by the training that goes on.

        Raises:
            NotFinite: the loss is infinite or not a number; the last checkpoint is from before that.
        """
        self.method.train()
        steps = len(self.loader)
        last = steps * self.epochs
        self._first_step = self.position.step
        try:
            if self.position.step == 0 and not self.latest:
                with stop.at_once():
                    self._baselines()
                self.save()
            self.console.start(last, self.position.step)
            while (self.position.step < last or self.position.unmeasured) and not stop.received(self.device):
                epoch = self.position.step // steps
                if self.position.unmeasured:
                    with stop.at_once():
                        self._watch(epoch)
                    self.position.unmeasured, self._saved_step = False, -1
                    self._save_after(self.runtime.checkpoint_seconds)
                    continue
                if self.position.step % steps == 0:
                    with stop.at_once():
                        self._before_epoch(epoch)
                self.loader.set_epoch(epoch, start=self.position.step - epoch * steps)
                self.position.unmeasured = self._train_epoch(stop)
        except (Stopped, RuntimeError) as error:
            why = process_group.cause_of(error)
            if not isinstance(why, Stopped):
                raise
            stop.number = stop.number or why.number
            # Others may not have heard of it yet, so nothing is exchanged with them any more.
            process_group.announce_stop(why.number)
        finally:
            self.console.stop()
            self.checkpoints.wait()
        if self.whole and self.position.step and self._saved_step != self.position.step:
            self.save()
            self.checkpoints.wait()
        return self.position.step == last and not self.position.unmeasured

    def _before_epoch(self, epoch: int) -> None:
        """The method's E-step, if it has one, with its seconds and scores.

        Nothing is saved between this and the first step of the epoch: an interrupted E-step is done again, from the
        weights and centroids that it began with.
        """
        start, self.whole = time.monotonic(), False
        clustered = self.method.before_epoch(epoch, self.embed, seed_of(self.seed, "e-step", epoch))
        self.whole = True
        if clustered:
            values = {"time/e_step": time.monotonic() - start}
            self._log({**values, **(self.score(clustered) if distributed.rank() == 0 else {})})
            process_group.wait_for_first()  # which scores them alone

    def _train_epoch(self, stop: StopSignal) -> bool:
        """The rest of an epoch; False when a stop signal ended it early."""
        steps, log_every = len(self.loader), self.runtime.log_every
        clock, clock_step = time.monotonic(), self.position.step
        batches = iter(self.loader)
        batch = next(batches)
        while batch:
            values = self._step(batch)
            batch = next(batches, None)  # made before anything is read: while the host waits, a GPU has work
            step = self.position.step
            logged = step % log_every == 0 or step % steps == 0
            if logged:
                loss_and_values = self._read(values)
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
            if logged or distributed.processes() == 1:
                if stop.received(self.device):
                    return False
                if self.runtime.checkpoint_minutes:
                    self._save_after(60 * self.runtime.checkpoint_minutes)
        return True

    def _step(self, batch: Batch) -> Values:
        """One optimizer step; its loss and metrics, which the next one may overwrite."""
        values = self.step(
            batch,
            seed=seed_of(self.seed, "step", self.position.step, distributed.rank()),
            lr_factor=self.schedule(self.epoch),
            step=self.position.step,
            steps=len(self.loader),
            epochs=self.epochs,
        )
        self.position.step += 1
        return values

    # ------------------------------------------------------------------------------------------------- watching it learn

    def _read(self, values: Values) -> dict[str, float]:
        """Means over processes: the only wait for the device between two log lines."""
        process_group.barrier()  # which names a process that does not come
        means = distributed.mean(torch.stack(list(values.values()))).tolist()
        numbers = {f"train/{name}": mean for name, mean in zip(values, means, strict=True)}
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
        untrained = self.evaluation_context(self.method.encoder)
        found = {"untrained": run_protocols(knn, untrained)}
        self._watch_seconds = time.monotonic() - start
        found["pixels"] = run_protocols(
            knn, self.evaluation_context(Pixels(untrained.data.channels, untrained.data.size))
        )
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
            found = run_protocols(due, self.evaluation_context(self.method.encoder))
            values = {f"{name}/{key}": v for name, verdict in found.items() for key, v in verdict.values.items()}
            for note in dict.fromkeys(note for verdict in found.values() for note in verdict.notes):
                self.console.say(note)
        if epoch == self.epochs:
            values.update(peak_memory(self.device))
        if values:
            self._log(values)
