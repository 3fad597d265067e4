"""SimSiam: two views, one encoder, a predictor and a stop-gradient; with more views, FastSiam.

Chen and He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566;
Pototzky et al., "FastSiam: Resource-Efficient Self-supervised Learning on a Single GPU" (targets are means over views).
Shapes: V views of B images, D embedding. Letters as in Algorithm 1: z projections, p predictions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import encode_views, mlp, spread, without_duplicates
from twoviews.methods.method import Method, Output
from twoviews.ranges import Repeats, Size


def negative_cosine(p: Float[Tensor, "B D"], z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Eq. 1: mean of -cos(p, z), in [-1, 1]; no gradient flows into `z`."""
    return -nnf.cosine_similarity(p, z.detach(), dim=1).mean()


class SimSiam(Method):
    """Algorithm 1 of the paper, for any number of views.

    Args:
        encoder: the network to pretrain.
        embed_dim: D, the width of projections and predictions, and of the projector's hidden layers.
        hidden_dim: width of the predictor's bottleneck; D / 4 in the paper.
        projector_layers: 3 for ImageNet, 2 for CIFAR (appendix D).
        fix_predictor_lr: keep the predictor off the lr schedule (sec. 4.2 (c)).
    """

    views = None

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
        """Each prediction against the mean of the other views' projections; each view has batch-norm statistics of its own.

        Raises:
            BadInput: there is only one view.
        """
        if len(views) < 2:
            raise BadInput(
                f"SimSiam compares at least 2 views of an image and the augmentation makes {len(views)}; choose another "
                "augmentation."
            )
        z = [self.projector(y) for y in encode_views(self.encoder, views)]
        p = [self.predictor(each).float() for each in z]
        z = [each.float() for each in z]
        targets = [torch.stack([*z[:v], *z[v + 1 :]]).mean(0) for v in range(len(z))]
        losses = [negative_cosine(prediction, target) for prediction, target in zip(p, targets, strict=True)]
        return Output(torch.stack(losses).mean(), {"spread": spread(z[0])})
