"""Barlow Twins: each dimension agrees with itself across two views and is uncorrelated with every other.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", arXiv:2103.03230.
Shapes: B images a process, N over all processes, D embedding. Letters as in Algorithm 1: z embeddings, c cross-correlation.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import centred, encode_views, mlp, spread
from twoviews.methods.method import Collapse, Method, Output
from twoviews.ranges import NotNegative, Positive, Range, Size


def standardised(z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Each dimension with mean 0 and standard deviation 1 over the N rows of all processes, as batch norm does it."""
    z = centred(z)
    variance = distributed.sum_with_gradient(z.square().sum(0)) / (len(z) * distributed.processes())
    return z * (variance + 1e-5).rsqrt()


def cross_correlation(z1: Float[Tensor, "B D"], z2: Float[Tensor, "B D"]) -> Float[Tensor, "D D"]:
    """Eq. 2: correlation of each dimension of the first view with each of the second, in [-1, 1], over all N images."""
    # Under autocast the product would be rounded to bf16.
    with torch.autocast(z1.device.type, enabled=False):
        c = standardised(z1.float()).T @ standardised(z2.float())
    return distributed.sum_with_gradient(c) / (len(z1) * distributed.processes())


def redundancy_reduction(c: Float[Tensor, "D D"], off_diagonal_weight: float) -> Float[Tensor, ""]:
    """Eq. 1: sum of (1 - c_ii)^2 plus the weighted sum of c_ij^2 for i other than j; in [0, 4 D + weight D (D - 1)]."""
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal


class BarlowTwins(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's two hidden layers.
        embed_dim: D; the method gains from a large one (fig. 4).
        off_diagonal_weight: lambda.
        loss_scale: the loss is multiplied by it. LARS makes steps of weights that do not depend on it, so there it is the
            ratio of the learning rates of norms and biases to that of weights.
    """

    batch_dependence = "correlations"
    collapses = (
        Collapse(
            "redundancy",
            "all dimensions of the embeddings say nearly the same (1 is entirely). Raise off_diagonal_weight, or lower the "
            "learning rate.",
            above=0.9,
        ),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Annotated[int, Range(at_least=2, usual="2048 to 8192")],
        off_diagonal_weight: NotNegative,
        loss_scale: Positive,
    ):
        super().__init__()
        self.off_diagonal_weight, self.loss_scale = off_diagonal_weight, loss_scale
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, hidden_dim, embed_dim], last_bias=False)

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Refuse micro-batches of less than three images, over which correlations say nothing; no notes."""
        if micro_batch < 3:
            raise BadInput(
                f"correlations over {micro_batch} images are 1 or -1 whatever the encoder does, so Barlow Twins has nothing to "
                f"learn from; use a batch_size of at least {3 * batch_size // micro_batch}, usually 256 or more."
            )
        return []

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The loss of two views, each with batch-norm statistics of its own; every process has that of all N images."""
        y1, y2 = encode_views(self.encoder, views)
        z1, z2 = self.projector(y1), self.projector(y2)
        c = cross_correlation(z1, z2)
        with torch.no_grad():
            diagonal, d = c.diagonal(), len(c)
            # 1 when embeddings do not depend on the view.
            agreement = diagonal.mean()
            # Root mean square of correlations between dimensions: 1 when all say the same (dimensional collapse).
            redundancy = ((c.square().sum() - diagonal.square().sum()).clamp(min=0) / (d * (d - 1))).sqrt()
        metrics = {"spread": spread(z1), "agreement": agreement, "redundancy": redundancy}
        return Output(self.loss_scale * redundancy_reduction(c, self.off_diagonal_weight), metrics)
