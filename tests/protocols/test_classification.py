"""Scores of probabilities against scikit-learn, scipy and loops, on a classifier of handwritten digits that errs."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, bootstrap
from sklearn import metrics
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from twoviews.errors import BadInput
from twoviews.protocols import classification
from twoviews.protocols.classification import (
    accuracy_interval,
    bootstrap_interval,
    bootstrap_intervals,
    calibration_error,
    classification_scores,
    mask_zeros,
    ranks,
)

DIGITS = tuple("0123456789")


@cache
def classified() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [1297, 10] of noisy images, and labels."""
    x, y = load_digits(return_X_y=True)
    noisy = (x + np.random.default_rng(0).normal(scale=6, size=x.shape)) / 16
    model = LogisticRegression(max_iter=200).fit(noisy[:500], y[:500])
    return torch.from_numpy(model.predict_proba(noisy[500:])), torch.from_numpy(y[500:]).long()


def test_values_are_scikit_learns():
    p, y = classified()
    found, predicted = classification_scores(p.float(), y, DIGITS), p.argmax(1)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(y, predicted, average="macro")
    assert found.values == {
        "top1": pytest.approx(100 * metrics.accuracy_score(y, predicted)),
        "top5": pytest.approx(100 * metrics.top_k_accuracy_score(y, p, k=5)),
        "precision": pytest.approx(100 * precision),
        "recall": pytest.approx(100 * recall),
        "f1": pytest.approx(100 * f1),
        "roc_auc": pytest.approx(100 * metrics.roc_auc_score(y, p, multi_class="ovr"), abs=1e-3),
        "ece": pytest.approx(found.values["ece"]),
    }
    assert 60 < found.values["top1"] < 98 and found.values["top1"] < found.values["top5"] < 100
    assert np.array_equal(found.confusion, metrics.confusion_matrix(y, predicted))


def test_rows_of_classes():
    p, y = classified()
    found = classification_scores(p, y, DIGITS)
    report = metrics.classification_report(y, p.argmax(1), output_dict=True)
    for number, row in enumerate(found.per_class):
        theirs = report[str(number)]
        assert (row["class"], row["images"]) == (str(number), theirs["support"])
        assert row["accuracy"] == pytest.approx(100 * theirs["recall"])
        assert row["precision"] == pytest.approx(100 * theirs["precision"])
        assert row["f1"] == pytest.approx(100 * theirs["f1-score"])
        assert row["roc_auc"] == pytest.approx(100 * metrics.roc_auc_score(y == number, p[:, number]))
        assert row["low"] <= row["accuracy"] <= row["high"]
    hits = sum(row["accuracy"] * row["images"] for row in found.per_class) / len(y)
    assert hits == pytest.approx(found.values["top1"])  # every image counts once


def test_a_class_without_test_images():
    p, y = classified()
    some = y != 3
    found = classification_scores(p[some], y[some], DIGITS)
    row = found.per_class[3]
    assert row["images"] == 0 and all(np.isnan(row[key]) for key in ("accuracy", "low", "high", "precision", "roc_auc"))
    others = [one for one in found.per_class if one["images"]]
    for mean, column in (("recall", "accuracy"), ("precision", "precision"), ("f1", "f1"), ("roc_auc", "roc_auc")):
        assert found.values[mean] == pytest.approx(np.mean([one[column] for one in others]))
    assert found.confusion.shape == (10, 10) and found.confusion[3].sum() == 0


def test_few_classes_and_images_of_one_class():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    found = classification_scores(p, torch.tensor([0, 1, 1]), ("cat", "dog"))
    assert "top5" not in found.values and "top5" not in found.intervals
    assert found.values["top1"] == pytest.approx(200 / 3)
    assert found.values["roc_auc"] == pytest.approx(100)  # both dogs are more of a dog than the cat
    alone = classification_scores(p, torch.tensor([0, 0, 0]), ("cat", "dog"))
    assert "roc_auc" not in alone.values and alone.values["recall"] == pytest.approx(200 / 3)


def test_ranks_by_a_loop():
    made = torch.randint(0, 4, (300, 7), generator=torch.Generator().manual_seed(0)).float()  # many ties and zeros
    labels = torch.arange(300) % 7
    for row, label, rank in zip(made.tolist(), labels.tolist(), ranks(mask_zeros(made), labels).tolist(), strict=True):
        order = sorted(range(7), key=lambda number: (-row[number], number))
        assert rank == (order.index(label) if row[label] > 0 else 7)
    voted = made.sum(1) > 0
    assert torch.equal((ranks(mask_zeros(made), labels) == 0)[voted], (made.argmax(1) == labels)[voted])


def test_calibration_error_by_a_loop():
    p, y = classified()
    confidence, predicted = p.max(1)
    total = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidence.tolist()) if number / 15 < c <= (number + 1) / 15]
        if inside:
            accuracy = np.mean([float(predicted[i] == y[i]) for i in inside])
            total += len(inside) / len(y) * abs(accuracy - np.mean([confidence[i].item() for i in inside]))
    assert calibration_error(p, y) == pytest.approx(total) and total > 0.01
    assert classification_scores(p, y, DIGITS).values["ece"] == pytest.approx(100 * total)


def test_calibration_error_in_closed_form():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    # Of two bins' errors, +0.2 and -0.3, none makes up for the other.
    p = torch.tensor([[0.8, 0.2], [0.7, 0.3]])
    assert calibration_error(p, torch.tensor([0, 1])) == pytest.approx((0.2 + 0.7) / 2)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_interval_is_scipys(share):
    hits = (torch.rand(800, generator=torch.Generator().manual_seed(1)) < share).double() * 100
    low, high = bootstrap_interval(hits)
    theirs = bootstrap((hits.numpy(),), np.mean, method="percentile", n_resamples=5000, batch=500, rng=0)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)
    assert low < hits.mean() < high


def test_interval_of_any_score_in_chunks_and_by_seed(monkeypatch):
    losses = torch.rand(300, generator=torch.Generator().manual_seed(2)) ** 4
    whole = bootstrap_interval(losses, seed=3)
    assert whole == bootstrap_interval(losses, seed=3) != bootstrap_interval(losses, seed=4)
    expected = 1.96 * losses.std().item() / 300**0.5  # a mean of 300 is all but normal
    assert (whole[1] - whole[0]) / 2 == pytest.approx(expected, rel=0.1)
    monkeypatch.setattr(classification, "RESAMPLED_AT_ONCE", 1000)
    assert bootstrap_interval(losses, seed=3) == pytest.approx(whole, rel=0.02)
    assert bootstrap_interval(torch.full((50,), 7.0)) == (7.0, 7.0)


def test_intervals_of_accuracies_are_those_of_the_binomial_distribution():
    hits = torch.zeros(2, 150)
    hits[0, :120], hits[1] = 100, 100
    found = bootstrap_intervals(hits)
    exact = [100 * binom.ppf(q, 150, 0.8) / 150 for q in (0.025, 0.975)]
    torch.testing.assert_close(found[0], torch.tensor(exact, dtype=torch.double), atol=1, rtol=0)
    assert found[1].tolist() == [100, 100]


@pytest.mark.parametrize("value", [0.0, 100.0])
def test_where_all_or_none_are_right_the_interval_has_a_width(value):
    low, high = accuracy_interval(torch.full((30,), value))
    exact = binomtest(30 if value else 0, 30).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((100 * exact.low, 100 * exact.high)) and high - low > 10
    mixed = torch.tensor([0.0, 100.0] * 20)
    assert accuracy_interval(mixed) == bootstrap_interval(mixed)


def test_intervals_of_rows_are_those_of_each_row_alone():
    rows = torch.rand(3, 200, generator=torch.Generator().manual_seed(4))
    expected = torch.tensor([bootstrap_interval(row, seed=5) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(bootstrap_intervals(rows, seed=5), expected)


def test_what_is_not_finite_is_named():
    p, y = classified()
    broken = p.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(BadInput, match="1 of 1297 test images"):
        classification_scores(broken, y, DIGITS)


def test_one_class_alone():
    found = classification_scores(torch.ones(4, 1), torch.zeros(4, dtype=torch.long), ("digit",))
    assert found.values == {"top1": 100, "precision": 100, "recall": 100, "f1": 100, "ece": 0}
    assert found.intervals == {"top1": (pytest.approx(100 * 0.025**0.25), 100)}  # Clopper-Pearson, of four images
