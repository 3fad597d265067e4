"""Tent: batch statistics, and scales and offsets that make predictions more certain.

Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", arXiv:2006.10726.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.protocols.adaptation import Adaptation, Model, affine, entropy
from twoviews.protocols.linear import Linear
from twoviews.protocols.streams import Classify
from twoviews.ranges import Count, Index, Positive, Range, Severity


@dataclass
class Tent(Adaptation):
    """A step of Adam on the mean entropy of each batch, over the affine parameters of the batch norms.

    Args:
        linear: this and what is not listed: see `Adaptation`.
        lr: of Adam.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    linear: Linear
    corruptions: Sequence[str] | None
    severities: Sequence[Severity]
    images: Count | None
    batch_size: Annotated[int, Range(at_least=2, usual="128 to 200")]
    seed: Index
    lr: Positive
    every_epochs: Index

    def start(self, model: Model) -> Classify:
        """Logits of before the step that they cause.

        Raises:
            BadInput: the encoder has no batch norm with scales and offsets.
        """
        optimizer = torch.optim.Adam(affine(model.batch_norms(), "tent"), lr=self.lr)

        @torch.enable_grad()
        def classify(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
            logits = model(images)
            optimizer.zero_grad()
            entropy(logits).mean().backward()
            optimizer.step()
            return logits.detach()

        return classify
