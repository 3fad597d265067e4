"""What is on pictures of one's own: the classes of the run by its linear probe.

Shapes: n pictures, C classes.
"""

import json
from collections.abc import Sequence
from typing import Annotated

from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.evaluation.given import embed_given, made_grey, pictures
from twoviews.features import Judged
from twoviews.protocols.linear import Linear
from twoviews.protocols.protocol import Protocol, Verdict
from twoviews.ranges import Count, Index, NotNegative, Range
from twoviews.tracking.state import replace


class Predict(Protocol):
    """Class names and probabilities of given pictures; writes predictions.json.

    Args:
        images: a picture file, a folder of them, or a pattern.
        weight_decays: of the linear probe, as in `Linear`.
        held_out: likewise.
        iterations: likewise.
        every_epochs: how often it is done in training; 0 is at the end only.
    """

    def __init__(
        self,
        images: str | None,
        weight_decays: Sequence[NotNegative],
        held_out: Annotated[float, Range(above=0, below=1, usual="0.1")],
        iterations: Count,
        every_epochs: Index,
    ):
        self.images, self.every_epochs = images, every_epochs
        self.linear = Linear(weight_decays, held_out, iterations, every_epochs)

    def notes(self, data: ImageData) -> list[str]:
        """That colours are lost, if they are."""
        return made_grey(self.images, data)

    def __call__(self, judged: Judged) -> Verdict:
        """A row for each picture; a file that is no sound picture has what is wrong with it in place of a class.

        Raises:
            BadInput: there are no such pictures, or no labelled images to learn the classes from.
        """
        paths = pictures(self.images)
        classes = judged.data.classes
        if judged.data.memory is None:
            raise BadInput(f"{judged.data.name} has no labelled images, so there are no classes to predict.")
        given = embed_given(paths, judged)
        probe, _ = self.linear.probe(judged)
        probabilities = probe(given.x).softmax(1).cpu()
        found = dict(zip(given.rows.tolist(), probabilities.tolist(), strict=True))
        rows, full = [], []
        for row, path in enumerate(paths):
            shares = sorted(zip(found.get(row, ()), classes, strict=False), reverse=True)
            (first, name), (next_, second) = (*shares, ("", ""), ("", ""))[:2]
            rows.append(
                {
                    "image": path,
                    "class": name,
                    "probability": first,
                    "second": second,
                    "second_probability": next_,
                    "broken": given.broken.get(row, ""),
                }
            )
            ranked = {name: share for share, name in shares}
            full.append(
                {"image": path, "class": name, "probabilities": ranked}
                if shares
                else {"image": path, "broken": given.broken[row]}
            )
        if judged.folder is not None:
            content = {"linear_probe_on": judged.data.name, "predictions": full}
            replace(judged.folder / "predictions.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return Verdict({"images": float(len(paths)), "broken": float(len(given.broken))}, tables={"predictions": rows})
