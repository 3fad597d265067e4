"""T3A: the linear classifier is replaced by class prototypes that the stream itself adjusts.

Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", NeurIPS 2021.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.protocols.adaptation import Adaptation, Memory, Model
from twoviews.protocols.linear import Linear
from twoviews.protocols.streams import Classify
from twoviews.ranges import Count, Index, Range, Severity


@dataclass
class T3A(Adaptation):
    """Logits are products with unit prototypes of the memory, which a batch enters before it is classified.

    Features are those that the probe's weights are about (standardised), and the encoder is in eval mode.

    Args:
        linear: this and what is not listed: see `Adaptation`.
        per_class: supports that a class keeps, M in the paper; None is all.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    linear: Linear
    corruptions: Sequence[str] | None
    severities: Sequence[Severity]
    images: Count | None
    batch_size: Annotated[int, Range(at_least=2, usual="128 to 200")]
    seed: Index
    per_class: Count | None
    every_epochs: Index

    def start(self, model: Model) -> Classify:
        """The prototypes begin with the rows of the probe's weights."""
        memory = Memory(model.probe.linear, self.per_class)

        @torch.no_grad()
        def classify(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
            z = model.features(images)
            memory.add(z, model.probe.linear(z))
            return z @ nnf.normalize(memory.prototypes(), dim=1).T

        return classify
