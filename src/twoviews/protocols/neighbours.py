"""The training images whose features are most similar to those of other images, as a table and a sheet of pictures.

Shapes: N training images, M others, K neighbours, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.images import ImageData, Images
from twoviews.figures import save_sheet
from twoviews.pictures import (
    GAP,
    GREEN,
    GREY,
    HEADING_PX,
    LINE_PX,
    RED,
    draw_frame,
    fitted,
    font,
    squares,
    titled_sheet,
)
from twoviews.protocols.knn import neighbours
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.protocols.user_images import check_images, embed_user_images, grey_notes, image_paths
from twoviews.randomness import generator
from twoviews.ranges import Count, NonNegativeInt, Seed

MAX_ROWS, MAX_COLUMNS = 20, 10  # images on the sheet, and neighbours of each
CAPTION = 12  # px, of names, so that more of them fits


def nearest_rows(
    queries: Float[Tensor, "M F"], bank: Float[Tensor, "N F"], k: int, exclude: Int[Tensor, " M"] | None
) -> tuple[Float[Tensor, "M K"], Int[Tensor, "M K"]]:
    """Cosines and indices of the k bank rows most similar to each query, see `neighbours`; on the CPU."""
    cosines, rows = zip(*(nearest for _, *nearest in neighbours(queries, bank, k, exclude)), strict=True)
    return torch.cat(cosines).cpu(), torch.cat(rows).cpu()


@dataclass(frozen=True)
class NeighbourRow:
    """An image and its nearest training images."""

    name: str  # a path, or what it is called
    image: int
    label: int  # -1: none
    neighbours: list[int]  # training images, the nearest first
    cosines: list[float]  # of the angles to them


@dataclass
class Neighbours(Protocol):
    """A table of the nearest training images, and neighbours.png, a sheet of them.

    Args:
        images: a picture file, a folder of them, or a pattern; None: a sample of the test images (of the training
            images, each but itself, where there are no test images).
        k: neighbours of each; clamped to the training images.
        sample: how many images the sample has.
        seed: of the sample.
    """

    needs_labels = False

    images: str | None
    k: Count
    sample: Count
    seed: Seed
    every_epochs: NonNegativeInt

    def __post_init__(self) -> None:
        if self.images is not None:
            check_images(self.images)

    def notes(self, data: ImageData) -> list[str]:
        """Sentences if the encoder takes grey images and these have colours, or if there are no test images to sample."""
        if self.images is None and data.test is None:
            return [f"{data.name} has no test images, so the sample is of its training images, each without itself."]
        return grey_notes(self.images, data)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """agreement: the share of neighbours of the image's own class in percent, where both are labelled.

        Raises:
            BadInput: there are no such pictures.
        """
        data, broken = context.data, {}
        if self.images is not None:
            decoded = embed_user_images(image_paths(self.images), context)
            shown, x, names, exclude = decoded.images, decoded.x, decoded.images.paths or [], None
            broken = {decoded.paths[row]: why for row, why in decoded.broken.items()}
        else:
            shown, x, names, exclude = self._sampled(context)
        train, bank = context.split("train")
        cosines, rows = (
            nearest_rows(x, bank, self.k, exclude) if len(x) else (torch.empty(0, 1), torch.empty(0, 1).long())
        )
        labels = [-1] * len(x) if shown.labels is None else shown.labels.tolist()
        made = [
            NeighbourRow(*row)
            for row in zip(names, range(len(x)), labels, rows.tolist(), cosines.tolist(), strict=True)
        ]
        table: list[TableRow] = [
            {
                "image": row.name,
                "rank": rank,
                "neighbour": train.paths[neighbour] if train.paths else f"{neighbour}",
                "class": "" if train.labels is None else data.classes[int(train.labels[neighbour])],
                "cosine": round(cosine, 4),
                "broken": "",
            }
            for row in made
            for rank, (neighbour, cosine) in enumerate(zip(row.neighbours, row.cosines, strict=True), 1)
        ]
        empty: TableRow = dict.fromkeys(("rank", "neighbour", "class", "cosine"), "")
        table += [{"image": name, **empty, "broken": why} for name, why in broken.items()]
        if context.folder is not None and made:
            title = f"{context.title}: the nearest of {len(train):,} training images of {data.name}"
            draw_neighbours(context.folder / "neighbours.png", shown, train, made, data.classes, title)
        values = {"images": float(len(made)), "broken": float(len(broken))}
        if made and shown.labels is not None and train.labels is not None:
            agree = train.labels.cpu()[rows] == shown.labels.cpu()[:, None]
            values["agreement"] = 100 * agree.float().mean().item()
        return EvaluationResult(values, tables={"neighbours": table})

    def _sampled(
        self, context: EvaluationContext
    ) -> tuple[Images, Float[Tensor, "M F"], list[str], Int[Tensor, " M"] | None]:
        """A sample of images, their features and names, and their indices if they are training images."""
        which = "train" if context.data.test is None else "test"
        images, x = context.split(which)
        chosen = torch.randperm(len(images), generator=generator(self.seed, "neighbours"))[: self.sample].sort().values
        names = [f"{which} {row}" if images.paths is None else images.paths[row] for row in chosen.tolist()]
        return images.subset(chosen), x[chosen.to(x.device)], names, chosen if which == "train" else None


def draw_neighbours(
    path: Path, images: Images, train: Images, rows: Sequence[NeighbourRow], classes: Sequence[str], title: str
) -> None:
    """Draw a row for each of at most MAX_ROWS images: the image, and after a gap its nearest training images.

    Below each neighbour stand its class, after a green ✓ if it is that of the image and else a red ✗, and the cosine; below
    the image its name and its class. Neighbours of another class have a red frame. `rows`, at least one, are about `images`.
    """
    shown = rows[:MAX_ROWS]
    columns = min(MAX_COLUMNS, max(len(row.neighbours) for row in shown))
    own = squares(images, [row.image for row in shown])
    neighbours = squares(train, sorted({image for row in shown for image in row.neighbours[:columns]}))
    side = max(picture.width for picture in (*own.values(), *neighbours.values()))
    wide, high = side + GAP, side + 2 * LINE_PX + GAP
    start = GAP + wide + 3 * GAP  # a wider gap sets the image apart from its neighbours
    face, bold, small = font("DejaVuSans"), font("DejaVuSans-Bold"), font("DejaVuSans", CAPTION)
    explanation = "left: the image; then its nearest, with the cosine between their features"
    if any(row.label >= 0 for row in shown) and train.labels is not None:
        explanation += "; ✓ of the same class, ✗ and red frame: of another"
    if len(rows) > len(shown):
        explanation = f"{len(shown)} of {len(rows):,} images; {explanation}"
    sheet, draw = titled_sheet(title, explanation, start + columns * wide, len(shown) * high + GAP)
    for number, row in enumerate(shown):
        top = HEADING_PX + number * high
        below, lowest = top + side + 2, top + side + 2 + LINE_PX
        sheet.paste(own[row.image], (GAP, top))
        draw.text((GAP, below), fitted(Path(row.name).name, small, wide + GAP, keep_end=True), GREY, small)
        if row.label >= 0:
            draw.text((GAP, lowest), fitted(classes[row.label], bold, wide), "black", bold)
        for place, (image, cosine) in enumerate(zip(row.neighbours[:columns], row.cosines, strict=False)):
            left = start + place * wide
            sheet.paste(neighbours[image], (left, top))
            draw.text((left, below), f"cos {cosine:.3f}", GREY, face)
            if train.labels is not None:
                label = int(train.labels[image])
                mark, colour = ("", "black") if row.label < 0 else ("✓ ", GREEN) if row.label == label else ("✗ ", RED)
                draw.text((left, lowest), fitted(f"{mark}{classes[label]}", face, side), colour, face)
                if colour == RED:
                    draw_frame(draw, left, top, side, side)
    save_sheet(sheet, path)
