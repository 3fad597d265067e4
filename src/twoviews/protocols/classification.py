"""Accuracies, further scores of classifiers, and bootstrap intervals, from a score of each class for each test image.

Means are over images or, where it says macro, over classes; never over batches.
Shapes: M test images, C classes, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.errors import BadInput
from twoviews.protocols.protocol import TableRow
from twoviews.randomness import generator

BINS = 15  # of confidence; as in Guo et al., arXiv:1706.04599
RESAMPLES = 2_000
CONFIDENCE_PERCENT = 95
RESAMPLED_AT_ONCE = 4 * 10**6  # drawn images held in memory, 16 bytes each


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of the classifications of one protocol, in percent."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of top1 and top5: see `accuracy_interval`
    per_class: list[TableRow]  # a row for each class, also for one without test images
    confusion: Int[Tensor, "C C"]  # images, [class, predicted class]


def mask_zeros(scores: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
    """Votes or probabilities with -inf in place of 0, so that such a class counts as not predicted at all in `ranks`."""
    return scores.masked_fill(scores == 0, -torch.inf)


def ranks(scores: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """Number of classes with a larger score than the right class: 0 is a top-1 hit, less than 5 a top-5 hit.

    Of classes with equal scores the one with the smaller number comes first, as in argmax. A class whose score is -inf was
    not predicted: its rank is C.
    """
    own = scores.gather(1, labels[:, None])
    smaller = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = ((scores > own) | ((scores == own) & smaller)).sum(1)
    return torch.where(own[:, 0] > -torch.inf, before, scores.shape[1])


def top1(scores: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> float:
    """Share of images whose largest score is that of their class, in percent."""
    return 100 * (scores.argmax(1) == labels).sum().item() / len(labels)


def accuracies(scores: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> dict[str, float]:
    """top1, and top5 where there are more than five classes, in percent; see `ranks`."""
    values = {"top1": top1(scores, labels)}
    if scores.shape[1] > 5:
        values["top5"] = 100 * (ranks(scores, labels) < 5).sum().item() / len(labels)
    return values


@torch.no_grad()
def classification_scores(
    probabilities: Float[Tensor, "M C"], labels: Int[Tensor, " M"], classes: Sequence[str], seed: int = 0
) -> ClassificationScores:
    """Scores of the most probable class and of the probabilities.

    The values: `top1`, and `top5` of more than five classes; `precision`, `recall` and `f1`, macro, a class that is never
    predicted having a precision of 0; `roc_auc`, macro, each class against the rest, absent where the images are all of one
    class; `ece`, the expected calibration error. Macro is over the classes that have test images.

    Args:
        probabilities: of each class; rows sum to 1.
        labels: 0 … C - 1.
        classes: names by label.
        seed: of the intervals.

    Raises:
        BadInput: a probability is not finite.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    if broken := int((~probabilities.isfinite().all(1)).sum()):
        raise BadInput(
            f"{broken} of {len(labels)} test images have probabilities that are not finite: the encoder's features are not; "
            "use an earlier checkpoint, or runtime.precision=fp32."
        )
    p, labels = probabilities.double().cpu(), labels.cpu()
    rank, predicted, count = ranks(mask_zeros(p), labels), p.argmax(1), p.shape[1]
    hits = {"top1": 100 * (rank < 1).double()}
    if count > 5:
        hits["top5"] = 100 * (rank < 5).double()
    numbers, images = range(count), torch.bincount(labels, minlength=count)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0.0)  # type: ignore[arg-type]
    auc = _roc_auc(p, labels)
    columns = {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "roc_auc": 100 * auc}
    macro = {name: float(column[(images > 0).numpy()].mean()) for name, column in columns.items()}
    values = {name: hit.mean().item() for name, hit in hits.items()}
    values |= {name: value for name, value in macro.items() if value == value}  # an undefined roc_auc is NaN
    values["ece"] = 100 * calibration_error(p, labels)
    rows: list[TableRow] = []
    for number, name in enumerate(classes):
        own, nan = hits["top1"][labels == number], float("nan")
        low, high = accuracy_interval(own, seed) if len(own) else (nan, nan)
        row: TableRow = {"class": name, "images": len(own), "accuracy": own.mean().item(), "low": low, "high": high}
        row |= {key: float(columns[key][number]) if len(own) else nan for key in ("precision", "f1", "roc_auc")}
        rows.append(row)
    return ClassificationScores(
        values,
        {name: accuracy_interval(hit, seed) for name, hit in hits.items()},
        rows,
        torch.from_numpy(confusion_matrix(labels, predicted, labels=numbers)),
    )


def _roc_auc(p: Float[Tensor, "M C"], labels: Int[Tensor, " M"]):
    """[C]: of each class against the rest; NaN where one of the two is empty."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    one_hot, auc = nnf.one_hot(labels, p.shape[1]), np.full(p.shape[1], np.nan)
    if (defined := one_hot.any(0) & ~one_hot.all(0)).any():
        auc[defined] = roc_auc_score(one_hot[:, defined], p[:, defined], average=None)  # type: ignore[arg-type]
    return auc


def calibration_error(p: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> float:
    """Expected calibration error, in [0, 1]: mean over images of their bin's |accuracy - mean confidence|.

    Guo et al., arXiv:1706.04599, eq. 3: the largest probabilities fall into BINS equal intervals, open on the left.
    """
    confidence, predicted = p.double().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    surplus = (predicted == labels).double() - confidence
    return torch.bincount(bins, surplus, minlength=BINS).abs().sum().item() / len(labels)


def bootstrap_intervals(scores: Float[Tensor, "R M"], seed: int = 0) -> Float[Tensor, "R 2"]:
    """Ends of the CONFIDENCE_PERCENT % bootstrap interval of the mean of each row, in the unit of the scores.

    Percentile method: quantiles of the means of RESAMPLES samples of M images, drawn with replacement and alike for all
    rows. An interval says how far the mean depends on which test images there happen to be, not on the seed of a training.
    """
    scores, drawn = scores.double().cpu(), generator(seed, "bootstrap", scores.shape[1])
    images, means = scores.shape[1], []
    for samples in torch.arange(RESAMPLES).split(max(1, RESAMPLED_AT_ONCE // images)):
        rows = torch.randint(images, (len(samples), images), generator=drawn)
        times = scores.new_zeros(rows.shape).scatter_add_(1, rows, scores.new_ones(1, 1).expand_as(rows))
        means.append(scores @ times.T / images)
    tail = (1 - CONFIDENCE_PERCENT / 100) / 2
    return torch.cat(means, dim=1).quantile(scores.new_tensor((tail, 1 - tail)), dim=1).T


def bootstrap_interval(scores: Float[Tensor, " M"], seed: int = 0) -> tuple[float, float]:
    """Both ends of the interval of `bootstrap_intervals` for a single row."""
    low, high = bootstrap_intervals(scores[None], seed)[0].tolist()
    return low, high


def accuracy_interval(hits: Float[Tensor, " M"], seed: int = 0) -> tuple[float, float]:
    """The interval of an accuracy in percent, of hits that are 0 or 100.

    That of `bootstrap_interval`; where all hits are equal, whose resamples are too, that of Clopper and Pearson (1934), which
    is exact for shares: no error in 30 images does not say that there is none in others.
    """
    if not (hits == hits[0]).all():
        return bootstrap_interval(hits, seed)
    reach = 100 * (1 - ((1 - CONFIDENCE_PERCENT / 100) / 2) ** (1 / len(hits)))
    return (100 - reach, 100.0) if hits[0] else (0.0, reach)
