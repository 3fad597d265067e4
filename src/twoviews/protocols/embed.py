"""Features to take elsewhere: embeddings.npz of a split, or of pictures of one's own.

Shapes: N images, F features.
"""

from typing import Literal

import numpy as np
import torch

from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.user_images import embed_user_images, grey_notes, image_paths
from twoviews.ranges import Index


class Embed(Protocol):
    """Writes embeddings.npz: features [N, F] float32, labels [N] (-1: none), paths [N] ("": no file), classes.

    Args:
        split: train, memory or test; the last two are labelled, where there are any.
        images: in place of the split a picture file, a folder of them, or a pattern.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    needs_labels = False

    def __init__(self, split: Literal["train", "memory", "test"], images: str | None, every_epochs: Index):
        self.split, self.images, self.every_epochs = split, images, every_epochs

    def notes(self, data: ImageData) -> list[str]:
        """That colours are lost, if they are."""
        return grey_notes(self.images, data)

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """Numbers of images and features; broken files have no row in embeddings.npz and one each in the table.

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
            labels = torch.full((len(x),), -1) if images.labels is None else images.labels.long().cpu()
            path = context.folder / "embeddings.npz"
            new = path.with_name(path.name + ".new")
            with new.open("wb") as file:
                np.savez(
                    file,
                    features=x.cpu().numpy(),
                    labels=labels.numpy(),
                    paths=np.array(images.paths or [""] * len(x)),
                    classes=np.array(context.data.classes, dtype=str),
                )
            new.replace(path)
        return EvaluationResult({"images": float(len(x)), "features": float(x.shape[1])}, tables=tables)
