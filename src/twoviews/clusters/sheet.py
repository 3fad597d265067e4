"""A sheet of clusters, each with its images nearest to and farthest from the centroid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from twoviews.clusters.kmeans import Clusters
from twoviews.data.images import Images
from twoviews.errors import counted
from twoviews.figures import save_sheet
from twoviews.pictures import GAP, GREY, RED, fitted, font, squares

MAX_ROWS = 20  # clusters
NEAREST, FARTHEST = 10, 4  # images of each cluster
CAPTION_PX, HEADING_PX = 220, 90  # width of the captions, height of the heading


@dataclass(frozen=True)
class ClusterRow:
    """A cluster on the sheet."""

    cluster: int
    members: Int[Tensor, " n"]  # images, nearest to the centroid first
    majority: int  # the commonest class; -1 without labels
    purity: float  # its share, in [0, 1]; 0 without labels
    looseness: float  # mean squared distance to the centroid

    def caption(self, classes: Sequence[str]) -> list[str]:
        """The lines of text beside its images."""
        images = counted(len(self.members), "image")
        if self.majority < 0:
            return [f"cluster {self.cluster}", images, f"distance {self.looseness:.3g}"]
        return [f"cluster {self.cluster}", images, f"{100 * self.purity:.0f} % are {classes[self.majority]}"]

    @property
    def shown(self) -> list[int]:
        """The images to show: the nearest to the centroid, then the farthest, each once."""
        members = self.members.tolist()
        return members[:NEAREST] + members[NEAREST:][-FARTHEST:]


def cluster_rows(clusters: Clusters, labels: Int[Tensor, " N"] | None) -> list[ClusterRow]:
    """A row for each cluster that has images, the purest first; without labels the tightest first."""
    order = clusters.distance.argsort(stable=True).cpu()
    order = order[clusters.assignment.cpu()[order].argsort(stable=True)]
    distance, made = clusters.distance.cpu(), []
    for cluster, members in enumerate(order.split(clusters.sizes.tolist())):
        if len(members):
            majority, purity = -1, 0.0
            if labels is not None:
                counts = torch.bincount(labels.cpu()[members])
                majority, purity = int(counts.argmax()), counts.max().item() / len(members)
            made.append(ClusterRow(cluster, members, majority, purity, distance[members].mean().item()))
    return sorted(made, key=lambda row: (-row.purity, row.looseness))


def evenly_spaced(ordered: Sequence[ClusterRow], count: int = MAX_ROWS) -> list[ClusterRow]:
    """At most `count` rows at even steps from the first to the last."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[round(place)] for place in torch.linspace(0, len(ordered) - 1, count).tolist()]


def draw_clusters(path: Path, images: Images, clusters: Clusters, classes: Sequence[str], title: str) -> None:
    """Draw a row for each of at most MAX_ROWS clusters: a caption, the images nearest to the centroid, and the farthest.

    Where there are labels, the rows go from the purest to the most mixed cluster, and images that are not of their
    cluster's commonest class have a red frame; else from the tightest to the loosest.

    Args:
        path: of the picture.
        images: what was clustered.
        clusters: of all `images`.
        classes: names by label.
        title: first line of the heading.
    """
    from PIL import Image, ImageDraw

    labels = images.labels
    ordered = cluster_rows(clusters, labels)
    shown = evenly_spaced(ordered)
    pictures = squares(images, sorted({image for row in shown for image in row.shown}))
    side = max(picture.width for picture in pictures.values())
    step = side + GAP
    wide = CAPTION_PX + (NEAREST + FARTHEST) * step + 3 * GAP
    sheet = Image.new("RGB", (wide, HEADING_PX + len(shown) * step + GAP), "white")
    draw, plain, bold = ImageDraw.Draw(sheet), font("DejaVuSans"), font("DejaVuSans-Bold")
    edge = CAPTION_PX + NEAREST * step + 3 * GAP  # a wider gap sets the farthest images apart
    draw.text((GAP, 8), title, "black", bold)
    draw.text((GAP, 34), _explanation(len(shown), len(ordered), labels is not None), GREY, plain)
    draw.text((CAPTION_PX, HEADING_PX - 26), "nearest to the centroid", GREY, plain)
    draw.text((edge, HEADING_PX - 26), "farthest from it", GREY, plain)
    for number, row in enumerate(shown):
        top = HEADING_PX + number * step
        for line, text in enumerate(row.caption(classes)):
            face = bold if line == 2 else plain
            text = fitted(text, face, CAPTION_PX - 2 * GAP)
            draw.text((GAP, top + side / 2 - 34 + 24 * line), text, "black" if line else GREY, face)
        for place, image in enumerate(row.shown):
            left = CAPTION_PX + place * step if place < NEAREST else edge + (place - NEAREST) * step
            sheet.paste(pictures[image], (left, top))
            if labels is not None and labels[image] != row.majority:
                draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=RED, width=3)
    save_sheet(sheet, path)


def _explanation(shown: int, there: int, labelled: bool) -> str:
    """Second line of the heading."""
    which = "all clusters" if shown == there else f"{shown} of {there:,} clusters at even steps"
    if not labelled:
        return f"{which}, from the tightest to the loosest (distance: mean square of that to the centroid)"
    return f"{which}, from the purest to the most mixed; red frame: not of the class that is commonest in the cluster"
