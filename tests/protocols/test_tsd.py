"""Both losses of TSD against loops, as released and mended, and its steps."""

import math

import pytest
import torch
from adapting import LINEAR, context, probe, views, without_batch_norm
from torch import nn

from twoviews.backbones import Encoder
from twoviews.errors import BadInput
from twoviews.protocols.adaptation import Model, PseudoLabels
from twoviews.protocols.protocol import EvaluationContext
from twoviews.protocols.tsd import TSD, distillation, local_clustering

NUMBERS = {"linear": LINEAR, "corruptions": ["fog"], "severities": [5], "images": None, "batch_size": 50, "seed": 0}
MORE = {"lr": 1e-4, "per_class": 20, "neighbours": 3, "every_epochs": 0}


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def unit(values: list[float], order: int) -> list[float]:
    norm = sum(abs(value) ** order for value in values) ** (1 / order)
    return [value / norm for value in values]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def something() -> tuple[torch.Tensor, torch.Tensor, PseudoLabels]:
    """Features and logits of 20 digits, in a memory with 40 others."""
    linear = probe().linear.double()
    z = probe().standardised(context().test.x).double()[:60]
    memory = PseudoLabels(linear, None)
    memory.add(z, linear(z))
    linear.float()
    return z[40:].clone(), memory.logits[-20:].clone(), memory


@pytest.mark.parametrize("as_released", [True, False])
def test_distillation_by_a_loop(as_released):
    z, logits, memory = something()
    order = 1 if as_released else 2
    prototypes = [unit(row, order) for row in memory.prototypes().tolist()]
    total = 0.0
    for feature, said in zip(z.tolist(), logits.tolist(), strict=True):
        p = softmax([dot(unit(feature, order), prototype) for prototype in prototypes])
        q = softmax(softmax(said)) if as_released else softmax(said)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert distillation(z, logits, memory.prototypes(), as_released).item() == pytest.approx(total / 20)


@pytest.mark.parametrize("as_released", [True, False])
def test_local_clustering_by_a_loop(as_released):
    z, logits, memory = something()
    logits = logits + 0.5  # not what the memory holds of the same images
    logits[:, 0] -= 2
    order = 1 if as_released else 2
    supports = [unit(row, order) for row in memory.z.tolist()]
    total = 0.0
    for feature, said in zip(z.tolist(), logits.tolist(), strict=True):
        similar = [dot(unit(feature, order), support) for support in supports]
        for index in sorted(range(len(similar)), key=lambda i: -similar[i])[:3]:
            near = softmax(memory.logits[index].tolist())
            mine = said if as_released else softmax(said)
            total += similar[index] * sum((a - b) ** 2 for a, b in zip(mine, near, strict=True))
    expected = total / 60 * (-1 if as_released else 1)
    assert local_clustering(z, logits, memory, 3, as_released).item() == pytest.approx(expected)


def test_l1_cosines_are_tiny_as_released():
    z, logits, memory = something()
    flat = torch.zeros_like(logits)  # a uniform target: the divergence says how far from uniform the prediction is
    released, mended = (distillation(z, flat, memory.prototypes(), as_released).item() for as_released in (True, False))
    assert 0 < released < mended / 100


def test_mended_clustering_pulls_predictions_to_their_neighbours_and_the_released_one_drives_them_away():
    z, logits, memory = something()
    said = (logits / 3).requires_grad_()
    moves = []
    for as_released in (True, False):
        (gradient,) = torch.autograd.grad(local_clustering(z, said, memory, 3, as_released), said)
        step = said.detach() - 0.1 * gradient
        before, after = (local_clustering(z, x, memory, 3, as_released=False).item() for x in (said, step))
        moves.append(after - before)
        assert gradient.abs().max() > 0
    distance = moves[1]
    assert distance < 0
    near = memory.logits.softmax(1)[-20:]
    (gradient,) = torch.autograd.grad(local_clustering(z, said, memory, 1, as_released=True), said)
    assert ((said - gradient - near).square().sum() > (said - near).square().sum()).item()


def test_gradients_reach_features_through_prototypes_only_and_never_the_targets():
    z, logits, memory = something()
    z.requires_grad_(), logits.requires_grad_()
    loss = distillation(z, logits, memory.prototypes(), as_released=False)
    wrt_z, wrt_logits = torch.autograd.grad(loss, (z, logits), allow_unused=True)
    assert wrt_z.abs().max() > 0 and wrt_logits is None
    loss = local_clustering(z, logits, memory, 3, as_released=False)
    wrt_z, wrt_logits = torch.autograd.grad(loss, (z, logits), allow_unused=True)
    assert wrt_z is None and wrt_logits.abs().max() > 0


@pytest.mark.parametrize(
    ("update", "as_released", "lam"), [("all", True, 0), ("affine", False, 0.1), ("all", False, 1)]
)
def test_steps_change_what_update_says(update, as_released, lam):
    model = Model(context(), probe())
    tsd = TSD(**NUMBERS, **MORE, update=update, as_released=as_released, lam=lam)
    before = {name: value.clone() for name, value in model.named_parameters()}
    classify, (images, *_) = tsd.start(model), views(context(), "fog", 5, 50)
    with torch.no_grad():
        expected = Model(context(), probe())
        expected.batch_norms()
        torch.testing.assert_close(classify(images), expected(images))  # of before the step
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    norms = {name for name in before if "bn" in name or "downsample.1" in name}
    # With lam = 0 the loss does not see the logits, nor so the classifier's weights.
    expected_names = (
        norms if update == "affine" else set(before) - (set() if lam else {"probe.linear.weight", "probe.linear.bias"})
    )
    assert changed == expected_names


def test_works_without_batch_norm_unless_that_is_all_it_may_change():
    plain = Encoder()
    plain.out_dim, plain.convolution = 64, nn.Conv2d(1, 4, 8, 8)
    plain.forward = lambda images: plain.convolution(images).relu().flatten(1)
    other = EvaluationContext(plain, context().data, torch.device("cpu"), torch.float32)
    result = TSD(**NUMBERS, **MORE, update="all", as_released=True, lam=0)(other)
    assert 0 <= result.values["top1"] <= 100
    with pytest.raises(BadInput, match="protocol=tsd .* has none"):
        TSD(**NUMBERS, **MORE, update="affine", as_released=True, lam=0)(without_batch_norm())


def test_as_released_has_no_clustering_term():
    with pytest.raises(BadInput, match="lam=0.1 with as_released=true"):
        TSD(**NUMBERS, **MORE, update="all", as_released=True, lam=0.1)
