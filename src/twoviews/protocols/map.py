"""Where images lie to an encoder: its features in the plane."""

from typing import Literal

from twoviews.evaluation.pictures import draw_map
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.ranges import Index, Seed


class Map(Protocol):
    """Draws map.png: images of a split in the plane by t-SNE, coloured by class where there are classes.

    Args:
        split: train, memory or test; without labelled images the first.
        seed: of which images are shown, and of the map.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    needs_labels = False

    def __init__(self, split: Literal["train", "memory", "test"], seed: Seed, every_epochs: Index):
        self.split, self.seed, self.every_epochs = split, seed, every_epochs

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """The number of images that were to choose from."""
        data = context.data
        which = self.split if getattr(data, self.split) is not None else "train"
        images, x = context.split(which)
        if context.folder is not None:
            title = f"features of {data.name}, {which}"
            draw_map(context.folder / "map.png", x, images.labels, data.classes, title, self.seed)
        return EvaluationResult({"images": float(len(x))})
