"""A linear classifier on frozen features: softmax regression on features computed once.

Not the published protocol with augmented images: that re-runs the backbone each epoch. The weight decay is chosen on a
held-out part of the memory images, never on the test images.
Shapes: N bank, M queries, F features, C classes.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.errors import BadInput
from twoviews.features import Judged
from twoviews.optim import LBFGS
from twoviews.protocols.knn import top1
from twoviews.protocols.protocol import Protocol, Verdict
from twoviews.randomness import generator
from twoviews.ranges import Count, Index, NotNegative, Range


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
        """What the classifier's weights are about."""
        return (x - self.mean) / self.std

    def forward(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """Logits."""
        return self.linear(self.standardised(x))


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
    """Indices of a fixed stratified split: (rest, held out), with `share` of each class held out."""
    order = torch.randperm(len(y), generator=generator("linear", "held out")).to(y.device)
    # Within each class, the first ones of the random order are held out.
    ranks = torch.empty_like(y)
    for label in y.unique():
        members = order[y[order] == label]
        ranks[members] = (torch.arange(len(members), device=y.device) >= share * len(members)).long()
    return ranks.nonzero().flatten(), (ranks == 0).nonzero().flatten()


class Linear(Protocol):
    """Accuracy of softmax regression on standardised features.

    Args:
        weight_decays: candidates; the one with the best accuracy on the held-out memory images is fitted again on all.
        held_out: share of the memory images that chooses.
        iterations: of LBFGS, at most.
        every_epochs: how often it is measured in training; 0 is at the end only.

    Raises:
        BadInput: there is no candidate.
    """

    def __init__(
        self,
        weight_decays: Sequence[NotNegative],
        held_out: Annotated[float, Range(above=0, below=1, usual="0.1")],
        iterations: Count,
        every_epochs: Index,
    ):
        if not weight_decays:
            raise BadInput(
                "protocol.linear.weight_decays=[] leaves nothing to choose from; use [0] for no weight decay."
            )
        self.weight_decays, self.held_out = list(weight_decays), held_out
        self.iterations, self.every_epochs = iterations, every_epochs

    def probe(self, judged: Judged) -> tuple[Probe, float]:
        """The classifier, and the weight decay that was chosen for it; the test images are not looked at."""
        classes, memory = len(judged.data.classes), judged.memory
        mean, std = memory.x.mean(0), memory.x.std(0) + 1e-6
        x, y = (memory.x - mean) / std, memory.y
        rest, chooses = held_out(y, self.held_out)
        best, chosen = -1.0, self.weight_decays[0]
        for weight_decay in self.weight_decays if len(self.weight_decays) > 1 else []:
            linear = fit(x[rest], y[rest], classes, weight_decay, self.iterations)
            accuracy = top1(linear(x[chooses]), y[chooses])
            if accuracy > best:
                best, chosen = accuracy, weight_decay
        return Probe(mean, std, fit(x, y, classes, chosen, self.iterations)), chosen

    def __call__(self, judged: Judged) -> Verdict:
        """top1 on the test images and the weight decay it was reached with."""
        probe, weight_decay = self.probe(judged)
        scores = probe(judged.test.x)
        return Verdict({"top1": top1(scores, judged.test.y), "weight_decay": weight_decay}, scores.softmax(1))
