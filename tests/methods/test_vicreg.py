"""The terms of VICReg against a loop, closed forms and lightly; the two-process value is in test_distributed.py."""

import pytest
import torch
from lightly.loss import VICRegLoss
from torch import nn

from twoviews.backbones import ResNet
from twoviews.methods.vicreg import VICReg, covariance_matrix, covariance_term, variance_term

WEIGHTS = {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}


def small(**changes) -> VICReg:
    torch.manual_seed(0)
    options = {"hidden_dim": 12, "embed_dim": 6, **WEIGHTS, **changes}
    return VICReg(ResNet(3, 16, "basic", [1, 1], width=4), **options)


def by_loop(z1: torch.Tensor, z2: torch.Tensor, weights: tuple[float, float, float]) -> float:
    n, d = z1.shape
    rows = [z1.tolist(), z2.tolist()]
    invariance = sum((rows[0][b][i] - rows[1][b][i]) ** 2 for b in range(n) for i in range(d)) / (n * d)
    variance = covariance = 0.0
    for z in rows:
        means = [sum(row[i] for row in z) / n for i in range(d)]
        for i in range(d):
            for j in range(d):
                c = sum((row[i] - means[i]) * (row[j] - means[j]) for row in z) / (n - 1)
                if i == j:
                    variance += max(0.0, 1 - (c + 1e-4) ** 0.5) / d / 2
                else:
                    covariance += c**2 / d
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


class Given(nn.Module):
    """Gives prepared embeddings, in turn."""

    def __init__(self, *z: torch.Tensor):
        super().__init__()
        self.z = list(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.z.pop(0)


def loss_of(z1: torch.Tensor, z2: torch.Tensor, **weights: float) -> torch.Tensor:
    method = small(**weights)
    method.projector = Given(z1, z2)
    x = torch.zeros(len(z1), 3, 16, 16)
    return method([x, x], torch.arange(len(z1))).loss


def test_against_a_loop():
    torch.manual_seed(0)
    z1, z2 = torch.randn(7, 4) * 0.8 + 2, torch.randn(7, 4) * torch.tensor([0.1, 0.5, 1, 3])
    found = loss_of(z1, z2, invariance_weight=3, variance_weight=5, covariance_weight=2).item()
    assert found == pytest.approx(by_loop(z1, z2, (3, 5, 2)), rel=1e-5)


def test_closed_forms():
    """Uncorrelated dimensions with a deviation of more than 1; of 0.5; all equal; all dimensions the same."""
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * 0.75**0.5  # variance 1 with N - 1
    wide, narrow = covariance_matrix(2 * z + 3), covariance_matrix(z / 2)
    assert variance_term(wide).item() == 0 and covariance_term(wide).item() == pytest.approx(0, abs=1e-6)
    assert variance_term(narrow).item() == pytest.approx(1 - 0.2501**0.5, rel=1e-5)
    assert variance_term(covariance_matrix(torch.ones(4, 2))).item() == pytest.approx(0.99)
    assert covariance_term(covariance_matrix(z[:, :1].expand(4, 3))).item() == pytest.approx(2, rel=1e-5)
    assert loss_of(2 * z, 2 * z).item() == pytest.approx(0, abs=1e-6)


def test_value_and_gradient_are_lightlys():
    torch.manual_seed(0)
    a = (torch.randn(2, 9, 8) * 0.8).requires_grad_()
    b = a.detach().clone().requires_grad_()
    ours = loss_of(a[0], a[1])
    theirs = VICRegLoss()(b[0], b[1])
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_covariances():
    torch.manual_seed(0)
    z = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = covariance_matrix(z)
    assert torch.equal(rounded, covariance_matrix(z))


def test_equal_embeddings_have_a_finite_gradient():
    z = torch.ones(2, 5, 4, requires_grad=True)
    loss_of(z[0], z[1]).backward()
    assert z.grad.isfinite().all()


def test_loss_and_metrics_of_two_views():
    method = small()
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16) * 2 + 1
    z1, z2 = method.projector(method.encoder(x1)).detach(), method.projector(method.encoder(x2)).detach()
    output = method([x1, x2], torch.arange(6))
    assert output.loss.item() == pytest.approx(by_loop(z1, z2, (25, 25, 1)), rel=1e-4)
    torch.testing.assert_close(output.metrics["std"], z1.std(0).mean())
    torch.testing.assert_close(output.metrics["invariance"], (z1 - z2).square().mean())


def test_collapse_is_seen():
    method, x = small(), torch.randn(8, 3, 16, 16)
    nn.init.zeros_(method.projector[4].weight)
    nn.init.ones_(method.projector[4].bias)
    metrics = method([x, x], torch.arange(8)).metrics
    assert metrics["spread"] < 0.1 and metrics["std"] < 0.01


def test_structure():
    """Three layers, norms on the hidden ones, and no biases, which the loss would not see."""
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    projector = small().projector
    assert [type(layer) for layer in projector] == [*hidden, *hidden, nn.Linear]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert [layer.out_features for layer in projector if isinstance(layer, nn.Linear)] == [12, 12, 6]
