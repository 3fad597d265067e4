"""Streams of corrupted test images, what a classifier answers to them, and the table of it.

Shapes: B images of a batch, M test images, S streams, C channels, H = W the side in px.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twoviews.data.corruptions import CORRUPTIONS, check, corrupt
from twoviews.data.images import stratified
from twoviews.data.pixels import normalise
from twoviews.data.views import eval_view
from twoviews.errors import BadInput
from twoviews.protocols.protocol import EvaluationContext
from twoviews.randomness import generator

RESAMPLES = 1000  # of the bootstrap
Classify = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B K"]]  # normalised images to logits


@dataclass(frozen=True)
class Answers:
    """What a classifier made of all streams."""

    right: Bool[Tensor, "S M"]
    seconds: Float[Tensor, " S"]  # for an image, without the corruption

    @property
    def shares(self) -> Float[Tensor, "R M"]:
        """1 where it is right, and at last, for each image, the mean over the corrupted streams."""
        right = self.right.double()
        return torch.cat([right, right[1:].mean(0, keepdim=True)])


class Streams:
    """The test images as they are, and under each corruption at each severity, in one random order.

    Args:
        context: whose test images.
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
        # In the order of the files the classes may come one after the other, and so would the batches.
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
        """Of the classifier that `start` makes anew for each stream."""
        right = torch.zeros(len(self.names), len(self.index), dtype=torch.bool)
        seconds = torch.zeros(len(self.names), dtype=torch.double)
        for number, (name, severity) in enumerate(self.names):
            classify = start()
            for images, rows in self.batches(name, severity, batch_size):
                begun = time.perf_counter()
                right[number, rows] = classify(images).argmax(1).cpu() == self.labels[rows]
                seconds[number] += time.perf_counter() - begun
        return Answers(right, seconds / len(self.index))

    def intervals(self, shares: Float[Tensor, "R M"]) -> Float[Tensor, "R 2"]:
        """95 % percentile bootstrap of the mean of each row, in percent; images are drawn with replacement.

        All rows are resampled alike. What an adapting classifier learnt from the images is not drawn again.
        """
        draws, count = generator(self.seed, "bootstrap"), len(self.index)
        means = []
        for _ in range(RESAMPLES):
            times = torch.bincount(torch.randint(count, (count,), generator=draws), minlength=count)
            means.append(shares @ times.double() / count)
        limits = torch.tensor([0.025, 0.975], dtype=torch.double)
        return 100 * torch.stack(means).quantile(limits, dim=0).T

    def table(self, answers: Answers) -> list[dict[str, float | int | str]]:
        """A row for each stream, accuracies in percent, and at last their mean without the images as they are."""
        shares = answers.shares
        accuracy, limits = 100 * shares.mean(1), self.intervals(shares)
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


def headline(table: Sequence[dict[str, float | int | str]], key: str) -> dict[str, float]:
    """Accuracy in the last row of a table of streams, and the limits of its interval, by the name `key`."""
    return {
        key + end: float(table[-1][column]) for end, column in (("", "accuracy"), ("_low", "low"), ("_high", "high"))
    }
