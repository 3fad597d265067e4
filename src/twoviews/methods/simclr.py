"""SimCLR: two views of an image find each other among all views of the batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv:2002.05709;
Yeh et al., "Decoupled Contrastive Learning", arXiv:2110.06848 (DCL: the positive leaves the denominator).
Shapes: B images a process, N over all processes, D embedding. Letters as in Algorithm 1: z projections.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import mlp, spread
from twoviews.methods.method import Method, Output
from twoviews.ranges import Size, Temperature


def nt_xent(
    z1: Float[Tensor, "B D"], z2: Float[Tensor, "B D"], temperature: float, decoupled: bool = False
) -> Float[Tensor, ""]:
    """Eq. 1, averaged over the 2B anchors of this process: 1 positive and 2(N - 1) negatives each.

    Half of what google-research/simclr reports, which adds the two halves of the mean. If `decoupled`, the denominator has
    the negatives alone, as in eq. 6 of DCL with weights of 1; such a loss may be negative.
    """
    z1, z2 = nnf.normalize(z1, dim=1), nnf.normalize(z2, dim=1)
    z = torch.cat([z1, z2])  # [2B, D]
    others = torch.cat([distributed.gather_with_gradient(z1), distributed.gather_with_gradient(z2)])  # [2N, D]
    n = len(others) // 2
    me = torch.arange(len(z1), device=z.device) * distributed.processes() + distributed.rank()
    # Under autocast the product would be rounded to bf16: an error of up to 0.004 / T.
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ others.T / temperature  # [2B, 2N]
    logits = logits.scatter(1, torch.cat([me, me + n])[:, None], float("-inf"))
    positives = torch.cat([me + n, me])
    if not decoupled:
        return nnf.cross_entropy(logits, positives)
    negatives = logits.scatter(1, positives[:, None], float("-inf")).logsumexp(1)
    return (negatives - logits.gather(1, positives[:, None])[:, 0]).mean()


class SimCLR(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's hidden layer.
        embed_dim: D.
        temperature: tau, which divides cosines before the softmax.
        decoupled: leave the positive out of the denominator (DCL), for small batches.
    """

    batch_dependence = "negatives"

    def __init__(
        self, encoder: Encoder, hidden_dim: Size, embed_dim: Size, temperature: Temperature, decoupled: bool = False
    ):
        super().__init__()
        self.temperature, self.decoupled = temperature, decoupled
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, embed_dim])

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Refuse a batch of one image, which has no negatives; no notes."""
        if batch_size < 2:
            raise BadInput(
                f"batch_size={batch_size} leaves SimCLR without negatives; use at least 2, usually 256 or more."
            )
        return []

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Both views go through the encoder as one batch, as in the authors' code, so they share batch-norm statistics."""
        z = self.projector(self.encoder(torch.cat(list(views)))).float()
        z1, z2 = z.chunk(2)
        return Output(nt_xent(z1, z2, self.temperature, self.decoupled), {"spread": spread(z1)})
