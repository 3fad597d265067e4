"""InfoNCE within the batch against a loop, closed forms and lightly; heads, key encoder and vision transformers."""

import math

import pytest
import torch
from assembled import progress
from lightly.loss import NTXentLoss
from torch import nn
from torch.nn import functional as nnf

from twoviews.backbones import Encoder, ResNet, Timm
from twoviews.errors import BadInput
from twoviews.methods.moco_v3 import MoCoV3, in_batch_info_nce


def small(encoder: Encoder | None = None, **changes) -> MoCoV3:
    torch.manual_seed(0)
    options = {
        "hidden_dim": 10,
        "embed_dim": 6,
        "projector_layers": 2,
        "momentum": 0.9,
        "temperature": 0.2,
        "freeze_patch_embed": False,
    }
    return MoCoV3(encoder or ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def by_loop(q: torch.Tensor, k: torch.Tensor, temperature: float) -> float:
    total = 0.0
    keys = [[x / math.hypot(*key) for x in key] for key in k.tolist()]
    for number, query in enumerate(q.tolist()):
        length = math.hypot(*query)
        logits = [sum(a * b for a, b in zip(query, key, strict=True)) / length / temperature for key in keys]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[number]
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_against_a_loop(temperature):
    torch.manual_seed(0)
    q, k = torch.randn(7, 4), torch.randn(7, 4)
    assert in_batch_info_nce(q, k, temperature).item() == pytest.approx(by_loop(q, k, temperature), rel=1e-5)


def test_loss_closed_forms():
    """Keys equal to queries and orthogonal to each other; and everything in one point."""
    eye = torch.eye(8)
    expected = 2 * 0.5 * math.log(1 + 7 * math.exp(-2))
    assert in_batch_info_nce(3 * eye, eye, 0.5).item() == pytest.approx(expected, rel=1e-5)
    point = eye[:1].expand(6, 8)
    assert in_batch_info_nce(point, point, 0.1).item() == pytest.approx(0.2 * math.log(6))


def test_loss_is_lightlys_with_the_other_keys_as_its_memory_bank():
    torch.manual_seed(0)
    q, k = torch.randn(5, 8, requires_grad=True), nnf.normalize(torch.randn(5, 8), dim=1)
    theirs = torch.zeros(())
    for number in range(5):
        loss = NTXentLoss(0.2, memory_bank_size=(4, 8))
        loss.memory_bank.bank.copy_(torch.cat([k[:number], k[number + 1 :]]))
        theirs = theirs + loss(q[number : number + 1], k[number : number + 1]) / 5
    ours = in_batch_info_nce(q, k, 0.2)
    torch.testing.assert_close(ours, 2 * 0.2 * theirs)
    (expected,), (gradient,) = torch.autograd.grad(2 * 0.2 * theirs, q), torch.autograd.grad(ours, q)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_similarities():
    torch.manual_seed(0)
    q, k = torch.randn(16, 32), torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = in_batch_info_nce(q, k, 0.1)
    assert torch.equal(rounded, in_batch_info_nce(q, k, 0.1))


def test_both_directions_are_added_and_gradient_flows_through_queries_alone():
    method = small()
    with torch.no_grad():
        for parameter in method.key_encoder.parameters():
            parameter.mul_(1.1)
    x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16) + 0.5
    q1, q2 = (method.predictor(method.projector(method.encoder(x))) for x in (x1, x2))
    k1, k2 = (method.key_encoder(x).detach() for x in (x1, x2))
    expected = by_loop(q1, k2, 0.2) + by_loop(q2, k1, 0.2)
    learnt = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(in_batch_info_nce(q1, k2, 0.2) + in_batch_info_nce(q2, k1, 0.2), learnt)
    output = method([x1, x2], torch.arange(6))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    for found, gradient in zip(torch.autograd.grad(output.loss, learnt), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in method.key_encoder.parameters())


def test_keys_follow_without_the_predictor_by_the_momentum_of_the_step():
    method = small(momentum=0.8)
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    before = [parameter.clone() for parameter in method.key_encoder.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(torch.randn_like(parameter))
    method.after_step(progress(60, 10, 12), {})
    momentum = 1 - 0.2 * (math.cos(math.pi / 2) + 1) / 2
    for key, old, new in zip(method.key_encoder.parameters(), before, online, strict=True):
        torch.testing.assert_close(key.detach(), momentum * old + (1 - momentum) * new.detach())


@pytest.mark.parametrize("layers", [2, 3])
def test_heads_are_the_authors(layers):
    """Linear layers without bias, each with a norm; the output's norm has no scale and no offset."""
    method = small(projector_layers=layers)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in method.projector] == [*hidden * (layers - 1), nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in method.predictor] == [*hidden, nn.Linear, nn.BatchNorm1d]
    for head in (method.projector, method.predictor):
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
        assert head[1].affine and not head[-1].affine


def test_parameters_are_as_many_as_the_authors_on_imagenet():
    """moco-v3's ResNet-50: 23,508,032 in the encoder, 4096-256 in both heads."""
    encoder = ResNet(3, 224, "bottleneck", [3, 4, 6, 3], stem="imagenet")
    method = small(encoder, hidden_dim=4096, embed_dim=256)
    heads = 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256 * 4096 + 2 * 4096 + 4096 * 256
    learnt = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    assert learnt == 23_508_032 + heads


@pytest.mark.parametrize("frozen", [False, True])
def test_the_patch_projection_of_a_transformer_stays_as_it_was_if_frozen(frozen):
    torch.manual_seed(0)
    method = small(Timm(3, 32, "test_vit"), projector_layers=3, freeze_patch_embed=frozen)
    patches = [parameter for name, parameter in method.encoder.named_parameters() if "patch_embed" in name]
    before = {key: value.clone() for key, value in method.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1, weight_decay=0.1)
    output = method([torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)], torch.arange(4))
    output.loss.backward()
    optimizer.step()
    method.after_step(progress(1, 10, 1), output.rows)
    assert patches and all(parameter.requires_grad is not frozen for parameter in patches)
    for key, value in method.encoder.state_dict().items():
        same = torch.equal(value, before[key])
        assert same if frozen and "patch_embed" in key else not same, key


def test_freezing_patches_of_a_network_without_them_is_refused():
    with pytest.raises(BadInput, match=r"freeze_patch_embed=true is for vision transformers.*freeze_patch_embed=false"):
        small(freeze_patch_embed=True)
