"""BN: batch norms that normalise corrupted images by their own statistics instead of the training images'.

Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift", arXiv:2006.10963;
Schneider et al., arXiv:2006.16971.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from twoviews.errors import BadInput
from twoviews.protocols.adaptation import Adaptation, Model
from twoviews.protocols.linear import Linear
from twoviews.protocols.streams import Classify
from twoviews.ranges import Count, Index, Range, Severity


@dataclass
class BN(Adaptation):
    """Statistics of the batch alone (prediction-time batch norm); nothing is learnt from batch to batch.

    Args:
        linear: this and what is not listed: see `Adaptation`.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    linear: Linear
    corruptions: Sequence[str] | None
    severities: Sequence[Severity]
    images: Count | None
    batch_size: Annotated[int, Range(at_least=2, usual="128 to 200")]
    seed: Index
    every_epochs: Index

    def start(self, model: Model) -> Classify:
        """The model with its batch norms in train mode.

        Raises:
            BadInput: the encoder has no batch norm.
        """
        if not model.batch_norms():
            raise BadInput(
                "protocol=bn renews the statistics of batch norms, and this encoder has none; use protocol=t3a."
            )
        return torch.no_grad()(model)
