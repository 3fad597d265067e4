"""BN: batch norms that normalise corrupted images by their own statistics instead of the training images'.

Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift", arXiv:2006.10963;
Schneider et al., arXiv:2006.16971.
"""

from dataclasses import dataclass

import torch

from twoviews.errors import BadInput
from twoviews.protocols.adaptation import Adaptation, Model
from twoviews.protocols.streams import Classify


@dataclass
class BN(Adaptation):
    """Statistics of the batch alone (prediction-time batch norm); nothing is learnt from batch to batch."""

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
