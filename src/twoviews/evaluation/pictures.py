"""Pictures of an evaluation: which classes are confused, where images lie, how runs learnt and how they compare."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.evaluation.scores import CONFIDENCE, Row
from twoviews.randomness import generator, seed_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAPPED = 3_000  # images on a map
NUMBERED = 20  # up to so many classes each cell of a confusion matrix has its number
NAMED = 40  # up to so many classes all have their names; of more every so many
DPI = 110

# Of the log in the notebook of MoCo's CIFAR-10 demo (facebookresearch/moco, branch colab-notebook): ResNet-18, asymmetric,
# 200 epochs; kNN with k = 200 and T = 0.1 on the 128 outputs of the last layer.
MOCO_DEMO = ((1, 32.0), (20, 61.4), (50, 73.3), (100, 78.1), (200, 82.6))
MOCO_DEMO_METHOD = {"queue_size": 4096, "momentum": 0.99, "temperature": 0.1, "symmetric": False}


def draw_confusion(path: Path, confusion: Int[Tensor, "C C"], classes: Sequence[str], title: str) -> None:
    """Rows are classes, columns what their images were taken for, shades the share of the row; numbers are images."""
    count = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 3.5 + 0.45 * count)
    figure, axis = _figure(side + 1, side)
    picture = axis.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axis, label="share of the class, %", shrink=0.8)
    places, names = _named(classes)
    axis.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
    axis.set_yticks(places, names)
    axis.set(title=title, xlabel="predicted as", ylabel="class")
    if count <= NUMBERED:
        for row in range(count):
            for column in range(count):
                images = int(confusion[row, column])
                if images:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, f"{images}", ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def draw_per_class(path: Path, rows: Sequence[Row], title: str) -> None:
    """Accuracy of each class with its interval, best first; the line is the mean over images.

    Args:
        path: of the PNG.
        rows: the table of `Scores`.
        title: above it.
    """
    known = [row for row in rows if row["images"]]
    known.sort(key=lambda row: -float(row["accuracy"]))
    total = sum(int(row["images"]) for row in known)
    mean = sum(float(row["accuracy"]) * int(row["images"]) for row in known) / total
    figure, axis = _figure(8, min(24.0, 1.4 + 0.3 * len(known)))
    _bars(axis, [float(row["accuracy"]) for row in known], [(float(row["low"]), float(row["high"])) for row in known])
    axis.axvline(mean, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(*_named([f"{row['class']} ({row['images']:,})" for row in known]))
    explained = f"accuracy, %, with {CONFIDENCE} % intervals; dashed: of all images, {mean:.1f}"
    axis.set(title=title, xlabel=explained, xlim=(0, 100))
    _save(figure, path)


def draw_map(
    path: Path,
    x: Float[Tensor, "N F"],
    labels: Int[Tensor, " N"] | None,
    classes: Sequence[str],
    title: str,
    seed: int = 0,
) -> None:
    """Images in the plane, those near each other that have near features: t-SNE of unit features, begun from their PCA.

    Distances between far groups and sizes of groups mean nothing. At most MAPPED images, drawn by `seed`.

    Args:
        path: of the PNG.
        x: features.
        labels: colours; None for images without.
        classes: names by label.
        title: above it.
        seed: of the draw and of the map.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    chosen = torch.randperm(len(x), generator=generator(seed, "map"))[:MAPPED]
    points: Any = normalize(x.cpu()[chosen].double().numpy())
    state = seed_of(seed, "map") % 2**32
    if points.shape[1] > 50:  # as van der Maaten and Hinton (2008) did: distances become cheap, and lose noise
        points = PCA(min(50, len(points)), random_state=state).fit_transform(points)
    # Its default of 30 neighbours is too many for fewer than 91 images.
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(init="pca", perplexity=perplexity, random_state=state).fit_transform(points)
    figure, axis = _figure(9.5, 6.8)
    colours = _colours(len(classes))
    # In the order of the draw, so that no class covers another.
    shown = None if labels is None else [colours[label] for label in labels.cpu()[chosen].tolist()]
    axis.scatter(plane[:, 0], plane[:, 1], s=9, linewidths=0, color=shown)
    if labels is not None and len(classes) <= NAMED:
        for name, colour in zip(classes, colours, strict=True):
            axis.scatter([], [], s=80, linewidths=0, color=colour, label=name)
        figure.legend(loc="outside right upper", ncols=1 if len(classes) <= 20 else 2, frameon=False)
    axis.set(title=f"{title}: {len(plane):,} images, t-SNE", xticks=[], yticks=[])
    axis.set_aspect("equal", adjustable="datalim")
    _save(figure, path)


def published_curve(config: Mapping[str, Any]) -> dict[str, Sequence[tuple[float, float]]]:
    """Published (epoch, kNN top-1 in percent) of the recipe of a run, by name of the source; {} where none is known.

    Known is MoCo's CIFAR-10 demo, whose kNN is about the projection and not, as here, the features before it.
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
    """kNN accuracy over the epochs of a run, its baselines, and what others have published; False: none was measured.

    Args:
        path: of the PNG.
        lines: of metrics.jsonl.
        published: (epoch, percent) by name; see `published_curve`.
        title: above it.
    """
    lines = list(lines)
    points = [(line["epoch"], line["knn/top1"]) for line in lines if "knn/top1" in line]
    if not points:
        return False
    figure, axis = _figure(8, 5)
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
    _save(figure, path)
    return True


def draw_comparison(
    path: Path, values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], label: str, title: str
) -> None:
    """One number of several runs as bars, in the order they are given, the first on top, with the intervals of those that have.

    Args:
        path: of the PNG.
        values: by run.
        intervals: by run, likewise.
        label: what the number is, and its unit.
        title: above it.
    """
    names = list(values)
    figure, axis = _figure(8, min(24.0, 1.4 + 0.4 * len(names)))
    ends = [intervals.get(name, (values[name], values[name])) for name in names]
    _bars(axis, list(values.values()), ends)
    axis.set_yticks(range(len(names)), names)
    axis.set(title=title, xlabel=label + (f", with {CONFIDENCE} % intervals" if intervals else ""))
    _save(figure, path)


def _bars(axis: "Axes", values: Sequence[float], ends: Sequence[tuple[float, float]]) -> None:
    """Horizontal, the first on top, each with its number in it."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    known = any(below) or any(above)
    axis.barh(range(len(values)), values, color="#7fa8d1", xerr=(below, above) if known else None, capsize=2)
    axis.set_ylim(len(values) - 0.5, -0.5)
    if len(values) <= NAMED:
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:.1f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axis.grid(axis="x", alpha=0.3)


def _named(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places and texts of the ticks: all names, or every so many."""
    places = list(range(0, len(names), -(-len(names) // NAMED)))
    return places, [names[place] if len(names[place]) <= 24 else names[place][:23] + "…" for place in places]


def _colours(count: int) -> list[Any]:
    """As different as so many can be."""
    from matplotlib import colormaps

    for name, room in (("tab10", 10), ("tab20", 20)):
        if count <= room:
            return [colormaps[name](number) for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """In inches; by itself, so that pyplot's settings and windows have no part in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: "Figure", path: Path) -> None:
    new = path.with_name(path.name + ".new")
    figure.savefig(new, format="png", dpi=DPI)
    new.replace(path)
