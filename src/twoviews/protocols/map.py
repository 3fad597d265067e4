"""A map of images: their features in the plane, by t-SNE. Shapes: N images, F features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.figures import new_figure, save_figure
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import generator, seed_of
from twoviews.ranges import Index, Seed

MAX_IMAGES = 3_000
MAX_LEGEND_CLASSES = 40


class Map(Protocol):
    """Draws map.png: images of a split in the plane by t-SNE, coloured by class.

    Args:
        split: train, memory or test; train is taken if there are no labelled images.
        seed: of the choice of images and of t-SNE.
        every_epochs: how often it is drawn in training; 0 is at the end only.
    """

    needs_labels = False

    def __init__(self, split: Literal["train", "memory", "test"], seed: Seed, every_epochs: Index):
        self.split, self.seed, self.every_epochs = split, seed, every_epochs

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """The value `images` is the number of images in the split."""
        data = context.data
        which = self.split if getattr(data, self.split) is not None else "train"
        images, x = context.split(which)
        if context.folder is not None:
            title = f"features of {data.name}, {which}"
            draw_map(context.folder / "map.png", x, images.labels, data.classes, title, self.seed)
        return EvaluationResult({"images": float(len(x))})


def draw_map(
    path: Path,
    x: Float[Tensor, "N F"],
    labels: Int[Tensor, " N"] | None,
    classes: Sequence[str],
    title: str,
    seed: int = 0,
) -> None:
    """Draw images in the plane so that images with similar features are close: t-SNE of unit features, from their PCA.

    Distances between far groups and sizes of groups mean nothing. At most MAX_IMAGES images are shown.

    Args:
        path: of the PNG.
        x: features.
        labels: classes, shown as colours; None: the images have none.
        classes: names by label.
        title: above the plot.
        seed: of the choice of images and of t-SNE.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    chosen = torch.randperm(len(x), generator=generator(seed, "map"))[:MAX_IMAGES]
    points: Any = normalize(x.cpu()[chosen].double().numpy())
    state = seed_of(seed, "map") % 2**32
    if points.shape[1] > 50:  # as van der Maaten and Hinton (2008) did: distances become cheap, and lose noise
        points = PCA(min(50, len(points)), random_state=state).fit_transform(points)
    # Its default of 30 neighbours is too many for fewer than 91 images.
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(init="pca", perplexity=perplexity, random_state=state).fit_transform(points)
    figure, axis = new_figure(9.5, 6.8)
    colours = _colours(len(classes))
    # In the order of the draw, so that no class covers another.
    shown = None if labels is None else [colours[label] for label in labels.cpu()[chosen].tolist()]
    axis.scatter(plane[:, 0], plane[:, 1], s=9, linewidths=0, color=shown)
    if labels is not None and len(classes) <= MAX_LEGEND_CLASSES:
        for name, colour in zip(classes, colours, strict=True):
            axis.scatter([], [], s=80, linewidths=0, color=colour, label=name)
        figure.legend(loc="outside right upper", ncols=1 if len(classes) <= 20 else 2, frameon=False)
    axis.set(title=f"{title}: {len(plane):,} images, t-SNE", xticks=[], yticks=[])
    axis.set_aspect("equal", adjustable="datalim")
    save_figure(figure, path)


def _colours(count: int) -> list[Any]:
    """So many colours that are easy to tell apart."""
    from matplotlib import colormaps

    for name, size in (("tab10", 10), ("tab20", 20)):
        if count <= size:
            return [colormaps[name](number) for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]
