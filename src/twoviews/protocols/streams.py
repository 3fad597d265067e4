"""Streams of corrupted test images, and the accuracies of a classifier on them.

Shapes: B images of a batch, M test images, R rows: the streams and their mean, C channels, H = W the side in px.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twoviews.data.corruptions import CORRUPTIONS, check, corrupt
from twoviews.data.images import stratified
from twoviews.data.pixels import normalise
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.protocols.classification import bootstrap_intervals
from twoviews.protocols.linear import Linear, linear_of_run
from twoviews.protocols.protocol import EvaluationContext, Protocol, TableRow
from twoviews.randomness import generator
from twoviews.ranges import Corruption, Count, NonNegativeInt, Seed, Severity

Classify = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B K"]]  # normalised images to logits


class Streams:
    """The test images as they are, and under each corruption at each severity, in one random order.

    Args:
        context: with the test images.
        corruptions: names; None is all fifteen.
        severities: 1 to 5 each.
        images: how many of the test images, with the shares of the classes kept; None is all.
        seed: of the order, the choice of images and the corruptions.

    Raises:
        BadInput: there are no labelled test images, or a corruption that these images cannot have.
    """

    def __init__(
        self,
        context: EvaluationContext,
        corruptions: Sequence[str] | None,
        severities: Sequence[int],
        images: int | None,
        seed: int,
    ):
        test = context.data.test
        if test is None or test.labels is None:
            raise BadInput(f"the data ({context.data.name}) has no labelled test images to corrupt; use labelled data.")
        names = list(CORRUPTIONS) if corruptions is None else list(dict.fromkeys(corruptions))
        check(names, context.data.channels)
        self.context, self.test, self.seed = context, test, seed
        labels = test.labels.cpu().long()
        index = torch.arange(len(test)) if images is None else stratified(labels, len(test), min(images, len(test)))
        # Files are often sorted by class, and a batch would then be of one class.
        self.index = index[torch.randperm(len(index), generator=generator(seed, "streams"))]
        self.labels = labels[self.index]
        self.names = [("none", 0), *((name, severity) for name in names for severity in sorted(set(severities)))]

    def batches(
        self, name: str, severity: int, batch_size: int
    ) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]]:
        """Normalised images on the device, with their places among the M; sizes of batches differ by at most one.

        A stream's last batch would else be a remainder of a few images, and batch norms would take statistics of it.
        """
        data, device = self.context.data, self.context.device
        mean, std = (torch.tensor(t, dtype=torch.float32, device=device) for t in (data.mean, data.std))
        for rows in torch.arange(len(self.index)).tensor_split(math.ceil(len(self.index) / batch_size)):
            ((canvases, sizes, index),) = self.test.batches(len(rows), self.index[rows])
            plain = {"mean": (0.0,) * data.channels, "std": (1.0,) * data.channels}
            x = eval_view(canvases.to(device), sizes, size=data.size, crop=1.0, **plain)
            pixels = (x * 255).round_().clamp_(0, 255).to(torch.uint8)
            if severity:
                pixels = corrupt(pixels.cpu(), index, name, severity, self.seed).to(device)
            yield normalise(pixels.float() / 255, mean, std).to(memory_format=self.context.memory_format), rows

    def answers(self, batch_size: int, start: Callable[[], Classify]) -> tuple[Float[Tensor, "R M"], list[TableRow]]:
        """1 where a classifier is right and 0 elsewhere, and the same as a table; `start` makes a classifier for each stream."""
        right = torch.zeros(len(self.names), len(self.index), dtype=torch.double)
        seconds = torch.zeros(len(self.names), dtype=torch.double)  # without those of the corruption
        for number, (name, severity) in enumerate(self.names):
            classify = start()
            for images, rows in self.batches(name, severity, batch_size):
                begun = time.perf_counter()
                right[number, rows] = (classify(images).argmax(1).cpu() == self.labels[rows]).double()
                seconds[number] += time.perf_counter() - begun
        right = torch.cat([right, right[1:].mean(0, keepdim=True)])
        milliseconds = 1000 * torch.cat([seconds, seconds[1:].mean(0, keepdim=True)]) / len(self.index)
        columns = (100 * right.mean(1), 100 * bootstrap_intervals(right, self.seed), milliseconds)
        rows_of_table = zip([*self.names, ("mean", "all")], *(column.tolist() for column in columns), strict=True)
        return right, [
            {
                "corruption": "frost (procedural)" if name == "frost" else name,
                "severity": severity,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "ms_per_image": ms,
            }
            for (name, severity), accuracy, (low, high), ms in rows_of_table
        ]


@dataclass
class OnStreams(Protocol):
    """Abstract: evaluates a classifier on `Streams`.

    Args:
        linear: how the probe is fitted.
        corruptions: names, as in `twoviews.data.corruptions`; None is all fifteen.
        severities: 1 to 5 each.
        images: how many of the test images, with the shares of the classes kept; None is all.
        seed: of corruptions, choice and order of images, and bootstrap.
    """

    linear: Linear
    corruptions: Sequence[Corruption] | None
    severities: Sequence[Severity]
    images: Count | None
    seed: Seed
    every_epochs: NonNegativeInt

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run's linear probe."""
        return linear_of_run(config)

    def streams(self, context: EvaluationContext) -> Streams:
        """The streams that the settings describe."""
        return Streams(context, self.corruptions, self.severities, self.images, self.seed)


def headline(row: TableRow, key: str) -> dict[str, float]:
    """Accuracy of a row of a table of streams, and the limits of its interval, by the name `key`."""
    return {f"{key}{end}": float(row[column]) for end, column in (("", "accuracy"), ("_low", "low"), ("_high", "high"))}
