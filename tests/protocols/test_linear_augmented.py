"""The published protocol against loops on cached features, which are the same where crops are whole pictures."""

import pytest
import torch
from contexts import small
from test_labelled import same, state
from torch import nn
from torch.nn import functional as nnf

from twoviews.protocols.classification import top1
from twoviews.protocols.labelled import classifier
from twoviews.protocols.linear_augmented import LinearAugmented
from twoviews.randomness import generator


def protocol(**changes) -> LinearAugmented:
    numbers = {"optimizer": "sgd", "lr": 3.0, "lr_scaling": "none", "momentum": 0.9, "weight_decay": 0.0}
    numbers |= {"batch_size": 50, "epochs": 5, "milestones": None, "smallest_crop": 1.0, "flip": 0.0, "seed": 0}
    return LinearAugmented(**{**numbers, "every_epochs": 0, **changes})


def on_features(context, take_step, factor, epochs: int, batch_size: int) -> torch.Tensor:
    """Probabilities of the test images after training on features computed once; take_step(linear, lr factor, epoch)."""
    memory, linear = context.memory, classifier(context.encoder.out_dim, 10, context.device, 0)
    for epoch in range(epochs):
        order = torch.randperm(len(memory.x), generator=generator(0, "order", epoch))
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            linear.zero_grad()
            nnf.cross_entropy(linear(memory.x[rows]), memory.y[rows]).backward()
            take_step(linear, factor(epoch))
    return linear(context.test.x).softmax(1).detach()


def torch_sgd(lr: float, weight_decay: float):
    found = []

    def take_step(linear: nn.Linear, factor: float) -> None:
        if not found:
            found.append(torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay))
        found[0].param_groups[0]["lr"] = lr * factor
        found[0].step()

    return take_step


def apex_larc(lr: float):
    """g <- 0.001 |w| / |g| g where both norms are positive, then SGD with momentum."""
    velocity = {}

    @torch.no_grad()
    def take_step(linear: nn.Linear, factor: float) -> None:
        for p in linear.parameters():
            adapted = p.norm() > 0 and p.grad.norm() > 0
            g = p.grad * (0.001 * p.norm() / p.grad.norm() if adapted else 1.0)
            velocity[p] = 0.9 * velocity.get(p, 0.0) + g
            p.sub_(lr * factor * velocity[p])

    return take_step


def cosine(epochs: int):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), epochs)
    return lambda epoch: schedule._get_closed_form_lr()[0] if not setattr(schedule, "last_epoch", epoch) else None


@pytest.mark.parametrize("case", ["steps", "cosine", "larc"])
def test_whole_pictures_give_what_cached_features_give(case):
    context = small(220)  # 220 / 50: 20 images sit out each epoch
    if case == "steps":
        found = protocol(milestones=[2, 4])(context)
        expected = on_features(context, torch_sgd(3.0, 0.0), lambda epoch: [1, 1, 0.1, 0.1, 0.01][epoch], 5, 50)
    elif case == "cosine":
        found = protocol(weight_decay=1e-3)(context)
        expected = on_features(context, torch_sgd(3.0, 1e-3), cosine(5), 5, 50)
    else:
        found = protocol(optimizer="larc", lr=100.0, lr_scaling="linear")(context)
        expected = on_features(context, apex_larc(100.0 * 50 / 256), cosine(5), 5, 50)
    torch.testing.assert_close(found.probabilities, expected, rtol=0, atol=2e-4)
    assert found.values["top1"] == pytest.approx(top1(expected, context.test.y), abs=1.01)
    assert expected.amax(1).mean() > 0.12  # it has left the even start


@pytest.mark.parametrize("training", [True, False])
def test_encoder_and_its_mode_are_left_as_they_were(training):
    context = small(120)
    context.encoder.train(training)
    before, numbers = state(context.encoder), torch.get_rng_state()
    first = protocol(smallest_crop=0.3, flip=0.5, epochs=2)(context)
    assert same(before, state(context.encoder))
    assert context.encoder.training == training
    assert all(p.grad is None for p in context.encoder.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    again = protocol(smallest_crop=0.3, flip=0.5, epochs=2)(context)
    assert torch.equal(first.probabilities, again.probabilities)
    other = protocol(smallest_crop=0.3, flip=0.5, epochs=2, seed=1)(context)
    assert not torch.equal(first.probabilities, other.probabilities)


def test_an_encoder_that_changes_in_eval_mode_is_found_out():
    context = small(60)

    def count(norm: nn.Module, *_) -> None:
        norm.num_batches_tracked += 1

    context.encoder.bn1.register_forward_hook(count)
    with pytest.raises(AssertionError, match="bn1.num_batches_tracked"):
        protocol(epochs=1)(context)


def test_larger_batches_than_data_are_clamped_and_said():
    context = small(60)
    found = protocol(batch_size=4096, lr=0.1, lr_scaling="linear", epochs=1)(context)
    assert found.values["batch_size"] == 60
    assert found.values["learning_rate"] == pytest.approx(0.1 * 60 / 256)
    assert found.notes == ["batch_size=4096 is larger than the 60 images: batches have 60."]
    assert protocol(epochs=1)(context).tables == {}
