"""MoCo: queries against a queue of keys from a slowly moving encoder.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv:1911.05722 (v1);
Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv:2003.04297 (v2: MLP head, more augmentation);
and the authors' CIFAR-10 demo, which runs on one GPU (SplitBatchNorm) and has a symmetric form.
Shapes: B images, D embedding, K queue. Letters as in Algorithm 1: q queries, k keys, T temperature.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.batch_norms import check_splits, encode_keys, split_batch_norms
from twoviews.layers import Queue, ema_update, frozen_copy, mlp, spread
from twoviews.methods.method import Method, Output, Progress, Rows
from twoviews.ranges import Count, EmaMomentum, Size, Temperature


def info_nce(
    q: Float[Tensor, "B D"], k: Float[Tensor, "B D"], queue: Float[Tensor, "K D"], temperature: float
) -> Float[Tensor, ""]:
    """Eq. 1: cross-entropy of the positive among 1 + K candidates; all rows have unit length."""
    # Under autocast the product would be rounded to bf16: an error of up to 0.004 / T in the negatives' logits alone.
    with torch.autocast(q.device.type, enabled=False):
        positive = (q * k).sum(1, keepdim=True)  # [B, 1]
        negative = q @ queue.T  # [B, K]
    logits = torch.cat([positive, negative], dim=1) / temperature  # [B, 1 + K]
    return nnf.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class MoCo(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain; the query encoder without its head.
        embed_dim: D.
        queue_size: K; at most the number of training images, or the queue holds an image's own older keys as negatives.
        momentum: m of the moving average that makes the key encoder.
        temperature: T, which divides cosines before the softmax.
        mlp_head: a hidden layer as wide as the features before the embedding (v2), instead of one linear layer (v1, demo).
        symmetric: each view is query and key in turn; the two losses are added and both sets of keys are queued.
        bn_splits: parts of the batch, over all processes, with batch-norm statistics of their own (the demo: 8);
            1 is ordinary batch norm. The original gets the same from its GPUs, and loses accuracy without.
    """

    queue_within_data = True

    def __init__(
        self,
        encoder: Encoder,
        embed_dim: Size,
        queue_size: Size,
        momentum: EmaMomentum,
        temperature: Temperature,
        mlp_head: bool,
        symmetric: bool,
        bn_splits: Count,
    ):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.symmetric, self.bn_splits = symmetric, bn_splits
        self.encoder = encoder
        features = encoder.out_dim
        self.projector = mlp([features, features, embed_dim] if mlp_head else [features, embed_dim], norm=False)
        if bn_splits > 1:
            split_batch_norms(self.encoder, bn_splits)
        self.key_encoder = frozen_copy(nn.Sequential(self.encoder, self.projector))
        self.queue = Queue(queue_size, embed_dim)

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Queue against data and batch, micro-batch against the parts of SplitBatchNorm."""
        self.queue.check(batch_size, 2 if self.symmetric else 1, train_images)
        check_splits(self.bn_splits, batch_size, micro_batch, processes)
        return []

    def _queries(self, x: Tensor) -> Float[Tensor, "B D"]:
        return nnf.normalize(self.projector(self.encoder(x)).float(), dim=1)

    def _keys(self, x: Tensor) -> Float[Tensor, "B D"]:
        return encode_keys(self.key_encoder, x, self.bn_splits)

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Queries of the first view against keys of the second, and the reverse if symmetric."""
        x1, x2 = views
        q1, k2 = self._queries(x1), self._keys(x2)
        loss, keys = info_nce(q1, k2, self.queue.rows, self.temperature), {"k2": k2}
        if self.symmetric:
            q2, k1 = self._queries(x2), self._keys(x1)
            loss, keys = loss + info_nce(q2, k1, self.queue.rows, self.temperature), {"k1": k1, "k2": k2}
        return Output(loss, {"spread": spread(q1)}, keys)

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """Enqueue the keys; update the key encoder by EMA, whose batch-norm statistics stay its own, as in the original."""
        self.queue.push(torch.cat(list(rows.values())))
        ema_update(self.key_encoder, (self.encoder, self.projector), self.momentum)
