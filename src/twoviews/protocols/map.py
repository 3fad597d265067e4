"""A map of images: their features in the plane, by t-SNE or UMAP. Shapes: N images, F features."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.images import ImageData
from twoviews.errors import BadInput, counted, printable
from twoviews.figures import WIDTH, drawing
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import generator, seed_of
from twoviews.ranges import NonNegativeInt, Seed

MAX_IMAGES = 3_000
MAX_PLAIN_CLASSES = 10  # more are not told apart by colour alone: their names stand on the map, too
MAX_NAME = 18  # characters of a class in the legend
NAMES = {"tsne": "t-SNE", "umap": "UMAP"}


@dataclass
class Map(Protocol):
    """Draws map.png: images of a split in the plane by t-SNE or UMAP, coloured by class.

    Args:
        split: train, memory or test; train is taken if there are no labelled images.
        algorithm: tsne (van der Maaten and Hinton, 2008) or umap (McInnes et al., arXiv:1802.03426), which needs umap-learn.
        seed: of the choice of images and of the map.

    Raises:
        BadInput: umap-learn is not installed.
    """

    needs_labels = False

    split: Literal["train", "memory", "test"]
    seed: Seed
    every_epochs: NonNegativeInt
    algorithm: Literal["tsne", "umap"] = "tsne"

    def __post_init__(self) -> None:
        if self.algorithm == "umap" and find_spec("umap") is None:
            raise BadInput("algorithm=umap needs umap-learn; run `pip install umap-learn`, or use algorithm=tsne.")

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if the training images take the place of a split that the data do not have."""
        if getattr(data, self.split) is not None:
            return []
        return [f"split={self.split}: {data.name} has no {self.split} images, so the map is of its training images."]

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Draw the map into the context's folder; the value `images` is the number of images in the split."""
        data = context.data
        which = self.split if getattr(data, self.split) is not None else "train"
        images, x = context.split(which)
        if context.folder is not None:
            title = f"{context.title}: features of {data.name}, {which}"
            draw_map(context.folder / "map.png", x, images.labels, data.classes, title, self.seed, self.algorithm)
        return EvaluationResult({"images": float(len(x))})


def draw_map(
    path: Path,
    x: Float[Tensor, "N F"],
    labels: Int[Tensor, " N"] | None,
    classes: Sequence[str],
    title: str,
    seed: int = 0,
    algorithm: Literal["tsne", "umap"] = "tsne",
) -> None:
    """Draw images in the plane so that images with similar features are close, from the PCA of unit features.

    Distances between far groups and sizes of groups mean nothing. At most MAX_IMAGES images are shown; labels are colours.
    """
    chosen = torch.randperm(len(x), generator=generator(seed, "map"))[:MAX_IMAGES]
    plane = _in_the_plane(x.cpu()[chosen].double(), algorithm, seed_of(seed, "map") % 2**32)
    y = None if labels is None else labels.cpu()[chosen]
    colours, names = _colours(len(classes)), [printable(name)[:MAX_NAME] for name in classes]
    # The page is as high as the points need at its width, so that they fill it at one scale.
    extent = (plane.max(0).values - plane.min(0).values).clamp(min=1e-9)
    points = 7 if len(names) <= 20 else 6  # size of the letters of the legend
    columns = max(1, min(len(names), int(800 / points / (max(map(len, names), default=1) + 4))))
    height = WIDTH * min(1.3, max(0.5, float(extent[1] / extent[0])))
    heading = f"{title}: {counted(len(plane), 'image')}, {NAMES[algorithm]}"
    with drawing(path, height, title=heading) as (figure, (axis,)):
        # In the order of the draw, so that no class covers another.
        shown = None if y is None else [colours[label] for label in y.tolist()]
        size = min(16.0, max(4.0, 9000 / len(plane)))
        axis.scatter(plane[:, 0], plane[:, 1], s=size, linewidths=0, color=shown)
        if y is not None:
            handles = [axis.scatter([], [], s=24, linewidths=0, color=colour) for colour in colours]
            style: Any = {"loc": "outside lower center", "handletextpad": 0.1, "columnspacing": 1}
            figure.legend(handles, names, ncols=columns, fontsize=points, **style)
            for label in y.unique().tolist() if len(names) > MAX_PLAIN_CLASSES else ():
                _write_name(axis, plane[y == label].median(0).values.tolist(), names[label], colours[label])
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="box")
        axis.margins(0.02)


def _in_the_plane(x: Float[Tensor, "N F"], algorithm: str, state: int) -> Float[Tensor, "N 2"]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    points: Any = normalize(x.numpy())
    if points.shape[1] > 50:  # as van der Maaten and Hinton (2008) did: distances become cheap, and lose noise
        points = PCA(min(50, len(points)), random_state=state).fit_transform(points)
    if algorithm == "umap":
        from umap import UMAP  # type: ignore[import-not-found]

        # Its default of 15 neighbours is too many for fewer than 16 images; with a seed it runs on one thread.
        method: Any = UMAP(n_neighbors=min(15, len(points) - 1), random_state=state, n_jobs=1)
    else:
        # Its default of 30 neighbours is too many for fewer than 91 images.
        method = TSNE(init="pca", perplexity=min(30.0, (len(points) - 1) / 3), random_state=state)
    return torch.from_numpy(method.fit_transform(points)).double()


def _write_name(axis: Any, place: Sequence[float], name: str, colour: Any) -> None:
    """Write the name of a class in the middle of its images, in a darker shade of its colour with a white rim."""
    from matplotlib.patheffects import withStroke

    dark = tuple(0.6 * part for part in colour[:3])
    rim = [withStroke(linewidth=1.5, foreground="white")]
    axis.text(*place, name, color=dark, fontsize=6, ha="center", va="center", path_effects=rim)


def _colours(count: int) -> list[Any]:
    """So many colours: for up to 20 classes those of matplotlib's palettes, else hues far apart in three shades."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    for name, size in (("tab10", 10), ("tab20", 20)):
        if count <= size:
            return [colormaps[name](number) for number in range(count)]
    shades = ((0.9, 0.85), (0.55, 0.95), (0.8, 0.55))  # saturation and value
    # By steps of the golden ratio, neighbours in the list are far apart however many there are.
    return [(*hsv_to_rgb((number * 0.618034 % 1, *shades[number % 3])), 1.0) for number in range(count)]
