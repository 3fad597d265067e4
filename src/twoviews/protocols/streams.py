"""Streams of corrupted test images, and the accuracies of a classifier on them.

Shapes: B images of a batch, M test images, S streams, C channels, H = W the side in px.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twoviews.data.corruptions import CORRUPTIONS, check, corrupt
from twoviews.data.images import stratified
from twoviews.data.pixels import normalise
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.protocols.classification import bootstrap_intervals
from twoviews.protocols.linear import Linear, linear_of_run
from twoviews.protocols.protocol import EvaluationContext, Protocol
from twoviews.randomness import generator
from twoviews.ranges import Corruption, Count, Index, Seed, Severity

Classify = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B K"]]  # normalised images to logits


@dataclass(frozen=True)
class Answers:
    """Which images of each stream a classifier classified correctly, and how fast."""

    right: Bool[Tensor, "S M"]
    seconds: Float[Tensor, " S"]  # per image, without the time for the corruption

    @property
    def shares(self) -> Float[Tensor, "R M"]:
        """1 where an answer is correct, and 0 elsewhere; the last row is the mean over the corrupted streams."""
        right = self.right.double()
        return torch.cat([right, right[1:].mean(0, keepdim=True)])


class Streams:
    """The test images as they are, and under each corruption at each severity, in one random order.

    Args:
        context: with the test images.
        corruptions: names; None is all fifteen.
        severities: 1 to 5 each.
        images: how many of the test images, with the shares of the classes kept; None is all.
        seed: of the order, the choice of images and the corruptions.

    Raises:
        BadInput: there are no labelled test images, no streams, or a corruption that these images cannot have.
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
        if not names or not severities:
            raise BadInput(
                "there is nothing to measure: give at least one corruption and one severity, such as "
                "corruptions=[fog] severities=[5], or corruptions=null for all fifteen."
            )
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
            x = normalise(pixels.float() / 255, mean, std)
            yield (x.to(memory_format=torch.channels_last) if self.context.channels_last else x), rows

    def answers(self, batch_size: int, start: Callable[[], Classify]) -> Answers:
        """Which images a classifier gets right in each stream, and its seconds per image; `start` makes one for each stream."""
        right = torch.zeros(len(self.names), len(self.index), dtype=torch.bool)
        seconds = torch.zeros(len(self.names), dtype=torch.double)
        for number, (name, severity) in enumerate(self.names):
            classify = start()
            for images, rows in self.batches(name, severity, batch_size):
                begun = time.perf_counter()
                right[number, rows] = classify(images).argmax(1).cpu() == self.labels[rows]
                seconds[number] += time.perf_counter() - begun
        return Answers(right, seconds / len(self.index))

    def table(self, answers: Answers) -> list[dict[str, float | int | str]]:
        """A row for each stream with accuracies in percent; the last row is the mean over the corrupted streams."""
        shares = answers.shares
        accuracy, limits = 100 * shares.mean(1), 100 * bootstrap_intervals(shares, self.seed)
        seconds = [*answers.seconds.tolist(), answers.seconds[1:].mean().item()]
        rows: list[dict[str, float | int | str]] = []
        for number, (name, severity) in enumerate([*self.names, ("mean", "all")]):
            low, high = limits[number].tolist()
            rows.append(
                {
                    "corruption": "frost (procedural)" if name == "frost" else name,
                    "severity": severity,
                    "accuracy": accuracy[number].item(),
                    "low": low,
                    "high": high,
                    "ms_per_image": 1000 * seconds[number],
                }
            )
        return rows


@dataclass
class OnStreams(Protocol):
    """Abstract: evaluates a classifier on `Streams`.

    Args:
        linear: how the probe is fitted.
        corruptions: names, as in `twoviews.data.corruptions`; None is all fifteen.
        severities: 1 to 5 each.
        images: how many of the test images, with the shares of the classes kept; None is all.
        seed: of corruptions, choice and order of images, and bootstrap.
        every_epochs: how often it is measured in training; 0 is at the end only.
    """

    linear: Linear
    corruptions: Sequence[Corruption] | None
    severities: Sequence[Severity]
    images: Count | None
    seed: Seed
    every_epochs: Index

    def settings_from_run(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run's linear probe."""
        return linear_of_run(config)

    def streams(self, context: EvaluationContext) -> Streams:
        """The streams that the settings describe."""
        return Streams(context, self.corruptions, self.severities, self.images, self.seed)


def headline(table: Sequence[dict[str, float | int | str]], key: str) -> dict[str, float]:
    """Accuracy in the last row of a table of streams, and the limits of its interval, by the name `key`."""
    return {
        key + end: float(table[-1][column]) for end, column in (("", "accuracy"), ("_low", "low"), ("_high", "high"))
    }
