"""The grid against KNN itself at each of its points, and on copies of images."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from twoviews.backbones import ResNet
from twoviews.config.building import build
from twoviews.data.sources import digits
from twoviews.errors import BadInput
from twoviews.features import Features, PixelEncoder
from twoviews.protocols import knn
from twoviews.protocols.knn import KNN, knn_scores
from twoviews.protocols.knn_grid import KNNGrid
from twoviews.protocols.protocol import EvaluationContext

KS, TEMPERATURES = [1, 5, 10, 20, 50, 100, 200], [0.07, 0.1, 0.2, 0.5]


@cache
def context(bank: int = 400) -> EvaluationContext:
    """An untrained network, which finds some of the classes."""
    data = digits()
    data = replace(data, memory=data.memory.subset(torch.arange(bank)), test=data.test.subset(torch.arange(150)))
    torch.manual_seed(1)  # without equal cosines, of which each k may take others
    return EvaluationContext(ResNet(1, 32, "basic", [1, 1], width=8), data, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("bank", [400, 120])  # 120: the largest k are clamped
def test_every_point_is_knns(bank, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * bank * 40)  # four chunks
    result = KNNGrid(KS, TEMPERATURES, 0)(context(bank))
    rows = result.tables["grid"]
    assert [(row["k"], row["temperature"]) for row in rows] == [(k, t) for k in KS for t in TEMPERATURES]
    for row in rows:
        alone = KNN(row["k"], row["temperature"], 0)(context(bank)).values
        assert alone == {"top1": row["top1"], "top5": row["top5"]}
        name = f"k{row['k']}_t{row['temperature']:g}"
        assert (result.values[f"{name}_top1"], result.values[f"{name}_top5"]) == (row["top1"], row["top5"])
    assert len(result.values) == 2 * len(rows) and "top1" not in result.values
    assert len({row["top1"] for row in rows}) > 3


def test_scores_have_the_bits_of_knns():
    grid, subject = KNNGrid([1, 20, 200], [0.07, 0.5], 0), context()
    for (row, column), scores, labels in grid._scores(subject.test, subject.memory, 10):
        expected = knn_scores(subject.test.x, subject.memory, 10, grid.ks[row], grid.temperatures[column])
        assert torch.equal(scores, expected) and torch.equal(labels, subject.test.y)


def test_the_nearest_alone_is_the_same_at_any_temperature():
    rows = KNNGrid([1], TEMPERATURES, 0)(context()).tables["grid"]
    assert len({row["top1"] for row in rows}) == 1


def test_copies_of_an_image_in_the_bank():
    x = torch.eye(3)
    bank, subject = Features(x[[0, 0, 0, 1, 2]], torch.tensor([0, 0, 0, 1, 2])), context()
    data = replace(subject.data, classes=("a", "b", "c"))
    copies = EvaluationContext(PixelEncoder(1, 32), data, torch.device("cpu"), torch.float32)
    vars(copies).update(memory=bank, test=Features(x, torch.arange(3)))
    found = KNNGrid([1, 3], [0.1], 0)(copies)
    assert found.values == {"k1_t0.1_top1": 100, "k3_t0.1_top1": 100}  # no top5 of three classes


def test_an_empty_grid_is_refused():
    grid = {"_target_": "twoviews.protocols.knn_grid.KNNGrid", "ks": [], "temperatures": [0.1], "every_epochs": 0}
    with pytest.raises(BadInput, match=r"ks=\[\] is an empty list"):
        build(grid)


def test_order_and_repetition_do_not_matter():
    assert KNNGrid([20, 5, 20], [0.5, 0.1], 0)(context()) == KNNGrid([5, 20], [0.1, 0.5], 0)(context())
