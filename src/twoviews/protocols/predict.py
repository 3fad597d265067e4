"""Classes of the user's own images by the linear probe of the features, and how different they are from the run's images.

Shapes: n images, M test images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from twoviews.data.images import ImageData
from twoviews.errors import BadInput
from twoviews.files import write_atomic
from twoviews.protocols.distance import FAR_PERCENTILE, distances, far_notes, percentiles
from twoviews.protocols.linear import Linear, linear_of_run
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol, TableRow
from twoviews.protocols.user_images import check_images, embed_user_images, grey_notes, image_paths
from twoviews.ranges import Count, NonNegativeInt, NotNegative, Range


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

    Raises:
        BadInput: `images` is missing, or there is no such file or folder.
    """

    images: str | None
    weight_decays: Sequence[NotNegative]
    held_out: Annotated[float, Range(above=0, below=1, usual="0.1")]
    iterations: Count
    every_epochs: NonNegativeInt

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
        classes, temperature = context.data.classes, 1.0
        if context.head is not None:
            classes, logits = context.head.classes, context.head.linear.to(context.device)(decoded.x)
        else:
            probe, _, temperature = self.linear.fitted(context.memory, len(classes), calibrate=True)
            logits = probe(decoded.x) / temperature
        distance, test = (distances(x, context.memory.x) for x in (decoded.x, context.test.x))
        closer = percentiles(distance, test)
        predictions: list[dict[str, Any]] = [
            {"image": path, "broken": decoded.broken.get(place, "")} for place, path in enumerate(paths)
        ]
        columns = (decoded.positions, logits.softmax(1), distance, closer)
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
        notes = [f"warning: {note}" for note in far_notes(closer, len(test), " (column distance_percentile)")]
        values = {"images": float(len(paths)), "broken": float(len(decoded.broken)), "temperature": temperature}
        values["far"] = float((closer >= FAR_PERCENTILE).sum())
        return EvaluationResult(values, tables={"predictions": [*map(_row, predictions)]}, notes=notes)


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
