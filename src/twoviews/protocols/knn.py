"""Weighted k-nearest-neighbour classification: how well an encoder's features know the classes, without training.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978, sec. 3.4.
Shapes: N bank, M queries, F features.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.features import Features, Judged
from twoviews.protocols.protocol import Protocol, Verdict
from twoviews.ranges import Count, Index, Temperature

CHUNK_BYTES = 64 * 2**20  # of similarities held at once


@torch.no_grad()
def knn_scores(
    queries: Float[Tensor, "M F"], bank: Features, classes: int, k: int, temperature: float
) -> Float[Tensor, "M classes"]:
    """Votes for each class: sum over the k most similar bank rows of exp((cosine - largest cosine) / temperature).

    Works in chunks of queries, so that beside the result it needs a copy of bank and queries and CHUNK_BYTES.
    """
    rows = nnf.normalize(bank.x, dim=1)
    k = min(k, len(rows))
    chunk = max(1, CHUNK_BYTES // (4 * len(rows)))
    scores = torch.zeros(len(queries), classes, device=queries.device)
    for start in range(0, len(queries), chunk):
        similarity = nnf.normalize(queries[start : start + chunk], dim=1) @ rows.T
        nearest, index = similarity.topk(k, dim=1, sorted=False)
        # Relative to the query's nearest, whose vote is 1 at any temperature: the others cannot overflow, nor all vanish.
        votes = ((nearest - nearest.amax(1, keepdim=True)) / temperature).exp()
        scores[start : start + chunk].scatter_add_(1, bank.y[index], votes)
    return scores


def top1(scores: Float[Tensor, "M classes"], labels: Int[Tensor, " M"]) -> float:
    """Share of rows whose largest score is the label's, in percent."""
    return 100 * (scores.argmax(1) == labels).sum().item() / len(labels)


class KNN(Protocol):
    """Accuracy of the vote of the k nearest bank images, over the whole bank.

    Args:
        k: neighbours that vote; clamped to the bank.
        temperature: of the votes.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    def __init__(self, k: Count, temperature: Temperature, every_epochs: Index):
        self.k, self.temperature, self.every_epochs = k, temperature, every_epochs

    def __call__(self, judged: Judged) -> Verdict:
        """top1 of the encoder's features (before any projector), in percent."""
        scores = knn_scores(judged.test.x, judged.memory, len(judged.data.classes), self.k, self.temperature)
        return Verdict({"top1": top1(scores, judged.test.y)}, scores / scores.sum(1, keepdim=True))
