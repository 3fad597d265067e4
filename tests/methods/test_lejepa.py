"""SIGReg and invariance against loops, closed forms and lightly; directions, views and refusals.

The two-process values are in test_distributed.py.
"""

import math

import pytest
import torch
from lightly.loss.lejepa_loss import LeJEPALoss

from twoviews.backbones import ResNet
from twoviews.errors import BadInput
from twoviews.methods.lejepa import LeJEPA, invariance, random_directions, sigreg

CPU = torch.device("cpu")


def small(**changes) -> LeJEPA:
    torch.manual_seed(0)
    options = {"hidden_dim": 12, "embed_dim": 6, "directions": 16, "sigreg_weight": 0.05}
    return LeJEPA(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def crops(*sides: int, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(count, 3, side, side) + 0.1 * number for number, side in enumerate(sides)]


def sigreg_by_loop(z: torch.Tensor, a: torch.Tensor) -> float:
    """Both sides of the integral, by the sum of trapezoids."""
    total, count, step = 0.0, z.shape[1], 3 / 16
    for view in z.double():
        for direction in a.T.double():
            s = (view @ direction).tolist()
            heights = []
            for knot in range(-16, 17):
                t = knot * step
                cos, sin = sum(math.cos(t * x) for x in s) / count, sum(math.sin(t * x) for x in s) / count
                heights.append(((cos - math.exp(-t * t / 2)) ** 2 + sin**2) * math.exp(-t * t / 2))
            total += count * step * (sum(heights) - (heights[0] + heights[-1]) / 2)
    return total / len(z) / a.shape[1]


def test_against_loops():
    torch.manual_seed(0)
    z, a = torch.randn(3, 7, 5), random_directions(5, 4, CPU)
    assert sigreg(z, a).item() == pytest.approx(sigreg_by_loop(z, a), rel=1e-4)
    total = 0.0
    for view in z.tolist():
        for row, *others in zip(view, *z[:2].tolist(), strict=True):
            total += sum((x - sum(ys) / 2) ** 2 for x, *ys in zip(row, *others, strict=True))
    assert invariance(z, z[:2]).item() == pytest.approx(total / (3 * 7 * 5), rel=1e-5)


def collapsed(power: int) -> float:
    """The integral of exp(-power t^2 / 2) over |t| < 3."""
    return math.sqrt(2 * math.pi / power) * math.erf(3 * math.sqrt(power / 2))


def test_closed_forms():
    """All embeddings 0; Gaussian ones, whose expectation does not depend on how many there are; equal views."""
    a = random_directions(6, 8, CPU)
    expected = 50 * (collapsed(1) - 2 * collapsed(2) + collapsed(3))
    assert sigreg(torch.zeros(2, 50, 6), a).item() == pytest.approx(expected, rel=1e-3)
    assert expected == pytest.approx(0.40 * 50, rel=0.01)
    gaussian = collapsed(1) - collapsed(3)
    torch.manual_seed(0)
    for count in (20, 500):
        z = torch.randn(400, count, 6)
        assert sigreg(z, a).item() == pytest.approx(gaussian, rel=0.1)
    assert gaussian == pytest.approx(1.05, abs=0.01)
    z = torch.randn(1, 9, 6).expand(4, -1, -1)
    assert invariance(z, z[:2]).item() == 0


@pytest.mark.parametrize("global_views", [1, 2])
def test_value_and_gradient_are_lightlys(global_views):
    torch.manual_seed(0)
    a, b = (torch.randn(4, 9, 8, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        b.copy_(a)
    torch.manual_seed(1)
    ours = 0.05 * sigreg(a, random_directions(8, 64, CPU)) + 0.95 * invariance(a, a[:global_views])
    torch.manual_seed(1)
    theirs = LeJEPALoss(0.05, sigreg_num_vectors=64)(local_proj=b[global_views:], global_proj=b[:global_views])
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_angles():
    torch.manual_seed(0)
    z, a = torch.randn(2, 64, 32), random_directions(32, 16, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sigreg(z, a)
    assert torch.equal(rounded, sigreg(z, a))


def test_directions_have_unit_length_and_follow_from_the_seed():
    torch.manual_seed(3)
    first, second = random_directions(6, 500, CPU), random_directions(6, 500, CPU)
    torch.manual_seed(3)
    assert torch.equal(random_directions(6, 500, CPU), first)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(500))
    torch.testing.assert_close(first @ first.T / 500, torch.eye(6) / 6, rtol=0, atol=0.05)


@pytest.mark.parametrize("sides", [(16, 16), (16, 16, 16), (16, 16, 8, 8, 8), (8, 16, 8)])
def test_views_of_the_largest_size_are_the_global_ones_wherever_they_stand(sides):
    method, views = small(), crops(*sides)
    method.eval()  # running statistics: views can be encoded one by one
    with torch.no_grad():
        z = torch.stack([method.projector(method.encoder(view)) for view in views])
        torch.manual_seed(5)
        expected = 0.05 * sigreg(z, random_directions(6, 16, CPU))
        expected += 0.95 * invariance(z, torch.stack([one for one, side in zip(z, sides, strict=True) if side == 16]))
        torch.manual_seed(5)
        output = method(views, torch.arange(4))
    torch.testing.assert_close(output.loss, expected)


def test_collapse_shows_in_spread_and_sigreg():
    method = small()
    with torch.no_grad():
        method.projector.get_parameter("6.weight").zero_()
    metrics = method(crops(16, 16, count=32), torch.arange(32)).metrics
    assert metrics["spread"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["sigreg"].item() > 0.35 * 32
    assert metrics["invariance"].item() == 0


def test_too_few_images_or_views_are_refused():
    method = small()
    assert method.prepare(2, 2, 100, 1) == []
    with pytest.raises(BadInput, match="batch_size=1 leaves LeJEPA without .* at least 2, "):
        method.prepare(1, 1, 100, 1)
    with pytest.raises(BadInput, match="batch_size=4 / accumulate=4 leaves LeJEPA without .* at least 8, "):
        method.prepare(4, 1, 100, 1)
    with pytest.raises(BadInput, match="the augmentation makes one; choose another augmentation"):
        method(crops(16), torch.arange(4))
