"""A linear classifier on frozen features: softmax regression on features computed once.

Not the published protocol with augmented images: that re-runs the backbone each epoch. The weight decay is chosen on a
held-out part of the memory images, never on the test images.
Shapes: N bank, M queries, F features, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.classifier_file import Head, as_head, save_head
from twoviews.console import progress_of
from twoviews.data.images import ImageData
from twoviews.features import Features
from twoviews.protocols.classification import top1
from twoviews.protocols.distance import kept, with_bank
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import generator
from twoviews.ranges import Count, NonNegativeInt, NotNegative, Range
from twoviews.torch_optimizers import LBFGS


class Probe(nn.Module):
    """Features to logits: standardised, then a linear classifier.

    Args:
        mean: [F], of the features.
        std: [F], likewise, positive.
        linear: [C, F], on standardised features.
    """

    mean: Float[Tensor, " F"]
    std: Float[Tensor, " F"]

    def __init__(self, mean: Float[Tensor, " F"], std: Float[Tensor, " F"], linear: nn.Linear):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = linear

    def standardised(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        """Features with mean 0 and variance 1, which the linear classifier takes."""
        return (x - self.mean) / self.std

    def forward(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """Class logits of features."""
        return self.linear(self.standardised(x))

    @torch.no_grad()
    def head(self, classes: Sequence[str], temperature: float = 1.0) -> Head:
        """A linear layer on the features themselves whose outputs are the logits divided by a temperature."""
        weight = self.linear.weight / self.std
        return as_head(weight / temperature, (self.linear.bias - weight @ self.mean) / temperature, classes)


def fit(x: Float[Tensor, "N F"], y: Int[Tensor, " N"], classes: int, weight_decay: float, iterations: int) -> nn.Linear:
    """Minimum of mean cross-entropy + weight_decay / 2 * |W|^2 by LBFGS, from zero; biases are not decayed."""
    linear = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = LBFGS(linear.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nnf.cross_entropy(linear(x), y) + weight_decay / 2 * linear.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return linear.requires_grad_(False)


def held_out(y: Int[Tensor, " N"], share: float) -> tuple[Tensor, Tensor]:
    """Indices of a fixed stratified split: (rest, held out), with `share` of each class held out, but never all of one."""
    order = torch.randperm(len(y), generator=generator("linear", "held out")).to(y.device)
    # Within each class, the first ones of the random order are held out.
    ranks = torch.empty_like(y)
    for label in y.unique():
        members = order[y[order] == label]
        count = min(share * len(members), len(members) - 1)
        ranks[members] = (torch.arange(len(members), device=y.device) >= count).long()
    return ranks.nonzero().flatten(), (ranks == 0).nonzero().flatten()


@torch.no_grad()
def temperature(logits: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> float:
    """The T for which softmax(logits / T) has the smallest cross-entropy; 1 where there are no logits.

    Temperature scaling of Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, sec. 4.2, for images
    that the classifier was not fitted to. One image more counts as of all classes alike: without it T would be 0 where each
    of a few images is classified correctly.
    """
    from scipy.optimize import minimize_scalar

    count, classes = logits.shape
    if not count:
        return 1.0
    targets = (count * nnf.one_hot(y, classes).double() + 1 / classes) / (count + 1)

    def loss(log_temperature: float) -> float:  # has one minimum: it is convex in 1 / T
        return nnf.cross_entropy(logits.double() / math.exp(log_temperature), targets).item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(1e-3), math.log(1e3)), method="bounded").x)


def linear_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the linear probe of a run's training as those of the parameter `linear`; empty if it had none."""
    protocols = config.get("protocol") or {}
    return {"linear": protocols["linear"]} if "linear" in protocols else {}


@dataclass
class Linear(Protocol):
    """Accuracy of softmax regression on standardised features.

    Args:
        weight_decays: candidates; the one with the best accuracy on the held-out memory images is fitted again on all.
        held_out: share of the memory images that chooses.
        iterations: of LBFGS, at most.
    """

    weight_decays: Sequence[NotNegative]
    held_out: Annotated[float, Range(above=0, below=1, usual="0.1")]
    iterations: Count
    every_epochs: NonNegativeInt

    def notes(self, data: ImageData) -> list[str]:
        """A sentence if the weight decay cannot be chosen for want of held-out images."""
        labels = None if data.memory is None else data.memory.labels
        if labels is None or len(labels.unique()) < len(labels) or len(self.weight_decays) < 2:
            return []
        return [
            f"each class has one labelled image, so none is held out to choose a weight decay: {self.weight_decays[0]:g} is used."
        ]

    def probe(self, context: EvaluationContext) -> tuple[Probe, float]:
        """The classifier, and the weight decay that was chosen for it, without use of the test images."""
        return self.fitted(context.memory, len(context.data.classes))[:2]

    def fitted(
        self, memory: Features, classes: int, calibrate: bool = False, scaled_as: Float[Tensor, "A F"] | None = None
    ) -> tuple[Probe, float, float]:
        """A classifier of these features, its weight decay, and its temperature, which is 1 where it is not to be calibrated.

        Args:
            memory: what it learns from, and is chosen and calibrated on.
            classes: C.
            calibrate: find the `temperature` of the classifier that was fitted without the held-out images.
            scaled_as: features whose mean and variance are made 0 and 1; None: those of `memory`.
        """
        scaled_as = memory.x if scaled_as is None else scaled_as
        mean, std = scaled_as.mean(0), scaled_as.std(0) + 1e-6
        x, y = (memory.x - mean) / std, memory.y
        rest, chooses = held_out(y, self.held_out)
        best, chosen, scale = -1.0, self.weight_decays[0], 1.0
        needed = len(chooses) and (calibrate or len(self.weight_decays) > 1)
        candidates = self.weight_decays if needed else []
        with progress_of("linear classifier", len(candidates) + 1, "fits") as advance:
            for weight_decay in candidates:
                logits = fit(x[rest], y[rest], classes, weight_decay, self.iterations)(x[chooses])
                if (accuracy := top1(logits, y[chooses])) > best:
                    best, chosen = accuracy, weight_decay
                    scale = temperature(logits, y[chooses]) if calibrate else 1.0
                advance(1)
            return Probe(mean, std, fit(x, y, classes, chosen, self.iterations)), chosen, scale

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 on the test images and the weight decay it was reached with; the calibrated classifier is saved."""
        data, folder = context.data, context.folder
        probe, weight_decay, scale = self.fitted(context.memory, len(data.classes), calibrate=folder is not None)
        scores = probe(context.test.x)
        if folder is not None:
            bank = context.memory.subset(kept(len(context.memory.x))).x
            head = with_bank(probe.head(data.classes, scale), bank, context.test.x)
            save_head(folder, head, context.encoder, data.size, (data.mean, data.std))
        return EvaluationResult({"top1": top1(scores, context.test.y), "weight_decay": weight_decay}, scores.softmax(1))
