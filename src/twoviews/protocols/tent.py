"""Tent: batch statistics, and scales and offsets that make predictions more certain.

Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", arXiv:2006.10726.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.protocols.adaptation import Adaptation, Model, affine, entropy
from twoviews.protocols.streams import Classify
from twoviews.ranges import Positive


@dataclass
class Tent(Adaptation):
    """A step of Adam on the mean entropy of each batch, over the affine parameters of the batch norms.

    Args:
        lr: of Adam.
        others: see `Adaptation`.
    """

    lr: Positive

    def start(self, model: Model) -> Classify:
        """A classifier for one stream: it returns the logits of a batch, then updates the model by them.

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
