"""The contract of a protocol: one way of judging an encoder, the same in train.py and in evaluate.py.

Shapes: M test images, C classes.
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from twoviews.data.images import ImageData
from twoviews.features import Judged


@dataclass(frozen=True)
class Verdict:
    """What a protocol finds."""

    values: dict[str, float]  # numbers by name, accuracies in percent; the one named top1 is the headline
    probabilities: Float[Tensor, "M C"] | None = None  # of the test images, in their order; None: nothing is classified
    tables: dict[str, list[dict[str, float | int | str]]] = field(default_factory=dict)  # rows by name, equal keys


class Protocol:
    """Abstract: an encoder with labelled images in, a verdict out.

    `every_epochs` says how often training measures it in passing; 0 is at the end only.
    """

    every_epochs: int
    needs_labels: bool = True  # of the data; those that do not are measured where there are none, too

    def notes(self, data: ImageData) -> list[str]:
        """Sentences that the user should read before these images are judged by it."""
        return []

    def __call__(self, judged: Judged) -> Verdict:
        """The verdict; the encoder and its mode are left as they were."""
        raise NotImplementedError
