"""Plots of an evaluation: confusion matrix, accuracy of each class, kNN accuracy over a training, comparison of runs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from twoviews.errors import printable
from twoviews.figures import BASELINES, WIDTH, draw_baselines, drawing, merged_legend
from twoviews.protocols.classification import CONFIDENCE_PERCENT
from twoviews.protocols.protocol import TableRow
from twoviews.protocols.units import KNN_TOP1

MAX_NUMBERED_CLASSES = 20  # with more, the cells of a confusion matrix have no numbers
MAX_NAME = 40  # characters of a name beside an axis
MAX_TICKS = 40  # with more classes or runs, only every second, third, … has its name


@dataclass(frozen=True)
class Measured:
    """A number of a run, in percent where it is an accuracy."""

    value: float  # NaN: the run has none
    interval: tuple[float, float] | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)  # by their names in metrics.jsonl


def draw_confusion(path: Path, confusion: Int[Tensor, "C C"], classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: rows are classes, columns predictions, shades and numbers percent of the images of the row.

    Behind the name of a class stands how many images it has.
    """
    count, images = len(classes), confusion.sum(1)
    percent = 100 * confusion / images[:, None].clamp(min=1)
    places, names = _ticks(classes)
    rows = [f"{name} ({int(images[place]):,})" for place, name in zip(places, names, strict=True)]
    names_width = 0.06 * max(map(len, rows))  # inches, about
    width = min(WIDTH, 2.6 + 0.3 * count + names_width)
    with drawing(path, width - 1.2 - names_width, width=width, title=title) as (figure, (axis,)):
        picture = axis.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(picture, ax=axis, label="% of the images of the class (row)", shrink=0.8)
        axis.set_anchor("SW")  # in the middle of a larger panel the layout would cut off what is below or beside it
        axis.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(places, rows)
        axis.set(xlabel="predicted as", ylabel="class (images)")
        axis.grid(visible=False)
        cells = itertools.product(range(count), range(count)) if count <= MAX_NUMBERED_CLASSES else ()
        for row, column in cells:
            if not images[row]:  # there is no percentage
                continue
            share = percent[row, column].item()
            colour = "white" if share > 50 else "black" if share else "#999999"
            number = "<1" if 0 < share <= 0.5 else ">99" if 99.5 <= share < 100 else f"{share:.0f}"
            axis.text(column, row, number, ha="center", va="center", color=colour, fontsize=7)


def draw_per_class(path: Path, rows: Sequence[TableRow], title: str) -> None:
    """Draw `per_class` of `ClassificationScores`: the best class first, and a line at the accuracy of all images."""
    judged = sorted((row for row in rows if row["images"]), key=lambda row: -float(row["accuracy"]))
    measured = [Measured(float(row["accuracy"]), (float(row["low"]), float(row["high"]))) for row in judged]
    images = [int(row["images"]) for row in judged]
    mean = sum(one.value * count for one, count in zip(measured, images, strict=True)) / sum(images)
    labels = [f"{row['class']} ({count:,})" for row, count in zip(judged, images, strict=True)]
    draw_comparison(path, {"accuracy of the class (images), %": measured}, labels, title, mean)


def draw_knn_curve(path: Path, lines: Iterable[Mapping[str, float]], title: str) -> bool:
    """Draw kNN accuracy over the epochs of a run with its baselines; `lines` are those of metrics.jsonl.

    False if kNN was measured at fewer than two epochs: there is no picture of that.
    """
    lines = list(lines)
    points = [(line["epoch"], line[KNN_TOP1]) for line in lines if KNN_TOP1 in line]
    if len(points) < 2:
        return False
    baselines = {name: [line[name]] for line in lines for name in BASELINES if name in line}
    with drawing(path, 3, title=title) as (figure, (axis,)):
        axis.plot(*zip(*points, strict=True), marker="o", label="this run")
        axis.annotate(f"{points[-1][1]:.1f}", points[-1], xytext=(4, 5), textcoords="offset points")
        seen = [*(value for _, value in points), *(accuracy for (accuracy,) in baselines.values())]
        axis.set(xlabel="epoch", ylabel="kNN top-1, %", ylim=(min(seen) - 2, max(seen) + 3))
        draw_baselines(axis, baselines)
        axis.set_xlim(0, 1.08 * points[-1][0])
        merged_legend(figure, [axis])
    return True


def draw_comparison(
    path: Path,
    metrics: Mapping[str, Sequence[Measured]],
    labels: Sequence[str],
    title: str,
    mean: float | None = None,
) -> None:
    """Draw some numbers of several runs or classes, a panel each, as dots with intervals, the first on top.

    The axes go as far as what was measured goes, and not from 0 to 100.

    Args:
        path: of the picture.
        metrics: what each run measured, by the name and unit of the number.
        labels: of the runs.
        title: above the panels.
        mean: where a dashed line is; None: there is none.
    """
    height = min(8.0, 0.3 + 0.2 * len(labels))
    with drawing(path, height, panels=(1, len(metrics)), sharey=True, title=title) as (figure, panels):
        for panel, (name, measured) in zip(panels, metrics.items(), strict=True):
            values = [one.value for one in measured]
            ends = [one.interval or (one.value, one.value) for one in measured]
            below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
            style: Any = {"fmt": "o", "ecolor": "#7fa8d1", "elinewidth": 1.5}
            panel.errorbar(values, range(len(values)), xerr=[below, above], **style)
            for baseline, (label, _) in BASELINES.items():
                points = [(one.baselines.get(baseline), row) for row, one in enumerate(measured)]
                if points := [point for point in points if point[0] is not None]:
                    marker = "|" if "untrained" in baseline else "x"
                    panel.plot(*zip(*points, strict=True), marker, color="black", label=label)
            if mean is not None:
                panel.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"all: {mean:.1f}")
            with_intervals = any(one.interval for one in measured)
            panel.set_xlabel(f"{name}, with {CONFIDENCE_PERCENT} % intervals" if with_intervals else name)
        panels[0].set_yticks(*_ticks(labels))
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        merged_legend(figure, panels)


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and texts of at most MAX_TICKS ticks at equal distances."""
    places = list(range(0, len(names), -(-len(names) // MAX_TICKS)))
    shown = [printable(names[place]) for place in places]
    return places, [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in shown]
