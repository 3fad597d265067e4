"""Supervised: the labels themselves, as the upper reference for an encoder, its data and its schedule.

Shapes: B images, N training images, F encoder features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.layers import encode_views, spread
from twoviews.methods.method import Method, Output
from twoviews.ranges import Count


class Supervised(Method):
    """Cross-entropy of a linear classifier on each view.

    Args:
        encoder: the network to train.
        labels: [N], the class of each training image; looked up by index, since batches carry no labels.
        classes: how many classes there are.
    """

    views = None
    labels: Tensor  # [N]

    def __init__(self, encoder: Encoder, labels: Int[Tensor, " N"], classes: Count):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.out_dim, classes)
        self.register_buffer("labels", labels.long(), persistent=False)

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The mean over all views."""
        y = self.labels[index]
        features = encode_views(self.encoder, views)
        losses = [nnf.cross_entropy(self.classifier(f).float(), y) for f in features]
        return Output(torch.stack(losses).mean(), {"spread": spread(features[0])})
