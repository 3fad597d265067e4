"""How good classifications are, from the probability of each class for each test image.

Every mean is over images, or over classes where it says macro; never over batches.
Shapes: M test images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.errors import BadInput
from twoviews.randomness import generator

Row = dict[str, float | int | str]

BINS = 15  # of confidence; as in Guo et al., arXiv:1706.04599
RESAMPLES = 2_000
CONFIDENCE = 95  # percent
CHUNK = 4 * 10**6  # drawn images held at once, 8 bytes each


@dataclass(frozen=True)
class Scores:
    """What there is to say about the classifications of one protocol; numbers in percent."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of top1 and top5: see `interval`
    per_class: list[Row]  # a row for each class, also for one without test images
    confusion: Int[Tensor, "C C"]  # images, [class, predicted class]


def ranks(scores: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """How many classes stand before the right one: 0 is a top-1 hit, less than 5 a top-5 hit.

    Of classes with equal scores, which are probabilities or votes, the one with the smaller number stands first, as in
    argmax. A class with a score of 0 was not predicted at all: the rank is then C.
    """
    own = scores.gather(1, labels[:, None])
    smaller = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = ((scores > own) | ((scores == own) & smaller)).sum(1)
    return torch.where(own[:, 0] > 0, before, scores.shape[1])


@torch.no_grad()
def scores(
    probabilities: Float[Tensor, "M C"], labels: Int[Tensor, " M"], classes: Sequence[str], seed: int = 0
) -> Scores:
    """Scores of the most probable class, and of the probabilities themselves.

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
    rank, predicted, count = ranks(p, labels), p.argmax(1), p.shape[1]
    hits = {
        name: 100 * (rank < best).double() for name, best in (("top1", 1), ("top5", 5)) if best == 1 or best < count
    }
    numbers, images = range(count), torch.bincount(labels, minlength=count)
    present = images > 0
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0.0)  # type: ignore[arg-type]
    auc = _roc_auc(p, labels)
    columns = {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "roc_auc": 100 * auc}
    values = {name: hit.mean().item() for name, hit in hits.items()}
    macro = {name: float(column[present.numpy()].mean()) for name, column in columns.items()}
    values |= {name: value for name, value in macro.items() if value == value}  # an undefined roc_auc is NaN
    values["ece"] = 100 * calibration_error(p, labels)
    rows = []
    for number, name in enumerate(classes):
        own = hits["top1"][labels == number]
        low, high = interval(own, seed) if len(own) else (float("nan"), float("nan"))
        accuracy = own.mean().item()  # NaN of none
        row = {"class": name, "images": len(own), "accuracy": accuracy, "low": low, "high": high}
        found = {key: float(column[number]) for key, column in columns.items() if key != "recall"}
        rows.append({**row, **(found if len(own) else dict.fromkeys(found, float("nan")))})
    return Scores(
        values,
        {name: interval(hit, seed) for name, hit in hits.items()},
        rows,
        torch.from_numpy(confusion_matrix(labels, predicted, labels=numbers)),
    )


def _roc_auc(p: Float[Tensor, "M C"], labels: Int[Tensor, " M"]):
    """[C]: of each class against the rest; NaN where one of the two is empty."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    images = torch.bincount(labels, minlength=p.shape[1])
    auc = np.full(p.shape[1], np.nan)
    for number in ((images > 0) & (images < len(labels))).nonzero()[:, 0].tolist():
        auc[number] = roc_auc_score(labels == number, p[:, number])
    return auc


def calibration_error(p: Float[Tensor, "M C"], labels: Int[Tensor, " M"]) -> float:
    """Expected calibration error, in [0, 1]: mean over images of their bin's |accuracy - mean confidence|.

    Guo et al., arXiv:1706.04599, eq. 3: the largest probabilities fall into BINS equal intervals, open on the left.
    """
    confidence, predicted = p.double().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    surplus = (predicted == labels).double() - confidence
    return torch.bincount(bins, surplus, minlength=BINS).abs().sum().item() / len(labels)


def interval(values: Float[Tensor, " M"], seed: int = 0) -> tuple[float, float]:
    """Ends of the CONFIDENCE % bootstrap interval of the mean of a per-image score, in its unit.

    Percentile method: quantiles of the means of RESAMPLES samples of M images, drawn with replacement. It says how far the
    number depends on which test images there happen to be, not how far on the seed of the training.
    """
    numbers, drawn = values.double().cpu(), generator(seed, "bootstrap", len(values))
    means = [
        numbers[torch.randint(len(numbers), (len(rows), len(numbers)), generator=drawn)].mean(1)
        for rows in torch.arange(RESAMPLES).split(max(1, CHUNK // len(numbers)))
    ]
    tail = (1 - CONFIDENCE / 100) / 2
    low, high = torch.cat(means).quantile(torch.tensor((tail, 1 - tail), dtype=torch.float64)).tolist()
    return low, high
