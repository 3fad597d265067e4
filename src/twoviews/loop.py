"""The training loop: it gets everything it needs as built objects, and knows neither the configuration nor any method."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twoviews import distributed, process_group
from twoviews.checkpoints import LAST, Checkpointer, all_finite
from twoviews.console import Console
from twoviews.data.loader import Batch
from twoviews.errors import Stopped
from twoviews.monitoring import FORECAST_STEPS, Monitor, NotFinite, Throughput, reduced_metrics
from twoviews.randomness import seed_of
from twoviews.runtime import format_name
from twoviews.step import TrainStep, Values
from twoviews.stop_signal import StopSignal
from twoviews.tracking.metrics import Metrics

if TYPE_CHECKING:
    from twoviews.assembly import Parts  # reads configurations, which the loop does not


@dataclass
class Position:
    """How far a training is; everything else in a checkpoint is state of the parts.

    Args:
        step: optimizer steps done.
        seconds: spent on this run before this process.
        evaluation_due: at the end of an epoch whose evaluations are not done yet.
    """

    step: int = 0
    seconds: float = 0.0
    evaluation_due: bool = False


class Training:
    """A training that can stop after any step and continue from there, bit for bit.

    Args:
        parts: what is trained, on which data and how.
        folder: for checkpoints.
        metrics: the record; only process 0 has one.
        console: shows progress and messages.
        epochs: length of the training.
        seed: of all randomness after initialisation.
    """

    def __init__(
        self, parts: "Parts", *, folder: Path, metrics: Metrics | None, console: Console, epochs: int, seed: int
    ):
        self.method, self.loader, self.device = parts.method, parts.loader, parts.device
        self.optimizer, self.schedule, self.runtime = parts.optimizer, parts.schedule, parts.runtime
        self.embed, self.score_clusters = parts.embed, parts.score_clusters
        self.folder, self.metrics, self.console, self.epochs, self.seed = folder, metrics, console, epochs, seed
        self.train_step = TrainStep(self.method, self.optimizer, self.runtime, self.device, console.say)
        self.dtype = self.train_step.dtype
        self.checkpoints = Checkpointer(folder, metrics)
        self.train_step.before_update = self.checkpoints.wait_for_copy
        self.monitor = Monitor(
            make_context=parts.evaluation_context,
            protocols=parts.protocols,
            metrics=metrics,
            console=console,
            epochs=epochs,
            device=self.device,
            collapses=parts.method.collapses,
            small_epochs=self.loader.small_epochs,
            small_cost=parts.views.cost(self.loader.small_scale),
        )
        self.position = Position()
        self.in_e_step = False  # the E-step changes the method bit by bit, so its state is not saved
        self._started_at, self._saved_at, self._saved_step = time.monotonic(), -math.inf, -1
        self._throughput = Throughput(self.loader.batch_size, 0)
        self._first_step = 0

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.position.step / len(self.loader)

    @property
    def lr(self) -> float:
        """Learning rate of the last step, of the parameters that follow the schedule."""
        groups = zip(self.optimizer.param_groups, self.train_step.lrs, strict=True)
        return next(lr for group, lr in groups if not group.get("fixed_lr"))

    def seconds(self) -> float:
        """Time spent on this run, without interruptions."""
        return self.position.seconds + time.monotonic() - self._started_at

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; order, views and dropout are functions of (seed, epoch, step)."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.train_step.optimizer_state(),
            "scaler": self.train_step.scaler.state_dict(),
            "position": {
                "step": self.position.step,
                "seconds": self.seconds(),
                "unmeasured": self.position.evaluation_due,  # its name in all checkpoints
            },
            "precision": format_name(self.dtype),
            "metrics_bytes": self.metrics.flush() if self.metrics else 0,
            "latest": self.monitor.latest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.method.load_state_dict(state["method"])
        self.train_step.load_optimizer(state["optimizer"])
        self.train_step.scaler.load_state_dict(state["scaler"])
        position = dict(state["position"])
        self.position = Position(evaluation_due=position.pop("unmeasured", False), **position)
        self.monitor.latest = dict(state["latest"])

    def save(self) -> None:
        """Begin to write a checkpoint, on process 0; the training goes on while its state is copied and written.

        Raises:
            NotFinite: a weight is not finite; the checkpoint before this one is kept.
            OSError: the checkpoint before this one could not be written.
        """
        # Moving averages of finite weights are finite, so only trained weights are looked at.
        if not all_finite(weight for weight in self.method.parameters() if weight.requires_grad):
            raise self._not_finite("weights are not finite")
        if distributed.rank() == 0:
            self.checkpoints.save(self.state(), (name for name, _ in self.method.named_parameters()))
        self._saved_at, self._saved_step = time.monotonic(), self.position.step

    def _save_after(self, seconds: float) -> None:
        """Save if the last checkpoint is that old; all processes must call this together."""
        if distributed.max_over_processes(int(time.monotonic() - self._saved_at >= seconds), self.device):
            self.save()

    # ------------------------------------------------------------------------------------------------------------- loop

    def fit(self, stop: StopSignal) -> bool:
        """Train to the end, True, or to the step after a stop signal, False; either way the last step is saved.

        An E-step or an evaluation that a signal ends is repeated by the training that continues.

        Raises:
            NotFinite: the loss is infinite or not a number; the last checkpoint is from before that.
        """
        self.method.train()
        steps = len(self.loader)
        last = steps * self.epochs
        self._first_step = self.position.step
        self._throughput = Throughput(self.loader.batch_size, self._first_step)
        try:
            if self.position.step == 0 and not self.monitor.latest:
                with stop.at_once():
                    self._log(self.monitor.baselines(self.method.encoder))
                self.save()
            self.console.start(last, self.position.step)
            while (self.position.step < last or self.position.evaluation_due) and not stop.received(self.device):
                epoch = self.position.step // steps
                if self.position.evaluation_due:
                    with stop.at_once():
                        self._log(self.monitor.evaluate(self.method.encoder, epoch))
                    self.position.evaluation_due, self._saved_step = False, -1
                    self._save_after(self.runtime.checkpoint_seconds)
                    continue
                if self.position.step % steps == 0:
                    with stop.at_once():
                        self.e_step(epoch)
                self.loader.set_epoch(epoch, start=self.position.step - epoch * steps)
                self.position.evaluation_due = self._train_epoch(stop)
        except (Stopped, RuntimeError) as error:
            cause = process_group.cause_of(error)
            if not isinstance(cause, Stopped):
                raise
            stop.number = stop.number or cause.number
            # Other processes may not know of the signal yet, so nothing is exchanged with them any more.
            process_group.announce_stop(cause.number)
        finally:
            self.console.stop()
            self.checkpoints.wait()
        if not self.in_e_step and self.position.step and self._saved_step != self.position.step:
            self.save()
            self.checkpoints.wait()
        return self.position.step == last and not self.position.evaluation_due

    def e_step(self, epoch: int) -> None:
        """Run the method's E-step before an epoch, if it has one, and log its time and scores.

        Nothing is saved between this and the first step of the epoch: an interrupted E-step is repeated, from the weights
        and centroids that it began with.
        """
        start, self.in_e_step = time.monotonic(), True
        clustered = self.method.before_epoch(epoch, self.embed, seed_of(self.seed, "e-step", epoch))
        self.in_e_step = False
        if clustered:
            values = {"time/e_step": time.monotonic() - start}
            self._log({**values, **(self.score_clusters(clustered) if distributed.rank() == 0 else {})})
            process_group.wait_for_first()  # which scores them alone

    def _train_epoch(self, stop: StopSignal) -> bool:
        """Train the rest of an epoch; False when a stop signal ended it early."""
        steps, log_every = len(self.loader), self.runtime.log_every
        self._throughput.restart(self.position.step)
        batches = iter(self.loader)
        batch = next(batches)
        while batch:
            values = self.train_on_batch(batch)
            batch = next(batches, None)  # made before values are read, so that a GPU has work while the host waits
            step = self.position.step
            logged = step % log_every == 0 or step % steps == 0
            if logged:
                self._log_step(values)
            if step % steps == 0:
                return True
            # Processes must ask together, and asking makes them wait for each other.
            if logged or distributed.processes() == 1:
                if stop.received(self.device):
                    return False
                if self.runtime.checkpoint_minutes:
                    self._save_after(60 * self.runtime.checkpoint_minutes)
        return True

    def train_on_batch(self, batch: Batch) -> Values:
        """Make one optimizer step; returns its loss and metrics, which the next step may overwrite."""
        values = self.train_step(
            batch,
            seed=seed_of(self.seed, "step", self.position.step, distributed.rank()),
            lr_factor=self.schedule(self.epoch),
            step=self.position.step,
            steps=len(self.loader),
            epochs=self.epochs,
        )
        self.position.step += 1
        return values

    # ---------------------------------------------------------------------------------------------------------- logging

    def _log(self, values: dict[str, float]) -> None:
        if values:
            self.monitor.log(self.position.step, self.epoch, values)

    def _log_step(self, values: Values) -> None:
        """Log the values of a step with learning rate and throughput: the only wait for the device between two log lines."""
        try:
            numbers = reduced_metrics(values)
        except NotFinite as error:
            raise self._not_finite(str(error)) from None
        images_per_s = self._throughput.measure(self.position.step)
        self.monitor.warn_of_collapse(numbers, self.epoch)
        self._log({**numbers, "lr": self.lr, "images_per_s": images_per_s})
        if self.position.step - self._first_step >= FORECAST_STEPS:
            images = len(self.loader) * self.loader.batch_size
            average = None if self.loader.small_epochs else self._throughput.average  # over steps of one cost
            self.monitor.forecast(average or images_per_s, images, self.epoch)

    def _not_finite(self, problem: str) -> NotFinite:
        return NotFinite(
            f"the {problem} at step {self.position.step} (epoch {self.epoch:.2f}) with lr {self.lr:.4g}; the last good "
            f"checkpoint is {self.folder / LAST}"
        )
