"""Learning-rate schedules: epochs done, fractional, to a multiplier of the base learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twoviews.errors import BadInput
from twoviews.ranges import Fraction, NotNegative, Positive


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to `final` after a linear warm-up from `warmup_start`.

    Step i of W warm-up steps has the share i / W of the way, so that step W is the first at the full rate. SwAV's code and
    solo-learn's have i / (W - 1), which is the full rate one step earlier: less than 1 / W of it apart at any step, 0.05 %
    with 10 epochs of 196 steps. Ours does not depend on the number of steps, and a warm-up of a single step works.

    Args:
        epochs: length of the training, warm-up included.
        warmup_epochs: length of the warm-up.
        warmup_start: multiplier at the first step of the warm-up.
        final: multiplier at the end.
        every: "step" follows the curve at each optimizer step; "epoch" holds it for an epoch; "epoch_from_1" as well,
            but counts epochs from 1, as MoCo's CIFAR demo does, whose last epoch therefore has a learning rate of 0.

    Raises:
        BadInput: the warm-up is longer than the training.
    """

    epochs: Positive
    warmup_epochs: NotNegative = 0.0
    warmup_start: Fraction = 0.0
    final: Fraction = 0.0
    every: Literal["step", "epoch", "epoch_from_1"] = "step"

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise BadInput(
                f"warmup_epochs={self.warmup_epochs:g} is longer than the training of {self.epochs:g} epochs, so the "
                f"learning rate would never be reached; use at most {self.epochs:g}, for example {self.epochs / 10:g}."
            )

    def __call__(self, epoch: float) -> float:
        """The multiplier after `epoch` epochs."""
        if self.every != "step":
            epoch = math.floor(epoch) + (self.every == "epoch_from_1")
        if epoch < self.warmup_epochs:
            return self.warmup_start + (1 - self.warmup_start) * epoch / self.warmup_epochs
        done = min(1.0, (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Step:
    """Multiplied by `factor` at each of `milestones` (epochs)."""

    milestones: Sequence[NotNegative]
    factor: Fraction

    def __call__(self, epoch: float) -> float:
        """The multiplier after `epoch` epochs."""
        return self.factor ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Constant:
    """A learning rate that never changes."""

    def __call__(self, epoch: float) -> float:
        """The multiplier 1 at every epoch."""
        return 1.0


Schedule = Cosine | Step | Constant
