"""T3A: the linear classifier is replaced by class prototypes that the stream itself adjusts.

Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", NeurIPS 2021.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.protocols.adaptation import Adaptation, Model, PseudoLabels
from twoviews.protocols.streams import Classify
from twoviews.ranges import Count


@dataclass
class T3A(Adaptation):
    """Logits are products with unit prototypes of the memory, which a batch enters before it is classified.

    Features are those that the probe's weights are about (standardised), and the encoder is in eval mode.

    Args:
        per_class: supports that a class keeps, M in the paper; None is all.
        others: see `Adaptation`.
    """

    per_class: Count | None

    def start(self, model: Model) -> Classify:
        """A classifier for one stream, whose prototypes begin as the rows of the probe's weights."""
        memory = PseudoLabels(model.probe.linear, self.per_class)

        @torch.no_grad()
        def classify(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
            z = model.features(images)
            memory.add(z, model.probe.linear(z))
            return z @ nnf.normalize(memory.prototypes(), dim=1).T

        return classify
