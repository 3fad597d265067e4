"""Scores against cases worked out by hand and against scikit-learn."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples

from twoviews.clusters import scores as module
from twoviews.clusters.kmeans import Clusters, kmeans
from twoviews.clusters.scores import clustering_scores, nmi_and_ari, silhouette


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target).long()


def clusters_of(assignment: list[int], k: int) -> Clusters:
    numbers = torch.tensor(assignment)
    return Clusters(numbers, torch.zeros(k, 2), torch.zeros(len(numbers)), 1)


def of_labels(assignment: list[int], k: int, labels: list[int], previous: list[int] | None = None) -> dict[str, float]:
    before = None if previous is None else torch.tensor(previous)
    x = torch.zeros(len(assignment), 2)
    return clustering_scores(x, clusters_of(assignment, k), labels=torch.tensor(labels), previous=before, seed=0)


def test_perfect_but_for_the_names():
    found = of_labels([2, 2, 0, 0, 1, 1], 3, [0, 0, 1, 1, 2, 2], previous=[5, 5, 7, 7, 0, 0])
    for name in ("nmi", "ari", "accuracy", "purity", "stability"):
        assert found[name] == pytest.approx(100)
    assert (found["largest"], found["smallest"], found["empty"]) == (2, 2, 0)
    assert "silhouette" not in found


def test_worked_out_by_hand():
    """Clusters {a a a b}, {b b a}, {c}, {}: three of four are matched, 3 + 2 + 1 points of 8."""
    found = of_labels([0, 0, 0, 0, 1, 1, 1, 2], 4, [0, 0, 0, 1, 1, 1, 0, 2])
    assert found["accuracy"] == found["purity"] == pytest.approx(100 * 6 / 8)
    # Pairs: 4 together in both, 9 within clusters, 9 within classes, 28 in all.
    assert found["ari"] == pytest.approx(100 * (4 - 81 / 28) / (9 - 81 / 28))
    joint = [3 / 8, 1 / 8, 2 / 8, 1 / 8, 1 / 8]
    outer = [(4 / 8) ** 2, 4 / 8 * 3 / 8, (3 / 8) ** 2, 3 / 8 * 4 / 8, 1 / 64]
    # Row by row: (0, a) 4/8 4/8, (0, b) 4/8 3/8, (1, b) 3/8 3/8, (1, a) 3/8 4/8, (2, c) 1/8 1/8.
    mutual = sum(p * math.log(p / q) for p, q in zip(joint, outer, strict=True))
    entropy = -sum(p * math.log(p) for p in (4 / 8, 3 / 8, 1 / 8))
    assert found["nmi"] == pytest.approx(100 * mutual / entropy)
    assert (found["largest"], found["smallest"], found["empty"]) == (4, 1, 1)


def test_more_clusters_than_classes_and_fewer():
    """One-to-one: of four pure clusters two are matched, of one cluster its largest class."""
    four = of_labels([0, 0, 0, 1, 2, 2, 3, 3], 4, [0, 0, 0, 0, 1, 1, 1, 1])
    assert four["purity"] == 100
    assert four["accuracy"] == pytest.approx(100 * 5 / 8)
    one = of_labels([0] * 5, 1, [0, 0, 1, 2, 2])
    assert one["purity"] == one["accuracy"] == pytest.approx(40)
    assert one["nmi"] == one["ari"] == 0


def test_the_matching_is_the_best_and_not_the_greedy_one():
    """Cluster 0 shares 3 points with a and 2 with b, cluster 1 shares 3 with a alone: 2 + 3, not 3 + 0."""
    found = of_labels([0, 0, 0, 0, 0, 1, 1, 1], 2, [0, 0, 0, 1, 1, 0, 0, 0])
    assert found["accuracy"] == pytest.approx(100 * 5 / 8)
    assert found["purity"] == pytest.approx(100 * 6 / 8)


def test_stability_is_about_the_partition_and_not_its_names():
    first, x = [0, 0, 1, 1, 2, 2, 3, 3], torch.randn(8, 2)
    same = clustering_scores(
        x, clusters_of([3, 3, 2, 2, 1, 1, 0, 0], 4), labels=None, previous=torch.tensor(first), seed=0
    )
    other = clustering_scores(
        x, clusters_of([0, 1, 0, 1, 0, 1, 0, 1], 4), labels=None, previous=torch.tensor(first), seed=0
    )
    assert same["stability"] == pytest.approx(100)
    assert other["stability"] == pytest.approx(0, abs=1e-9)
    assert "stability" not in clustering_scores(x, clusters_of(first, 4), labels=None, previous=None, seed=0)
    unknown = torch.tensor([-1, 1, -1, 1, -1, 3, -1, 3])
    assert "stability" not in clustering_scores(x, clusters_of(first, 4), labels=None, previous=0 * unknown - 1, seed=0)
    some = clustering_scores(x, clusters_of([3, 3, 2, 3, 1, 1, 0, 1], 4), labels=None, previous=unknown, seed=0)
    assert some["stability"] == pytest.approx(100)


@pytest.mark.parametrize("parts", [(1, 1), (1, 4), (4, 1), (2, 3), (10, 50), (300, 300)])
def test_agreement_is_scikit_learns(parts):
    drawn = torch.Generator().manual_seed(sum(parts))
    one, noise = (torch.randint(k, (500,), generator=drawn) for k in parts)
    for other in (noise, torch.where(torch.rand(500, generator=drawn) < 0.7, one, noise), one, (one + 1) % parts[0]):
        expected = (normalized_mutual_info_score(one, other), adjusted_rand_score(one, other))
        assert nmi_and_ari(one, other) == pytest.approx([100 * value for value in expected], abs=1e-9)
    each = torch.arange(500)
    assert nmi_and_ari(each, each) == (pytest.approx(100), 100)


def test_scores_of_real_clusters():
    x, y = digits()
    found = clustering_scores(x, kmeans(x, 10, seed=0, iterations=20), labels=y, previous=None, seed=0)
    assert found["nmi"] > 65 and found["ari"] > 55 and found["accuracy"] > 65
    assert found["purity"] >= found["accuracy"]
    whole = {name for name, value in found.items() if isinstance(value, int)}
    assert whole == {"largest", "smallest", "empty"}  # as clusters.json and the table on the console have them
    assert all(isinstance(found[name], float) for name in found.keys() - whole)


@pytest.mark.parametrize("k", [2, 10, 300])
def test_silhouette_is_scikit_learns(k):
    x, _ = digits()
    found = kmeans(x, k, seed=0)
    expected = silhouette_samples(x, found.assignment)
    assert silhouette(x, found, seed=0) == pytest.approx(expected.mean(), abs=1e-4)
    assert clustering_scores(x, found, labels=None, previous=None, seed=0)["silhouette"] == silhouette(x, found, seed=0)


def test_silhouette_of_a_sample_sees_all_points(monkeypatch):
    x, _ = digits()
    found = kmeans(x, 100, seed=0)
    whole = silhouette(x, found, seed=0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * len(x) * 70)  # seventy points at once
    assert silhouette(x, found, seed=0) == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr(module, "SILHOUETTE_SAMPLE", 400)
    assert silhouette(x, found, seed=0) == silhouette(x, found, seed=0) != silhouette(x, found, seed=1)
    for seed in range(3):
        assert silhouette(x, found, seed=seed) == pytest.approx(whole, abs=0.03)


def test_silhouette_where_it_says_nothing():
    x = torch.randn(6, 2)
    for assignment in ([0] * 6, [0, 1, 2, 3, 4, 5]):
        assert silhouette(x, clusters_of(assignment, 6), seed=0) == 0
    assert silhouette(torch.ones(6, 2), clusters_of([0, 0, 0, 1, 1, 1], 2), seed=0) == 0
    far = torch.tensor([[0.0, 0], [0, 0], [9, 9], [9, 9]])
    assert silhouette(far, clusters_of([0, 0, 3, 3], 4), seed=0) == pytest.approx(1)
