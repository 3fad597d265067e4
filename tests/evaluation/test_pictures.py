"""Pictures of an evaluation: files that are whole, the same twice, and that show what they were given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twoviews.evaluation import pictures
from twoviews.evaluation.pictures import (
    MOCO_DEMO,
    draw_comparison,
    draw_confusion,
    draw_knn_curve,
    draw_per_class,
    published_curve,
)
from twoviews.protocols.classification import classification_scores

MOCO = {
    "method": {
        "_target_": "twoviews.methods.moco.MoCo",
        "queue_size": 4096,
        "momentum": 0.99,
        "temperature": 0.1,
        "symmetric": False,
    },
    "data": {"_target_": "twoviews.data.sources.cifar10"},
}
LINES = [
    {"step": 0, "epoch": 0, "baseline/untrained_knn_top1": 30.0, "baseline/pixels_knn_top1": 35.4},
    {"step": 9, "epoch": 10, "knn/top1": 48.0},
    {"step": 18, "epoch": 20, "train/loss": 1.0},
    {"step": 18, "epoch": 20, "knn/top1": 61.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved, as an object."""
    kept, save = [], pictures.save_figure

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "save_figure", keep)
    return kept


def probabilities(classes: int, count: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    logits = torch.randn(count, classes, generator=made) + 3 * torch.eye(classes)[labels]
    return logits.softmax(1), labels


def twice(tmp_path: Path, draw: Callable[[Path], object]) -> np.ndarray:
    """The picture, after it was drawn twice to the same pixels, with no other file left behind."""
    for name in ("one.png", "two.png"):
        draw(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "two.png"))
    assert np.array_equal(one, two) and one.std() > 5
    return one


@pytest.mark.parametrize("classes", [10, 50])
def test_confusion(classes, tmp_path, drawn):
    found = classification_scores(*probabilities(classes), [f"class {n}" for n in range(classes)])
    twice(tmp_path, lambda path: draw_confusion(path, found.confusion, [r["class"] for r in found.per_class], "A"))
    axis = drawn[-1].axes[0]
    shares = axis.images[0].get_array()
    assert np.allclose(shares.sum(1), 100)
    assert np.allclose(shares.diagonal(), [row["accuracy"] for row in found.per_class])
    numbers = sorted(int(text.get_text()) for text in axis.texts)
    assert numbers == (sorted(n for n in found.confusion.flatten().tolist() if n) if classes == 10 else [])


def test_per_class(tmp_path, drawn):
    p, labels = probabilities(10)
    found = classification_scores(p[labels != 4], labels[labels != 4], list("abcdefghij"))
    draw_per_class(tmp_path / "bars.png", found.per_class, "A")
    axis = drawn[-1].axes[0]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == sorted((row["accuracy"] for row in found.per_class if row["images"]), reverse=True)
    assert "e (0)" not in [tick.get_text() for tick in axis.get_yticklabels()] and len(widths) == 9
    assert found.values["top1"] == pytest.approx(axis.lines[-1].get_xdata()[0])


def test_knn_curve(tmp_path, drawn):
    curve = published_curve(MOCO)
    twice(tmp_path, lambda path: draw_knn_curve(path, LINES, curve, "moco"))
    lines = {line.get_label(): line for line in drawn[-1].axes[0].lines}
    assert lines["this run"].get_xydata().tolist() == [[10, 48.0], [20, 61.0]]
    assert lines["MoCo's CIFAR-10 demo, 200 epochs, of the projection"].get_xydata().tolist() == [
        list(point) for point in MOCO_DEMO
    ]
    assert lines["raw pixels: 35.4"].get_ydata()[0] == 35.4
    assert not draw_knn_curve(tmp_path / "none.png", LINES[:1], {}, "nothing")
    assert not (tmp_path / "none.png").exists()


def test_published_curve_is_of_that_recipe_alone():
    assert list(published_curve(MOCO)) == ["MoCo's CIFAR-10 demo, 200 epochs, of the projection"]
    for part, change in (
        ("method", {"symmetric": True}),
        ("method", {"temperature": 0.2}),
        ("method", {"_target_": "twoviews.methods.simclr.SimCLR"}),
        ("data", {"_target_": "twoviews.data.sources.cifar100"}),
    ):
        assert published_curve({**MOCO, part: {**MOCO[part], **change}}) == {}
    assert published_curve({}) == {}


def test_comparison(tmp_path, drawn):
    values, intervals = {"moco": 82.5, "a long name of a run": 40.0}, {"moco": (81.0, 83.5)}
    twice(tmp_path, lambda path: draw_comparison(path, values, intervals, "kNN top-1, %", "runs"))
    axis = drawn[-1].axes[0]
    assert [bar.get_width() for bar in axis.patches] == [82.5, 40.0]
    ends = axis.collections[0].get_segments()
    assert ends[0][:, 0].tolist() == pytest.approx([81.0, 83.5]) and ends[1][:, 0].tolist() == [40.0, 40.0]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top
