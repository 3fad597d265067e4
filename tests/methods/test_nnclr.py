"""The loss against a loop, closed forms and lightly; support set, neighbours and refusals.

The two-process value is in test_distributed.py.
"""

import math

import pytest
import torch
from assembled import progress
from lightly.loss import NTXentLoss
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from torch import nn
from torch.nn import functional as nnf

from twoviews.backbones import ResNet
from twoviews.errors import BadInput
from twoviews.methods.nnclr import NNCLR, nearest, neighbour_info_nce


def small(**changes) -> NNCLR:
    torch.manual_seed(0)
    options = {"hidden_dim": 12, "embed_dim": 6, "predictor_hidden_dim": 10, "queue_size": 20, "temperature": 0.2}
    return NNCLR(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def unit(*shape: int) -> torch.Tensor:
    return nnf.normalize(torch.randn(*shape), dim=-1)


def views(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(count, 3, 16, 16), torch.randn(count, 3, 16, 16) + 0.5]


def by_loop(z: torch.Tensor, p: torch.Tensor, queue: torch.Tensor, temperature: float) -> float:
    """Of one direction, with the search for neighbours."""
    predictions = [[value / math.hypot(*row) for value in row] for row in p.tolist()]
    total = 0.0
    for i, projection in enumerate(z.tolist()):
        neighbour = max(queue.tolist(), key=lambda row: sum(a * b for a, b in zip(projection, row, strict=True)))
        logits = [sum(a * b for a, b in zip(neighbour, other, strict=True)) / temperature for other in predictions]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[i]
    return total / len(predictions)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_against_a_loop(temperature):
    torch.manual_seed(0)
    z, p, queue = torch.randn(5, 4), torch.randn(5, 4), unit(11, 4)
    loss = neighbour_info_nce(queue[nearest(z, queue)], p, temperature)
    assert loss.item() == pytest.approx(by_loop(z, p, queue, temperature), rel=1e-5)


def test_closed_forms():
    """Predictions that are the neighbours, orthogonal to all others; and everything in one point."""
    eye, one = torch.eye(6), torch.ones(6, 3)
    assert neighbour_info_nce(eye, 3 * eye, 0.5).item() == pytest.approx(math.log(1 + 5 * math.exp(-2)), rel=1e-6)
    assert neighbour_info_nce(nnf.normalize(one, dim=1), one, 0.5).item() == pytest.approx(math.log(6), rel=1e-6)


def test_neighbours_and_value_are_lightlys():
    """Its loss of one image, with the other images' predictions in its memory bank as the negatives."""
    torch.manual_seed(0)
    z, p, queue = torch.randn(7, 8), unit(7, 8), unit(33, 8)
    bank = NNMemoryBankModule(size=(33, 8))
    bank.bank.copy_(queue)
    neighbours = bank(z)
    torch.testing.assert_close(queue[nearest(z, queue)], neighbours)
    theirs = []
    for i in range(7):
        loss = NTXentLoss(0.2, memory_bank_size=(6, 8))
        loss.memory_bank.bank.copy_(torch.cat([p[:i], p[i + 1 :]]))
        theirs.append(loss(neighbours[i : i + 1], p[i : i + 1]))
    torch.testing.assert_close(neighbour_info_nce(neighbours, p, 0.2), torch.stack(theirs).mean())


def test_gradient_flows_only_through_predictions():
    torch.manual_seed(0)
    z, p, queue = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True), unit(33, 8)
    neighbour_info_nce(queue[nearest(z, queue)], p, 0.2).backward()
    assert z.grad is None and p.grad is not None and p.grad.any(1).all()


def test_heads_are_lightlys():
    method = small()

    def shapes(module: nn.Module) -> list[tuple]:
        kinds = [part for part in module.modules() if isinstance(part, nn.Linear | nn.BatchNorm1d | nn.ReLU)]
        return [(type(part), getattr(part, "weight", torch.zeros(0)).shape) for part in kinds]

    features = method.encoder.out_dim
    assert shapes(method.projector) == shapes(NNCLRProjectionHead(features, 12, 6))
    assert shapes(method.predictor) == shapes(NNCLRPredictionHead(6, 10, 6))


def test_autocast_rounds_neither_neighbours_nor_similarities():
    torch.manual_seed(0)
    z, p, queue = unit(64, 32), torch.randn(64, 32), unit(500, 32)
    with torch.autocast("cpu", torch.bfloat16):
        numbers = nearest(z, queue)
        rounded = neighbour_info_nce(queue[numbers], p, 0.07)
    assert torch.equal(numbers, nearest(z, queue))
    assert torch.equal(rounded, neighbour_info_nce(queue[numbers], p, 0.07))


def test_the_loss_is_the_mean_of_both_directions_and_the_first_view_is_queued_after_the_step():
    method, (x1, x2) = small(), views()
    queue = method.queue.rows.clone()
    z1, z2 = (method.projector(method.encoder(x)) for x in (x1, x2))
    p1, p2 = method.predictor(z1), method.predictor(z2)
    expected = (by_loop(z1, p2, queue, 0.2) + by_loop(z2, p1, queue, 0.2)) / 2
    output = method([x1, x2], torch.arange(4))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(method.queue.rows, queue)
    method.after_step(progress(1, 10, 1), output.rows)
    torch.testing.assert_close(method.queue.rows[:4], nnf.normalize(z1.detach(), dim=1))
    assert torch.equal(method.queue.rows[4:], queue[4:])


def test_an_image_in_the_queue_is_its_own_neighbour():
    method, (x1, x2) = small(), views(6)
    for _ in range(2):
        output = method([x1, x2], torch.arange(6))
        method.after_step(progress(1, 10, 1), output.rows)
    z1 = method.projector(method.encoder(x1)).detach()
    numbers = nearest(z1, method.queue.rows)
    assert numbers.remainder(6).tolist() == list(range(6))
    assert method([x1, x2], torch.arange(6)).metrics["distinct_neighbours"].item() == 1


def test_collapse_shows_in_spread_and_neighbours():
    method = small()
    with torch.no_grad():
        method.projector.get_parameter("7.weight").zero_()  # the last norm
        method.projector.get_parameter("7.bias").fill_(1.0)
    metrics = method(views(8), torch.arange(8)).metrics
    assert metrics["spread"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["distinct_neighbours"].item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("queue_size", "batch_size", "micro_batch", "message"),
    [
        (16, 16, 16, None),
        (100, 16, 16, None),
        (
            15,
            16,
            16,
            r"queue_size=15 is smaller than the 16 images of one step; use queue_size=64 or batch_size=15\.",
        ),
        (16, 16, 8, None),
        (12, 16, 8, "smaller than the 16 images"),
        (16, 1, 1, "batch_size=1 leaves NNCLR without negatives; use at least 2, "),
        (16, 4, 1, "batch_size=4 / accumulate=4 leaves NNCLR without negatives; use at least 8, "),
    ],
)
def test_what_is_refused(queue_size, batch_size, micro_batch, message):
    method = small(queue_size=queue_size)
    if message is None:
        assert method.prepare(batch_size, micro_batch, 100, 1) == []
    else:
        with pytest.raises(BadInput, match=message):
            method.prepare(batch_size, micro_batch, 100, 1)


def test_a_queue_longer_than_the_data_is_permitted_and_said():
    (note,) = small(queue_size=101).prepare(16, 16, 100, 1)
    assert note.startswith("queue_size=101 is more than the 100 training images")
