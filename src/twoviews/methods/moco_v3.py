"""MoCo v3: queries against the keys of the same batch, with a predictor and a momentum that rises to 1.

Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv:2104.02057.
Shapes: B images a process, N over all processes, D embedding. Letters as in Algorithm 1: q queries, k keys.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import ema_update, encode_views, frozen_copy, mlp, rising_momentum, spread, targets
from twoviews.methods.method import Method, Output, Progress, Rows
from twoviews.ranges import EmaMomentum, Repeats, Size, Temperature


def in_batch_info_nce(q: Float[Tensor, "B D"], k: Float[Tensor, "B D"], temperature: float) -> Float[Tensor, ""]:
    """Eq. 1, times 2 * temperature as in Algorithm 1: cross-entropy of each query's key among the keys of all N images.

    No gradient flows into `k`.
    """
    q, k = nnf.normalize(q, dim=1), distributed.gather(nnf.normalize(k.detach(), dim=1))
    # Under autocast the product would be rounded to bf16: an error of up to 0.004 / T.
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.T / temperature  # [B, N]
    positives = torch.arange(len(q), device=q.device) * distributed.processes() + distributed.rank()
    return 2 * temperature * nnf.cross_entropy(logits, positives)


class MoCoV3(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain; the query encoder without its heads.
        hidden_dim: hidden width of projector and predictor; 4096 in the paper.
        embed_dim: D; 256 in the paper.
        projector_layers: 2 for ResNets, 3 for vision transformers, as in the authors' code.
        momentum: m at the start; it rises to 1 with a cosine over the whole training.
        temperature: of the softmax.
        freeze_patch_embed: keep the patch projection of a vision transformer as it was initialised (sec. 4.2). The
            authors' transformers also have fixed sine-cosine positions; timm's learn theirs.

    Raises:
        BadInput: `freeze_patch_embed` for an encoder without patches.
    """

    batch_dependence = "negatives"

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        projector_layers: Repeats,
        momentum: EmaMomentum,
        temperature: Temperature,
        freeze_patch_embed: bool,
    ):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.encoder = encoder
        if freeze_patch_embed:
            _freeze_patch_embed(encoder)
        # "All layers in both MLPs have BN"; in the authors' code the output's norm has no scale and no offset.
        dims = [encoder.out_dim, *[hidden_dim] * (projector_layers - 1), embed_dim]
        self.projector = mlp(dims, last_norm=True, last_affine=False)
        self.predictor = mlp([embed_dim, hidden_dim, embed_dim], last_norm=True, last_affine=False)
        self.key_encoder = frozen_copy(nn.Sequential(self.encoder, self.projector))

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """The loss of both directions, added; each view has batch-norm statistics of its own."""
        y1, y2 = encode_views(self.encoder, views)
        z1, z2 = self.projector(y1), self.projector(y2)
        q1, q2 = self.predictor(z1).float(), self.predictor(z2).float()
        k1, k2 = targets(self.key_encoder, views)
        loss = in_batch_info_nce(q1, k2, self.temperature) + in_batch_info_nce(q2, k1, self.temperature)
        return Output(loss, {"spread": spread(z1)})

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """The key encoder follows; batch-norm statistics stay its own."""
        momentum = rising_momentum(self.momentum, progress.fraction)
        ema_update(self.key_encoder, (self.encoder, self.projector), momentum)


def _freeze_patch_embed(encoder: Encoder) -> None:
    for name, module in encoder.named_modules():
        if name.split(".")[-1] == "patch_embed":  # timm's name
            module.requires_grad_(False)
            return
    raise BadInput(
        "freeze_patch_embed=true is for vision transformers, and this backbone has no patch projection; use "
        "freeze_patch_embed=false, or a vision transformer as backbone."
    )
