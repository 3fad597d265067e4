"""Sinkhorn and the swapped prediction against loops, closed forms, lightly and two processes; crops, queue, prototypes."""

import io
import math

import pytest
import torch
from assembled import in_processes, progress
from torch import nn
from torch.nn import functional as nnf

from twoviews import distributed
from twoviews.backbones import Encoder, ResNet
from twoviews.errors import BadInput
from twoviews.methods.swav import SwAV, sinkhorn, swapped_prediction


def lightlys(scores: torch.Tensor | list, assigned: int, older: torch.Tensor | list | None = None) -> torch.Tensor:
    """Its loss. Imported here: the import takes seconds, and the processes of the two-process test need none of it."""
    from lightly.loss import SwaVLoss

    return SwaVLoss()([*scores[:assigned]], [*scores[assigned:]], None if older is None else [*older]).squeeze()


def small(**changes) -> SwAV:
    torch.manual_seed(0)
    options = {
        "hidden_dim": 12,
        "embed_dim": 6,
        "prototypes": 5,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "assign_crops": 2,
        "queue_size": 0,
        "queue_start_epoch": 0,
        "freeze_prototypes_epochs": 0,
    }
    return SwAV(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def cosines(*shape: int) -> torch.Tensor:
    """Of random points with random prototypes in 8 dimensions; the last axis is prototypes."""
    points, prototypes = torch.randn(*shape[:-1], 8), torch.randn(shape[-1], 8)
    return nnf.normalize(points, dim=-1) @ nnf.normalize(prototypes, dim=-1).T


def crops(*sides: int, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(count, 3, side, side) + 0.1 * number for number, side in enumerate(sides)]


def codes_by_loop(scores: torch.Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """Algorithm 1's pseudo-code: K x N, rows to 1 / K, columns to 1 / N."""
    n, k = scores.shape
    q = [[math.exp(scores[i, j].item() / epsilon) for i in range(n)] for j in range(k)]
    for _ in range(iterations):
        q = [[value / sum(row) / k for value in row] for row in q]
        sums = [sum(q[j][i] for j in range(k)) for i in range(n)]
        q = [[value / sums[i] / n for i, value in enumerate(row)] for row in q]
    return [[q[j][i] * n for j in range(k)] for i in range(n)]


def loss_by_loop(scores: torch.Tensor, assigned: int, temperature: float) -> float:
    total, (v, b, k) = 0.0, scores.shape
    for crop in range(assigned):
        q = codes_by_loop(scores[crop], 0.05, 3)
        for other in set(range(v)) - {crop}:
            for i in range(b):
                logits = [scores[other, i, j].item() / temperature for j in range(k)]
                whole = math.log(sum(math.exp(logit) for logit in logits))
                total -= sum(q[i][j] * (logits[j] - whole) for j in range(k)) / b
    return total / assigned / (v - 1)


# ----------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_against_a_loop_and_lightly(iterations):
    from lightly.loss.swav_loss import sinkhorn as lightlys_sinkhorn

    torch.manual_seed(0)
    scores = cosines(9, 4)
    found = sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(found, torch.tensor(codes_by_loop(scores, 0.05, iterations)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, lightlys_sinkhorn(scores, iterations, 0.05), rtol=1e-4, atol=1e-6)


def test_rows_sum_to_one_and_columns_become_even():
    torch.manual_seed(0)
    scores = cosines(40, 8)
    for iterations in (1, 3, 200):
        torch.testing.assert_close(sinkhorn(scores, 0.05, iterations).sum(1), torch.ones(40))
    torch.testing.assert_close(sinkhorn(scores, 0.05, 200).sum(0), torch.full((8,), 5.0), rtol=1e-3, atol=1e-3)
    uneven = [(sinkhorn(scores, 0.05, iterations).sum(0) - 5).abs().max() for iterations in (1, 3, 10)]
    assert uneven[0] > uneven[1] > uneven[2]


def test_closed_forms():
    """Equal rows belong to all prototypes alike; rows on prototypes of their own get those."""
    torch.testing.assert_close(sinkhorn(cosines(1, 7).expand(6, 7), 0.05, 3), torch.full((6, 7), 1 / 7))
    order = torch.randperm(6)
    torch.testing.assert_close(sinkhorn(torch.eye(6)[order], 0.01, 3), torch.eye(6)[order])


@pytest.mark.parametrize("epsilon", [1e-4, 0.001, 0.05, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_for_any_epsilon_and_number_format(epsilon, dtype):
    torch.manual_seed(0)
    scores = cosines(12, 5).to(dtype)
    scores[:, 0] = -1  # a prototype that no row is near
    found = sinkhorn(scores, epsilon, 3)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(12))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores, epsilon, 3), found)


def test_rows_that_do_not_count_get_codes_and_change_no_others():
    torch.manual_seed(0)
    scores, counted = cosines(10, 4), torch.arange(10) < 7
    found = sinkhorn(scores, 0.05, 3, counted)
    torch.testing.assert_close(found[:7], sinkhorn(scores[:7], 0.05, 3))
    torch.testing.assert_close(found.sum(1), torch.ones(10))
    assert torch.equal(sinkhorn(scores, 0.05, 3, torch.ones(10, dtype=torch.bool)), sinkhorn(scores, 0.05, 3))


def codes_and_loss() -> dict[str, torch.Tensor]:
    """Of this process's part of one batch, averaged over processes; and three steps of a method with a queue."""
    torch.manual_seed(0)
    scores = cosines(3, 8, 4)
    own = scores[:, distributed.rank() :: distributed.processes()].clone().requires_grad_()
    codes = torch.stack([sinkhorn(one, 0.05, 3) for one in own[:2]])
    loss = swapped_prediction(own, codes, 0.1)
    loss.backward()
    found = {
        "codes": torch.stack([distributed.gather(one) for one in codes]),
        "loss": distributed.mean_over_processes(loss.detach()),
        # Averaged over processes, as DistributedDataParallel does: each row's is from one process alone.
        "gradient": torch.stack([distributed.gather(one) for one in own.grad]) / distributed.processes(),
    }
    method = small(queue_size=12).eval()  # eval: batch norms of this test's small parts differ
    for step in range(3):
        z = nnf.normalize(torch.randn(2, 8, 6), dim=2)
        mine = z[:, distributed.rank() :: distributed.processes()]
        codes = method._codes(method.prototypes(mine))
        found[f"codes{step}"] = torch.stack([distributed.gather(one) for one in codes])
        method.after_step(progress(step + 1, 4, 9), {"z": z.transpose(0, 1).flatten(1)})
    return {**found, "rows": method.queue.rows, "queued": method.queued}


def test_two_processes_share_the_prototypes_as_one_does(tmp_path):
    one = codes_and_loss()
    for found in in_processes(2, tmp_path, codes_and_loss):
        for key, value in one.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


# ------------------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize(("v", "assigned"), [(2, 2), (5, 2), (4, 1), (3, 3)])
def test_loss_against_a_loop(v, assigned):
    torch.manual_seed(0)
    scores = cosines(v, 6, 4)
    codes = torch.stack([sinkhorn(one, 0.05, 3) for one in scores[:assigned]])
    expected = loss_by_loop(scores, assigned, 0.1)
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_everything_in_one_point_is_ln_k():
    scores = torch.full((3, 6, 7), 0.3)
    codes = torch.stack([sinkhorn(one, 0.05, 3) for one in scores[:2]])
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize("low_resolution", [0, 3])
@pytest.mark.parametrize("queued", [0, 11])
def test_value_and_gradient_are_lightlys(low_resolution, queued):
    torch.manual_seed(0)
    a, older = cosines(2 + low_resolution, 6, 5), cosines(2, queued, 5)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    theirs = lightlys(b, 2, older if queued else None)
    codes = torch.stack([sinkhorn(torch.cat([x, y]), 0.05, 3)[:6] for x, y in zip(a[:2], older, strict=True)])
    ours = swapped_prediction(a, codes, 0.1)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_methods_loss_is_lightlys_on_its_scores():
    method, views = small(), crops(16, 16, 8, 8, 8)
    method.eval()
    loss = method(views, torch.arange(4)).loss
    with torch.no_grad():
        z = [nnf.normalize(method.projector(method.encoder(view)), dim=1) for view in views]
        scores = [method.prototypes(one) for one in z]
    torch.testing.assert_close(loss.detach(), lightlys(scores, 2), rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_through_codes():
    method, views = small(), crops(16, 16)
    z = method._embed(views)
    scores = method.prototypes(z)
    assert scores.requires_grad
    assert not method._codes(scores).requires_grad


# ----------------------------------------------------------------------------------------------------------------- crops


class Recorder(Encoder):
    """The mean of each channel; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.out_dim, self.seen = 3, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((16, 16), [(8, 3, 16, 16)]),
        ((16, 16, 8, 8, 8), [(8, 3, 16, 16), (12, 3, 8, 8)]),
        ((16, 16, 12, 8, 8, 16), [(8, 3, 16, 16), (4, 3, 12, 12), (8, 3, 8, 8), (4, 3, 16, 16)]),
    ],
)
def test_neighbouring_crops_of_one_size_are_one_batch_and_all_are_one_for_the_head(sides, expected):
    encoder, heads = Recorder(), []
    method = SwAV(encoder, 8, 6, 5, 0.1, 0.05, 3, 2, 0, 0, 0)
    method.projector.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    views = crops(*sides)
    z = method._embed(views)
    assert encoder.seen == expected
    assert len(heads) == 1
    torch.testing.assert_close(heads[0], torch.cat([view.mean((2, 3)) for view in views]))
    assert z.shape == (len(sides), 4, 6)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(len(sides), 4))


def test_codes_come_from_the_assigned_crops_alone():
    """With A = 1 and two crops the loss is one-sided; where the other crops lie does not change the codes."""
    torch.manual_seed(1)
    method, views = small(assign_crops=1), crops(16, 16)
    method.eval()
    loss = method(views, torch.arange(4)).loss.item()
    scores = method.prototypes(method._embed(views)).detach()
    assert loss == pytest.approx(loss_by_loop(scores, 1, 0.1), rel=1e-5)
    assert method(views[::-1], torch.arange(4)).loss.item() != pytest.approx(loss_by_loop(scores, 1, 0.1), rel=1e-5)


@pytest.mark.parametrize(("assigned", "sides"), [(1, (16,)), (2, (16,)), (3, (16, 16))])
def test_too_few_crops_are_refused(assigned, sides):
    with pytest.raises(BadInput, match=f"assign_crops={assigned} needs at least {max(2, assigned)} views"):
        small(assign_crops=assigned)(crops(*sides), torch.arange(4))


def test_metrics_tell_codes_that_say_nothing():
    method = small()
    output = method(crops(16, 16), torch.arange(4))
    assert 0 < output.metrics["code_entropy"] < 1
    same = [torch.ones(4, 3, 16, 16)] * 2
    output = method.eval()(same, torch.arange(4))
    assert output.metrics["code_entropy"].item() == pytest.approx(1, abs=1e-4)
    assert output.metrics["spread"].item() == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ prototypes


def test_parameters_are_as_many_as_the_originals():
    encoder = ResNet(3, 224, "bottleneck", [3, 4, 6, 3], stem="imagenet")
    method = SwAV(encoder, 2048, 128, 3000, 0.1, 0.05, 3, 2, 0, 0, 0)
    # Less the hidden layer's biases, which the norm after it takes out again.
    assert sum(parameter.numel() for parameter in method.parameters()) == 28_354_752 - 2048


def test_head_has_one_hidden_layer_with_a_norm_and_prototypes_no_bias():
    method = small()
    assert [type(layer) for layer in method.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert method.prototypes.bias is None


def test_prototypes_have_unit_length_in_every_forward_pass():
    """What the optimizer makes of them is not."""
    method = small()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for number in range(2):
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(5))
        output = method(crops(16, 16), torch.arange(4))
        output.loss.backward()
        optimizer.step()
        assert not torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(5))
        method.after_step(progress(number + 1, 4, 2), output.rows)


def test_prototypes_stay_for_the_first_epochs():
    method = small(freeze_prototypes_epochs=1.5)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    kept = []
    for step in range(8):  # 4 steps an epoch
        method(crops(16, 16), torch.arange(4)).loss.backward()
        before = method.prototypes.weight.clone()
        head = method.projector[0].weight.clone()
        method.before_optimizer_step(method.phase(step / 4))
        optimizer.step()
        optimizer.zero_grad()
        kept.append(torch.equal(method.prototypes.weight, before))
        assert not torch.equal(method.projector[0].weight, head)
    assert kept == [True] * 6 + [False] * 2


# ----------------------------------------------------------------------------------------------------------------- queue


def step(method: SwAV, number: int) -> torch.Tensor:
    """One step of 4 images, 4 steps an epoch."""
    torch.manual_seed(number)
    output = method(crops(16, 16, 8), torch.arange(4))
    output.loss.backward()
    method.before_optimizer_step(method.phase(number / 4))
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    method.zero_grad()
    method.after_step(progress(number + 1, 4, 9), output.rows)
    return output.loss.detach()


def without_queue(method: SwAV, number: int) -> float:
    """What that step's loss would be if nothing were queued."""
    torch.manual_seed(number)
    with torch.no_grad():
        z = method._embed(crops(16, 16, 8))
        scores = method.prototypes(z)
        codes = torch.stack([sinkhorn(one, 0.05, 3) for one in scores[:2]])
        return swapped_prediction(scores, codes, 0.1).item()


@pytest.mark.parametrize(("start", "first"), [(0, 3), (0.5, 5), (1, 7)])
def test_the_queue_fills_from_its_epoch_and_counts_once_full(start, first):
    """10 images are full after three steps of 4."""
    method = small(queue_size=10, queue_start_epoch=start)
    method.eval()  # so that the loss can be computed twice
    for number in range(9):
        alone = without_queue(method, number)
        assert (step(method, number).item() == pytest.approx(alone, rel=1e-5)) is (number < first), number


def test_a_full_queue_shares_the_prototypes_crop_by_crop():
    method = small(queue_size=8)
    method.eval()
    for number in range(2):
        step(method, number)
    older = method.queue.rows.clone()
    torch.manual_seed(5)
    views = crops(16, 16, 8)
    output = method(views, torch.arange(4))
    with torch.no_grad():
        z = method._embed(views)
        scores = [method.prototypes(one) for one in z]
        queued = [method.prototypes(older[:, :6]), method.prototypes(older[:, 6:])]
    assert output.loss.item() == pytest.approx(lightlys(scores, 2, queued).item(), rel=1e-5)
    method.after_step(progress(3, 4, 9), output.rows)
    torch.testing.assert_close(method.queue.rows[:4], torch.cat([z[0], z[1]], dim=1))
    assert torch.equal(method.queue.rows[4:], older[4:])


@pytest.mark.parametrize("stop", [1, 4, 6, 8])
def test_a_queue_in_any_state_goes_on_bit_for_bit(stop):
    options = {"queue_size": 10, "queue_start_epoch": 1, "freeze_prototypes_epochs": 0.5}
    method = small(**options)
    for number in range(stop):
        step(method, number)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    expected = [step(method, number) for number in range(stop, stop + 4)]
    file.seek(0)
    other = small(**options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [step(other, number) for number in range(stop, stop + 4)] == expected
    for (key, value), found in zip(method.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(found, value), key


# --------------------------------------------------------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    ("options", "batch_size", "images", "message"),
    [
        ({"queue_size": 100}, 10, 100, None),
        ({"queue_size": 101}, 10, 100, r"queue_size=101 is larger than the 100 training images.*queue_size=50\."),
        ({"queue_size": 16}, 16, 100, None),
        ({"queue_size": 15}, 16, 100, r"queue_size=15 is smaller than the 16 images .* queue_size=64, or 0"),
        ({"queue_size": 30}, 40, 100, r"use queue_size=100, or 0"),
    ],
)
def test_queues_that_cannot_work_are_refused(options, batch_size, images, message):
    method = small(**options)
    if message is None:
        assert method.prepare(batch_size, batch_size, images, 1) == []
    else:
        with pytest.raises(BadInput, match=message):
            method.prepare(batch_size, batch_size, images, 1)


@pytest.mark.parametrize(
    ("options", "batch_size", "images", "advice"),
    [
        ({"prototypes": 32}, 32, 2000, None),
        ({"prototypes": 3000, "queue_size": 3840}, 256, 50_000, None),
        ({"prototypes": 3000}, 4096, 50_000, None),
        (
            {"prototypes": 512},
            32,
            2000,
            "prototypes=512 are more than the 32 .* prototypes=32 or queue_size=480 queue_start",
        ),
        ({"prototypes": 512, "queue_size": 64}, 32, 2000, "more than the 96 .* prototypes=96 or .*size=480 "),
        ({"prototypes": 3000}, 32, 2000, r"better use prototypes=32\.$"),
    ],
)
def test_more_prototypes_than_images_to_share_them_is_said(options, batch_size, images, advice):
    notes = small(**options).prepare(batch_size, batch_size, images, 1)
    if advice is None:
        assert notes == []
    else:
        with pytest.raises(AssertionError, match=advice):
            raise AssertionError(*notes)
