"""Many linear classifiers at once against torch.optim one by one and scikit-learn, on the pixels of handwritten digits."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_linear import context, pixels
from torch import nn
from torch.nn import functional as nnf

from twoviews.config.building import build
from twoviews.errors import BadInput
from twoviews.features import Features
from twoviews.protocols.classification import top1
from twoviews.protocols.linear import held_out
from twoviews.protocols.linear_sgd import LinearSGD, sgd
from twoviews.randomness import generator

SETTINGS = {"momentum": 0.9, "batch_size": 64, "epochs": 4, "seed": 3}


def alone(train: Features, lr: float, weight_decay: float, momentum: float, batch_size: int, epochs: int, seed: int):
    """One classifier by autograd, torch.optim and torch's cosine."""
    linear = nn.Linear(train.x.shape[1], 10)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    groups = [{"params": [linear.weight], "weight_decay": weight_decay}, {"params": [linear.bias]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    steps = epochs * -(-len(train.x) // batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(train.x), generator=generator(seed, "linear_sgd", epoch))
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            nnf.cross_entropy(linear(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
            cosine.step()
    return linear


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_of_the_stack_is_what_it_is_alone(momentum):
    train = pixels(0, 300)  # 300 / 64: a short last batch
    grid = [(0.3, 0.0), (0.01, 1e-2), (0.1, 0.1), (1.0, 1e-3)]
    settings = {**SETTINGS, "momentum": momentum}
    stack = sgd(train.x, train.y, 10, grid, **settings)
    for point, (lr, weight_decay) in enumerate(grid):
        one = alone(train, lr, weight_decay, **settings)
        torch.testing.assert_close(stack.weight[point], one.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(stack.bias[point], one.bias.detach(), rtol=0, atol=1e-5)
        assert one.weight.abs().max() > 0.005


def test_converges_to_scikit_learns_minimum():
    train, test = pixels(0, 400), pixels(400, 800)
    stack = sgd(train.x, train.y, 10, [(0.3, 0.01)], momentum=0.9, batch_size=400, epochs=2000, seed=0)
    theirs = LogisticRegression(C=1 / (0.01 * 400), max_iter=5000, tol=1e-8)
    theirs.fit(train.x.double().numpy(), train.y.numpy())
    torch.testing.assert_close(stack.weight[0], torch.from_numpy(theirs.coef_).float(), rtol=0, atol=0.005)
    expected = torch.from_numpy(theirs.predict(test.x.double().numpy()))
    assert (stack.linear(0)(test.x).argmax(1) == expected).float().mean() > 0.99


def test_one_that_runs_away_leaves_the_others_alone():
    train = pixels(0, 200)
    stack = sgd(train.x, train.y, 10, [(0.1, 0.0), (1000.0, 1.0), (0.01, 0.0)], **{**SETTINGS, "epochs": 10})
    assert not stack.weight[1].isfinite().all()
    without = sgd(train.x, train.y, 10, [(0.1, 0.0), (0.01, 0.0)], **{**SETTINGS, "epochs": 10})
    torch.testing.assert_close(stack.weight[[0, 2]], without.weight, rtol=0, atol=1e-6)


def protocol(rates, decays, **changes) -> LinearSGD:
    numbers = {"held_out": 0.2, "batch_size": 64, "epochs": 5, "momentum": 0.9, "seed": 0, "every_epochs": 0}
    return LinearSGD(rates, decays, **{**numbers, **changes})


def test_chooses_on_held_out_images_and_trains_again_on_all():
    memory, test = pixels(0, 500), pixels(500, 900)
    mean, std = memory.x.mean(0), memory.x.std(0) + 1e-6
    x = (memory.x - mean) / std
    rest, chooses = held_out(memory.y, 0.2)
    settings = {"momentum": 0.9, "batch_size": 64, "epochs": 5, "seed": 0}
    pairs, found = [(r, d) for r in (1e-5, 0.01, 3.0) for d in (0.0, 0.3)], {}
    for pair in pairs:
        scores = alone(Features(x[rest], memory.y[rest]), *pair, **settings)(x[chooses]).detach()
        found[pair] = (top1(scores, memory.y[chooses]), -nnf.cross_entropy(scores, memory.y[chooses]).item())
    best = max(found, key=found.__getitem__)
    result = protocol([1e-5, 0.01, 3.0], [0.0, 0.3])(context(memory, test))
    assert (result.values["learning_rate"], result.values["weight_decay"]) == best
    scores = alone(Features(x, memory.y), *best, **settings)((test.x - mean) / std)
    assert result.values["top1"] == pytest.approx(top1(scores, test.y))
    torch.testing.assert_close(result.probabilities, scores.softmax(1).detach(), rtol=0, atol=1e-4)
    grid = result.tables["grid"]
    assert {(row["learning_rate"], row["weight_decay"]) for row in grid} == set(pairs)
    assert grid[0]["held_out_top1"] == pytest.approx(found[best][0])
    assert result.values["top1"] > 80


def test_test_labels_have_no_say():
    memory, test = pixels(0, 300), pixels(500, 600)
    honest = protocol([0.001, 0.1], [0.0])(context(memory, test))
    lied_to = protocol([0.001, 0.1], [0.0])(context(memory, Features(test.x, (test.y + 1) % 10)))
    assert torch.equal(honest.probabilities, lied_to.probabilities)
    assert lied_to.values["top1"] < 20 < honest.values["top1"]


def test_diverging_candidates_come_last_and_are_refused_alone():
    memory, test = pixels(0, 200), pixels(500, 600)
    result = protocol([1e5, 0.01], [1.0])(context(memory, test))
    assert result.values["learning_rate"] == 0.01
    assert [row["learning_rate"] for row in result.tables["grid"]] == [0.01, 1e5]
    with pytest.raises(BadInput, match=r"learning_rates=\[100000.0\] diverge"):
        protocol([1e5], [1.0])(context(memory, test))


def test_refuses_an_empty_list_of_candidates():
    numbers = {"held_out": 0.2, "batch_size": 64, "epochs": 5, "momentum": 0.9, "seed": 0, "every_epochs": 0}
    for rates, decays in (([], [0.0]), ([0.1], [])):
        lists = {"learning_rates": rates, "weight_decays": decays}
        with pytest.raises(BadInput, match=r"=\[\] is an empty list"):
            build({"_target_": "twoviews.protocols.linear_sgd.LinearSGD", **lists, **numbers})
