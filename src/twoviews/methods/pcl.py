"""PCL: MoCo, and beside the other view's key a prototype for each image: the centroid of its cluster.

Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", arXiv:2005.04966, and salesforce/PCL.
The E-step at the start of an epoch clusters what the momentum encoder makes of all training images, for several numbers
of clusters; the M-step is the training of the epoch.
Shapes: B images, D embedding, N training images, K clusters. Letters: q queries, k keys, c prototypes, phi concentrations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.batch_norms import check_splits, encode_keys, split_batch_norms
from twoviews.clusters.kmeans import Clustered, concentration, kmeans
from twoviews.errors import BadInput
from twoviews.layers import Queue, ema_update, frozen_copy, mlp, spread
from twoviews.methods.method import Embed, Method, Output, Progress, Rows
from twoviews.methods.moco import info_nce
from twoviews.randomness import seed_of
from twoviews.ranges import Count, EmaMomentum, NonNegativeInt, Size, Temperature

IMAGES_PER_CLUSTER = (200, 100, 50)  # of the default: k = 250, 500 and 1000 for CIFAR's 50,000 images


def proto_nce(
    q: Float[Tensor, "B D"],
    c: Float[Tensor, "R D"],
    phi: Float[Tensor, " R"],
    own: Int[Tensor, " B"],
    left_out: Bool[Tensor, "B R"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 11 for one clustering: cross-entropy of each image's own prototype among R candidates; unit rows.

    Args:
        q: queries.
        c: candidate prototypes.
        phi: concentration of each candidate, the temperature of its column.
        own: which candidate is the image's.
        left_out: candidates that do not count, image by image.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ c.T / phi  # [B, R]
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    return nnf.cross_entropy(logits, own)


class Prototypes(nn.Module):
    """One clustering of the N training images; part of the checkpoint."""

    assignment: Int[Tensor, " N"]
    centroids: Float[Tensor, "K D"]  # means as k-means leaves them, not of unit length
    phi: Float[Tensor, " K"]
    filled: Bool[Tensor, " K"]  # whether the cluster has images; follows from the assignment, so not in the checkpoint

    def __init__(self, k: int, images: int, dim: int):
        super().__init__()
        self.k = k
        self.register_buffer("assignment", torch.zeros(images, dtype=torch.long))
        self.register_buffer("centroids", torch.zeros(k, dim))
        self.register_buffer("phi", torch.ones(k))
        self.register_buffer("filled", torch.zeros(k, dtype=torch.bool), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.fill())

    def fill(self) -> None:
        """Bring `filled` up to date with the assignment."""
        self.filled.fill_(False).index_fill_(0, self.assignment, True)


class PCL(Method):
    """Algorithm 1 of the paper.

    Args:
        encoder: the network to pretrain; the query encoder without its head.
        embed_dim: D.
        queue_size: negatives of the InfoNCE part, at most the number of training images.
        momentum: m of the moving average that makes the key encoder.
        temperature: T of InfoNCE, and the mean of the concentrations.
        mlp_head: a hidden layer as wide as the features before the embedding (v2), instead of one linear layer (v1).
        bn_splits: parts of the batch, over all processes, with batch-norm statistics of their own; 1 is ordinary batch norm.
        clusters: k of each clustering; None: one cluster for 200, for 100 and for 50 images.
        negative_prototypes: how many prototypes of clusters that no image of the batch is in are drawn as negatives, beside
            those of the other images; None: all of them.
        mask_same_cluster: leave out the prototypes of images in an image's own cluster, which are false negatives; the
            original keeps them.
        warmup_epochs: epochs of InfoNCE alone.
        nredo: starts of each k-means, of which the best is kept; None: ten up to k = 8, and one from k = 41 on.
    """

    batch_dependence = "prototypes of other images"

    queue_within_data = True

    def __init__(
        self,
        encoder: Encoder,
        embed_dim: Size,
        queue_size: Size,
        momentum: EmaMomentum,
        temperature: Temperature,
        mlp_head: bool,
        bn_splits: Count,
        clusters: list[Size] | None,
        negative_prototypes: Size | None,
        mask_same_cluster: bool,
        warmup_epochs: NonNegativeInt,
        nredo: Count | None = None,
    ):
        super().__init__()
        self.embed_dim, self.momentum, self.temperature, self.bn_splits = embed_dim, momentum, temperature, bn_splits
        self.clusters, self.negative_prototypes = clusters, negative_prototypes
        self.mask_same_cluster, self.warmup_epochs, self.nredo = mask_same_cluster, warmup_epochs, nredo
        self.encoder = encoder
        features = encoder.out_dim
        self.projector = mlp([features, features, embed_dim] if mlp_head else [features, embed_dim], norm=False)
        if bn_splits > 1:
            split_batch_norms(self.encoder, bn_splits)
        self.key_encoder = frozen_copy(nn.Sequential(self.encoder, self.projector))
        self.queue = Queue(queue_size, embed_dim)
        self.prototypes: Sequence[Prototypes] = []
        self.clustered = False

    def get_extra_state(self) -> Tensor:
        """Whether there has been an E-step; in memory on the CPU, so that asking does not wait for the device."""
        return torch.tensor(self.clustered)

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave."""
        self.clustered = bool(state)

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Queue, parts of the micro-batch and clusters against the data; room for the assignments."""
        self.queue.check(batch_size, 1, train_images)
        check_splits(self.bn_splits, batch_size, micro_batch, processes)
        usual = (max(2, train_images // images) for images in IMAGES_PER_CLUSTER)
        ks = self.clusters or [*dict.fromkeys(usual)]  # of few images they would be the same
        if max(ks) > train_images:
            raise BadInput(
                f"clusters={ks} asks for more clusters than there are training images; use at most {train_images}."
            )
        if len(set(ks)) < len(ks):
            raise BadInput(f"clusters={ks} has a number twice; give each k once.")
        if self.negative_prototypes and self.negative_prototypes > min(ks) - micro_batch:
            room = min(ks) - micro_batch
            fitting = f"at most {room} or " if room > 0 else ""
            raise BadInput(
                f"negative_prototypes={self.negative_prototypes} with {min(ks)} clusters, of which a batch of "
                f"{micro_batch} images can fill {min(micro_batch, min(ks))}; use {fitting}null, which takes all there are."
            )
        modules: Any = nn.ModuleList(Prototypes(k, train_images, self.embed_dim) for k in ks)
        self.prototypes = modules
        return [f"{' + '.join(f'{k:,}' for k in ks)} clusters from epoch {self.warmup_epochs + 1} on"]

    def before_epoch(self, epoch: int, embed: Embed, seed: int) -> Clustered | None:
        """The E-step: k-means of the momentum encoder's embeddings for each k, from last epoch's assignment."""
        if epoch < self.warmup_epochs:
            return None
        x = nnf.normalize(embed(self.key_encoder), dim=1)
        clusterings, previous = {}, {}
        for part in self.prototypes:
            name = f"k{part.k}"
            if self.clustered:
                previous[name] = part.assignment.clone()
            clusters = kmeans(x, part.k, seed=seed_of(seed, part.k), start=previous.get(name), nredo=self.nredo)
            part.assignment.copy_(clusters.assignment)
            part.centroids.copy_(clusters.centroids)
            part.phi.copy_(concentration(clusters, self.temperature))
            part.fill()
            clusterings[name] = clusters
        self.clustered = True
        return Clustered(x, clusterings, previous)

    def _candidates(
        self, part: Prototypes, positives: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"]]:
        """The prototypes of all images of the batch, then others; and which are left out, as no negatives.

        Those are of clusters that an image of the batch is in, which stand among the first already, and of empty ones, which
        have no mean. How many they are only the device knows, and it is not asked, so that nobody waits for the answer.
        """
        absent = part.filled.index_fill(0, positives, False)
        if self.negative_prototypes:
            keys = distributed.broadcast(torch.rand(part.k, device=absent.device))
            rest = keys.masked_fill(~absent, -1).topk(self.negative_prototypes).indices
        else:
            rest = torch.arange(part.k, device=absent.device)
        return torch.cat([positives, rest]), torch.cat([torch.zeros_like(positives, dtype=torch.bool), ~absent[rest]])

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """InfoNCE of the two views, and once there are clusters ProtoNCE of the first, averaged over clusterings."""
        x1, x2 = views
        q = nnf.normalize(self.projector(self.encoder(x1)).float(), dim=1)
        k = encode_keys(self.key_encoder, x2, self.bn_splits)
        loss = info_nce(q, k, self.queue.rows, self.temperature)
        metrics = {"spread": spread(q)}
        if self.clustered:
            everyone = distributed.gather(index)
            own = distributed.local_rows(torch.arange(len(everyone), device=q.device))
            losses = []
            for part in self.prototypes:
                candidates, left_out = self._candidates(part, part.assignment[everyone])
                if self.mask_same_cluster:
                    left_out = left_out | (part.assignment[index][:, None] == candidates)
                    left_out = left_out.scatter(1, own[:, None], False)
                c = nnf.normalize(part.centroids[candidates], dim=1)
                losses.append(proto_nce(q, c, part.phi[candidates], own, left_out.expand(len(q), -1)))
            prototype_loss = torch.stack(losses).mean()
            metrics.update(instance_loss=loss.detach(), prototype_loss=prototype_loss.detach())
            loss = loss + prototype_loss
        return Output(loss, metrics, {"k": k})

    def phase(self, epoch: float) -> bool:
        """Whether there are clusters."""
        return self.clustered

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """Keys are queued. The key encoder follows; batch-norm statistics stay its own, as in the original."""
        self.queue.push(rows["k"])
        ema_update(self.key_encoder, (self.encoder, self.projector), self.momentum)
