"""Write features to files for other programs: embeddings.npz, .parquet and .csv of a split, or of the user's own images.

Shapes: N images, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.data.images import ImageData, Images
from twoviews.errors import BadInput, printable
from twoviews.files import open_atomic
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.user_images import check_images, embed_user_images, grey_notes, image_paths
from twoviews.ranges import NonNegativeInt
from twoviews.runtime import format_name

Format = Literal["npz", "parquet", "csv"]


@dataclass
class Embed(Protocol):
    """Writes the features of images, with their paths, labels and class names.

    embeddings.npz holds features [N, F] float32, labels [N] (-1: none), paths [N] ("": no file) and classes, the names by
    label. embeddings.parquet and embeddings.csv hold a row for each image, with the columns path, label, class (empty where
    there are none), feature_0, feature_1, …; bytes of a path that are not UTF-8 are spelt out in them, such as \\udcfc.

    Args:
        split: train, memory or test; the last two are labelled, where there are any.
        images: in place of the split a picture file, a folder of them, or a pattern.
        formats: of the files.
    """

    needs_labels = False

    split: Literal["train", "memory", "test"]
    images: str | None
    formats: Sequence[Format]
    every_epochs: NonNegativeInt

    def __post_init__(self) -> None:
        if self.images is not None:
            check_images(self.images)

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if the encoder takes grey images and these have colours; otherwise none."""
        return grey_notes(self.images, data)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """The values `images` and `features` are their numbers; files that cannot be decoded are in the table `broken`.

        Raises:
            BadInput: there are no such images, or none of them is a sound picture.
        """
        tables = {}
        if self.images is None:
            images, x = context.split(self.split)
        else:
            decoded = embed_user_images(image_paths(self.images), context)
            images, x = decoded.images, decoded.x
            if decoded.broken:
                tables["broken"] = [{"image": decoded.paths[row], "broken": why} for row, why in decoded.broken.items()]
        if not len(x):
            raise BadInput(f"images={self.images}: none of them is a sound picture ({tables['broken'][0]['broken']}).")
        if context.folder is not None:
            for kind in self.formats:
                write = _write_npz if kind == "npz" else _write_table
                write(context.folder / f"embeddings.{kind}", x.cpu(), images, context.data.classes)
        notes = []
        if context.dtype != torch.float32:
            notes = [f"embeddings were computed in {format_name(context.dtype)} and are stored as float32."]
        return EvaluationResult({"images": float(len(x)), "features": float(x.shape[1])}, tables=tables, notes=notes)


def _write_npz(path: Path, x: Float[Tensor, "N F"], images: Images, classes: tuple[str, ...]) -> None:
    labels = torch.full((len(x),), -1) if images.labels is None else images.labels.long().cpu()
    paths = np.array(images.paths or [""] * len(x))
    with open_atomic(path) as file:
        np.savez(file, features=x.numpy(), labels=labels.numpy(), paths=paths, classes=np.array(classes, dtype=str))


def _write_table(path: Path, x: Float[Tensor, "N F"], images: Images, classes: tuple[str, ...]) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    labels = [None] * len(x) if images.labels is None else images.labels.tolist()
    names = [None if label is None else printable(classes[label]) for label in labels]
    columns = {
        "path": pyarrow.array([printable(name) for name in images.paths or [""] * len(x)], pyarrow.string()),
        "label": pyarrow.array(labels, pyarrow.int64()),
        "class": pyarrow.array(names, pyarrow.string()),
        **{f"feature_{number}": column for number, column in enumerate(np.ascontiguousarray(x.numpy().T))},
    }
    table = pyarrow.table(columns)
    with open_atomic(path) as file:
        (pyarrow.parquet.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv)(table, file)
