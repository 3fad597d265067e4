"""The picture sheet of nearest neighbours: made to see at a glance what an encoder takes for alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twoviews.data.images import Images
from twoviews.pictures import GAP, GREY, RED, TEXT, fitted, font, squares

ROWS, COLUMNS = 20, 10  # images and neighbours shown at most
HEAD, LINE = 66, TEXT + 6  # px: heights of the heading and of a line of text


@dataclass(frozen=True)
class Row:
    """An image and the training images nearest to it."""

    name: str  # a path, or what it is called
    image: int
    label: int  # -1: none
    neighbours: list[int]  # training images, the nearest first
    cosines: list[float]  # of the angles to them


def draw_neighbours(
    path: Path, images: Images, train: Images, rows: Sequence[Row], classes: Sequence[str], title: str
) -> None:
    """A row for each of at most ROWS images: the image, and after a gap the training images most like it.

    Below each stand its class, where it has one, and the cosine. Neighbours of another class have a red frame.

    Args:
        path: of the PNG.
        images: what the rows are about.
        train: what the neighbours are among.
        rows: at least one.
        classes: names by label.
        title: first line of the heading.
    """
    from PIL import Image, ImageDraw

    shown = rows[:ROWS]
    columns = min(COLUMNS, max(len(row.neighbours) for row in shown))
    own = squares(images, [row.image for row in shown])
    found = squares(train, sorted({one for row in shown for one in row.neighbours[:columns]}))
    side = max(picture.width for picture in (*own.values(), *found.values()))
    wide, high = side + GAP, side + 2 * LINE + GAP
    start = GAP + wide + 3 * GAP  # a wider gap sets the image apart from its neighbours
    face, bold = font("DejaVuSans"), font("DejaVuSans-Bold")
    explanation = "left: the image; then its nearest, with the cosine between their features"
    if any(row.label >= 0 for row in shown) and train.labels is not None:
        explanation += "; red frame: of another class"
    if len(rows) > len(shown):
        explanation = f"{len(shown)} of {len(rows):,} images; {explanation}"
    room = max(start + columns * wide, round(max(bold.getlength(title), face.getlength(explanation))) + 2 * GAP)
    sheet = Image.new("RGB", (room, HEAD + len(shown) * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, "black", bold)
    draw.text((GAP, 34), explanation, GREY, face)
    for number, row in enumerate(shown):
        top = HEAD + number * high
        sheet.paste(own[row.image], (GAP, top))
        draw.text((GAP, top + side + 2), fitted(Path(row.name).name, face, wide), GREY, face)
        if row.label >= 0:
            draw.text((GAP, top + side + 2 + LINE), fitted(classes[row.label], bold, wide), "black", bold)
        for place, (one, cosine) in enumerate(zip(row.neighbours[:columns], row.cosines, strict=False)):
            left = start + place * wide
            sheet.paste(found[one], (left, top))
            label = -1 if train.labels is None else int(train.labels[one])
            draw.text((left, top + side + 2), f"{cosine:.3f}", GREY, face)
            if label >= 0:
                draw.text((left, top + side + 2 + LINE), fitted(classes[label], face, side), "black", face)
                if row.label not in (-1, label):
                    draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=RED, width=3)
    new = path.with_name(path.name + ".new")
    sheet.save(new, format="PNG")
    new.replace(path)
