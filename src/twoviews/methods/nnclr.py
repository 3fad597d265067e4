"""NNCLR: a view's nearest neighbour among earlier images is the positive of the other view.

Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations",
arXiv:2104.14548.
Shapes: B images a process, N over all processes, D embedding, K support set. Letters as in the paper: z projections,
p predictions, tau temperature; Q, the support set, is a queue of earlier z.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import Queue, encode_views, mlp, spread
from twoviews.methods.method import Collapse, Method, Output, Progress, Rows
from twoviews.ranges import Size, Temperature


@torch.no_grad()
def nearest(z: Float[Tensor, "B D"], queue: Float[Tensor, "K D"]) -> Int[Tensor, " B"]:
    """For each row of `z`, the number of the row of `queue` with the largest cosine; queue rows have unit length."""
    # Autocast would round the cosines to bf16, and neighbours would be drawn among those that are equal then.
    with torch.autocast(z.device.type, enabled=False):
        return (z.float() @ queue.T).argmax(1)


def neighbour_info_nce(
    neighbours: Float[Tensor, "B D"], p: Float[Tensor, "B D"], temperature: float
) -> Float[Tensor, ""]:
    """InfoNCE, averaged over the B images of this process: each neighbour finds its image's prediction among all N.

    Args:
        neighbours: unit rows; they get no gradient.
        p: predictions of the other view, of any length.
        temperature: tau, which divides cosines before the softmax.
    """
    everyone = distributed.gather_with_gradient(nnf.normalize(p.float(), dim=1))  # [N, D]
    me = torch.arange(len(p), device=p.device) * distributed.processes() + distributed.rank()
    # Under autocast the product would be rounded to bf16: an error of up to 0.004 / tau.
    with torch.autocast(p.device.type, enabled=False):
        logits = neighbours.detach() @ everyone.T / temperature  # [B, N]
    return nnf.cross_entropy(logits, me)


class NNCLR(Method):
    """Sec. 3 of the paper; its loss without the second, transposed term, as solo-learn and lightly have it.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's two hidden layers.
        embed_dim: D.
        predictor_hidden_dim: width of the predictor's hidden layer.
        queue_size: K, at least the images of one step. It may be more than the training images: an image's own earlier
            embedding is a neighbour like any other, where for MoCo it would be a wrong negative.
        temperature: tau, which divides cosines before the softmax.
    """

    batch_dependence = "negatives"
    collapses = (
        Collapse(
            "distinct_neighbours",
            "most images of a batch have the same few nearest neighbours, so that there is little to learn from. Raise "
            "queue_size, or lower the learning rate.",
            below=0.05,
        ),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        predictor_hidden_dim: Size,
        queue_size: Size,
        temperature: Temperature,
    ):
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, hidden_dim, embed_dim], last_norm=True)
        self.predictor = mlp([embed_dim, predictor_hidden_dim, embed_dim])
        self.queue = Queue(queue_size, embed_dim)

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Support set against step and data; negatives come from the micro-batch."""
        size = self.queue.size
        if micro_batch < 2:
            accumulate = f" / accumulate={batch_size // micro_batch}" if micro_batch < batch_size else ""
            raise BadInput(
                f"batch_size={batch_size}{accumulate} leaves NNCLR without negatives; use at least "
                f"{2 * (batch_size // micro_batch)}, usually 256 or more."
            )
        if size < batch_size:
            raise BadInput(
                f"queue_size={size} is smaller than the {batch_size} images of one step; use "
                f"queue_size={4 * batch_size} or batch_size={size}."
            )
        if size <= train_images:
            return []
        return [
            f"queue_size={size} is more than the {train_images} training images, so that an image's nearest neighbour "
            "may always be its own earlier embedding; a shorter queue gives other images as neighbours."
        ]

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Mean of both directions; each view has batch-norm statistics of its own."""
        y1, y2 = encode_views(self.encoder, views)
        z1, z2 = self.projector(y1), self.projector(y2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        queue = self.queue.rows
        nearest1, nearest2 = nearest(z1, queue), nearest(z2, queue)
        forth = neighbour_info_nce(queue[nearest1], p2, self.temperature)
        back = neighbour_info_nce(queue[nearest2], p1, self.temperature)
        metrics = {"spread": spread(z1), "distinct_neighbours": _distinct(nearest1)}
        return Output((forth + back) / 2, metrics, {"z1": nnf.normalize(z1.detach().float(), dim=1)})

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """Projections of the first view join the support set."""
        self.queue.push(rows["z1"])


def _distinct(numbers: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """How many numbers there are, as a share of B; 1 / B when all images have one neighbour (collapse)."""
    ordered = numbers.sort().values
    return (1 + (ordered[1:] != ordered[:-1]).sum()) / len(numbers)
