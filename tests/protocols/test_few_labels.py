"""Draws of few labels: stratified, repeatable, and their mean and standard deviation against scikit-learn one by one."""

import statistics

import pytest
import torch
from contexts import small
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from test_configs import composed
from test_finetune import protocol as finetune
from test_labelled import same, state
from test_linear import context, pixels

from twoviews.config.building import build
from twoviews.errors import BadInput
from twoviews.features import Features
from twoviews.protocols.few_labels import FewLabels, drawn, quota
from twoviews.protocols.linear import Linear


def protocol(shares, per_class, **changes) -> FewLabels:
    numbers = {"draws": 3, "weight_decays": [0.01], "held_out": 0.2, "iterations": 200, "finetune": None}
    return FewLabels(shares, per_class, **{**numbers, "seed": 0, "every_epochs": 0, **changes})


def test_draws_are_stratified_distinct_and_a_function_of_their_key():
    y = torch.tensor([0] * 400 + [1] * 100 + [2] * 30)[torch.randperm(530, generator=torch.Generator().manual_seed(0))]
    counts, raised = quota(y, 3, 0.1)
    assert counts.tolist() == [40, 10, 3]
    assert raised == 0
    one = drawn(y, counts, 0, "10pct", 0)
    assert torch.bincount(y[one]).tolist() == [40, 10, 3]
    assert len(one.unique()) == 53
    torch.manual_seed(5)
    assert torch.equal(one, drawn(y, counts, 0, "10pct", 0))
    # Two draws of 53 of 530 share some five, and all draws together reach everything.
    assert len(set(one.tolist()) & set(drawn(y, counts, 0, "10pct", 1).tolist())) < 20
    reached = torch.cat([drawn(y, counts, 0, "10pct", draw) for draw in range(100)]).unique()
    assert len(reached) > 520


def test_a_share_that_leaves_a_class_without_an_image_is_raised_and_said():
    memory, test = pixels(0, 300), pixels(500, 700)
    assert quota(torch.tensor([0] * 100 + [1] * 10), 3, 0.01)[0].tolist() == [1, 1, 0]  # a class without any stays so
    row = protocol([0.01], [])(context(memory, test)).tables["few_labels"][0]
    assert row["images"] == 10
    assert row["note"] == "10 of 10 classes would have no image and give one"
    assert protocol([0.1], [])(context(memory, test)).tables["few_labels"][0]["note"] == ""


def test_more_than_a_class_has_is_refused():
    with pytest.raises(
        BadInput, match=r"per_class=\[50\] has 50, but class '2' has (\d+) memory images; use at most \1"
    ):
        protocol([], [50])(context(pixels(0, 300), pixels(500, 600)))


def test_mean_and_deviation_are_those_of_scikit_learns_draws():
    memory, test = pixels(0, 600), pixels(600, 1000)
    result = protocol([0.1], [3])(context(memory, test))
    mean, std = memory.x.mean(0), memory.x.std(0) + 1e-6
    x, queries = ((memory.x - mean) / std).double().numpy(), ((test.x - mean) / std).double().numpy()
    for setting, counts in (("10pct", quota(memory.y, 10, 0.1)[0]), ("3_per_class", torch.full((10,), 3))):
        found = []
        for draw in range(3):
            rows = drawn(memory.y, counts, 0, setting, draw).numpy()
            theirs = LogisticRegression(C=1 / (0.01 * len(rows)), max_iter=5000, tol=1e-8)
            theirs.fit(x[rows], memory.y.numpy()[rows])
            found.append(100 * theirs.score(queries, test.y.numpy()))
        assert result.values[f"top1_{setting}"] == pytest.approx(statistics.mean(found), abs=0.3)
        assert result.values[f"top1_{setting}_std"] == pytest.approx(statistics.stdev(found), abs=0.3)
    assert result.values["top1"] == result.values["top1_10pct"] > result.values["top1_3_per_class"] > 50
    rows = result.tables["few_labels"]
    assert [(row["setting"], row["classifier"], row["images"]) for row in rows] == [
        ("10pct", "linear", int(quota(memory.y, 10, 0.1)[0].sum())),
        ("3_per_class", "linear", 30),
    ]
    assert rows[0]["top1"] == result.values["top1_10pct"]
    assert rows[0]["top5"] > rows[0]["top1"]


def test_all_labels_are_the_linear_probe():
    memory, test = pixels(0, 300), pixels(500, 800)
    found = protocol([1.0], [], weight_decays=[3.0, 0.01])(context(memory, test)).values
    linear = Linear([3.0, 0.01], held_out=0.2, iterations=200, every_epochs=0)(context(memory, test)).values
    assert found == {"top1": linear["top1"], "top1_100pct": linear["top1"], "top1_100pct_std": 0.0}


def test_one_image_a_class_takes_the_largest_weight_decay():
    memory, test = pixels(0, 300), pixels(500, 800)
    chosen = protocol([], [1], weight_decays=[1e-3, 1.0])(context(memory, test)).values
    assert chosen == protocol([], [1], weight_decays=[1.0])(context(memory, test)).values
    assert chosen != protocol([], [1], weight_decays=[1e-3])(context(memory, test)).values


def test_fine_tuning_of_each_draw_stands_beside_the_probe():
    subject = small(200, 100)
    before = state(subject.encoder)
    tuning = finetune(epochs=2)
    result = protocol([], [5], draws=2, finetune=tuning)(subject)
    assert same(before, state(subject.encoder))
    found = []
    for draw in range(2):
        index = drawn(subject.memory.y, torch.full((10,), 5), 0, "5_per_class", draw)
        few = Features(subject.memory.x[index], subject.memory.y[index])
        made = tuning.fitted(subject, few, subject.data.memory.subset(index), "5_per_class", draw)
        scores = tuning.scores(subject, made.model, subject.data.test)
        found.append(100 * (scores.argmax(1) == subject.test.y).float().mean().item())
    assert result.values["finetune_top1_5_per_class"] == pytest.approx(statistics.mean(found))
    assert result.values["finetune_top1_5_per_class_std"] == pytest.approx(statistics.stdev(found))
    assert [row["classifier"] for row in result.tables["few_labels"]] == ["linear", "fine-tuned"]


@pytest.mark.parametrize("changes", [{"shares": []}, {"weight_decays": []}])
def test_what_leaves_nothing_to_do_is_refused(changes):
    ((_, node),) = composed("protocol=[few_labels]").protocol.items()
    with pytest.raises(BadInput, match=r"(shares|weight_decays)=\[\]"):
        build({**OmegaConf.to_container(node, resolve=True), **changes})
