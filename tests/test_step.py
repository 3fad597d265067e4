"""Captured steps: what is replayed does what eager steps do, for every method, optimizer and schedule."""

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from assembled import METHODS, config
from recorded_graph import recorded_graphs
from torch import Tensor

from twoviews.assembly import load_data, make_parts, make_views
from twoviews.console import Console
from twoviews.loop import Training
from twoviews.run import Run
from twoviews.step import EAGER_STEPS

STEPS = 8


def training(folder: Path, name: str, *overrides: str) -> Training:
    """At the start of its first epoch."""
    cfg = config(name, "runtime.device=cpu", *overrides)
    runtime, data = hydra.utils.instantiate(cfg.runtime), load_data(cfg)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu"))
    one = Training(parts, run=Run(folder), metrics=None, console=Console(), epochs=4, seed=0)
    one.method.before_epoch(0, parts.embed, seed=0)
    one.method.train()
    return one


def stepped(one: Training, count: int = STEPS) -> list[dict[str, float]]:
    """Losses and metrics of the next steps, over as many epochs as they take."""
    found = []
    while len(found) < count:
        epoch, start = divmod(one.position.step, len(one.loader))
        one.loader.set_epoch(epoch, start=start)
        for batch, _ in zip(one.loader, range(count - len(found)), strict=False):
            found.append({name: value.item() for name, value in one._step(batch).items()})
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two states of a training, but for the time that they took."""
    first, second = torch.utils._pytree.tree_leaves((one["method"], one["optimizer"])), None
    second = torch.utils._pytree.tree_leaves((other["method"], other["optimizer"]))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6) if isinstance(a, Tensor) else None
        assert isinstance(a, Tensor) or a == pytest.approx(b) if isinstance(a, float) else True


@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_do_what_eager_ones_do(name: str, tmp_path: Path, capfd) -> None:
    eager = training(tmp_path, name)
    expected = stepped(eager)
    with recorded_graphs() as graphs:
        captured = training(tmp_path, name)
        found = stepped(captured)
        assert graphs.replays == STEPS - EAGER_STEPS + 1, capfd.readouterr().out
    assert "eager" not in capfd.readouterr().out
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert_same(captured.state(), eager.state())
