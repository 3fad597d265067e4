"""The negative cosine against a loop, closed forms and lightly; the structure against the authors' numbers."""

import math

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import nn

from twoviews.backbones import ResNet
from twoviews.errors import BadInput
from twoviews.methods.simsiam import SimSiam, negative_cosine


def small(**changes) -> SimSiam:
    torch.manual_seed(0)
    options = {"embed_dim": 12, "hidden_dim": 6, "projector_layers": 2, "fix_predictor_lr": True, **changes}
    return SimSiam(ResNet(3, 16, "basic", [1, 1], width=4), **options)


def trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_against_a_loop_and_lightly():
    torch.manual_seed(0)
    p, z = torch.randn(7, 5), torch.randn(7, 5)
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)
        for x, y in zip(p.tolist(), z.tolist(), strict=True)
    ]
    assert negative_cosine(p, z).item() == pytest.approx(-sum(cosines) / 7, rel=1e-5)
    torch.testing.assert_close(negative_cosine(p, z), NegativeCosineSimilarity()(p, z))


def test_closed_forms():
    z = torch.eye(4)
    assert negative_cosine(3 * z, z).item() == pytest.approx(-1)
    assert negative_cosine(-z, 2 * z).item() == pytest.approx(1)
    assert negative_cosine(z.roll(1, 0), z).item() == 0


def test_no_gradient_flows_into_z():
    p, z = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    negative_cosine(p, z).backward()
    assert z.grad is None
    assert p.grad.abs().sum() > 0


def test_the_loss_and_its_gradient_take_projections_as_constants():
    method = small()
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
    z1, z2 = method.projector(method.encoder(x1)), method.projector(method.encoder(x2))
    constants = [z1.detach().clone(), z2.detach().clone()]
    loss = 0
    for p, z in ((method.predictor(z1), constants[1]), (method.predictor(z2), constants[0])):
        loss = loss - (p * z).sum(1).div(p.norm(dim=1) * z.norm(dim=1)).mean() / 2
    expected = torch.autograd.grad(loss, list(method.parameters()))
    found = method([x1, x2], torch.arange(6)).loss
    torch.testing.assert_close(found, loss)
    for one, other in zip(torch.autograd.grad(found, list(method.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_each_of_four_views_predicts_the_mean_of_the_others():
    method = small()
    views = [torch.randn(6, 3, 16, 16) for _ in range(4)]
    z = [method.projector(method.encoder(x)) for x in views]
    loss = 0.0
    for v in range(4):
        p, target = method.predictor(z[v]), sum(z[u] for u in range(4) if u != v) / 3
        loss -= nn.functional.cosine_similarity(p, target.detach()).mean().item() / 4
    assert method(views, torch.arange(6)).loss.item() == pytest.approx(loss, rel=1e-5)


def test_one_view_is_refused():
    with pytest.raises(BadInput, match="at least 2 views of an image and the augmentation makes 1"):
        small()([torch.zeros(2, 3, 16, 16)], torch.arange(2))


@pytest.mark.parametrize("layers", [2, 3])
def test_structure(layers):
    """Norms on every layer of the projector, the last without scale; a bias only at the predictor's end."""
    method = small(projector_layers=layers)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in method.projector] == hidden * (layers - 1) + [nn.Linear, nn.BatchNorm1d]
    assert not method.projector[-1].affine
    assert all(layer.affine for layer in method.projector[1:-1:3])
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, nn.Linear))
    assert [type(layer) for layer in method.predictor] == [*hidden, nn.Linear]
    assert method.predictor[0].bias is None
    assert method.predictor[-1].bias is not None
    assert [method.predictor[0].out_features, method.predictor[-1].out_features] == [6, 12]


def test_parameters_are_as_many_as_the_authors():
    """38,199,360 trainable ones with ResNet-50, 3 layers and 2048-512-2048; their frozen last bias is left out here."""
    encoder = ResNet(3, 224, "bottleneck", [3, 4, 6, 3], stem="imagenet")
    method = SimSiam(encoder, embed_dim=2048, hidden_dim=512, projector_layers=3, fix_predictor_lr=True)
    assert trainable(method) == 38_199_360


@pytest.mark.parametrize("fixed", [True, False])
def test_the_predictor_is_a_group_of_its_own(fixed):
    method = small(fix_predictor_lr=fixed)
    first, second = method.param_groups()
    assert {id(p) for p in second["params"]} == {id(p) for p in method.predictor.parameters()}
    assert {id(p) for p in first["params"]} == {
        id(p) for p in [*method.encoder.parameters(), *method.projector.parameters()]
    }
    assert second["fixed_lr"] is fixed
    assert not first.get("fixed_lr")
