"""A linear classifier on frozen features by SGD: many learning rates and weight decays at once, on features computed once.

All classifiers see the same batches and are multiplied in one matrix product. The best is chosen on a held-out part of
the memory images and trained again on all of them; the test images are not looked at before.
Shapes: N bank, M queries, F features, C classes, G points of the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from twoviews.classifier_file import as_linear
from twoviews.console import progress_of
from twoviews.errors import BadInput
from twoviews.protocols.classification import accuracies, top1
from twoviews.protocols.linear import held_out
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.randomness import generator
from twoviews.ranges import Count, NonNegativeInt, NotNegative, Positive, Range, Seed
from twoviews.schedule import Cosine

MIN_PROBABILITY = 1e-30  # smaller ones count as 0


@dataclass(frozen=True)
class Stack:
    """Weights and biases of G linear classifiers."""

    weight: Float[Tensor, "G C F"]
    bias: Float[Tensor, "G C"]

    def linear(self, point: int) -> nn.Linear:
        """A single classifier as a module."""
        return as_linear(self.weight[point], self.bias[point])


@torch.no_grad()
def sgd(
    x: Float[Tensor, "N F"],
    y: Int[Tensor, " N"],
    classes: int,
    grid: Sequence[tuple[float, float]],
    *,
    momentum: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> Stack:
    """One classifier for each (learning rate, weight decay), from zero, with half a cosine over all steps.

    Each goes as torch.optim.SGD would take it alone on mean cross-entropy; biases are not decayed. The gradient is
    written out: (softmax - one-hot) x / B. The last batch of an epoch is as short as it comes out.
    """
    count, features = len(grid), x.shape[1]
    weight, bias = x.new_zeros(count, classes, features), x.new_zeros(count, classes)
    v_weight, v_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    rates, decays = x.new_tensor(grid).unbind(1)
    schedule, steps = Cosine(epochs), -(-len(x) // batch_size)
    with progress_of(f"linear classifiers ({count}) by SGD", epochs * steps, "steps") as advance:
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=generator(seed, "linear_sgd", epoch)).to(x.device)
            for step, rows in enumerate(order.split(batch_size)):
                # x[rows] is the same and was measured to take 1.5 to 2 times as long on a CPU.
                batch, one_hot = x.index_select(0, rows), nnf.one_hot(y[rows], classes).to(x.dtype).T.contiguous()
                # The batch is the last axis, along which a softmax over few classes is many times as fast.
                logits = torch.addmm(bias.view(-1, 1), weight.view(-1, features), batch.T).view(count, classes, -1)
                # Probabilities of very unlikely classes are subnormal numbers, and products with these are slow.
                slope = torch.threshold_(logits.softmax(1), MIN_PROBABILITY, 0.0).sub_(one_hot)
                v_weight.view(-1, features).addmm_(slope.flatten(0, 1), batch, beta=momentum, alpha=1 / len(rows))
                v_weight.addcmul_(decays[:, None, None], weight)
                v_bias.mul_(momentum).add_(slope.mean(2))
                factor = schedule(epoch + step / steps)
                weight.addcmul_(rates[:, None, None], v_weight, value=-factor)
                bias.addcmul_(rates[:, None], v_bias, value=-factor)
                advance(1)
    return Stack(weight, bias)


@dataclass
class LinearSGD(Protocol):
    """Accuracy of a linear classifier trained by SGD on standardised features.

    Args:
        learning_rates: candidates, each with each of `weight_decays`; not scaled by the batch size.
        weight_decays: candidates. The pair with the best accuracy on the held-out memory images, of equals that with
            the smallest loss there, is trained again on all memory images.
        held_out: share of the memory images that chooses.
        momentum: of SGD.
        batch_size: images a step; more than there are means all of them.
        epochs: passes over the features.
        seed: of the order.
    """

    learning_rates: Sequence[Positive]
    weight_decays: Sequence[NotNegative]
    held_out: Annotated[float, Range(above=0, below=1, usual="0.1")]
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")]
    batch_size: Count
    epochs: Count
    seed: Seed
    every_epochs: NonNegativeInt

    def __call__(self, context: EvaluationContext) -> EvaluationResult:
        """top1 and top5 on the test images, the pair they were reached with, and all pairs, the best first, as a table.

        Raises:
            BadInput: none of the candidates stays finite, or no class has two images.
        """
        memory, test, classes = context.memory, context.test, len(context.data.classes)
        mean, std = memory.x.mean(0), memory.x.std(0) + 1e-6
        x, y = (memory.x - mean) / std, memory.y
        rest, chooses = held_out(y, self.held_out)
        if not len(chooses):
            raise BadInput(
                f"{context.data.name} has one labelled image of each class, and none to choose a learning rate on; use "
                "protocol=linear."
            )
        grid = list(product(self.learning_rates, self.weight_decays))
        settings = {key: getattr(self, key) for key in ("momentum", "batch_size", "epochs", "seed")}
        stack = sgd(x[rest], y[rest], classes, grid, **settings)
        rows: list[dict[str, Any]] = []
        for point, (learning_rate, weight_decay) in enumerate(grid):
            # A candidate that ran away scores nan, of which the loss is nan, too; it comes last.
            scores = stack.linear(point)(x[chooses]).nan_to_num(torch.nan, torch.nan, torch.nan)
            loss = nnf.cross_entropy(scores, y[chooses]).nan_to_num(torch.inf).item()
            pair = {"learning_rate": learning_rate, "weight_decay": weight_decay}
            rows.append({**pair, "held_out_top1": top1(scores, y[chooses]), "held_out_loss": loss})
        rows.sort(key=lambda row: (row["held_out_loss"] == math.inf, -row["held_out_top1"], row["held_out_loss"]))
        if rows[0]["held_out_loss"] == math.inf:
            raise BadInput(f"all of learning_rates={self.learning_rates} diverge; use smaller ones, such as [0.001].")
        chosen = {key: rows[0][key] for key in ("learning_rate", "weight_decay")}
        scores = sgd(x, y, classes, [(*chosen.values(),)], **settings).linear(0)((test.x - mean) / std)
        return EvaluationResult({**accuracies(scores, test.y), **chosen}, scores.softmax(1), {"grid": rows})
