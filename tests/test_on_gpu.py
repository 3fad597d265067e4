"""What runs on a GPU, on a pretended one (pretended_gpu.py): no tensors of two devices, and no waiting within an epoch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from assembled import CONF, METHODS, config
from conftest import SMALL_MOCO
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pretended_gpu import OnGPU, WrongDevice, pretended
from torch import nn

from twoviews import batch_size
from twoviews.assembly import Parts, load_data, make_parts, make_views
from twoviews.console import Console
from twoviews.data.images import ImageData
from twoviews.features import Judged
from twoviews.layers import Queue
from twoviews.loop import Training
from twoviews.run import Run, load_checkpoint

STEPS = 3
# What a protocol has of these is made smaller.
SMALL = {
    "corruptions": ["gaussian_noise", "fog"],
    "severities": [3],
    "epochs": 2,
    "milestones": [1],
    "iterations": 5,
    "draws": 2,
    "learning_rates": [0.01, 0.1],
    "weight_decays": [0.001, 0.01],
    "warmup_epochs": 0,
    "batch_size": 64,
}


@pytest.fixture
def waits() -> Iterator[list[str]]:
    with pretended() as found:
        yield found


@pytest.fixture(autouse=True)
def in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, here and there alike."""
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")


def training(folder: Path, cfg: DictConfig, restored: dict[str, Any] | None = None) -> Training:
    """At the start of its first epoch, or where it was."""
    runtime = hydra.utils.instantiate(cfg.runtime)
    device = runtime.torch_device()
    data = load_data(cfg).to(device)
    parts: Parts = make_parts(cfg, data, make_views(cfg, data), runtime, device)
    one = Training(parts, run=Run(folder), metrics=None, console=Console(quiet=True), epochs=4, seed=0)
    if restored:
        one.restore(restored)
    else:
        one.method.before_epoch(0, parts.embed, seed=0)
    one.method.train()
    return one


def stepped(one: Training, count: int = STEPS) -> list[torch.Tensor]:
    """Losses and metrics of the next steps; nothing is waited for."""
    one.loader.set_epoch(0, start=one.position.step)
    batches = iter(one.loader)
    batch, found = next(batches), []  # the order of an epoch is copied at its start
    from pretended_gpu import waits

    waits.clear()
    for _ in range(count):
        loss, metrics = one._step(one.method, batch)
        found += [loss, *metrics.values()]
        batch = next(batches)
    assert not waits, waits
    return found


def on_cpu(tensors: list[torch.Tensor]) -> list[float]:
    return [one.item() for one in tensors]


def everything(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of a checkpoint."""
    if isinstance(tree, torch.Tensor):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from everything(branch)


IN_BF16 = ("moco", "simclr", "swav", "pcl_masked", "deepcluster_v2")


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in METHODS), *((name, "bf16") for name in IN_BF16)]
)
def test_a_step_waits_for_nothing_and_computes_what_it_does_on_a_cpu(name: str, precision: str, tmp_path: Path) -> None:
    overrides = [f"runtime.precision={precision}", "runtime.channels_last=true", "runtime.accumulate=1"]
    with pretended():
        there = training(tmp_path, config(name, *overrides, "runtime.device=cuda"))
        found = stepped(there)
        assert {type(one) for one in found} == {OnGPU}
        assert {type(one) for one in there.method.state_dict(keep_vars=True).values()} <= {OnGPU, torch.Tensor}
        found = on_cpu(found)
    expected = on_cpu(stepped(training(tmp_path, config(name, *overrides, "runtime.device=cpu"))))
    assert found == pytest.approx(expected, **{"fp32": {"abs": 1e-4}, "bf16": {"rel": 0.02, "abs": 0.02}}[precision])
