"""SwAV: the cluster assignment of one crop is predicted from the other crops, while clusters stay evenly used.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv:2006.09882.
Shapes: V crops of B images, the first A of which give codes; F encoder features, D embedding, K prototypes.
Letters as in the paper: z embeddings, C prototypes, q codes, T temperature; scores are z C^T.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.layers import Queue, encode_crops, mlp, spread
from twoviews.methods.method import Collapse, Method, Output, Progress, Rows
from twoviews.ranges import NotNegative, Range, Repeats, Size, Temperature


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "N K"], epsilon: float, iterations: int, counted: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, "N K"]:
    """Codes, eq. 3 to 5: each row sums to 1, and over all processes' rows every prototype gets about as much.

    In float32 and in logarithms, so finite for any `epsilon`: exp(score / epsilon) overflows in float16 at the paper's
    0.05, and without its largest value still underflows to a prototype that nobody is near, 0 / 0.

    Args:
        scores: cosines of this process's rows with the prototypes.
        epsilon: the softness of the codes.
        iterations: how often columns, then rows, are brought to their sums.
        counted: rows that use prototypes up; the others only get codes. None: all.
    """
    q = scores.float() / epsilon  # log q
    for _ in range(iterations):
        used = q if counted is None else q.masked_fill(~counted[:, None], float("-inf"))
        q = q - distributed.gather(used.logsumexp(0, keepdim=True)).logsumexp(0)
        q = q.log_softmax(1)
    return q.exp()


def swapped_prediction(
    scores: Float[Tensor, "V B K"], codes: Float[Tensor, "A B K"], temperature: float
) -> Float[Tensor, ""]:
    """Eq. 2 for any number of crops, eq. 6: mean cross-entropy of each code with the predictions of the V - 1 other crops.

    Means over images, codes and crops, as the authors' code has them; the paper writes sums.
    """
    log_p = nnf.log_softmax(scores / temperature, dim=2)
    others = log_p.sum(0) - log_p[: len(codes)]  # [A, B, K]: all crops but the code's own
    return -(codes * others).sum(2).mean() / (len(scores) - 1)


class SwAV(Method):
    """Algorithm 1 of the paper, with multi-crop and queue.

    Args:
        encoder: the network to pretrain.
        hidden_dim: width of the projector's hidden layer.
        embed_dim: D.
        prototypes: K; at most the images of batch and queue, over which they are shared out evenly.
        temperature: T.
        epsilon: softness of the codes; where the loss stays at ln K, the authors advise 0.03.
        sinkhorn_iterations: passes over columns and rows that make the codes.
        assign_crops: A; the first so many crops give codes, all crops predict them.
        queue_size: older embeddings of each assigned crop that share the prototypes out with the batch; 0 for none.
        queue_start_epoch: when the queue begins to fill; it counts once it is full.
        freeze_prototypes_epochs: how long the prototypes stay as they began.
    """

    views = None
    batch_dependence = "codes"
    collapses = (
        Collapse(
            "code_entropy",
            "every image belongs to all prototypes alike (1 is entirely), so that codes say nothing. Lower epsilon.",
            above=0.99,
        ),
    )
    started: Tensor  # [], whether the queue fills
    queued: Tensor  # [], images queued since then

    def __init__(
        self,
        encoder: Encoder,
        hidden_dim: Size,
        embed_dim: Size,
        prototypes: Annotated[int, Range(at_least=2, usual="300 to 3000")],
        temperature: Temperature,
        epsilon: Annotated[float, Range(above=0, usual="0.03 to 0.05")],
        sinkhorn_iterations: Repeats,
        assign_crops: Repeats,
        queue_size: Annotated[int, Range(at_least=0)],
        queue_start_epoch: NotNegative,
        freeze_prototypes_epochs: NotNegative,
    ):
        super().__init__()
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.assign_crops, self.freeze_prototypes_epochs = assign_crops, freeze_prototypes_epochs
        self.queue_size, self.queue_start_epoch = queue_size, queue_start_epoch
        self.encoder = encoder
        self.projector = mlp([encoder.out_dim, hidden_dim, embed_dim])
        self.prototypes = nn.Linear(embed_dim, prototypes, bias=False)  # weight: C, unit rows
        self.queue = Queue(queue_size, assign_crops * embed_dim)  # a row: the assigned crops of one image side by side
        self.register_buffer("started", torch.tensor(queue_start_epoch == 0))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))
        self._normalise_prototypes()

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(nnf.normalize(self.prototypes.weight, dim=1))

    def prepare(self, batch_size: int, micro_batch: int, train_images: int, processes: int) -> list[str]:
        """Queue against data and batch; prototypes against queue and micro-batch, over which codes share them out."""
        size, k = self.queue_size, self.prototypes.out_features
        if size > train_images:
            raise BadInput(
                f"queue_size={size} is larger than the {train_images} training images, so it would hold an image "
                f"several times; use at most {train_images}, for example "
                f"queue_size={max(batch_size, train_images // 2 // batch_size * batch_size)}."
            )
        if 0 < size < batch_size:
            raise BadInput(
                f"queue_size={size} is smaller than the {batch_size} images of one step; use "
                f"queue_size={min(train_images, 4 * batch_size)}, or 0 for none."
            )
        if k <= micro_batch + size:
            return []
        needed = math.ceil((k - micro_batch) / batch_size) * batch_size
        queue = f" or queue_size={needed} queue_start_epoch=0" if needed <= train_images else ""
        return [
            f"prototypes={k} are more than the {micro_batch + size} images of batch and queue that are shared out "
            f"over them, so that some are nobody's; better use prototypes={micro_batch + size}{queue}."
        ]

    def _embed(self, views: Sequence[Tensor]) -> Float[Tensor, "V B D"]:
        """All crops are one batch for the projector."""
        z = nnf.normalize(self.projector(encode_crops(self.encoder, views)).float(), dim=1)
        return z.unflatten(0, (len(views), -1))

    @torch.no_grad()
    def _codes(self, scores: Float[Tensor, "A B K"]) -> Float[Tensor, "A B K"]:
        """Codes of each crop on its own, the batch sharing the prototypes with the queue once that is full."""
        a, b, _ = scores.shape
        counted = None
        if self.queue_size:
            older = distributed.local_rows(self.queue.rows).unflatten(1, (a, -1)).transpose(0, 1)  # [A, Q, D]
            full = self.queued >= self.queue_size  # stays on the device: an `if` would wait for it
            counted = torch.cat([full.new_ones(b), full.expand(older.shape[1])])
            scores = torch.cat([scores, self.prototypes(older)], dim=1)
        return torch.stack([sinkhorn(s, self.epsilon, self.sinkhorn_iterations, counted)[:b] for s in scores])

    def forward(self, views: Sequence[Float[Tensor, "B C _ _"]], index: Int[Tensor, " B"]) -> Output:
        """Every crop predicts the codes of the assigned crops other than itself.

        Raises:
            BadInput: there are too few crops.
        """
        a = self.assign_crops
        if len(views) < max(2, a):
            raise BadInput(
                f"assign_crops={a} needs at least {max(2, a)} views of an image and the augmentation makes "
                f"{len(views)}; choose another augmentation."
            )
        z = self._embed(views)
        # Under autocast the scores would be rounded to bf16: an error of up to 0.004 / epsilon.
        with torch.autocast(z.device.type, enabled=False):
            scores = self.prototypes(z)
            codes = self._codes(scores[:a])
            loss = swapped_prediction(scores, codes, self.temperature)
        # 1 when every image belongs to all prototypes alike: codes that say nothing, a loss of ln K.
        entropy = torch.special.entr(codes).sum(2).mean() / math.log(codes.shape[2])
        rows = {"z": z[:a].detach().transpose(0, 1).flatten(1)} if self.queue_size else {}
        return Output(loss, {"spread": spread(z[0]), "code_entropy": entropy}, rows)

    def phase(self, epoch: float) -> bool:
        """Whether the prototypes are frozen."""
        return epoch < self.freeze_prototypes_epochs

    def before_optimizer_step(self, phase: Hashable) -> None:
        """Prototypes without gradient stay as they are."""
        if phase:
            self.prototypes.weight.grad = None

    def after_step(self, progress: Progress, rows: Rows) -> None:
        """Embeddings are queued, prototypes have unit length again; `started` is for the next step."""
        if self.queue_size:
            self.queue.push(rows["z"])
            self.queued += self.started * len(rows["z"])
        self._normalise_prototypes()
        self.started.copy_(progress.epoch >= self.queue_start_epoch)
