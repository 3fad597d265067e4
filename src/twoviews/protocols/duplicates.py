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

from twoviews.data.images import ImageData, Images
from twoviews.errors import counted
from twoviews.figures import save_sheet
from twoviews.pictures import GAP, GREY, HEADING_PX, LINE_PX, draw_frame, fitted, font, squares, titled_sheet
from twoviews.protocols.neighbours import CAPTION, nearest_rows
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.ranges import Count, NonNegativeInt, Range

MAX_PAIRS, COLUMNS = 40, 4  # of the sheet
ROWS_SHOWN = 10  # of the table, whose rows are long
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


def compared_images(data: ImageData) -> dict[str, Int[Tensor, " n"]]:
    """The rows of each split that are compared: all but memory images that are training images."""
    rows = {"train": torch.arange(len(data.train))}
    if data.memory is not None and data.memory is not data.train:
        training = {*_identities(data.train)}
        own = [row for row, identity in enumerate(_identities(data.memory)) if identity not in training]
        rows |= {"memory": torch.tensor(own)} if own else {}
    return rows | ({"test": torch.arange(len(data.test))} if data.test is not None else {})


@dataclass
class Duplicates(Protocol):
    """A table of pairs of images whose features have a cosine of at least a threshold, and duplicates.png, a sheet of some.

    Memory images that are training images, as usual, are compared as training images only.

    Args:
        threshold: of the cosine.
        k: of each image the k most similar others are compared.
    """

    needs_labels = False

    threshold: Annotated[float, Range(above=0, below=1, usual="0.9 to 0.99")]
    k: Annotated[Count, Range(at_most=1000)]
    every_epochs: NonNegativeInt

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Numbers of pairs: `pairs` of all, `exact` of these with equal pixels, and <split> within and <split>_<other> across.

        `test_duplicated` is the share of test images, in percent, with a near-duplicate in train or memory.
        """
        data = context.data
        compared = compared_images(data)
        x = torch.cat([context.split(split)[1][rows.to(context.device)] for split, rows in compared.items()])
        places = [(split, row) for split, rows in compared.items() for row in rows.tolist()]
        first, second, cosines, full = self._pairs(x)
        pairs = _described(data, places, first, second, cosines)
        counts = Counter(pair.relation for pair in pairs)
        relations = [*compared, *map("_".join, itertools.combinations(compared, 2))]
        values = {"pairs": float(len(pairs)), "exact": float(sum(pair.exact for pair in pairs))}
        values |= {relation: float(counts[relation]) for relation in relations}
        if data.test is not None:
            leaked = {pair.second for pair in pairs if pair.splits[1] == "test" != pair.splits[0]}
            values["test_duplicated"] = 100 * len(leaked) / len(data.test)
        if context.folder is not None and pairs:
            images = {split: context.images(split) for split in compared}
            draw_duplicates(context.folder / "duplicates.png", images, pairs, data.classes, self.threshold)
        table = [_row(pair, data) for pair in pairs]
        shared = len(data.memory or ()) - len(compared.get("memory", ()))
        notes = self._notes(len(x), shared, full, [row for row in table if not row["exact"]])
        return EvaluationResult(values, tables={"duplicates": table}, rows_shown=ROWS_SHOWN, notes=notes)

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

    def _notes(self, images: int, shared: int, full: int, near: list[TableRow]) -> list[str]:
        """What was left out, and how to choose the threshold by pairs that are not equal pixel by pixel."""
        notes = []
        if shared:
            notes.append(f"{shared:,} memory images are training images, and are compared as those.")
        if full:
            notes.append(
                f"{full:,} of {images:,} images have {self.k} near-duplicates or more, of which the {self.k} nearest are listed; "
                "raise threshold= if these are only similar, k= if they are copies."
            )
        if near:
            named = [(row["class"], row["other_class"]) for row in near]
            mixed = sum("" not in pair and pair[0] != pair[1] for pair in named)
            of_two = f", {mixed:,} of them of two classes, which copies rarely are" if mixed else ""
            notes.append(
                f"{counted(len(near), 'pair')} by cosine alone{of_two}: to a weak encoder images that are merely alike are near, "
                f"too. If the last pairs in duplicates.png are no copies, raise threshold= (now {self.threshold:g}) or use "
                "another encoder."
            )
        return notes


def _described(
    data: ImageData,
    places: Sequence[tuple[str, int]],
    first: Int[Tensor, " P"],
    second: Int[Tensor, " P"],
    cosines: Float[Tensor, " P"],
) -> list[DuplicatePair]:
    """Pairs of features as pairs of images, of which `places` has split and row; those with equal pixels are marked."""
    likely = cosines >= EXACT_COSINE
    candidates = [places[index] for index in torch.cat([first[likely], second[likely]]).unique().tolist()]
    pixels: dict[tuple[str, int], bytes] = {}
    for split in {split for split, _ in candidates}:
        own = [place for place in candidates if place[0] == split]
        rows = torch.tensor([row for _, row in own])
        pixels |= dict(zip(own, digests(getattr(data, split), rows), strict=True))
    return [
        DuplicatePair(
            splits=(one[0], other[0]),
            first=one[1],
            second=other[1],
            cosine=cosine,
            exact=one in pixels and pixels[one] == pixels.get(other),
        )
        for left, right, cosine in zip(first.tolist(), second.tolist(), cosines.tolist(), strict=True)
        for one, other in [(places[left], places[right])]
    ]


def _row(pair: DuplicatePair, data: ImageData) -> TableRow:
    row: TableRow = {"cosine": round(pair.cosine, 4), "exact": "yes" if pair.exact else ""}
    for prefix, split, number in (("", pair.splits[0], pair.first), ("other_", pair.splits[1], pair.second)):
        images: Images = getattr(data, split)
        row[f"{prefix}split"] = split
        row[f"{prefix}image"] = images.paths[number] if images.paths else f"{number}"
        row[f"{prefix}class"] = "" if images.labels is None else data.classes[int(images.labels[number])]
    return row


def shown_pairs(pairs: Sequence[DuplicatePair]) -> list[DuplicatePair]:
    """All pairs or, of more than MAX_PAIRS, the most similar and the least similar half as many."""
    half = MAX_PAIRS // 2
    return [*pairs] if len(pairs) <= MAX_PAIRS else [*pairs[:half], *pairs[-half:]]


def draw_duplicates(
    path: Path, images: Mapping[str, Images], pairs: Sequence[DuplicatePair], classes: Sequence[str], threshold: float
) -> None:
    """Draw `shown_pairs` of at least one pair with names, classes (without labels: folders), cosine and splits.

    Pairs of two classes have a red frame. `images` are those of each split, `classes` their names by label.
    """
    shown, rows = shown_pairs(pairs), {split: set() for split in images}
    for pair in shown:
        rows[pair.splits[0]].add(pair.first)
        rows[pair.splits[1]].add(pair.second)
    tiles = {split: squares(images[split], sorted(own)) for split, own in rows.items() if own}
    side = max(tile.width for of_split in tiles.values() for tile in of_split.values())
    wide, high = 2 * side + 5 * GAP, side + 3 * LINE_PX + GAP
    face, bold, small = font("DejaVuSans"), font("DejaVuSans-Bold"), font("DejaVuSans", CAPTION)
    title = f"{counted(len(pairs), 'pair')} with a cosine of at least {threshold:g}"
    several_folders = len({path.rpartition("/")[0] for its in images.values() for path in its.paths or ()}) > 1
    explanation, half = "by cosine; bold: equal pixels; red frame: of two classes", len(shown) // 2
    if len(shown) < len(pairs):
        explanation = f"the {half} most similar, then the {half} nearest to the threshold; {explanation}"
    columns = min(COLUMNS, len(shown))
    sheet, draw = titled_sheet(title, explanation, columns * wide + 2 * GAP, -(-len(shown) // columns) * high + GAP)
    for number, pair in enumerate(shown):
        left, top = GAP + number % columns * wide, HEADING_PX + number // columns * high
        below, labels, captioned = top + side + 2, [], False
        for place, (split, row) in enumerate(zip(pair.splits, (pair.first, pair.second), strict=True)):
            x, its = left + place * (side + GAP), images[split]
            sheet.paste(tiles[split][row], (x, top))
            name = Path(its.paths[row]).name if its.paths else f"{row}"
            draw.text((x, below), fitted(name, small, side, keep_end=True), GREY, small)
            # Of an image without a label, the folder tells more than its name.
            caption = Path(its.paths[row]).parent.name if its.paths and several_folders else ""
            if its.labels is not None:
                label = int(its.labels[row])
                labels.append(label)
                caption = classes[label]
            if caption:
                draw.text((x, below + LINE_PX), fitted(caption, small, side), "black", small)
                captioned = True
        cosine = f"{pair.cosine:.4f}  {', '.join(dict.fromkeys(pair.splits))}"
        line = (left, below + (2 if captioned else 1) * LINE_PX)
        draw.text(line, cosine, "black" if pair.exact else GREY, bold if pair.exact else face)
        if len({*labels}) > 1:
            draw_frame(draw, left, top, 2 * side + GAP, side)
    save_sheet(sheet, path)
