"""The memory and the prototypes of T3A against a loop with lists."""

import math

import pytest
import torch
from adapting import LINEAR, context, probe, views
from torch import nn

from twoviews.protocols.adaptation import Model, PseudoLabels
from twoviews.protocols.t3a import T3A


def entropy(logits: list[float]) -> float:
    shares = [math.exp(value - max(logits)) for value in logits]
    return -sum(p / sum(shares) * math.log(p / sum(shares)) for p in shares if p > 0)


def prototypes_by_loop(linear: nn.Linear, batches: list[torch.Tensor], per_class: int | None) -> list[torch.Tensor]:
    """Lists of (entropy, feature) by pseudo-label, filtered after each batch; the sums of unit features."""
    classes = linear.out_features
    supports: list[list[tuple[float, torch.Tensor]]] = [[] for _ in range(classes)]
    for rows in [linear.weight.detach(), *batches]:
        for z in rows:
            logits = linear(z).tolist()
            supports[logits.index(max(logits))].append((entropy(logits), z))
        supports = [sorted(own, key=lambda pair: pair[0])[:per_class] for own in supports]
    zero = torch.zeros(linear.in_features, dtype=linear.weight.dtype)
    return [sum((z / z.norm() for _, z in own), zero) for own in supports]


@pytest.mark.parametrize("per_class", [1, 5, 20, None])
def test_prototypes_are_those_of_a_loop(per_class):
    linear = probe().linear
    z = probe().standardised(context().test.x)
    batches = list(z.split(40))
    memory = PseudoLabels(linear, per_class)
    for number, batch in enumerate(batches, start=1):
        memory.add(batch, linear(batch))
        expected = torch.stack(prototypes_by_loop(linear, batches[:number], per_class))
        torch.testing.assert_close(memory.prototypes(), expected, rtol=1e-4, atol=1e-4)
    assert per_class is None or torch.bincount(memory.labels).max() <= per_class
    assert per_class is not None or len(memory.z) == 10 + len(z)


def test_predictions_are_those_of_a_loop():
    t3a = T3A(LINEAR, ["fog"], [5], None, batch_size=50, seed=0, per_class=5, every_epochs=0)
    classify = t3a.start(Model(context(), probe()))
    seen = []
    for images in views(context(), "fog", 5, 50):
        with torch.no_grad():
            seen.append(probe().standardised(context().encoder(images)))
        unit = [p / p.norm() if p.norm() > 0 else p for p in prototypes_by_loop(probe().linear, seen, 5)]
        expected = torch.tensor([[float(z @ p) for p in unit] for z in seen[-1]])
        torch.testing.assert_close(classify(images), expected, rtol=1e-3, atol=1e-3)


def test_a_class_without_supports_gets_nothing():
    linear = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))  # nothing is ever closest to the first
    memory = PseudoLabels(linear.requires_grad_(False), 5)
    assert memory.prototypes().tolist() == [[0, 0], [2, 0], [0, 1]]
