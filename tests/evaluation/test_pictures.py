"""Pictures of an evaluation: files that are whole, the same twice, and that show what they were given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twoviews import figures, pictures
from twoviews.evaluation.pictures import (
    Measured,
    draw_comparison,
    draw_confusion,
    draw_knn_curve,
    draw_per_class,
)
from twoviews.pictures import draw_curves
from twoviews.protocols.classification import classification_scores

LINES = [
    {"step": 0, "epoch": 0, "baseline/untrained_knn_top1": 30.0, "baseline/pixels_knn_top1": 35.4},
    {"step": 9, "epoch": 10, "knn/top1": 48.0},
    {"step": 18, "epoch": 20, "train/loss": 1.0},
    {"step": 18, "epoch": 20, "knn/top1": 61.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved, as an object."""
    kept, save = [], figures.save_figure

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
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
    shown = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
    expected = {(row, column): f"{shares[row, column]:.0f}" for row in range(classes) for column in range(classes)}
    assert "0" in expected.values() or classes == 50
    assert shown == (expected if classes == 10 else {})
    assert drawn[-1].axes[1].get_ylabel() == "% of the images of the class (row)"
    assert axis.get_yticklabels()[0].get_text() == f"class 0 ({600 // classes})"


@pytest.mark.parametrize("names", [[*"0123456789"], [f"class {n}" for n in range(20)], ["x" * 60, "y" * 60]])
def test_nothing_of_a_confusion_matrix_is_cut_off(names, tmp_path, drawn):
    draw_confusion(tmp_path / "a.png", 500 * torch.eye(len(names)).long() + 30, names, "A")
    drawn[-1].set_dpi(200)  # as it is saved
    inside, (width, height) = drawn[-1].get_tightbbox(), drawn[-1].get_size_inches()
    assert min(inside.x0, inside.y0) >= 0 and inside.x1 <= width and inside.y1 <= height


@pytest.mark.parametrize("images", [200, 1000])
def test_only_none_is_0_and_only_all_are_100(images, tmp_path, drawn):
    confusion = torch.tensor([[images - 1, 1, 0], [0, 0, 0], [0, 0, 5]])
    draw_confusion(tmp_path / "a.png", confusion, ["a", "b", "c"], "A")
    shown = [text.get_text() for text in drawn[-1].axes[0].texts]
    assert shown == [">99", "<1", "0", "0", "0", "100"]  # none of a class without images


def test_per_class(tmp_path, drawn):
    p, labels = probabilities(10)
    found = classification_scores(p[labels != 4], labels[labels != 4], list("abcdefghij"))
    draw_per_class(tmp_path / "classes.png", found.per_class, "A")
    axis = drawn[-1].axes[0]
    values = axis.lines[0].get_xdata().tolist()
    assert values == sorted((row["accuracy"] for row in found.per_class if row["images"]), reverse=True)
    assert "e (0)" not in [tick.get_text() for tick in axis.get_yticklabels()] and len(values) == 9
    assert found.values["top1"] == pytest.approx(axis.lines[-1].get_xdata()[0])


def test_knn_curve(tmp_path, drawn):
    twice(tmp_path, lambda path: draw_knn_curve(path, LINES, "moco"))
    lines = {line.get_label(): line for line in drawn[-1].axes[0].lines}
    assert lines["this run"].get_xydata().tolist() == [[10, 48.0], [20, 61.0]]
    assert lines["raw pixels: 35.4"].get_ydata()[0] == 35.4
    assert not drawn[-1].axes[0].get_legend() and drawn[-1].legends  # outside, where it covers nothing
    for count in (1, 2):  # not measured, and measured once
        assert not draw_knn_curve(tmp_path / "none.png", LINES[:count], "no curve")
    assert not (tmp_path / "none.png").exists()


def test_what_was_measured_once_is_a_point_among_its_baselines(tmp_path, drawn):
    twice(tmp_path, lambda path: draw_curves(path, LINES[:3], "moco"))
    loss, knn, spread, _ = drawn[-1].axes
    assert knn.lines[0].get_xydata().tolist() == [[10, 48.0]] and knn.texts[0].get_text() == "48"
    assert [line.get_ydata()[0] for line in knn.lines[1:]] == [30.0, 35.4] and knn.axison
    assert loss.texts[0].get_text() == "1" and spread.texts[0].get_text() == "not measured"


def test_a_fifth_panel_of_curves(tmp_path, drawn, monkeypatch):
    monkeypatch.setitem(pictures.PANELS, "train/norm", "norm of the gradient")
    draw_curves(tmp_path / "curves.png", [*LINES, {"step": 18, "epoch": 20, "train/norm": 3.0}], "moco")
    *_, norm, unused = drawn[-1].axes
    assert norm.get_title() == "norm of the gradient" and norm.texts[0].get_text() == "3" and not unused.axison


def test_comparison(tmp_path, drawn):
    baselines = {"baseline/untrained_knn_top1": 40.0, "baseline/pixels_knn_top1": 60.0}
    knn = [Measured(82.5, (81.0, 83.5), baselines), Measured(41.0), Measured(float("nan"))]
    linear = [Measured(90.0), Measured(50.0), Measured(30.0)]
    labels = ["seed=0", "seed=1", "torchvision:resnet18"]
    twice(tmp_path, lambda path: draw_comparison(path, {"kNN, %": knn, "linear, %": linear}, labels, "runs"))
    first, second = drawn[-1].axes
    assert first.lines[0].get_xdata()[:2].tolist() == [82.5, 41.0] and second.lines[0].get_xdata().tolist() == [
        90,
        50,
        30,
    ]
    ends = first.collections[0].get_segments()
    assert ends[0][:, 0].tolist() == pytest.approx([81.0, 83.5]) and ends[1][:, 0].tolist() == [41.0, 41.0]
    assert first.get_ylim()[0] > first.get_ylim()[1], "the first on top"
    assert [tick.get_text() for tick in first.get_yticklabels()] == labels
    assert first.get_xlim()[0] > 30, "the axis begins where the data do"
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == ["untrained encoder", "raw pixels"]
    assert first.get_xlabel() == "kNN, %, with 95 % intervals" and second.get_xlabel() == "linear, %"


def test_lines_of_a_note_end_between_its_parts(tmp_path, drawn):
    parts = ["dots: seeds; line: mean", "whiskers: 95% t-interval of the mean, an arrow where it leaves the axis"]
    with figures.drawing(tmp_path / "a.png", 1, title="A", note="; ".join(parts)):
        pass
    assert drawn[-1].get_suptitle().replace("\N{NO-BREAK SPACE}", " ").splitlines() == ["A", f"{parts[0]};", parts[1]]


def test_formats_and_size_of_print(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_formats", ["png"])
    figures.set_formats(["pdf", "png"])
    for _ in range(2):
        draw_comparison(tmp_path / "a.png", {"kNN, %": [Measured(50.0)]}, ["costs $5 and $6"], "a title")
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert sorted(files) == ["a.pdf", "a.png"]
    assert files["a.pdf"] == (tmp_path / "a.pdf").read_bytes() and b"CreationDate" not in files["a.pdf"]
    assert b"/MediaBox [ 0 0 504 " in files["a.pdf"] and b"/Subtype /Type3" not in files["a.pdf"]  # 7 inches; TrueType
    assert Image.open(tmp_path / "a.png").width == 1400
    figures.save_sheet(Image.new("RGB", (700, 300)), tmp_path / "sheet.png")
    assert b"504" in (tmp_path / "sheet.pdf").read_bytes() and Image.open(tmp_path / "sheet.png").size == (700, 300)
