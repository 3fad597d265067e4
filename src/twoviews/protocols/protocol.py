"""The contract of a protocol: one way of judging an encoder, the same in train.py and in evaluate.py.

Shapes: M test images, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from twoviews import distributed, process_group
from twoviews.data.images import ImageData
from twoviews.features import Judged


@dataclass(frozen=True)
class Verdict:
    """What a protocol finds."""

    values: dict[str, float]  # numbers by name, accuracies in percent; the one named top1 is the headline
    probabilities: Float[Tensor, "M C"] | None = None  # of the test images, in their order; None: nothing is classified
    tables: dict[str, list[dict[str, float | int | str]]] = field(default_factory=dict)  # rows by name, equal keys
    notes: list[str] = field(default_factory=list)  # sentences that the user should read beside the numbers


class Protocol:
    """Abstract: an encoder with labelled images in, a verdict out.

    `every_epochs` says how often training measures it in passing; 0 is at the end only.
    """

    every_epochs: int
    needs_labels: bool = True  # of the data; those that do not are measured where there are none, too
    together: bool = False  # with several processes all of them call it, and have its verdict; otherwise the first one

    def notes(self, data: ImageData) -> list[str]:
        """Sentences that the user should read before these images are judged by it."""
        return []

    def __call__(self, judged: Judged) -> Verdict:
        """The verdict; the encoder and its mode are left as they were."""
        raise NotImplementedError


def verdicts(protocols: Mapping[str, Protocol], judged: Judged) -> dict[str, Verdict]:
    """What each finds, on process 0; the other processes share the work on the features and have an empty dictionary."""
    if any(one.needs_labels for one in protocols.values()):
        _ = judged.memory, judged.test  # by all, where they are shared
    found = {name: one(judged) for name, one in protocols.items() if one.together}
    if distributed.rank() == 0:
        judged.shared = False  # what the others want beside these is for this process to compute
        found |= {name: one(judged) for name, one in protocols.items() if not one.together}
    process_group.wait_for_first()
    return found if distributed.rank() == 0 else {}
