"""Near-duplicates: pairs of images whose features are almost the same, within each split and across them.

Test images that are in the training images as well make accuracies too high: Barz and Denzler, "Do We Train on Test Data?
Purging CIFAR of Near-Duplicates", arXiv:1902.00423. What counts as near depends on the encoder; the sheet shows it.
Shapes: N images of all splits, F features, P pairs.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.images import Images
from twoviews.errors import counted
from twoviews.figures import save_sheet
from twoviews.pictures import GAP, GREY, RED, TEXT, fitted, font, squares
from twoviews.protocols.neighbours import CAPTION, nearest_rows
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.ranges import Count, Index, Range

MAX_PAIRS, COLUMNS = 40, 4  # of the sheet
ROWS_SHOWN = 10  # of the table, whose rows are long
HEADING_PX, LINE_PX = 66, TEXT + 6  # heights
EXACT_COSINE = 0.999  # equal pixels have equal features but for rounding, so only pairs above it are compared by pixels


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


@dataclass(frozen=True)
class SplitImages:
    """Images of a split that are compared."""

    name: str
    images: Images  # the whole split
    rows: Int[Tensor, " n"]  # which of them


def digests(images: Images, rows: Int[Tensor, " n"]) -> list[bytes]:
    """A digest of the pixels of each of these images."""
    return [
        hashlib.blake2b(canvas.numpy().tobytes(), digest_size=16).digest()
        for canvases, _, _ in images.batches(256, rows)
        for canvas in canvases.cpu()
    ]


def _identities(images: Images) -> list[tuple[str | bytes, int]]:
    """For each image what tells it from the others: its path or, without files, its pixels and how often they came before."""
    if images.paths is not None:
        return [(path, 0) for path in images.paths]
    seen: Counter[bytes] = Counter()
    identities = []
    for digest in digests(images, torch.arange(len(images))):
        identities.append((digest, seen[digest]))
        seen[digest] += 1
    return identities


def compared_splits(context: EvaluationContext) -> tuple[list[SplitImages], int]:
    """The splits that there are, and how many memory images were left out because they are training images."""
    data = context.data
    splits = [SplitImages("train", data.train, torch.arange(len(data.train)))]
    shared = 0
    if data.memory is data.train:
        shared = len(data.train)
    elif data.memory is not None:
        training = {*_identities(data.train)}
        rows = [row for row, identity in enumerate(_identities(data.memory)) if identity not in training]
        shared = len(data.memory) - len(rows)
        splits += [SplitImages("memory", data.memory, torch.tensor(rows))] if rows else []
    if data.test is not None:
        splits.append(SplitImages("test", data.test, torch.arange(len(data.test))))
    return splits, shared


@dataclass
class Duplicates(Protocol):
    """A table of pairs of images whose features have a cosine of at least a threshold, and duplicates.png, a sheet of some.

    Memory images that are training images, as usual, are compared as training images only.

    Args:
        threshold: of the cosine.
        k: of each image the k most similar others are compared.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    needs_labels = False

    threshold: Annotated[float, Range(above=0, below=1, usual="0.9 to 0.99")]
    k: Annotated[Count, Range(at_most=1000)]
    every_epochs: Index

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Numbers of pairs: `pairs` of all, `exact` of these with equal pixels, and <split> within and <split>_<other> across.

        `test_duplicated` is the share of test images, in percent, with a near-duplicate in train or memory.
        """
        splits, shared = compared_splits(context)
        features = {split.name: context.split(split.name)[1] for split in splits}
        x = torch.cat([features[split.name][split.rows.to(context.device)] for split in splits])
        first, second, cosines, full = self._pairs(x)
        pairs = _described(splits, first, second, cosines)
        names = [split.name for split in splits]
        relations = [*names, *map("_".join, itertools.combinations(names, 2))]
        counts = Counter(pair.relation for pair in pairs)
        values = {"pairs": len(pairs), "exact": sum(pair.exact for pair in pairs)}
        values |= {relation: counts[relation] for relation in relations}
        values = {name: float(value) for name, value in values.items()}
        if context.data.test is not None:
            leaked = {pair.second for pair in pairs if pair.splits[1] == "test" != pair.splits[0]}
            values["test_duplicated"] = 100 * len(leaked) / len(context.data.test)
        if context.folder is not None and pairs:
            images = {split.name: split.images for split in splits}
            draw_duplicates(context.folder / "duplicates.png", images, pairs, context.data.classes, self.threshold)
        tables = {"duplicates": [_row(pair, context) for pair in pairs]}
        notes = self._notes(len(x), shared, full)
        if near := [row for row, pair in zip(tables["duplicates"], pairs, strict=True) if not pair.exact]:
            notes.append(self._on_threshold(near))
        return EvaluationResult(values, tables=tables, rows_shown=ROWS_SHOWN, notes=notes)

    def _pairs(self, x: Float[Tensor, "N F"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Float[Tensor, " P"], int]:
        """Both rows of each pair, the smaller first, and their cosine, the largest first; how many rows have k others."""
        if len(x) < 2:
            return torch.empty(0).long(), torch.empty(0).long(), torch.empty(0), 0
        cosines, rows = nearest_rows(x, x, self.k, torch.arange(len(x), device=x.device))
        near = cosines >= self.threshold
        query, place = near.nonzero().T
        pairs = torch.stack([query, rows[query, place]]).sort(dim=0).values
        unique, inverse = pairs.unique(dim=1, return_inverse=True)
        values = torch.zeros(unique.shape[1]).scatter_reduce_(0, inverse, cosines[query, place], "amax")
        order = values.argsort(descending=True, stable=True)
        full = int(near.all(1).sum()) if self.k < len(x) - 1 else 0
        return unique[0][order], unique[1][order], values[order], full

    def _on_threshold(self, near: list[TableRow]) -> str:
        """How to choose the threshold, by pairs that are not equal pixel by pixel."""
        named = [(row["class"], row["other_class"]) for row in near]
        mixed = sum("" not in pair and pair[0] != pair[1] for pair in named)
        of_two = f", {mixed:,} of them of two classes, which copies rarely are" if mixed else ""
        return (
            f"{counted(len(near), 'pair')} by cosine alone{of_two}: to a weak encoder images that are merely alike are near, "
            f"too. If the last pairs in duplicates.png are no copies, raise threshold= (now {self.threshold:g}) or use another "
            "encoder."
        )

    def _notes(self, images: int, shared: int, full: int) -> list[str]:
        notes = []
        if shared:
            notes.append(f"{shared:,} memory images are training images, and are compared as those.")
        if full:
            notes.append(
                f"{full:,} of {images:,} images have {self.k} near-duplicates or more, of which the {self.k} nearest are listed; "
                "raise threshold= if these are only similar, k= if they are copies."
            )
        return notes


def _described(
    splits: Sequence[SplitImages], first: Int[Tensor, " P"], second: Int[Tensor, " P"], cosines: Float[Tensor, " P"]
) -> list[DuplicatePair]:
    """Pairs of rows of all splits as pairs of images of a split each; those with equal pixels are marked."""
    names = [split.name for split in splits for _ in range(len(split.rows))]
    rows = torch.cat([split.rows for split in splits]).tolist()
    offset, pixels = 0, {}
    likely = cosines >= EXACT_COSINE
    candidates = torch.cat([first[likely], second[likely]]).unique()
    for split in splits:
        mine = candidates[(candidates >= offset) & (candidates < offset + len(split.rows))]
        pixels |= dict(zip(mine.tolist(), digests(split.images, split.rows[mine - offset]), strict=True))
        offset += len(split.rows)
    return [
        DuplicatePair(
            splits=(names[left], names[right]),
            first=rows[left],
            second=rows[right],
            cosine=cosine,
            exact=left in pixels and pixels[left] == pixels.get(right),
        )
        for left, right, cosine in zip(first.tolist(), second.tolist(), cosines.tolist(), strict=True)
    ]


def _row(pair: DuplicatePair, context: EvaluationContext) -> TableRow:
    row: TableRow = {"cosine": round(pair.cosine, 4), "exact": "yes" if pair.exact else ""}
    for prefix, split, number in (("", pair.splits[0], pair.first), ("other_", pair.splits[1], pair.second)):
        images: Images = getattr(context.data, split)
        row[f"{prefix}split"] = split
        row[f"{prefix}image"] = images.paths[number] if images.paths else f"{number}"
        row[f"{prefix}class"] = "" if images.labels is None else context.data.classes[int(images.labels[number])]
    return row


def shown_pairs(pairs: Sequence[DuplicatePair]) -> list[DuplicatePair]:
    """All pairs or, of more than MAX_PAIRS, the most similar and the least similar half as many."""
    half = MAX_PAIRS // 2
    return [*pairs] if len(pairs) <= MAX_PAIRS else [*pairs[:half], *pairs[-half:]]


def draw_duplicates(
    path: Path, images: Mapping[str, Images], pairs: Sequence[DuplicatePair], classes: Sequence[str], threshold: float
) -> None:
    """Draw the pairs of `shown_pairs` with names, classes (without labels: folders), cosine and splits.

    Pairs of two classes have a red frame.

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
    face, bold, small, names = font("DejaVuSans"), font("DejaVuSans-Bold"), font("DejaVuSans", CAPTION), [*classes]
    title = f"{counted(len(pairs), 'pair')} with a cosine of at least {threshold:g}"
    several_folders = len({path.rpartition("/")[0] for its in images.values() for path in its.paths or ()}) > 1
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
        labels, captioned = [], False
        for place, (split, row) in enumerate(zip(pair.splits, (pair.first, pair.second), strict=True)):
            x, of_split = left + place * (side + GAP), images[split]
            sheet.paste(tiles[split][row], (x, top))
            name = Path(of_split.paths[row]).name if of_split.paths else f"{row}"
            draw.text((x, top + side + 2), fitted(name, small, side, keep_end=True), GREY, small)
            labels.append(-1 if of_split.labels is None else int(of_split.labels[row]))
            # Of an image without a label, the folder tells more than its name.
            of_folder = Path(of_split.paths[row]).parent.name if of_split.paths and several_folders else ""
            if caption := names[labels[-1]] if labels[-1] >= 0 else of_folder:
                draw.text((x, top + side + 2 + LINE_PX), fitted(caption, small, side), "black", small)
                captioned = True
        line = (left, top + side + 2 + (2 * LINE_PX if captioned else LINE_PX))
        cosine = f"{pair.cosine:.4f}  {', '.join(dict.fromkeys(pair.splits))}"
        draw.text(line, cosine, "black" if pair.exact else GREY, bold if pair.exact else face)
        if min(labels) >= 0 and labels[0] != labels[1]:
            draw.rectangle((left - 3, top - 3, left + 2 * side + GAP + 2, top + side + 2), outline=RED, width=3)
    save_sheet(sheet, path)
