"""The loss of Barlow Twins against a loop, closed forms and lightly; the two-process value is in test_distributed.py."""

import pytest
import torch
from lightly.loss import BarlowTwinsLoss
from torch import nn

from twoviews.backbones import ResNet
from twoviews.errors import BadInput
from twoviews.methods.barlow import BarlowTwins, cross_correlation, redundancy_reduction


def small(**changes) -> BarlowTwins:
    torch.manual_seed(0)
    options = {"hidden_dim": 12, "embed_dim": 6, "off_diagonal_weight": 0.0051, "loss_scale": 0.1, **changes}
    return BarlowTwins(ResNet(3, 16, "basic", [1, 1], width=4), **options)


def by_loop(z1: torch.Tensor, z2: torch.Tensor, weight: float) -> float:
    def columns(z: torch.Tensor) -> list[list[float]]:
        result = []
        for values in z.T.tolist():
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            result.append([(value - mean) / (variance + 1e-5) ** 0.5 for value in values])
        return result

    total = 0.0
    for i, first in enumerate(columns(z1)):
        for j, second in enumerate(columns(z2)):
            c = sum(a * b for a, b in zip(first, second, strict=True)) / len(first)
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


@pytest.mark.parametrize("weight", [0.0051, 0.5])
def test_against_a_loop(weight):
    torch.manual_seed(0)
    z1, z2 = torch.randn(7, 4) * 3 + 2, torch.randn(7, 4)
    assert redundancy_reduction(cross_correlation(z1, z2), weight).item() == pytest.approx(
        by_loop(z1, z2, weight), rel=1e-5
    )


def test_closed_forms():
    """Uncorrelated dimensions and equal views; opposite views; all dimensions the same."""
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert redundancy_reduction(cross_correlation(5 * z + 3, z), 0.5).item() == pytest.approx(0, abs=1e-6)
    assert redundancy_reduction(cross_correlation(z, -z), 0.5).item() == pytest.approx(8, rel=1e-4)
    same = z[:, :1].expand(4, 3)
    assert redundancy_reduction(cross_correlation(same, same), 0.5).item() == pytest.approx(3, rel=1e-4)


def test_value_and_gradient_are_lightlys():
    torch.manual_seed(0)
    a = torch.randn(2, 9, 8, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ours = redundancy_reduction(cross_correlation(a[0], a[1]), 0.0051)
    theirs = BarlowTwinsLoss(lambda_param=0.0051)(b[0], b[1])
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_correlations():
    torch.manual_seed(0)
    z1, z2 = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cross_correlation(z1, z2)
    assert torch.equal(rounded, cross_correlation(z1, z2))


def test_loss_and_metrics_of_two_views():
    method = small(loss_scale=0.3)
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16) * 2 + 1
    z1, z2 = method.projector(method.encoder(x1)), method.projector(method.encoder(x2))
    output = method([x1, x2], torch.arange(6))
    assert output.loss.item() == pytest.approx(0.3 * by_loop(z1, z2, 0.0051), rel=1e-4)
    c = cross_correlation(z1, z2).detach()
    off = c[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(output.metrics["agreement"], c.trace() / 6)
    torch.testing.assert_close(output.metrics["redundancy"], off.square().mean().sqrt())


def test_collapse_is_seen():
    """Embeddings that do not depend on the image, and ones of which all dimensions say the same."""
    method, x = small(), torch.randn(8, 3, 16, 16)
    nn.init.zeros_(method.projector[4].weight)
    nn.init.ones_(method.projector[4].bias)
    assert method([x, x], torch.arange(8)).metrics["spread"] < 0.1
    method = small()
    with torch.no_grad():
        method.projector[-1].weight.copy_(method.projector[-1].weight[:1].expand(6, -1).clone())
    assert method([x, x], torch.arange(8)).metrics["redundancy"] > 0.99


def test_structure():
    """Three layers, norms on the hidden ones, and no bias at all in front of norms or correlations."""
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    projector = small().projector
    assert [type(layer) for layer in projector] == [*hidden, *hidden, nn.Linear]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert [layer.out_features for layer in projector if isinstance(layer, nn.Linear)] == [12, 12, 6]


@pytest.mark.parametrize(("batch_size", "micro_batch", "least"), [(2, 2, 3), (8, 2, 12)])
def test_two_images_have_no_correlations(batch_size, micro_batch, least):
    method = small()
    method.prepare(least, 3, 100, 1)
    with pytest.raises(BadInput, match=f"correlations over 2 images are 1 or -1 .* batch_size of at least {least}"):
        method.prepare(batch_size, micro_batch, 100, 1)
