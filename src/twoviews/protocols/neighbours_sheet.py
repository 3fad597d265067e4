"""A sheet of images, each beside the training images whose features are most similar to its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twoviews.data.images import Images
from twoviews.figures import save_sheet
from twoviews.pictures import GAP, GREEN, GREY, RED, TEXT, fitted, font, squares

MAX_ROWS, MAX_COLUMNS = 20, 10  # images, and neighbours of each
HEADING_PX, LINE_PX = 66, TEXT + 6  # heights


@dataclass(frozen=True)
class NeighbourRow:
    """An image and its nearest training images."""

    name: str  # a path, or what it is called
    image: int
    label: int  # -1: none
    neighbours: list[int]  # training images, the nearest first
    cosines: list[float]  # of the angles to them


def draw_neighbours(
    path: Path, images: Images, train: Images, rows: Sequence[NeighbourRow], classes: Sequence[str], title: str
) -> None:
    """Draw a row for each of at most MAX_ROWS images: the image, and after a gap its nearest training images.

    Below each neighbour stand its class, after a green ✓ if it is that of the image and else a red ✗, and the cosine; below
    the image its name and its class. Neighbours of another class have a red frame.

    Args:
        path: of the picture.
        images: that `rows` are about.
        train: the training images.
        rows: at least one.
        classes: names by label.
        title: first line of the heading.
    """
    from PIL import Image, ImageDraw

    shown = rows[:MAX_ROWS]
    columns = min(MAX_COLUMNS, max(len(row.neighbours) for row in shown))
    own = squares(images, [row.image for row in shown])
    neighbours = squares(train, sorted({image for row in shown for image in row.neighbours[:columns]}))
    side = max(picture.width for picture in (*own.values(), *neighbours.values()))
    wide, high = side + GAP, side + 2 * LINE_PX + GAP
    start = GAP + wide + 3 * GAP  # a wider gap sets the image apart from its neighbours
    face, bold = font("DejaVuSans"), font("DejaVuSans-Bold")
    explanation = "left: the image; then its nearest, with the cosine between their features"
    if any(row.label >= 0 for row in shown) and train.labels is not None:
        explanation += "; ✓ of the same class, ✗ and red frame: of another"
    if len(rows) > len(shown):
        explanation = f"{len(shown)} of {len(rows):,} images; {explanation}"
    width = max(start + columns * wide, round(max(bold.getlength(title), face.getlength(explanation))) + 2 * GAP)
    sheet = Image.new("RGB", (width, HEADING_PX + len(shown) * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, "black", bold)
    draw.text((GAP, 34), explanation, GREY, face)
    for number, row in enumerate(shown):
        top = HEADING_PX + number * high
        sheet.paste(own[row.image], (GAP, top))
        draw.text((GAP, top + side + 2), fitted(Path(row.name).name, face, wide), GREY, face)
        if row.label >= 0:
            draw.text((GAP, top + side + 2 + LINE_PX), fitted(classes[row.label], bold, wide), "black", bold)
        for place, (image, cosine) in enumerate(zip(row.neighbours[:columns], row.cosines, strict=False)):
            left = start + place * wide
            sheet.paste(neighbours[image], (left, top))
            label = -1 if train.labels is None else int(train.labels[image])
            draw.text((left, top + side + 2), f"cos {cosine:.3f}", GREY, face)
            if label >= 0:
                mark, colour = ("", "black") if row.label < 0 else ("✓ ", GREEN) if row.label == label else ("✗ ", RED)
                text = fitted(f"{mark}{classes[label]}", face, side)
                draw.text((left, top + side + 2 + LINE_PX), text, colour, face)
                if colour == RED:
                    draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=RED, width=3)
    save_sheet(sheet, path)
