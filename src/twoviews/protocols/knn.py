"""Weighted k-nearest-neighbour classification by an encoder's features, which needs no training.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978, sec. 3.4.
Shapes: N bank, M queries, F features.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.console import progress_of
from twoviews.data.images import ImageData
from twoviews.errors import counted, printable
from twoviews.features import Features
from twoviews.protocols.classification import accuracies, mask_zeros
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import Count, NonNegativeInt, Temperature

CHUNK_BYTES = 64 * 2**20  # of similarities held in memory


def neighbours(
    queries: Float[Tensor, "M F"],
    bank: Float[Tensor, "N F"],
    k: int,
    exclude: Int[Tensor, " M"] | None = None,
    shared: bool = False,
) -> Iterator[tuple[slice, Float[Tensor, "m k"], Int[Tensor, "m k"]]]:
    """For each chunk of queries its slice, and cosines (largest first) and indices of the k most similar bank rows.

    Exact; of rows with equal cosines, such as copies of an image, `torch.topk` may take any, in any order. In memory are a
    normalised copy of the bank and CHUNK_BYTES of similarities, or those of one query where they are more.

    Args:
        queries: features.
        bank: features to search.
        k: clamped to the bank.
        exclude: for each query a bank row to leave out, as the query itself; None: there is none.
        shared: each process gets a part of the chunks.
    """
    rows = nnf.normalize(bank, dim=1)
    k = min(k, len(rows) - (exclude is not None))
    chunk = max(1, CHUNK_BYTES // (4 * len(rows)))
    rank, processes = (distributed.rank(), distributed.processes()) if shared else (0, 1)
    for start in range(0, len(queries), chunk)[rank::processes]:
        which = slice(start, start + chunk)
        similarity = nnf.normalize(queries[which], dim=1) @ rows.T
        if exclude is not None:
            similarity.scatter_(1, exclude.to(rows.device)[which, None], -2.0)  # less than any cosine
        nearest = similarity.topk(k, dim=1)
        yield which, nearest.values, nearest.indices


def votes(nearest: Float[Tensor, "m k"], temperature: float) -> Float[Tensor, "m k"]:
    """exp((cosine - largest cosine) / temperature); the first cosine of each row is the largest.

    The nearest has a vote of 1 at any temperature, so votes cannot overflow, nor all be 0.
    """
    return ((nearest - nearest[:, :1]) / temperature).exp()


@torch.no_grad()
def knn_scores(
    queries: Float[Tensor, "M F"], bank: Features, classes: int, k: int, temperature: float, shared: bool = False
) -> Float[Tensor, "M classes"]:
    """Sum of the `votes` for each class by the k nearest bank rows.

    Needs the memory of `neighbours` beside the result. With `shared` each process computes a part, and all get the whole.
    """
    scores = torch.zeros(len(queries), classes, device=queries.device)
    count = -(-len(queries) // (distributed.processes() if shared else 1))  # of this process, about
    with progress_of("kNN", count, "images") as advance:
        for which, nearest, index in neighbours(queries, bank.x, k, shared=shared):
            scores[which].scatter_add_(1, bank.y[index], votes(nearest, temperature))
            advance(len(index))
    return distributed.sum_over_processes(scores) if shared else scores


def clamped_notes(k: int, data: ImageData, key: str) -> list[str]:
    """A sentence for the user if the bank has fewer than k images; `key` is the name of the parameter."""
    bank = len(data.memory or ())
    if not 0 < bank < k:
        return []
    return [f"{key}={k} is more than the {bank:,} images of the bank, so all of them vote; choose a smaller {key}=."]


def _class_notes(k: int, data: ImageData) -> list[str]:
    """A sentence for the user if the bank has fewer than k images of a class, so that images of other classes always vote."""
    if data.memory is None or data.memory.labels is None:
        return []
    counts = zip(torch.bincount(data.memory.labels).tolist(), data.classes, strict=False)
    if not (small := [(count, name) for count, name in counts if 0 < count < k]):
        return []
    count, name = min(small)
    others = f" and fewer than {k} of {counted(len(small) - 1, 'other class')}" if len(small) > 1 else ""
    return [
        f"k={k}: the bank has {counted(count, 'image')} of class {printable(name)}{others}, so that images of other classes "
        f"always vote; choose k={count} or less."
    ]


class KNN(Protocol):
    """Accuracy of the weighted vote of the k nearest bank images.

    Args:
        k: neighbours that vote; clamped to the bank.
        temperature: of the votes.
    """

    on_all_processes = True

    def __init__(self, k: Count, temperature: Temperature, every_epochs: NonNegativeInt):
        self.k, self.temperature, self.every_epochs = k, temperature, every_epochs

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if k is clamped or more than the bank has of a class."""
        return clamped_notes(self.k, data, "k") or _class_notes(self.k, data)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1, and top5 of more than five classes, of the encoder's features (before any projector), in percent."""
        queries, bank, classes = context.test.x, context.memory, len(context.data.classes)
        scores = knn_scores(queries, bank, classes, self.k, self.temperature, context.shared)
        return EvaluationResult(accuracies(mask_zeros(scores), context.test.y), scores / scores.sum(1, keepdim=True))
