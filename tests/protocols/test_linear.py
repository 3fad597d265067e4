"""Softmax regression against scikit-learn's on handwritten digits, and the choice of its weight decay."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from twoviews.config.building import build
from twoviews.data.sources import digits
from twoviews.errors import BadInput
from twoviews.features import Features, PixelEncoder
from twoviews.protocols.classification import top1
from twoviews.protocols.linear import Linear, fit, held_out, temperature
from twoviews.protocols.protocol import EvaluationContext


def pixels(start: int, stop: int) -> Features:
    images, labels = load_digits(return_X_y=True)
    return Features(torch.from_numpy(images[start:stop] / 16).float(), torch.from_numpy(labels[start:stop]).long())


def context(memory: Features, test: Features) -> EvaluationContext:
    """Features that are already there."""
    data = SimpleNamespace(classes=tuple("0123456789"))
    found = EvaluationContext.__new__(EvaluationContext)
    found.encoder, found.data, found.folder = PixelEncoder(1, 8), data, None
    found.__dict__.update(memory=memory, test=test)
    return found


@pytest.mark.parametrize("weight_decay", [1e-2, 1e-1])
def test_fit_is_scikit_learns(weight_decay):
    """sum of cross-entropies x C + |W|^2 / 2 there, so C = 1 / (weight_decay N)."""
    train, test = pixels(0, 600), pixels(600, 1000)
    ours = fit(train.x, train.y, 10, weight_decay, iterations=500)
    theirs = LogisticRegression(C=1 / (weight_decay * 600), max_iter=5000, tol=1e-8)
    theirs.fit(train.x.double().numpy(), train.y.numpy())
    torch.testing.assert_close(ours.weight, torch.from_numpy(theirs.coef_).float(), rtol=1e-2, atol=2e-3)
    bias = torch.from_numpy(theirs.intercept_).float()
    # Biases are determined up to a constant.
    torch.testing.assert_close(ours.bias - ours.bias.mean(), bias - bias.mean(), rtol=1e-2, atol=2e-3)
    expected = torch.from_numpy(theirs.predict(test.x.double().numpy()))
    assert (ours(test.x).argmax(1) == expected).float().mean() > 0.997


def test_fit_reaches_a_stationary_point():
    train = pixels(0, 300)
    linear = fit(train.x, train.y, 10, 0.01, iterations=500)
    w = linear.weight.clone().requires_grad_()
    b = linear.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(train.x @ w.T + b, train.y) + 0.005 * w.square().sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-4
    assert b.grad.abs().max() < 1e-4


def test_held_out_is_stratified_complete_and_always_the_same():
    y = torch.tensor([0] * 40 + [1] * 10 + [2] * 3)
    rest, chooses = held_out(y, 0.25)
    assert torch.equal(torch.cat([rest, chooses]).sort().values, torch.arange(53))
    assert torch.bincount(y[chooses]).tolist() == [10, 3, 1]  # rounded up
    torch.manual_seed(1)
    again = held_out(y, 0.25)
    assert torch.equal(again[0], rest)
    assert torch.equal(again[1], chooses)
    # Drawn at random, not the first ones of each class.
    assert not torch.equal(chooses[:10], torch.arange(10))


def test_no_class_is_held_out_whole():
    y = torch.tensor([0] * 10 + [1] * 2 + [2])
    for share in (0.1, 0.5, 0.99):
        rest, chooses = held_out(y, share)
        assert len(rest) + len(chooses) == 13
        assert set(y[rest].tolist()) == {0, 1, 2} and set(y[chooses].tolist()) == {0, 1}


def test_images_that_cannot_be_held_out_choose_nothing_and_that_is_said():
    data = digits()
    rows = torch.stack([(data.train.labels == label).nonzero()[0, 0] for label in range(10)])
    data = replace(data, train=data.train.subset(rows), memory=data.train.subset(rows))
    linear = Linear([1e-2, 1e-3], 0.1, 20, 0)
    (note,) = linear.notes(data)
    assert "one labelled image" in note and "0.01 is used" in note
    there = EvaluationContext(PixelEncoder(1, 32), data, torch.device("cpu"), torch.float32)
    assert linear(there).values["weight_decay"] == 1e-2 and linear.fitted(there.memory, 10, calibrate=True)[2] == 1
    assert linear.notes(digits()) == Linear([1e-2], 0.1, 20, 0).notes(data) == []


def test_the_temperature_has_the_smallest_cross_entropy_and_stays_positive():
    torch.manual_seed(0)
    y = torch.randint(5, (400,))
    logits = 2 * torch.randn(400, 5) + 2 * torch.nn.functional.one_hot(y, 5)
    found = temperature(logits, y)

    def loss(t: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / t, y).item()

    grid = torch.logspace(-1, 1, 400).tolist()
    assert found == pytest.approx(min(grid, key=loss), rel=0.03)
    assert temperature(7 * logits, y) == pytest.approx(7 * found, rel=1e-3)
    # All right: a temperature of 0 would say that no other image is ever wrong.
    certain = 30.0 * torch.nn.functional.one_hot(torch.arange(4) % 2, 2)
    p = (certain / temperature(certain, torch.arange(4) % 2)).softmax(1).amax(1)
    assert p.tolist() == pytest.approx([0.9] * 4, abs=1e-3)
    assert temperature(torch.empty(0, 5), torch.empty(0, dtype=torch.long)) == 1


def by_hand(memory: Features, test: Features, decays: list[float], iterations: int) -> tuple[float, float]:
    mean, std = memory.x.mean(0), memory.x.std(0) + 1e-6
    x = (memory.x - mean) / std
    rest, chooses = held_out(memory.y, 0.2)
    accuracies = [top1(fit(x[rest], memory.y[rest], 10, d, iterations)(x[chooses]), memory.y[chooses]) for d in decays]
    chosen = decays[accuracies.index(max(accuracies))]
    assert len(set(accuracies)) == len(decays)
    return top1(fit(x, memory.y, 10, chosen, iterations)((test.x - mean) / std), test.y), chosen


def test_chooses_on_held_out_images_and_fits_again_on_all():
    memory, test = pixels(0, 500), pixels(500, 900)
    decays = [3.0, 0.01, 100.0]
    found = Linear(decays, held_out=0.2, iterations=50, every_epochs=0)(context(memory, test)).values
    accuracy, chosen = by_hand(memory, test, decays, 50)
    assert found == {"top1": pytest.approx(accuracy), "weight_decay": chosen}
    assert chosen == 0.01
    assert found["top1"] > 85


def test_test_labels_have_no_say_in_the_choice():
    memory, test = pixels(0, 300), pixels(500, 600)
    linear = Linear([10.0, 0.01], held_out=0.2, iterations=30, every_epochs=0)
    honest = linear(context(memory, test)).values
    lied_to = linear(context(memory, Features(test.x, (test.y + 1) % 10))).values
    assert honest["weight_decay"] == lied_to["weight_decay"]
    assert lied_to["top1"] < 20 < honest["top1"]


def test_scale_and_offset_of_features_do_not_matter():
    memory, test = pixels(0, 300), pixels(500, 700)
    linear = Linear([0.01], held_out=0.2, iterations=100, every_epochs=0)
    scale, offset = torch.logspace(-1, 2, 64), torch.linspace(-5, 5, 64)
    moved = context(Features(memory.x * scale + offset, memory.y), Features(test.x * scale + offset, test.y))
    assert linear(moved).values["top1"] == pytest.approx(linear(context(memory, test)).values["top1"], abs=1.01)


def test_refuses_an_empty_list_of_candidates():
    numbers = {"held_out": 0.2, "iterations": 30, "every_epochs": 0}
    with pytest.raises(BadInput, match=r"weight_decays=\[\]"):
        build({"_target_": "twoviews.protocols.linear.Linear", "weight_decays": [], **numbers})
