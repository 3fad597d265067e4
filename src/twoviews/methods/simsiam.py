"""SimSiam: two views, one encoder, a predictor and a stop-gradient.

Chen and He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566.
Shapes: B images, D embedding. Letters as in Algorithm 1: z projections, p predictions.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.layers import mlp, spread, without_duplicates
from twoviews.methods.method import Method, Output
from twoviews.ranges import Repeats, Size


def negative_cosine(p: Float[Tensor, "B D"], z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Eq. 1: mean of -cos(p, z), in [-1, 1]; no gradient flows into `z`."""
    return -nnf.cosine_similarity(p, z.detach(), dim=1).mean()


class SimSiam(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain.
        embed_dim: D, the width of projections and predictions, and of the projector's hidden layers.
        hidden_dim: width of the predictor's bottleneck; D / 4 in the paper.
        projector_layers: 3 for ImageNet, 2 for CIFAR (appendix D).
        fix_predictor_lr: keep the predictor off the lr schedule (sec. 4.2 (c)).
    """

    def __init__(
        self, encoder: Encoder, embed_dim: Size, hidden_dim: Size, projector_layers: Repeats, fix_predictor_lr: bool
    ):
        super().__init__()
        self.fix_predictor_lr = fix_predictor_lr
        self.encoder = encoder
        # "BN is applied to each fc layer including its output fc; the output fc has no ReLU"; the authors' code leaves
        # scale and offset out of the output's norm.
        dims = [encoder.out_dim] + [embed_dim] * projector_layers
        self.projector = mlp(dims, last_norm=True, last_affine=False)
        self.predictor = mlp([embed_dim, hidden_dim, embed_dim])

    def param_groups(self) -> list[dict]:
        """The predictor apart, so that its lr can stay constant."""
        return [
            {"params": without_duplicates([self.encoder, self.projector])},
            {"params": without_duplicates([self.predictor]), "fixed_lr": self.fix_predictor_lr},
        ]

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Symmetric loss of two views, each with batch-norm statistics of its own."""
        x1, x2 = views
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        z1, z2, p1, p2 = z1.float(), z2.float(), p1.float(), p2.float()
        loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
        return Output(loss, {"spread": spread(z1)})
