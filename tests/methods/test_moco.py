"""InfoNCE against a loop, a closed form and lightly; queue, key encoder, shuffling and refusals."""

import math

import pytest
import torch
from assembled import progress
from lightly.loss import NTXentLoss
from torch import nn
from torch.nn import functional as nnf

from twoviews.backbones import ResNet
from twoviews.batch_norms import SplitBatchNorm
from twoviews.errors import BadInput
from twoviews.methods.moco import MoCo, info_nce

DONE = progress(1, 10, 1)


def small(**changes) -> MoCo:
    torch.manual_seed(0)
    options = {
        "embed_dim": 6,
        "queue_size": 20,
        "momentum": 0.9,
        "temperature": 0.1,
        "mlp_head": False,
        "symmetric": False,
        "bn_splits": 1,
    }
    return MoCo(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def unit(*shape: int) -> torch.Tensor:
    return nnf.normalize(torch.randn(*shape), dim=-1)


def views(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(count, 3, 16, 16), torch.randn(count, 3, 16, 16) + 0.5]


def by_loop(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for query, key in zip(q.tolist(), k.tolist(), strict=True):
        logits = [
            sum(a * b for a, b in zip(query, other, strict=True)) / temperature for other in [key, *queue.tolist()]
        ]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[0]
    return total / len(q)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_info_nce_against_a_loop(temperature):
    torch.manual_seed(0)
    q, k, queue = unit(5, 4), unit(5, 4), unit(11, 4)
    assert info_nce(q, k, queue, temperature).item() == pytest.approx(by_loop(q, k, queue, temperature), rel=1e-5)


def test_info_nce_closed_forms():
    """Key equal to query and all negatives orthogonal; and everything in one point."""
    eye = torch.eye(8)
    assert info_nce(eye[:3], eye[:3], eye[3:], 0.5).item() == pytest.approx(math.log(1 + 5 * math.exp(-2)), rel=1e-6)
    one = eye[:1]
    assert info_nce(one.expand(3, 8), one.expand(3, 8), one.expand(5, 8), 0.1).item() == pytest.approx(math.log(6))


def test_info_nce_is_lightlys():
    torch.manual_seed(0)
    a, b, k, queue = unit(7, 8).requires_grad_(), torch.empty(7, 8).requires_grad_(), unit(7, 8), unit(33, 8)
    with torch.no_grad():
        b.copy_(a)
    theirs = NTXentLoss(0.1, memory_bank_size=(33, 8))
    theirs.memory_bank.bank.copy_(queue)
    ours, loss = info_nce(a, k, queue, 0.1), theirs(b, k)
    torch.testing.assert_close(ours, loss)
    ours.backward()
    loss.backward()
    # Theirs normalises the queries once more, which takes the part along them out of the gradient.
    along = (a.grad * a.detach()).sum(1, keepdim=True) * a.detach()
    torch.testing.assert_close(a.grad - along, b.grad, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_similarities():
    torch.manual_seed(0)
    q, k, queue = unit(16, 32), unit(16, 32), unit(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(q, k, queue, 0.07)
    assert torch.equal(rounded, info_nce(q, k, queue, 0.07))


@pytest.mark.parametrize("mlp_head", [False, True])
def test_head_and_key_encoder_start(mlp_head):
    method = small(mlp_head=mlp_head)
    kinds = [nn.Linear, nn.ReLU, nn.Linear] if mlp_head else [nn.Linear]
    assert [type(layer) for layer in method.projector] == kinds
    assert all(layer.bias is not None for layer in method.projector if isinstance(layer, nn.Linear))
    query = {
        **{f"0.{key}": value for key, value in method.encoder.state_dict().items()},
        **{f"1.{key}": value for key, value in method.projector.state_dict().items()},
    }
    keys = method.key_encoder.state_dict()
    assert keys.keys() == query.keys()
    assert all(torch.equal(value, query[name]) for name, value in keys.items())
    assert not any(parameter.requires_grad for parameter in method.key_encoder.parameters())
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(20))


def test_parameters_are_as_many_as_the_demos():
    encoder = ResNet(3, 32, "basic", [2, 2, 2, 2])
    method = MoCo(encoder, 128, 4096, 0.99, 0.1, mlp_head=False, symmetric=False, bn_splits=8)
    assert sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad) == 11_234_496
    assert sum(parameter.numel() for parameter in method.key_encoder.parameters()) == 11_234_496


@pytest.mark.parametrize(("mlp_head", "parameters"), [(False, 23_770_304), (True, 27_966_656)])
def test_parameters_are_as_many_as_on_imagenet(mlp_head, parameters):
    encoder = ResNet(3, 224, "bottleneck", [3, 4, 6, 3], stem="imagenet")
    method = MoCo(encoder, 128, 64, 0.999, 0.07, mlp_head=mlp_head, symmetric=False, bn_splits=8)
    assert sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad) == parameters


def test_one_view_is_query_the_other_key_and_keys_are_queued_after_the_step():
    method, (x1, x2) = small(), views()
    queue = method.queue.rows.clone()
    with torch.no_grad():
        q = nnf.normalize(method.projector(method.encoder(x1)), dim=1)
        k = nnf.normalize(method.key_encoder(x2), dim=1)
    output = method([x1, x2], torch.arange(4))
    method.after_step(DONE, output.rows)
    assert output.loss.item() == pytest.approx(by_loop(q, k, queue, 0.1), rel=1e-4)
    torch.testing.assert_close(method.queue.rows[:4], k)
    assert torch.equal(method.queue.rows[4:], queue[4:])
    assert method.queue.position.item() == 4


def test_symmetric_is_the_sum_over_both_directions_on_one_queue():
    method, (x1, x2) = small(symmetric=True), views()
    queue = method.queue.rows.clone()
    with torch.no_grad():
        q1, q2 = (nnf.normalize(method.projector(method.encoder(x)), dim=1) for x in (x1, x2))
        k1, k2 = (nnf.normalize(method.key_encoder(x), dim=1) for x in (x1, x2))
    output = method([x1, x2], torch.arange(4))
    method.after_step(DONE, output.rows)
    assert output.loss.item() == pytest.approx(by_loop(q1, k2, queue, 0.1) + by_loop(q2, k1, queue, 0.1), rel=1e-4)
    torch.testing.assert_close(method.queue.rows[:8], torch.cat([k1, k2]))
    assert torch.equal(method.queue.rows[8:], queue[8:])
    assert method.queue.position.item() == 8


def test_gradient_flows_only_through_queries():
    method, (x1, x2) = small(symmetric=True), views()
    queue = method.queue.rows.clone()
    k1, k2 = (nnf.normalize(method.key_encoder(x), dim=1).detach() for x in (x1, x2))
    q1, q2 = (nnf.normalize(method.projector(method.encoder(x)), dim=1) for x in (x1, x2))
    learnt = [*method.encoder.parameters(), *method.projector.parameters()]
    expected = torch.autograd.grad(info_nce(q1, k2, queue, 0.1) + info_nce(q2, k1, queue, 0.1), learnt)
    method([x1, x2], torch.arange(4)).loss.backward()
    for parameter, gradient in zip(learnt, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in method.key_encoder.parameters())
    assert not method.queue.rows.requires_grad


def test_key_encoder_follows_in_parameters_and_keeps_its_own_statistics():
    method = small(momentum=0.75)
    rows = method(views(), torch.arange(4)).rows
    query = [*method.encoder.parameters(), *method.projector.parameters()]
    before = [parameter.clone() for parameter in method.key_encoder.parameters()]
    buffers = {key: value.clone() for key, value in method.key_encoder.named_buffers()}
    # The views differ, so the two encoders have seen other statistics.
    assert not torch.allclose(buffers["0.bn1.running_mean"], method.encoder.bn1.running_mean)
    with torch.no_grad():
        for parameter in query:
            parameter.add_(torch.randn_like(parameter))
    method.after_step(DONE, rows)
    for key, old, new in zip(method.key_encoder.parameters(), before, query, strict=True):
        torch.testing.assert_close(key, 0.75 * old + 0.25 * new.detach())
    assert all(torch.equal(value, buffers[name]) for name, value in method.key_encoder.named_buffers())


class Recorder(nn.Module):
    """Passes flattened images on and remembers the order in which they came."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.flatten(1))
        return x.flatten(1)


@pytest.mark.parametrize("splits", [1, 2])
def test_keys_are_shuffled_for_the_norms_and_come_back_in_order(splits):
    method = small(bn_splits=splits, embed_dim=27)
    method.key_encoder = Recorder()
    x = torch.randn(16, 3, 3, 3)
    rows = x.flatten(1)
    torch.testing.assert_close(method._keys(x), nnf.normalize(rows, dim=1))
    torch.testing.assert_close(method._keys(x), nnf.normalize(rows, dim=1))
    first, second = method.key_encoder.seen
    assert torch.equal(first, rows) is (splits == 1)
    assert torch.equal(first, second) is (splits == 1)
    # Every image is there once.
    assert sorted(first[:, 0].tolist()) == sorted(rows[:, 0].tolist())


def test_split_norms_are_in_both_encoders_and_only_there_when_asked_for():
    for splits in (1, 4):
        method = small(bn_splits=splits)
        for encoder in (method.encoder, method.key_encoder):
            found = [type(module) for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
            assert set(found) == ({SplitBatchNorm} if splits > 1 else {nn.BatchNorm2d})


@pytest.mark.parametrize(
    ("options", "batch_size", "images", "processes", "message"),
    [
        ({"queue_size": 100}, 10, 100, 1, None),
        ({"queue_size": 101}, 10, 100, 1, r"queue_size=101 is larger than the 100 training images.*queue_size=50\."),
        ({"queue_size": 16}, 16, 100, 1, None),
        (
            {"queue_size": 15},
            16,
            100,
            1,
            r"queue_size=15 is smaller than the 16 keys of .* queue_size=64 or batch_size=15\.",
        ),
        ({"queue_size": 31, "symmetric": True}, 16, 100, 1, "smaller than the 32 keys of .* batch_size=15"),
        ({"queue_size": 32, "symmetric": True}, 16, 100, 1, None),
        ({"bn_splits": 8}, 16, 100, 1, None),
        ({"bn_splits": 8}, 16, 100, 4, None),
        ({"bn_splits": 8}, 20, 100, 1, "bn_splits=8 needs .* use batch_size=16 or bn_splits=1"),
        ({"bn_splits": 8}, 8, 100, 1, "at least 16"),
        ({"bn_splits": 8}, 16, 100, 3, r"processes that divides it.* 3 process\(es\): use bn_splits=1\."),
    ],
)
def test_check(options, batch_size, images, processes, message):
    method = small(**{"queue_size": 64, **options})
    if message is None:
        method.prepare(batch_size, batch_size, images, processes)
    else:
        with pytest.raises(BadInput, match=message):
            method.prepare(batch_size, batch_size, images, processes)
