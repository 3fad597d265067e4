"""VICReg: embeddings of two views are close, while each dimension keeps its variance and dimensions stay uncorrelated.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", arXiv:2105.04906.
Shapes: B images a process, N over all processes, D embedding. Letters as in Algorithm 1: z embeddings.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.layers import centred, encode_views, mlp, spread
from twoviews.methods.method import Collapse, Method, Output
from twoviews.ranges import NotNegative, Positive, Range, Size


def covariance_matrix(z: Float[Tensor, "B D"]) -> Float[Tensor, "D D"]:
    """Eq. 3: covariance of the dimensions over the N rows of all processes, divided by N - 1."""
    # Under autocast the product would be rounded to bf16.
    with torch.autocast(z.device.type, enabled=False):
        z = centred(z.float())
        products = distributed.sum_with_gradient(z.T @ z)
    return products / (len(z) * distributed.processes() - 1)


def variance_term(covariance: Float[Tensor, "D D"]) -> Float[Tensor, ""]:
    """Eq. 1: mean over dimensions of what the standard deviation lacks to 1; in [0, 0.99]."""
    return nnf.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()


def covariance_term(covariance: Float[Tensor, "D D"]) -> Float[Tensor, ""]:
    """Eq. 4: sum of the squared covariances of different dimensions, divided by D."""
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / len(covariance)


class VICReg(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's two hidden layers.
        embed_dim: D.
        invariance_weight: lambda, of the mean squared difference of the views.
        variance_weight: mu, of the mean of both views' terms, as in the authors' code; eq. 6 and solo-learn add them.
        covariance_weight: nu, of the sum of both views' terms.
    """

    batch_dependence = "variances, covariances"
    collapses = (
        Collapse(
            "std",
            "the embeddings' dimensions should have a standard deviation of about 1, and they hardly vary. Raise "
            "variance_weight, or lower the learning rate.",
            below=0.1,
        ),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Annotated[int, Range(at_least=2, usual="2048 to 8192")],
        invariance_weight: Positive,
        variance_weight: Positive,
        covariance_weight: NotNegative,
    ):
        super().__init__()
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight = covariance_weight
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, hidden_dim, embed_dim], last_bias=False)

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The loss of two views, each with batch-norm statistics of its own; variance and covariance of all N images."""
        y1, y2 = encode_views(self.encoder, views)
        z1, z2 = self.projector(y1).float(), self.projector(y2).float()
        covariances = [covariance_matrix(z1), covariance_matrix(z2)]
        invariance = nnf.mse_loss(z1, z2)
        variance = torch.stack([variance_term(each) for each in covariances]).mean()
        covariance = torch.stack([covariance_term(each) for each in covariances]).sum()
        loss = (
            self.invariance_weight * invariance + self.variance_weight * variance + self.covariance_weight * covariance
        )
        # About 1 when each dimension varies as it should, 0 when all embeddings are equal.
        deviation = covariances[0].detach().diagonal().clamp(min=0).sqrt().mean()
        terms = {"invariance": invariance.detach(), "covariance": covariance.detach(), "std": deviation}
        return Output(loss, {"spread": spread(z1), **terms})
