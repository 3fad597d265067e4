"""Classes of the user's own images by the linear probe of the features, and how different they are from the run's images.

Shapes: n images, M test images, N bank, F features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from twoviews.data.images import ImageData
from twoviews.errors import BadInput, counted
from twoviews.features import Features
from twoviews.files import write_atomic
from twoviews.protocols.knn import neighbours
from twoviews.protocols.linear import Linear, linear_of_run
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.protocols.user_images import check_images, embed_user_images, grey_notes, image_paths
from twoviews.ranges import Count, Index, NotNegative, Range

NEAREST = 10  # bank images whose mean distance is taken
FAR_PERCENTILE = 99.0  # of the distances of test images: from there on an image is far from the bank


@torch.no_grad()
def distances(x: Float[Tensor, "n F"], bank: Features) -> Float[Tensor, " n"]:
    """Mean of 1 - cosine, in [0, 2], to the `NEAREST` most similar bank images.

    Images that are far from the training images are probably of another kind: Sun et al., "Out-of-Distribution Detection
    with Deep Nearest Neighbors", arXiv:2204.06507, who take the distance to the k-th neighbour.
    """
    chunks = [1 - cosines.mean(1) for _, cosines, _ in neighbours(x, bank.x, NEAREST)]
    return torch.cat([x.new_empty(0), *chunks])


def percentiles(distance: Float[Tensor, " n"], test: Float[Tensor, " M"]) -> Float[Tensor, " n"]:
    """Share of the test images that are closer to the bank, in percent."""
    return 100 * torch.searchsorted(test.sort().values, distance).float() / len(test)


@dataclass
class Predict(Protocol):
    """Class names and probabilities of the user's images; writes predictions.json.

    The probabilities of the linear probe are calibrated by a temperature on held-out memory images. They hold for images
    like those of the data; the distance from the memory images tells whether an image is.

    Args:
        images: a picture file, a folder of them, or a pattern.
        weight_decays: of the linear probe, as in `Linear`.
        held_out: share of the memory images that chooses the weight decay and the temperature.
        iterations: as in `Linear`.
        every_epochs: how often it is done in training; 0 is at the end only.

    Raises:
        BadInput: `images` is missing, or there is no such file or folder.
    """

    images: str | None
    weight_decays: Sequence[NotNegative]
    held_out: Annotated[float, Range(above=0, below=1, usual="0.1")]
    iterations: Count
    every_epochs: Index

    def __post_init__(self) -> None:
        check_images(self.images)
        self.linear = Linear(self.weight_decays, self.held_out, self.iterations, self.every_epochs)

    def notes(self, data: ImageData) -> list[str]:
        """A sentence each if colours are lost, and if nothing can be held out."""
        return [*grey_notes(self.images, data), *self.linear.notes(data)]

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run's linear probe, which predicts."""
        probe = linear_of_run(config).get("linear", {})
        return {key: probe[key] for key in ("weight_decays", "held_out", "iterations", "every_epochs") if key in probe}

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """A row for each image; for a file that cannot be decoded, with the reason in place of a class.

        The values: `images`, `broken` of them, `far` of them (farther from the bank than `FAR_PERCENTILE` percent of the test
        images), and the `temperature` of the probabilities.

        Raises:
            BadInput: there are no such pictures, or no labelled images to learn the classes from.
        """
        paths = image_paths(self.images)
        if context.data.memory is None:
            raise BadInput(f"{context.data.name} has no labelled images, so there are no classes to predict.")
        decoded = embed_user_images(paths, context)
        if context.head is not None:
            classes, temperature = context.head.classes, 1.0
            probabilities = context.head.linear.to(context.device)(decoded.x).softmax(1)
        else:
            classes, (probe, temperature) = context.data.classes, self.linear.calibrated(context)
            probabilities = (probe(decoded.x) / temperature).softmax(1)
        distance, test = distances(decoded.x, context.memory), distances(context.test.x, context.memory)
        unlike = percentiles(distance, test)
        predictions: list[dict[str, Any]] = [
            {"image": path, "broken": decoded.broken.get(place, "")} for place, path in enumerate(paths)
        ]
        columns = (decoded.positions, probabilities, distance, unlike)
        for place, shares, far, percentile in zip(*(column.tolist() for column in columns), strict=True):
            by_class = {name: share for share, name in sorted(zip(shares, classes, strict=True), reverse=True)}
            predictions[place] = {"image": paths[place], "class": next(iter(by_class)), "probabilities": by_class}
            predictions[place] |= {"distance": far, "distance_percentile": percentile}
        if context.folder is not None:
            content = {
                "classifier": "linear probe" if context.head is None else "fine-tuned",
                "linear_probe_on": context.data.name,
                "temperature": temperature,
                "test_images": len(test),
                "predictions": predictions,
            }
            write_atomic(context.folder / "predictions.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        count = int((unlike >= FAR_PERCENTILE).sum())
        values = {"images": len(paths), "broken": len(decoded.broken), "far": count, "temperature": temperature}
        return EvaluationResult(
            {name: float(value) for name, value in values.items()},
            tables={"predictions": [*map(_row, predictions)]},
            notes=_warning(count, len(unlike), len(test)),
        )


def _row(prediction: Mapping[str, Any]) -> TableRow:
    """An entry of predictions.json as a row of the table, with its two most probable classes."""
    percents = [(name, 100 * share) for name, share in prediction.get("probabilities", {}).items()]
    (name, first), (second, next_) = (*percents, ("", ""), ("", ""))[:2]
    return {
        "image": prediction["image"],
        "class": name,
        "probability_percent": first,
        "second": second,
        "second_percent": next_,
        "distance": prediction.get("distance", ""),
        "distance_percentile": prediction.get("distance_percentile", ""),
        "broken": prediction.get("broken", ""),
    }


def _warning(far: int, pictures: int, test: int) -> list[str]:
    """A warning about images that are far from the training images, if there are any."""
    if not far:
        return []
    return [
        f"warning: {far:,} of {counted(pictures, 'picture')} {'are' if far > 1 else 'is'} farther from the training images than "
        f"{FAR_PERCENTILE:g} % of the {test:,} test images (column distance_percentile): such a picture may show none of the "
        "classes, whatever the probability."
    ]
