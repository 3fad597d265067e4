"""What is on pictures of one's own: the classes of the run by its linear probe, and how unlike its images they are.

Shapes: n pictures, M test images, N bank, F features.
"""

import json
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.features import Features
from twoviews.files import write_atomic
from twoviews.protocols.knn import neighbours
from twoviews.protocols.linear import Linear
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.protocols.user_images import embed_user_images, grey_notes, image_paths
from twoviews.ranges import Count, Index, NotNegative, Range

NEAREST = 10  # bank images that a distance is the mean of
FAR = 99.0  # percentile of the test images' distances from which on a picture is unlike them


@torch.no_grad()
def distances(x: Float[Tensor, "n F"], bank: Features) -> Float[Tensor, " n"]:
    """1 - cosine, in [0, 2], to the `NEAREST` nearest bank images, on average.

    How far images are from the training images' features tells those of another kind, as in Sun et al.,
    "Out-of-Distribution Detection with Deep Nearest Neighbors", arXiv:2204.06507, who take the distance to the k-th.
    """
    found = [1 - cosines.mean(1) for _, cosines, _ in neighbours(x, bank, NEAREST)]
    return torch.cat([x.new_empty(0), *found])


def percentiles(distance: Float[Tensor, " n"], test: Float[Tensor, " M"]) -> Float[Tensor, " n"]:
    """Share of the test images that are nearer to the bank, in percent."""
    return 100 * torch.searchsorted(test.sort().values, distance).float() / len(test)


class Predict(Protocol):
    """Class names and probabilities of decoded pictures; writes predictions.json.

    Probabilities are those of the linear probe at the temperature that suits memory images which it was not fitted to. They
    hold for pictures like the data's; of others the distance from the memory images tells.

    Args:
        images: a picture file, a folder of them, or a pattern.
        weight_decays: of the linear probe, as in `Linear`.
        held_out: share of the memory images that chooses the weight decay and the temperature.
        iterations: as in `Linear`.
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
        """That colours are lost, or that nothing can be held out, if so."""
        return [*grey_notes(self.images, data), *self.linear.notes(data)]

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """A row for each picture; a file that is no sound picture has what is wrong with it in place of a class.

        The values: `images`, `broken` of them, `far` of them, which are farther from the bank than `FAR` percent of the test
        images, and the `temperature` of the probabilities.

        Raises:
            BadInput: there are no such pictures, or no labelled images to learn the classes from.
        """
        paths = image_paths(self.images)
        classes = context.data.classes
        if context.data.memory is None:
            raise BadInput(f"{context.data.name} has no labelled images, so there are no classes to predict.")
        decoded = embed_user_images(paths, context)
        probe, temperature = self.linear.calibrated(context)
        probabilities = (probe(decoded.x) / temperature).softmax(1)
        distance, test = distances(decoded.x, context.memory), distances(context.test.x, context.memory)
        unlike = percentiles(distance, test)
        rows, full = [], []
        columns = (decoded.positions, probabilities, distance, unlike)
        found = {row: rest for row, *rest in zip(*(column.tolist() for column in columns), strict=True)}
        for row, path in enumerate(paths):
            shares, far, percentile = found.get(row, ((), "", ""))
            shares = sorted(zip(shares, classes, strict=False), reverse=True)
            (first, name), (next_, second) = (*shares, ("", ""), ("", ""))[:2]
            rows.append(
                {
                    "image": path,
                    "class": name,
                    "probability": first,
                    "second": second,
                    "second_probability": next_,
                    "distance": far,
                    "distance_percentile": percentile,
                    "broken": decoded.broken.get(row, ""),
                }
            )
            where = {"distance": far, "distance_percentile": percentile}
            full.append(
                {"image": path, "class": name, "probabilities": {name: share for share, name in shares}, **where}
                if shares
                else {"image": path, "broken": decoded.broken[row]}
            )
        if context.folder is not None:
            content = {
                "linear_probe_on": context.data.name,
                "temperature": temperature,
                "test_images": len(test),
                "predictions": full,
            }
            write_atomic(context.folder / "predictions.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        count = int((unlike >= FAR).sum())
        values = {"images": len(paths), "broken": len(decoded.broken), "far": count, "temperature": temperature}
        return EvaluationResult(
            {name: float(value) for name, value in values.items()},
            tables={"predictions": rows},
            notes=_warning(count, len(unlike), len(test)),
        )


def _warning(far: int, pictures: int, test: int) -> list[str]:
    """The sentence about pictures that are unlike the data's, if there are any."""
    if not far:
        return []
    return [
        f"warning: {far:,} of {pictures:,} picture{'s are' if pictures > 1 else ' is'} farther from the training images than "
        f"{FAR:g} % of the {test:,} test images (column distance_percentile): what they show may be none of the classes, "
        "whatever the probability."
    ]
