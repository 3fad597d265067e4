"""The loss against a loop, closed forms and lightly; center, temperature, frozen prototypes and crops."""

import math

import numpy as np
import pytest
import torch
from assembled import progress
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch.nn import functional as nnf

from twoviews.backbones import Encoder, ResNet, Timm
from twoviews.errors import BadInput
from twoviews.methods.dino import DINO, self_distillation


def small(encoder: Encoder | None = None, **changes) -> DINO:
    torch.manual_seed(0)
    options = {
        "hidden_dim": 10,
        "embed_dim": 6,
        "prototypes": 9,
        "head_norm": True,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "teacher_start_temperature": 0.04,
        "teacher_warmup_epochs": 3,
        "teacher_crops": 2,
        "momentum": 0.9,
        "center_momentum": 0.9,
        "freeze_prototypes_epochs": 0,
    }
    return DINO(encoder or ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def crops(*sides: int, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(count, 3, side, side) + 0.2 * number for number, side in enumerate(sides)]


def by_loop(student: torch.Tensor, p_t: torch.Tensor, temperature: float) -> float:
    total, pairs = 0.0, 0
    for a, teacher in enumerate(p_t.tolist()):
        for v, outputs in enumerate(student.tolist()):
            if v == a:
                continue
            pairs += 1
            for p, row in zip(teacher, outputs, strict=True):
                norm = math.log(sum(math.exp(x / temperature) for x in row))
                total -= sum(share * (x / temperature - norm) for share, x in zip(p, row, strict=True)) / len(teacher)
    return total / pairs


@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (5, 2), (3, 1)])
def test_loss_against_a_loop(views, teachers):
    torch.manual_seed(0)
    student, p_t = torch.randn(views, 4, 6), torch.randn(teachers, 4, 6).softmax(2)
    assert self_distillation(student, p_t, 0.3).item() == pytest.approx(by_loop(student, p_t, 0.3), rel=1e-5)


def test_loss_closed_forms():
    """A student without an opinion pays ln K; one that agrees with the teacher, the teacher's entropy."""
    p_t = torch.randn(2, 4, 6).softmax(2)
    assert self_distillation(torch.zeros(3, 4, 6), p_t, 0.1).item() == pytest.approx(math.log(6), rel=1e-5)
    same = p_t[:1].expand(2, 4, 6)
    entropy = torch.special.entr(same[0]).sum(1).mean().item()
    assert self_distillation(0.1 * same.log(), same, 0.1).item() == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("sides", [(16, 16), (16, 16, 8, 8, 8)])
def test_loss_and_center_are_lightlys_step_after_step(sides):
    """Lightly moves its center within the loss, ours moves in `after_step`."""
    method, theirs = small(), DINOLoss(9, center_momentum=0.9)
    for number in range(3):
        views = crops(*sides)
        with torch.no_grad():
            teacher = [
                nnf.linear(nnf.normalize(t, dim=1), nnf.normalize(method.teacher_prototypes.weight, dim=1))
                for t in method.teacher(torch.cat(views[:2])).chunk(2)
            ]
        groups = [group for group in (views[:2], views[2:]) if group]
        features = torch.cat([method.encoder(torch.cat(group)) for group in groups])
        z = nnf.normalize(method.projector(features), dim=1)
        student = nnf.linear(z, nnf.normalize(method.prototypes.weight, dim=1)).chunk(len(sides))
        expected = theirs(teacher, list(student), teacher_temp=method.temperature.item())
        output = method(views, torch.arange(4))
        torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-6)
        method.after_step(progress(number + 1, 2, 9), output.rows)
        torch.testing.assert_close(method.center, theirs.center.flatten(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():  # so that the teacher's weights matter
            for parameter in (*method.encoder.parameters(), method.prototypes.weight):
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("norm", [False, True])
def test_the_head_is_lightlys(norm):
    method = small(head_norm=norm)
    theirs = DINOProjectionHead(8, 10, 6, 9, batch_norm=norm)
    if norm:  # the authors' linear layers have a bias there, too, lightly's have none
        for layer in (method.projector[0], method.projector[3]):
            layer.bias = None
    theirs.layers.load_state_dict(method.projector.state_dict())
    theirs.last_layer.weight_v.data.copy_(method.prototypes.weight)
    x = torch.randn(5, 8)
    found = method.prototypes(nnf.normalize(method.projector(x), dim=1))
    torch.testing.assert_close(found, theirs(x))


def test_parameters_are_as_many_as_the_authors():
    """A ResNet-50 with a head of 2048-2048-256 and 65,536 outputs, whose gains are fixed."""
    encoder = ResNet(3, 224, "bottleneck", [3, 4, 6, 3], stem="imagenet")
    method = small(encoder, hidden_dim=2048, embed_dim=256, prototypes=65_536, head_norm=False)
    head = 2 * (2048 * 2048 + 2048) + 2048 * 256 + 256 + 256 * 65_536
    assert sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad) == 23_508_032 + head


@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 6])
def test_the_teachers_temperature_rises_by_epochs_as_the_authors(warmup):
    method, epochs, steps = small(teacher_warmup_epochs=warmup), 5, 3
    expected = [*np.linspace(0.04, 0.07, warmup), *[0.07] * epochs][:epochs]
    found = []
    for step in range(epochs * steps):
        found.append(method.temperature.item())
        method.after_step(progress(step + 1, steps, epochs), {"t": torch.zeros(4, 6)})
    assert found == pytest.approx(np.repeat(expected, steps).tolist(), rel=1e-6)


def test_whole_numbers_are_temperatures_too():
    method = small(teacher_start_temperature=1, teacher_temperature=2, teacher_warmup_epochs=2)
    assert method.temperature.dtype == torch.float32 and method.temperature == 1
    assert small(teacher_start_temperature=1, teacher_temperature=2, teacher_warmup_epochs=0).temperature == 2


def test_the_teacher_follows_in_all_its_parts_after_the_center():
    method = small(momentum=0.8)
    online = [*method.encoder.parameters(), *method.projector.parameters(), method.prototypes.weight]
    teacher = [*method.teacher.parameters(), method.teacher_prototypes.weight]
    assert all(torch.equal(one, other) for one, other in zip(online, teacher, strict=True))
    before = [parameter.clone() for parameter in teacher]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(torch.randn_like(parameter))
    rows = torch.randn(4, 6)
    method.after_step(progress(60, 10, 12), {"t": rows})
    momentum = 1 - 0.2 * (math.cos(math.pi / 2) + 1) / 2
    for found, old, new in zip(teacher, before, online, strict=True):
        torch.testing.assert_close(found.detach(), momentum * old + (1 - momentum) * new.detach())
    torch.testing.assert_close(method.center, 0.1 * (rows @ nnf.normalize(before[-1], dim=1).T).mean(0))


def test_the_last_layer_stays_for_the_first_epochs():
    method = small(freeze_prototypes_epochs=1.5)
    optimizer = torch.optim.SGD(method.param_groups(), lr=1.0, momentum=0.9, weight_decay=0.1)
    kept = []
    for step in range(8):  # 4 steps an epoch
        method(crops(16, 16), torch.arange(4)).loss.backward()
        before, head = method.prototypes.weight.clone(), method.projector[0].weight.clone()
        method.before_optimizer_step(method.phase(step / 4))
        optimizer.step()
        optimizer.zero_grad()
        kept.append(torch.equal(method.prototypes.weight, before))
        assert not torch.equal(method.projector[0].weight, head)
    assert kept == [True] * 6 + [False] * 2


def test_the_teacher_sees_the_first_crops_alone_as_one_batch():
    method, seen = small(), []
    method.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    views = crops(16, 16, 8, 8)
    method(views, torch.arange(4))
    (images,) = seen
    assert torch.equal(images, torch.cat(views[:2]))
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    assert not method.teacher_prototypes.weight.requires_grad


def test_autocast_rounds_neither_outputs_nor_distributions():
    method = small().eval()
    z = nnf.normalize(torch.randn(8, 6), dim=1)
    method.projector.forward = method.teacher.forward = lambda x: z
    views = crops(16, 16)
    exact = method(views, torch.arange(4)).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method(views, torch.arange(4)).loss, exact)


@pytest.mark.parametrize(
    ("teachers", "sides", "message"),
    [
        (1, (16,), "teacher_crops=1 needs at least 2 views"),
        (3, (16, 16), "teacher_crops=3 needs at least 3 views"),
        (3, (16, 16, 8, 8), "takes the first 3 views, which are of one size, .* of 2 sizes"),
    ],
)
def test_crops_that_do_not_fit_are_refused(teachers, sides, message):
    with pytest.raises(BadInput, match=message):
        small(teacher_crops=teachers)(crops(*sides), torch.arange(4))


def test_metrics_tell_the_two_ways_to_collapse():
    """Every image alike: the teacher's distribution is the batch's, and the spread is 0."""
    method = small().eval()
    same = [torch.ones(4, 3, 16, 16)] * 2
    metrics = method(same, torch.arange(4)).metrics
    assert metrics["spread"].item() == pytest.approx(0, abs=1e-3)
    assert metrics["teacher_entropy"].item() == pytest.approx(metrics["prototype_entropy"].item(), abs=1e-5)
    method.temperature.fill_(1e4)
    assert method(same, torch.arange(4)).metrics["teacher_entropy"].item() == pytest.approx(1, abs=1e-4)
    method.temperature.fill_(1e-4)
    assert method(same, torch.arange(4)).metrics["prototype_entropy"].item() == pytest.approx(0, abs=1e-4)
    method.temperature.fill_(0.5)
    different = method([10 * view for view in crops(16, 16)], torch.arange(4)).metrics
    assert different["teacher_entropy"] < different["prototype_entropy"]


def test_a_vision_transformer_takes_the_crops_that_timm_lets_it():
    method = small(Timm(3, 32, "test_vit"))  # one that takes images of any size; others refuse them in a sentence
    method(crops(32, 32, 16), torch.arange(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
