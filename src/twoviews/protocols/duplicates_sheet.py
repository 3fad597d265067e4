"""A sheet of near-duplicates, the two images of each pair side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twoviews.data.images import Images
from twoviews.errors import counted
from twoviews.figures import save_sheet
from twoviews.pictures import GAP, GREY, RED, TEXT, fitted, font, squares

MAX_PAIRS, COLUMNS = 40, 4
HEADING_PX, LINE_PX = 66, TEXT + 6  # heights


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are almost the same to an encoder."""

    splits: tuple[str, str]
    first: int  # row of its split
    second: int  # likewise
    cosine: float  # of their features
    exact: bool  # whether their pixels are equal

    @property
    def relation(self) -> str:
        """The split if both are of one, otherwise the two with "_" between them."""
        return self.splits[0] if self.splits[0] == self.splits[1] else "_".join(self.splits)


def shown_pairs(pairs: Sequence[DuplicatePair]) -> list[DuplicatePair]:
    """All pairs or, of more than MAX_PAIRS, the most similar and the least similar half as many."""
    half = MAX_PAIRS // 2
    return [*pairs] if len(pairs) <= MAX_PAIRS else [*pairs[:half], *pairs[-half:]]


def draw_duplicates(
    path: Path, images: Mapping[str, Images], pairs: Sequence[DuplicatePair], classes: Sequence[str], threshold: float
) -> None:
    """Draw the pairs of `shown_pairs` with their cosine, splits and classes; pairs of two classes have a red frame.

    Args:
        path: of the picture.
        images: of each split.
        pairs: at least one, the most similar first.
        classes: names by label.
        threshold: of the cosine.
    """
    from PIL import Image, ImageDraw

    shown = shown_pairs(pairs)
    tiles = {}
    for split, its_images in images.items():
        places = [zip(pair.splits, (pair.first, pair.second), strict=True) for pair in shown]
        rows = sorted({row for place in places for name, row in place if name == split})
        tiles[split] = squares(its_images, rows) if rows else {}
    side = max(tile.width for of_split in tiles.values() for tile in of_split.values())
    wide, high = 2 * side + 5 * GAP, side + 3 * LINE_PX + GAP
    face, bold, names = font("DejaVuSans"), font("DejaVuSans-Bold"), [*classes]
    title = f"{counted(len(pairs), 'pair')} with a cosine of at least {threshold:g}"
    explanation = "by cosine; bold: equal pixels; red frame: of two classes"
    if len(shown) < len(pairs):
        explanation = (
            f"the {len(shown) // 2} most similar, then the {len(shown) // 2} nearest to the threshold; {explanation}"
        )
    columns = min(COLUMNS, len(shown))
    text_width = max(bold.getlength(title), face.getlength(explanation))
    width = max(columns * wide + 2 * GAP, round(text_width) + 2 * GAP)
    sheet = Image.new("RGB", (width, HEADING_PX + -(-len(shown) // columns) * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, "black", bold)
    draw.text((GAP, 34), explanation, GREY, face)
    for number, pair in enumerate(shown):
        left, top = GAP + number % columns * wide, HEADING_PX + number // columns * high
        labels = []
        for place, (split, row) in enumerate(zip(pair.splits, (pair.first, pair.second), strict=True)):
            x, of_split = left + place * (side + GAP), images[split]
            sheet.paste(tiles[split][row], (x, top))
            name = Path(of_split.paths[row]).name if of_split.paths else f"{row}"
            draw.text((x, top + side + 2), fitted(f"{name} ({split})", face, side), GREY, face)
            labels.append(-1 if of_split.labels is None else int(of_split.labels[row]))
            if labels[-1] >= 0:
                draw.text((x, top + side + 2 + LINE_PX), fitted(names[labels[-1]], face, side), "black", face)
        line = (left, top + side + 2 + (2 * LINE_PX if max(labels) >= 0 else LINE_PX))
        draw.text(line, f"{pair.cosine:.4f}", "black" if pair.exact else GREY, bold if pair.exact else face)
        if min(labels) >= 0 and labels[0] != labels[1]:
            draw.rectangle((left - 3, top - 3, left + 2 * side + GAP + 2, top + side + 2), outline=RED, width=3)
    save_sheet(sheet, path)
