"""DeepCluster-v2: each image's crops are classified into the clusters that its embeddings of the epoch before fell into.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv:2006.09882, sec. 4 and
app. A; after DeepCluster, arXiv:1807.05520. Letters as there: z embeddings, c prototypes, T temperature.
Shapes: B images, V crops, D embedding, N training images, K clusters, H heads (clusterings).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder
from twoviews.clusters.kmeans import Clustered, kmeans
from twoviews.errors import BadInput
from twoviews.layers import encode_crops, mlp, spread
from twoviews.methods.method import Embed, Method, Output, Progress, Rows
from twoviews.randomness import seed_of
from twoviews.ranges import Count, Size, Temperature

BANKS = 2  # the first crops, each with a bank of its own
HEADS, IMAGES_PER_CLUSTER = 3, 100  # of the default
UNSEEN = -100  # no class, for images that sat out the epoch before


def cluster_loss(
    scores: Float[Tensor, "VB K"], classes: Int[Tensor, " VB"], temperature: float, share: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Cross-entropy of the rows that have a class, averaged over as many as have one in an average batch.

    The original divides by how many there are in the batch, so that an image would weigh more or less by its company.

    Args:
        scores: cosines with the prototypes.
        classes: a prototype each, or UNSEEN.
        temperature: T.
        share: of the training images, those that have a class.
    """
    losses = nnf.cross_entropy(scores.float() / temperature, classes, ignore_index=UNSEEN, reduction="sum")
    return losses / (len(scores) * share)


class DeepClusterV2(Method):
    """The method of app. A.4 of the SwAV paper, as main_deepclusterv2.py there has it.

    Args:
        encoder: the network to pretrain.
        hidden_dim: hidden width of the projector.
        embed_dim: D.
        temperature: T.
        clusters: K of each head, whose prototypes are the centroids of a spherical k-means of its own; None: three heads
            with a cluster for 100 training images.
        nredo: starts of each k-means, of which the best is kept; None: ten up to k = 8, and one from k = 41 on.
    """

    views = None
    bank: Float[Tensor, "2 N D"]  # unit embeddings, as the training of the epoch before made them
    seen: Bool[Tensor, " N"]  # which rows of the bank are from this epoch
    assignments: Int[Tensor, "H N"]

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        temperature: Temperature,
        clusters: list[Size] | None,
        nredo: Count | None = None,
    ):
        super().__init__()
        self.embed_dim, self.temperature, self.clusters, self.nredo = embed_dim, temperature, clusters, nredo
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, embed_dim])

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Clusters against the data; room for the bank, the assignments and the centroids."""
        ks = self.clusters or [max(2, train_images // IMAGES_PER_CLUSTER)] * HEADS
        # An epoch's batches leave less than one batch of images out of the bank.
        room = train_images // batch_size * batch_size
        if max(ks) > room:
            raise BadInput(f"clusters={ks} asks for more clusters than an epoch has images; use at most {room}.")
        self.ks = ks
        self.register_buffer("bank", torch.zeros(BANKS, train_images, self.embed_dim))
        self.register_buffer("seen", torch.zeros(train_images, dtype=torch.bool))
        self.register_buffer("assignments", torch.full((len(ks), train_images), UNSEEN))
        for head, k in enumerate(ks):
            self.register_buffer(f"centroids{head}", torch.zeros(k, self.embed_dim))
        return [f"{len(ks)} heads with {' + '.join(f'{k:,}' for k in ks)} clusters"]

    def before_epoch(self, epoch: int, embed: Embed, seed: int) -> Clustered | None:
        """Spherical k-means of the bank for each head, from last epoch's centroids; before any training, of an extra pass."""
        if epoch == 0:
            self.bank.copy_(nnf.normalize(embed(nn.Sequential(self.encoder, self.projector)), dim=1))
            self.seen.fill_(True)
        rows = self.seen.nonzero().flatten()
        clusterings, previous = {}, {}
        for head, k in enumerate(self.ks):
            centroids, name = self.get_buffer(f"centroids{head}"), f"head{head}"
            clusters = kmeans(
                self.bank[head % BANKS, rows],
                k,
                seed=seed_of(seed, head, k),
                start=centroids if epoch > 0 else None,
                spherical=True,
                nredo=self.nredo,
            )
            if epoch > 0:
                previous[name] = self.assignments[head, rows]
            self.assignments[head].fill_(UNSEEN)
            self.assignments[head, rows] = clusters.assignment
            centroids.copy_(clusters.centroids)
            clusterings[name] = clusters
        self.seen.fill_(False)
        return Clustered(self.bank[0, rows], clusterings, previous, rows)

    def forward(self, views: Sequence[Float[Tensor, "B C _h _w"]], index: Int[Tensor, " B"]) -> Output:
        """The mean over heads of the loss of all crops."""
        z = nnf.normalize(self.projector(encode_crops(self.encoder, views)).float(), dim=1)
        share = (self.assignments[0] != UNSEEN).float().mean()  # of each head
        losses = []
        for head in range(len(self.ks)):
            classes = self.assignments[head, index].repeat(len(views))
            losses.append(cluster_loss(z @ self.get_buffer(f"centroids{head}").T, classes, self.temperature, share))
        rows = {"index": index, "z": z.detach().unflatten(0, (len(views), -1))[:BANKS].transpose(0, 1)}
        return Output(torch.stack(losses).mean(), {"spread": spread(z)}, rows)

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """The first crops' embeddings go into the bank."""
        for bank, z in zip(self.bank, rows["z"].unbind(1), strict=False):
            bank[rows["index"]] = z
        self.seen.index_fill_(0, rows["index"], True)
