"""NT-Xent against a loop, a closed form and lightly; the two-process value is in test_distributed.py."""

import math

import pytest
import torch
from lightly.loss import DCLLoss, NTXentLoss

from twoviews.backbones import ResNet
from twoviews.errors import BadInput
from twoviews.methods.simclr import SimCLR, nt_xent


def by_loop(z1: torch.Tensor, z2: torch.Tensor, temperature: float, decoupled: bool = False) -> float:
    z = [[value / math.hypot(*row) for value in row] for row in [*z1.tolist(), *z2.tolist()]]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        similar = [math.exp(sum(a * b for a, b in zip(z[i], other, strict=True)) / temperature) for other in z]
        positive = (i + n) % (2 * n)
        left_out = {i, positive} if decoupled else {i}
        total -= math.log(similar[positive] / sum(s for k, s in enumerate(similar) if k not in left_out))
    return total / (2 * n)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_against_a_loop(temperature, decoupled):
    torch.manual_seed(0)
    z1, z2 = torch.randn(5, 4), torch.randn(5, 4)
    expected = by_loop(z1, z2, temperature, decoupled)
    assert nt_xent(z1, z2, temperature, decoupled).item() == pytest.approx(expected, rel=1e-5)


def test_closed_forms():
    """Equal pairs of orthogonal images; and everything in one point."""
    eye, one = torch.eye(6), torch.ones(6, 3)
    assert nt_xent(eye, eye, 0.5).item() == pytest.approx(math.log(1 + 10 * math.exp(-2)), rel=1e-6)
    assert nt_xent(one, one, 0.5).item() == pytest.approx(math.log(11), rel=1e-6)
    assert nt_xent(eye, eye, 0.5, decoupled=True).item() == pytest.approx(math.log(10) - 2, rel=1e-6)
    assert nt_xent(one, one, 0.5, decoupled=True).item() == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize(("decoupled", "loss"), [(False, NTXentLoss), (True, DCLLoss)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_and_gradient_are_lightlys(temperature, decoupled, loss):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 9, 8, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        b.copy_(a)
    ours = nt_xent(a[0], a[1], temperature, decoupled)
    theirs = loss(temperature)(b[0], b[1])
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_lengths_do_not_matter_and_order_of_views_neither():
    torch.manual_seed(0)
    z1, z2 = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(nt_xent(3 * z1, z2 / 7, 0.1), nt_xent(z1, z2, 0.1))
    torch.testing.assert_close(nt_xent(z2, z1, 0.1), nt_xent(z1, z2, 0.1))


def test_autocast_does_not_round_the_similarities():
    torch.manual_seed(0)
    z1, z2 = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = nt_xent(z1, z2, 0.07)
    assert torch.equal(rounded, nt_xent(z1, z2, 0.07))


@pytest.mark.parametrize("decoupled", [False, True])
def test_both_views_are_one_batch_for_the_batch_norms(decoupled):
    torch.manual_seed(0)
    encoder = ResNet(3, 16, "basic", [1, 1], width=4)
    method = SimCLR(encoder, hidden_dim=8, embed_dim=5, temperature=0.5, decoupled=decoupled)
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16) * 2 + 1
    z = method.projector(method.encoder(torch.cat([x1, x2])))
    expected = by_loop(z[:6], z[6:], 0.5, decoupled)
    assert method([x1, x2], torch.arange(6)).loss.item() == pytest.approx(expected, rel=1e-4)


def test_needs_negatives():
    method = SimCLR(ResNet(3, 16, "basic", [1], width=4), 8, 5, 0.5)
    method.prepare(2, 2, 100, 1)
    with pytest.raises(BadInput, match="batch_size=1 leaves SimCLR without negatives"):
        method.prepare(1, 1, 100, 1)
