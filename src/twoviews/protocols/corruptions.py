"""Robustness: accuracy of a frozen encoder and its linear probe on corrupted test images.

The corruptions of CIFAR-10-C and ImageNet-C, arXiv:1903.12261, made on the fly (`twoviews.data.corruptions`; frost is a
procedural substitute). The probe has seen clean images only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twoviews.features import BATCH
from twoviews.protocols.adaptation import Model
from twoviews.protocols.linear import Linear, linear_of_run
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.streams import Streams, headline
from twoviews.ranges import Corruption, Count, Index, Seed, Severity


@dataclass
class Corruptions(Protocol):
    """Accuracy per corruption and severity, and its mean.

    Args:
        linear: how the probe is fitted.
        corruptions: names, as in `twoviews.data.corruptions`; None is all fifteen.
        severities: 1 to 5 each.
        images: how many of the test images, with the shares of the classes kept; None is all.
        seed: of corruptions, choice of images and bootstrap.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    linear: Linear
    corruptions: Sequence[Corruption] | None
    severities: Sequence[Severity]
    images: Count | None
    seed: Seed
    every_epochs: Index

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run's linear probe."""
        return linear_of_run(config)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 is the mean over corruptions and severities; `clean` the accuracy on the same images as they are.

        Each with the limits of its 95 % interval, `_low` and `_high`.
        """
        streams = Streams(context, self.corruptions, self.severities, self.images, self.seed)
        model = Model(context, self.linear.probe(context)[0])
        table = streams.table(streams.answers(BATCH[context.device.type], lambda: torch.no_grad()(model)))
        return EvaluationResult(
            {**headline(table, "top1"), **headline(table[:1], "clean")}, tables={"corruptions": table}
        )
