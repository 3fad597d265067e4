"""The weighted vote against slow loops and lightly, on the pixels of handwritten digits."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from lightly.utils.benchmarking.knn import knn_predict
from sklearn.datasets import load_digits
from torch.nn import functional as nnf

from twoviews.data.sources import digits
from twoviews.features import Features, PixelEncoder
from twoviews.protocols import knn
from twoviews.protocols.classification import accuracies, mask_zeros, top1
from twoviews.protocols.knn import KNN, knn_scores
from twoviews.protocols.protocol import EvaluationContext


@cache
def pixels() -> tuple[Features, Features]:
    """500 bank and 200 query images; noise makes neighbours of other classes common."""
    images, labels = load_digits(return_X_y=True)
    noise = np.random.default_rng(0).normal(scale=8, size=images.shape)
    x, y = torch.from_numpy(images + noise).float(), torch.from_numpy(labels).long()
    return Features(x[:500], y[:500]), Features(x[500:700], y[500:700])


def by_loop(query: np.ndarray, bank: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> np.ndarray:
    cosines = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in bank]
    votes = np.zeros(10)
    for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[labels[index]] += np.exp(cosines[index] / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.5), (499, 0.02)])
def test_against_a_loop(k, temperature):
    bank, queries = pixels()
    found = knn_scores(queries.x, bank, 10, k, temperature).double()
    x, y = bank.x.double().numpy(), bank.y.numpy()
    expected = np.stack([by_loop(query, x, y, k, temperature) for query in queries.x.double().numpy()])
    shares = found / found.sum(1, keepdim=True)
    torch.testing.assert_close(
        shares, torch.from_numpy(expected / expected.sum(1, keepdims=True)), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.1), (200, 0.1), (200, 0.5)])
def test_predictions_are_lightlys(k, temperature):
    bank, queries = pixels()
    rows, unit = nnf.normalize(bank.x, dim=1), nnf.normalize(queries.x, dim=1)
    theirs = knn_predict(unit, rows.T, bank.y, 10, k, temperature)[:, 0]
    ours = knn_scores(queries.x, bank, 10, k, temperature).argmax(1)
    assert torch.equal(ours, theirs)
    assert 0.2 < (ours == queries.y).float().mean() < 0.99  # neither trivial nor hopeless


def test_chunks_change_nothing(monkeypatch):
    bank, queries = pixels()
    whole = knn_scores(queries.x, bank, 10, 20, 0.1)
    for chunk in (1, 7, 200):
        monkeypatch.setattr(knn, "CHUNK_BYTES", chunk * 4 * len(bank.x))
        torch.testing.assert_close(knn_scores(queries.x, bank, 10, 20, 0.1), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("count", "k"), [(500, 200), (500, 1), (97, 97), (1, 1)])
def test_neighbours_are_the_most_similar_rows_also_among_copies(count, k):
    bank, queries = pixels()
    x = bank.x[torch.arange(count) % max(1, count // 3)]  # each row three times
    ((_, cosines, rows),) = knn.neighbours(queries.x, x, k)
    similarity = nnf.normalize(queries.x, dim=1) @ nnf.normalize(x, dim=1).T
    assert torch.equal(cosines, similarity.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(similarity.gather(1, rows), cosines)  # of equal rows any, in any order,
    assert all(len(row.unique()) == k for row in rows)  # but none twice


def test_a_k_that_is_too_large_is_said_with_what_to_choose():
    def note(k: int, images: int) -> list[str]:
        data = digits()
        return KNN(k, 0.1, 0).notes(replace(data, memory=data.memory.subset(torch.arange(images))))

    assert note(200, 100) == [
        "k=200 is more than the 100 images of the bank, so all of them vote; choose a smaller k=."
    ]
    assert note(200, 10)[0].endswith("so all of them vote; choose a smaller k=.")
    assert "all of them vote" not in note(100, 100)[0]


def test_a_k_of_more_than_a_class_has_is_said_with_what_to_choose():
    data = digits()

    def note(k: int, *counts: int) -> list[str]:
        rows = [(data.memory.labels == label).nonzero()[:count, 0] for label, count in enumerate(counts)]
        return KNN(k, 0.1, 0).notes(replace(data, memory=data.memory.subset(torch.cat(rows))))

    assert note(200, 100, 30, 100) == [
        "k=200: the bank has 30 images of class 1 and fewer than 200 of 2 other classes, so that images of other classes "
        "always vote; choose k=30 or less."
    ]
    assert note(20, 30, 5, 30)[0].startswith("k=20: the bank has 5 images of class 1, so") and note(5, 30, 5) == []
    assert note(20, 30, 5, 30)[0].endswith("choose k=5 or less.")
    assert len(note(200, 30, 5)) == 1  # clamped: one sentence is enough
    small = yaml.safe_load((ROOT / "conf" / "protocol" / "knn_small.yaml").read_text())
    assert KNN(small["k"], 0.1, 0).notes(data) == []  # the default of digits


def test_k_is_clamped_to_the_bank():
    bank, queries = pixels()
    few = Features(bank.x[:30], bank.y[:30])
    assert torch.equal(knn_scores(queries.x, few, 10, 200, 0.1), knn_scores(queries.x, few, 10, 30, 0.1))


def test_a_tiny_temperature_asks_the_nearest_alone():
    bank, queries = pixels()
    scores = knn_scores(queries.x, bank, 10, 50, 1e-6)
    assert scores.isfinite().all()
    nearest = (nnf.normalize(queries.x, dim=1) @ nnf.normalize(bank.x, dim=1).T).argmax(1)
    assert torch.equal(scores.argmax(1), bank.y[nearest])


def test_a_huge_temperature_counts_heads():
    bank, queries = pixels()
    scores = knn_scores(queries.x, bank, 10, len(bank.x), 1e6)
    torch.testing.assert_close(scores[0], torch.bincount(bank.y, minlength=10).float(), rtol=1e-3, atol=1e-3)


def test_top1_is_a_percentage():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    assert top1(scores, torch.tensor([0, 1, 0, 1])) == 50.0
    assert top1(scores, torch.tensor([0, 1, 1, 1])) == 75.0


def test_protocol_measures_test_against_memory():
    data = digits()
    data = replace(data, memory=data.memory.subset(torch.arange(300)), test=data.test.subset(torch.arange(50)))
    context = EvaluationContext(PixelEncoder(1, 32), data, torch.device("cpu"), torch.float32)
    found = KNN(k=20, temperature=0.1, every_epochs=1)(context).values
    bank, test = data.memory.pixels.flatten(1).float(), data.test.pixels.flatten(1).float()
    # Normalised pixels are (pixel / 255 - mean) / std.
    rows, queries = [(x / 255 - data.mean[0]) / data.std[0] for x in (bank, test)]
    right = 0
    for query, label in zip(queries.double().numpy(), data.test.labels.tolist(), strict=True):
        votes = by_loop(query, rows.double().numpy(), data.memory.labels.numpy(), 20, 0.1)
        right += int(votes.argmax()) == label
    assert found == {"top1": pytest.approx(100 * right / 50), "top5": pytest.approx(found["top5"])}
    assert found["top1"] <= found["top5"] <= 100


def test_top5_by_a_loop():
    bank, queries = pixels()
    scores = knn_scores(queries.x, bank, 10, 5, 0.1)
    found = accuracies(mask_zeros(scores), queries.y)
    right = 0
    for row, label in zip(scores.tolist(), queries.y.tolist(), strict=True):
        voted = [number for number in sorted(range(10), key=lambda n: -row[n]) if row[number] > 0]
        right += label in voted[:5]  # a class without a vote is no prediction
    assert found == {"top1": top1(scores, queries.y), "top5": 100 * right / 200}
    assert found["top1"] < found["top5"] < 100
    assert accuracies(scores[:, :5], queries.y % 5).keys() == {"top1"}
