"""Plots of an evaluation: confusion matrix, accuracy of each class, kNN accuracy over a training, comparison of runs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from twoviews.figures import new_figure, save_figure
from twoviews.protocols.classification import CONFIDENCE_PERCENT
from twoviews.protocols.protocol import TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NUMBERED_CLASSES = 20  # with more, the cells of a confusion matrix have no numbers
MAX_TICKS = 40  # with more classes or runs, only every second, third, … has its name

# Of the log in the notebook of MoCo's CIFAR-10 demo (facebookresearch/moco, branch colab-notebook): ResNet-18, asymmetric,
# 200 epochs; kNN with k = 200 and T = 0.1 on the 128 outputs of the last layer.
MOCO_DEMO = ((1, 32.0), (20, 61.4), (50, 73.3), (100, 78.1), (200, 82.6))
MOCO_DEMO_METHOD = {"queue_size": 4096, "momentum": 0.99, "temperature": 0.1, "symmetric": False}


def draw_confusion(path: Path, confusion: Int[Tensor, "C C"], classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: rows are classes, columns predictions, shades shares of the row, numbers images."""
    count = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 3.5 + 0.45 * count)
    figure, axis = new_figure(side + 1, side)
    picture = axis.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axis, label="share of the class, %", shrink=0.8)
    places, names = _ticks(classes)
    axis.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
    axis.set_yticks(places, names)
    axis.set(title=title, xlabel="predicted as", ylabel="class")
    if count <= MAX_NUMBERED_CLASSES:
        for row in range(count):
            for column in range(count):
                images = int(confusion[row, column])
                if images:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, f"{images}", ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)


def draw_per_class(path: Path, rows: Sequence[TableRow], title: str) -> None:
    """Draw the accuracy of each class with its interval, the best first, and a line at the accuracy of all images.

    Args:
        path: of the PNG.
        rows: `per_class` of `ClassificationScores`.
        title: above the plot.
    """
    known = [row for row in rows if row["images"]]
    known.sort(key=lambda row: -float(row["accuracy"]))
    total = sum(int(row["images"]) for row in known)
    mean = sum(float(row["accuracy"]) * int(row["images"]) for row in known) / total
    figure, axis = new_figure(8, min(24.0, 1.4 + 0.3 * len(known)))
    _bars(axis, [float(row["accuracy"]) for row in known], [(float(row["low"]), float(row["high"])) for row in known])
    axis.axvline(mean, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(*_ticks([f"{row['class']} ({row['images']:,})" for row in known]))
    explained = f"accuracy, %, with {CONFIDENCE_PERCENT} % intervals; dashed: of all images, {mean:.1f}"
    axis.set(title=title, xlabel=explained, xlim=(0, 100))
    save_figure(figure, path)


def published_curve(config: Mapping[str, Any]) -> dict[str, Sequence[tuple[float, float]]]:
    """Published kNN curves of a run's recipe: points (epoch, top-1 in percent) by name of the source; often none.

    The only one known is that of MoCo's CIFAR-10 demo, whose kNN compares projections and not, as here, features.
    """
    method, data = config.get("method") or {}, config.get("data") or {}
    target, source = str(method.get("_target_")), str(data.get("_target_"))
    same = all(method.get(name) == value for name, value in MOCO_DEMO_METHOD.items())
    if target.endswith(".MoCo") and source.endswith(".cifar10") and same:
        return {"MoCo's CIFAR-10 demo, 200 epochs, of the projection": MOCO_DEMO}
    return {}


def draw_knn_curve(
    path: Path,
    lines: Iterable[Mapping[str, float]],
    published: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
) -> bool:
    """Draw kNN accuracy over the epochs of a run with its baselines and published curves; False if none was measured.

    Args:
        path: of the PNG.
        lines: of metrics.jsonl.
        published: see `published_curve`.
        title: above the plot.
    """
    lines = list(lines)
    points = [(line["epoch"], line["knn/top1"]) for line in lines if "knn/top1" in line]
    if not points:
        return False
    figure, axis = new_figure(8, 5)
    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label="this run")
    axis.annotate(f"{points[-1][1]:.1f}", points[-1], xytext=(4, 5), textcoords="offset points")
    for name, curve in published.items():
        axis.plot(*zip(*curve, strict=True), marker="s", markersize=4, linestyle="--", color="black", label=name)
    for name, style, label in (
        ("baseline/untrained_knn_top1", ":", "untrained encoder"),
        ("baseline/pixels_knn_top1", "-.", "raw pixels"),
    ):
        values = [line[name] for line in lines if name in line]
        if values:
            axis.axhline(values[0], color="grey", linestyle=style, label=f"{label}: {values[0]:.1f}")
    axis.set(title=title, xlabel="epoch", ylabel="kNN top-1, %")
    axis.set_xlim(0, max(1.08 * points[-1][0], 22 if published else 0))  # of published curves the epochs of this run
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
    return True


def draw_comparison(
    path: Path, values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], label: str, title: str
) -> None:
    """Draw one number of several runs as bars, the first on top.

    Args:
        path: of the PNG.
        values: by run.
        intervals: by run, for runs that have one.
        label: name and unit of the number.
        title: above the plot.
    """
    names = list(values)
    figure, axis = new_figure(8, min(24.0, 1.4 + 0.4 * len(names)))
    ends = [intervals.get(name, (values[name], values[name])) for name in names]
    _bars(axis, list(values.values()), ends)
    axis.set_yticks(range(len(names)), names)
    axis.set(title=title, xlabel=label + (f", with {CONFIDENCE_PERCENT} % intervals" if intervals else ""))
    save_figure(figure, path)


def _bars(axis: "Axes", values: Sequence[float], ends: Sequence[tuple[float, float]]) -> None:
    """Draw horizontal bars with their intervals, the first on top, and the value in each bar."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    known = any(below) or any(above)
    axis.barh(range(len(values)), values, color="#7fa8d1", xerr=(below, above) if known else None, capsize=2)
    axis.set_ylim(len(values) - 0.5, -0.5)
    if len(values) <= MAX_TICKS:
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:.1f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axis.grid(axis="x", alpha=0.3)


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and texts of at most MAX_TICKS ticks at equal distances."""
    places = list(range(0, len(names), -(-len(names) // MAX_TICKS)))
    return places, [names[place] if len(names[place]) <= 24 else names[place][:23] + "…" for place in places]
