"""BYOL: an online network predicts what a slowly moving target network says of the other view.

Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733.
Shapes: B images, D embedding. Letters as in the paper: z' target projections, q(z) predictions, tau the target's decay.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.layers import ema_update, encode_views, frozen_copy, mlp, rising_momentum, spread, targets
from twoviews.methods.method import Method, Output, Progress, Rows
from twoviews.ranges import EmaMomentum, Size


def regression_loss(p: Float[Tensor, "B D"], z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Eq. 2: squared distance of unit vectors, 2 - 2 cos(p, z), averaged over the batch; in [0, 4]."""
    return 2 - 2 * nnf.cosine_similarity(p, z, dim=1).mean()


class BYOL(Method):
    """Sec. 3 of the paper.

    Args:
        encoder: the network to pretrain; the online encoder.
        hidden_dim: hidden width of projector and predictor; 4096 in the paper.
        embed_dim: D; 256 in the paper.
        momentum: tau at the start; it rises to 1 with a cosine over the whole training.
    """

    def __init__(self, encoder: Encoder, hidden_dim: Size, embed_dim: Size, momentum: EmaMomentum):
        super().__init__()
        self.momentum = momentum
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, embed_dim])
        self.predictor = mlp([embed_dim, hidden_dim, embed_dim])
        self.target = frozen_copy(nn.Sequential(self.encoder, self.projector))

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The loss of both directions, added."""
        y1, y2 = encode_views(self.encoder, views)
        z1, z2 = self.projector(y1), self.projector(y2)
        p1, p2 = self.predictor(z1).float(), self.predictor(z2).float()
        t1, t2 = targets(self.target, views)
        return Output(regression_loss(p1, t2) + regression_loss(p2, t1), {"spread": spread(z1)})

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """The target follows; batch-norm statistics stay its own."""
        tau = rising_momentum(self.momentum, progress.fraction)
        ema_update(self.target, (self.encoder, self.projector), tau)
