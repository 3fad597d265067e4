"""Robustness: accuracy of a frozen encoder and its linear probe on corrupted test images.

The corruptions of CIFAR-10-C and ImageNet-C, arXiv:1903.12261, made on the fly (`twoviews.data.corruptions`; frost is a
procedural substitute). The probe has seen clean images only.
"""

from dataclasses import dataclass

import torch

from twoviews.features import BATCH
from twoviews.protocols.adaptation import Model
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult
from twoviews.protocols.streams import OnStreams, headline


@dataclass
class Corruptions(OnStreams):
    """Accuracy per corruption and severity, and its mean; the parameters are those of `OnStreams`."""

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 is the mean over corruptions and severities; `clean` the accuracy on the same images as they are.

        Each with the limits of its 95 % interval, `_low` and `_high`.
        """
        streams = self.streams(context)
        model = Model(context, self.linear.probe(context)[0])
        _, table = streams.answers(BATCH[context.device.type], lambda: torch.no_grad()(model))
        values = {**headline(table[-1], "top1"), **headline(table[0], "clean")}
        return EvaluationResult(values, tables={"corruptions": table})
