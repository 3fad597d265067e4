"""Advice when embeddings collapse: each method recognises its own way of it, and says nothing of sound embeddings."""

from collections.abc import Callable

import pytest
import torch
from assembled import DIFFERENT_CODE, batch_of, build, config
from torch import nn

from twoviews import console as console_module
from twoviews.console import Console
from twoviews.methods.method import Method, Output
from twoviews.monitoring import Monitor


def forward(method: Method, parts) -> Output:
    """Of 32 images, both views the same."""
    batches = [batch_of(parts, number) for number in range(2)]
    views = [torch.cat([batch.views[0] for batch in batches])] * 2
    return method(views, torch.cat([batch.index for batch in batches]))


def advice(method: Method, output: Output, monkeypatch, epoch: float = 1.0) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(Console, "say", lambda self, message: said.append(message))
    monitor = Monitor(lambda encoder: None, {}, None, Console(), 1, torch.device("cpu"), method.collapses)
    values = {f"train/{name}": value.item() for name, value in output.metrics.items()}
    monitor.advise(values, epoch)
    monitor.advise(values, epoch)
    return said


def equal(last: nn.Linear | nn.BatchNorm1d) -> None:
    """All images have one embedding."""
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.ones_(last.bias)


@torch.no_grad()
def one_direction(method) -> None:
    """All dimensions of an embedding say the same."""
    weight = method.projector[-1].weight
    weight.copy_(weight[:1].expand_as(weight))


@torch.no_grad()
def even_teacher(method) -> None:
    method.teacher_prototypes.weight.copy_(method.teacher_prototypes.weight[:1].expand(12, -1))


@torch.no_grad()
def one_prototype(method) -> None:
    method.center[0] = -10


def test_forecast_counts_epochs_of_smaller_views_by_their_pixels(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Console, "say", lambda self, message: said.append(message))
    monitor = Monitor(
        *(lambda encoder: None, {}, None, Console(), 100, torch.device("cpu")), small_epochs=60, small_cost=0.25
    )
    monitor.forecast(images_per_s=100, images=1000, epoch=20)  # 10 s an epoch, and 40 s an epoch from 60 on
    assert said == ["100 images/s: an epoch takes 10 s, the rest of the run about 33 min 20 s."]  # 40 x 10 + 40 x 40


CAUSES: list[tuple[str, str, Callable]] = [
    ("vicreg", "std", lambda method: equal(method.projector[-1])),
    ("lejepa", "std", lambda method: equal(method.projector[-1])),
    ("barlow", "redundancy", one_direction),
    ("nnclr", "distinct_neighbours", lambda method: equal(method.projector[-1])),
    ("swav", "code_entropy", lambda method: equal(method.projector[-1])),
    ("dino", "teacher_entropy", even_teacher),
    ("dino", "prototype_entropy", one_prototype),
    ("byol", "spread", lambda method: equal(method.projector[-1])),
]


@pytest.mark.parametrize(("name", "metric", "cause"), CAUSES, ids=[f"{name}-{metric}" for name, metric, _ in CAUSES])
def test_collapse_is_said_once(name, metric, cause, monkeypatch):
    parts = build(config(name))
    cause(parts.method)
    output = forward(parts.method, parts)
    (line,) = [line for line in advice(parts.method, output, monkeypatch) if f"train/{metric} is " in line]
    assert line.startswith("advice: ")
    assert advice(parts.method, output, monkeypatch, epoch=0.9) == []  # in the first epoch embeddings may be narrow


def test_knn_of_the_last_epoch_is_always_said(capfd):
    console = Console()
    monitor = Monitor(lambda encoder: None, {}, None, console, 2, torch.device("cpu"))
    console.start(20, 0)
    monitor.log(1, 0.1, {"train/loss": 3.0})  # a line; the next would come ten seconds later
    monitor.log(10, 1.0, {"knn/top1": 40.0})
    monitor.log(20, 2.0, {"train/loss": 2.0})
    monitor.log(20, 2.0, {"knn/top1": 50.0})
    console.stop()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and "epoch 2.00" in lines[1] and lines[1].endswith("loss 2  kNN 50")


def test_an_older_knn_is_shown_with_its_epoch(capfd, monkeypatch):
    monkeypatch.setattr(console_module, "PLAIN_SECONDS", 0)
    console = Console()
    monitor = Monitor(lambda encoder: None, {}, None, console, 30, torch.device("cpu"))
    console.start(300, 0)
    monitor.log(100, 10.0, {"train/loss": 3.0})
    monitor.log(100, 10, {"knn/top1": 40.0})
    monitor.log(105, 10.5, {"train/loss": 2.5})
    monitor.log(200, 20.0, {"train/loss": 2.0})
    monitor.log(200, 20, {"knn/top1": 50.0})
    console.stop()
    ends = [line.partition("loss ")[2] for line in capfd.readouterr().out.splitlines()]
    assert ends == ["3", "3  kNN 40", "2.5  kNN 40 (epoch 10)", "2  kNN 40 (epoch 10)", "2  kNN 50"]

    resumed = Monitor(lambda encoder: None, {}, None, console, 30, torch.device("cpu"))
    resumed.latest = dict(monitor.latest)  # as from a checkpoint, which does not have the epoch of the kNN
    console.start(300, 205)
    resumed.log(210, 21.0, {"train/loss": 1.5})
    console.stop()
    assert capfd.readouterr().out.splitlines()[0].endswith("loss 1.5  kNN 50")


@pytest.mark.parametrize("name", [name for name in DIFFERENT_CODE if name != "supervised"])
def test_declared_metrics_exist(name):
    parts = build(config(name))
    assert {collapse.metric for collapse in parts.method.collapses} <= {*forward(parts.method, parts).metrics}
