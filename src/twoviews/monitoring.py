"""What a training says about itself: logged values, baselines, evaluations, throughput, forecast and advice."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from twoviews import distributed, process_group
from twoviews.backbones import Encoder
from twoviews.console import Console, duration
from twoviews.features import PixelEncoder
from twoviews.methods.method import Collapse
from twoviews.protocols.protocol import EvaluationContext, Protocol, run_protocols
from twoviews.protocols.units import KNN_TOP1, PIXELS_KNN_TOP1, UNTRAINED_KNN_TOP1
from twoviews.runtime import peak_memory
from twoviews.step import Values

if TYPE_CHECKING:
    from twoviews.tracking.metrics import Metrics

FORECAST_STEPS = 50  # of a process, after which it forecasts the rest of the run
PROGRESS_VALUES = {  # name in the progress line: name in metrics.jsonl
    "loss": "train/loss",
    "spread": "train/spread",
    "lr": "lr",
    "img/s": "images_per_s",
    "kNN": KNN_TOP1,
}
SPREAD_WARNING = Collapse(
    "spread",
    "1 is even, 0 is one point, so the embeddings are collapsing. Lower the learning rate, check in views.png that the views "
    "are not too alike, and give the batch norms larger batches.",
    below=0.1,
)


class NotFinite(ArithmeticError):
    """The loss or the weights are infinite or not a number; the message says where, not what to do."""


class Throughput:
    """Images per second between log lines, and on average.

    Args:
        batch_size: images per step, of all processes.
        step: optimizer steps done before.
    """

    def __init__(self, batch_size: int, step: int):
        self._batch_size, self._first_step = batch_size, step
        self._steps, self._seconds = 0, 0.0  # without those before the first measurement, which load and compile
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin to measure after `step` steps."""
        self._step, self._time = step, time.monotonic()

    def measure(self, step: int) -> float:
        """Images per second since the last measurement."""
        steps, seconds = step - self._step, time.monotonic() - self._time
        if self._step > self._first_step:
            self._steps += steps
            self._seconds += seconds
        self.restart(step)
        return steps * self._batch_size / seconds

    @property
    def average(self) -> float | None:
        """Images per second over all measurements but the first; None before the second."""
        return self._steps * self._batch_size / self._seconds if self._steps else None


class Monitor:
    """Logs values to metrics.jsonl and the console, and evaluates the encoder while it is trained.

    Args:
        make_context: makes the evaluation context of an encoder.
        protocols: what is evaluated, by name.
        metrics: the record; only process 0 has one.
        console: shows progress and messages.
        epochs: length of the training.
        device: whose peak memory is logged at the end.
        collapses: the method's `Collapse` criteria.
        small_epochs: at the beginning, with smaller views.
        small_cost: of such an epoch, as a share of a later one's.
    """

    def __init__(
        self,
        make_context: Callable[[Encoder], EvaluationContext],
        protocols: Mapping[str, Protocol],
        metrics: "Metrics | None",
        console: Console,
        epochs: int,
        device: torch.device,
        collapses: Sequence[Collapse] = (),
        small_epochs: int = 0,
        small_cost: float = 1.0,
    ):
        self._make_context, self._protocols, self._metrics, self._console = make_context, protocols, metrics, console
        self._epochs, self._device = epochs, device
        self._small_epochs, self._small_cost = small_epochs, small_cost
        self.latest: dict[str, float] = {}
        self._knn_epoch: float | None = None  # of the latest kNN accuracy; None: that is of before a resume
        self._collapses = [SPREAD_WARNING, *collapses]  # those that the user was not warned of yet
        self._epoch_seconds: float | None = None  # of training steps with views of full size, as forecast
        self._knn_seconds = 0.0

    def log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record values measured together after `step` optimizer steps, and show the important ones."""
        self.latest.update(values)
        if self._metrics:
            self._metrics.log(step, epoch, values)
        if PROGRESS_VALUES["kNN"] in values:
            self._knn_epoch = epoch
        shown = {name: f"{self.latest[key]:.4g}" for name, key in PROGRESS_VALUES.items() if key in self.latest}
        if "kNN" in shown and self._knn_epoch is not None and self._knn_epoch < epoch:
            shown["kNN"] += f" (epoch {self._knn_epoch:.4g})"
        at_end = epoch >= self._epochs and "train/loss" not in values  # of the last evaluation, not of the last step
        self._console.progress(step, epoch, shown, self._seconds_left(epoch), important=at_end)

    def warn_of_collapse(self, values: Mapping[str, float], epoch: float) -> None:
        """Warn, once for each metric, when the embeddings collapse.

        Args:
            values: of a step, by their names in metrics.jsonl.
            epoch: epochs done, fractional; in the first one embeddings of most methods are narrow.
        """
        for collapse in [*self._collapses] if epoch >= 1 else ():
            value = values.get(f"train/{collapse.metric}", math.nan)
            if value < collapse.below or value > collapse.above:
                self._collapses.remove(collapse)
                self._console.say(f"advice: train/{collapse.metric} is {value:.3f}: {collapse.advice}")

    def forecast(self, images_per_s: float, images: int, epoch: float) -> None:
        """Renew the forecast of how long the rest of the run will take, and say it the first time.

        Args:
            images_per_s: of the training steps.
            images: of an epoch.
            epoch: epochs done, fractional.
        """
        first, seconds = self._epoch_seconds is None, images / images_per_s
        self._epoch_seconds = seconds / (self._small_cost if epoch <= self._small_epochs else 1)
        if first:
            self._console.say(
                f"{images_per_s:.0f} images/s: an epoch takes {duration(seconds)}, the rest of the run about "
                f"{duration(self._seconds_left(epoch) or 0)}."
            )

    def _seconds_left(self, epoch: float) -> float | None:
        """Forecast of the seconds that training and evaluations take after `epoch` epochs; None before the first forecast."""
        if self._epoch_seconds is None:
            return None
        intervals = [protocol.every_epochs for protocol in self._protocols.values() if protocol.every_epochs]
        evaluation_seconds = len(intervals) * self._knn_seconds
        left = self._epochs - epoch
        smaller = min(left, max(0, self._small_epochs - epoch))
        seconds = (left - smaller + smaller * self._small_cost) * self._epoch_seconds
        seconds += left * self.latest.get("time/e_step", 0)
        return seconds + left / min(intervals, default=self._epochs) * evaluation_seconds

    def baselines(self, encoder: Encoder) -> dict[str, float]:
        """KNN accuracy of the untrained encoder and of raw pixels; a method that does not beat both has learnt nothing.

        Empty where kNN is not evaluated, and on all processes but the first.
        """
        if "knn" not in self._protocols:
            return {}
        self._console.say("measuring kNN of raw pixels and of the untrained encoder …")
        knn, start = {"knn": self._protocols["knn"]}, time.monotonic()
        untrained = self._make_context(encoder)
        results = {UNTRAINED_KNN_TOP1: run_protocols(knn, untrained)}
        self._knn_seconds = time.monotonic() - start
        results[PIXELS_KNN_TOP1] = run_protocols(
            knn, self._make_context(PixelEncoder(untrained.data.channels, untrained.data.size))
        )
        if distributed.rank() > 0:
            return {}
        return {name: result["knn"].values["top1"] for name, result in results.items()}

    def evaluate(self, encoder: Encoder, epoch: int) -> dict[str, float]:
        """The values of all protocols that are due after `epoch` epochs; at the end all are, and peak memory is added."""
        end = epoch == self._epochs
        due = {
            name: protocol
            for name, protocol in self._protocols.items()
            if end or (protocol.every_epochs and epoch % protocol.every_epochs == 0)
        }
        results = run_protocols(due, self._make_context(encoder)) if due else {}
        for note in dict.fromkeys(note for result in results.values() for note in result.notes):
            self._console.say(note)
        values = {f"{name}/{key}": value for name, result in results.items() for key, value in result.values.items()}
        return values | (peak_memory(self._device) if end else {})


def reduced_metrics(values: Values) -> dict[str, float]:
    """Loss and metrics of a step as numbers, train/<name>: means over processes; waits for all of them and for the device.

    Raises:
        NotFinite: the loss is infinite or not a number.
    """
    process_group.barrier()  # its error names the missing process
    means = distributed.mean_over_processes(torch.stack(list(values.values()))).tolist()
    numbers = {f"train/{name}": mean for name, mean in zip(values, means, strict=True)}
    if not math.isfinite(numbers["train/loss"]):
        raise NotFinite(f"loss is {numbers['train/loss']}")
    return numbers
