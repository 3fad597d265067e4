"""The regression loss against a loop, closed forms and lightly; the target's path."""

import math

import pytest
import torch
from assembled import progress
from lightly.loss import NegativeCosineSimilarity

from twoviews.backbones import ResNet
from twoviews.methods.byol import BYOL, regression_loss


def small(momentum: float = 0.9) -> BYOL:
    torch.manual_seed(0)
    return BYOL(ResNet(3, 16, "basic", [1, 1], width=4), hidden_dim=10, embed_dim=6, momentum=momentum)


def test_against_a_loop_and_lightly():
    torch.manual_seed(0)
    p, z = torch.randn(7, 5), torch.randn(7, 5)
    total = 0.0
    for x, y in zip(p.tolist(), z.tolist(), strict=True):
        total += sum((a / math.hypot(*x) - b / math.hypot(*y)) ** 2 for a, b in zip(x, y, strict=True))
    assert regression_loss(p, z).item() == pytest.approx(total / 7, rel=1e-5)
    torch.testing.assert_close(regression_loss(p, z), 2 + 2 * NegativeCosineSimilarity()(p, z))


def test_closed_forms():
    z = torch.eye(4)
    assert regression_loss(3 * z, z).item() == pytest.approx(0, abs=1e-6)
    assert regression_loss(z.roll(1, 0), z).item() == pytest.approx(2)
    assert regression_loss(-z, z).item() == pytest.approx(4)


def test_the_target_follows_by_the_tau_of_the_step():
    method = small()
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    assert all(torch.equal(t, o) for t, o in zip(method.target.parameters(), online, strict=True))
    before = [parameter.clone() for parameter in method.target.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(torch.randn_like(parameter))
    method([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)], torch.arange(4))
    buffers = {key: value.clone() for key, value in method.target.named_buffers()}
    method.after_step(progress(30, 10, 12), {})
    tau = 1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2
    for target, old, new in zip(method.target.parameters(), before, online, strict=True):
        torch.testing.assert_close(target.detach(), tau * old + (1 - tau) * new.detach())
    assert all(torch.equal(value, buffers[key]) for key, value in method.target.named_buffers())


def test_the_loss_and_its_gradient_take_targets_as_constants():
    method = small()
    with torch.no_grad():
        for parameter in method.target.parameters():
            parameter.mul_(1.1)
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
    learnt = [parameter for parameter in method.parameters() if parameter.requires_grad]
    loss = 0
    for x, other in ((x1, x2), (x2, x1)):
        p, t = method.predictor(method.projector(method.encoder(x))), method.target(other).detach()
        loss = loss + (p / p.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(1).mean()
    expected = torch.autograd.grad(loss, learnt)
    found = method([x1, x2], torch.arange(6)).loss
    torch.testing.assert_close(found, loss)
    for one, other in zip(torch.autograd.grad(found, learnt), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in method.target.parameters())


def test_the_target_keeps_batch_statistics_of_its_own():
    method = small()
    x1, x2 = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16) + 3
    method([x1, x2], torch.arange(4))
    assert method.target[0].bn1.num_batches_tracked.item() == 2
    method.encoder.bn1.running_mean.fill_(9.0)
    assert not method.target[0].bn1.running_mean.eq(9).any()
