"""Captured steps: what is replayed does what eager steps do, for every method, optimizer and phase."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from assembled import DIFFERENT_CODE, config
from recorded_graph import recorded_graphs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from twoviews import distributed
from twoviews.assembly import load_data, make_parts, make_views
from twoviews.backbones import Encoder
from twoviews.checkpoints import copied
from twoviews.console import Console
from twoviews.loop import Training
from twoviews.methods.method import Method, Output
from twoviews.step import EAGER_STEPS, TrainStep, eager_reason

STEPS = 8


def training(folder: Path, name: str, *overrides: str, device: str = "cpu") -> Training:
    """At the start of its first epoch."""
    cfg = config(name, f"runtime.device={device}", *overrides)
    runtime = hydra.utils.instantiate(cfg.runtime)
    data = load_data(cfg).to(there := runtime.torch_device())
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, there)
    one = Training(parts, folder=folder, metrics=None, console=Console(), epochs=4, seed=0)
    one.method.before_epoch(0, parts.embed, seed=0)
    one.method.train()
    return one


def stepped(one: Training, count: int = STEPS) -> list[dict[str, float]]:
    """Losses and metrics of the next steps, over as many epochs as they take."""
    found = []
    while len(found) < count:
        epoch, start = divmod(one.position.step, len(one.loader))
        if one.position.step and start == 0:
            one.e_step(epoch)
        one.loader.set_epoch(epoch, start=start)
        for batch, _ in zip(one.loader, range(count - len(found)), strict=False):
            found.append({name: value.item() for name, value in one.train_step(batch).items()})
    return found


def assert_same(one: Training, other: Training) -> None:
    """Weights, buffers and the optimizer's state."""
    for part in ("method", "optimizer"):
        first, second = (tree_leaves(each.state()[part]) for each in (one, other))
        assert len(first) == len(second)
        tensors = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor)]
        assert tensors
        for a, b in tensors:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def compare(folder: Path, name: str, *overrides: str, phases: int = 1, count: int = STEPS) -> None:
    """Steps of which the later ones are replayed, with eager ones."""
    eager = training(folder, name, *overrides)
    expected = stepped(eager, count)
    with recorded_graphs() as graphs:
        captured = training(folder, name, *overrides)
        found = stepped(captured, count)
        assert graphs.replays == count - phases * (EAGER_STEPS - 1)  # one more for each capture, which is tried
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert_same(captured, eager)


@pytest.mark.parametrize("name", DIFFERENT_CODE)
def test_replayed_steps_do_what_eager_ones_do(name: str, tmp_path: Path) -> None:
    compare(tmp_path, name)


# SimSiam keeps one learning rate off the schedule; BYOL's moving average changes its momentum.
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("simsiam", "adamw"),
        ("byol", "lars"),
        ("simsiam", "larc"),
        ("byol", "larc optimizer.clip=true"),
        ("simsiam", "muon"),
    ],
)
def test_with_every_optimizer(name: str, optimizer: str, tmp_path: Path) -> None:
    compare(tmp_path, name, *f"optimizer={optimizer}".split(), "schedule.warmup_epochs=1")


@pytest.mark.parametrize("name", ["simclr", "moco_symmetric", "swav"])
def test_in_micro_batches(name: str, tmp_path: Path) -> None:
    compare(tmp_path, name, "runtime.accumulate=2")


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_another_phase_is_captured_anew(name: str, tmp_path: Path) -> None:
    """Prototypes that are frozen for an epoch, after which the optimizer makes state for them."""
    frozen = ("method.freeze_prototypes_epochs=1", "optimizer=sgd", "optimizer.momentum=0.9")
    steps = len(training(tmp_path, name).loader)
    assert steps > EAGER_STEPS
    compare(tmp_path, name, *frozen, phases=2, count=steps + EAGER_STEPS + 2)


@pytest.mark.parametrize("name", ["pcl", "deepcluster_v2"])
def test_with_e_steps_between_replays(name: str, tmp_path: Path) -> None:
    """What they find is what the steps behind them compare with; the first clusters of PCL are another phase."""
    warm_up = ["method.warmup_epochs=1"] if name == "pcl" else []
    steps = len(training(tmp_path, name, *warm_up).loader)
    compare(tmp_path, name, *warm_up, phases=1 + len(warm_up), count=2 * steps + EAGER_STEPS)


class Keeping(Method):
    """A method whose loss has something in it that a graph cannot repeat.

    Args:
        encoder: the network.
        kept: a factor of the loss.
    """

    def __init__(self, encoder: Encoder, kept: Callable[[], float]):
        super().__init__()
        self.encoder, self.kept = encoder, kept

    def forward(self, views: Sequence[Tensor], index: Tensor) -> Output:
        """The mean square of the features, times that factor."""
        return Output(self.encoder(views[0]).square().mean() * self.kept())


@pytest.mark.parametrize("kind", ["counting on the host", "waiting for the device"])
def test_what_cannot_be_captured_trains_eagerly_and_is_said(kind: str, tmp_path: Path, capfd) -> None:
    numbers = itertools.count(1)
    kept = {
        "counting on the host": lambda: float(next(numbers)),
        "waiting for the device": lambda: torch.ones(1).item(),
    }
    with recorded_graphs() as graphs:
        one = training(tmp_path, "simsiam")
        method = Keeping(one.method.encoder, kept[kind])
        optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, fused=True)
        one.method, one.step = method, TrainStep(method, optimizer, one.runtime, one.device, one.console.say)
        found = stepped(one)
        assert graphs.replays == 0
    reason = {"counting on the host": "two eager steps", "waiting for the device": "_local_scalar_dense"}[kind]
    assert reason in capfd.readouterr().out.split("step      eager (no CUDA graph: ")[1]
    assert len(found) == STEPS and len({values["loss"] for values in found}) == STEPS


def test_a_training_goes_on_from_its_checkpoint_captured_or_not(tmp_path: Path) -> None:
    expected = training(tmp_path, "moco", "optimizer=adamw")
    stepped(expected, 12)
    eager = training(tmp_path, "moco", "optimizer=adamw")
    stepped(eager, 6)
    with recorded_graphs() as graphs:
        captured = training(tmp_path, "moco", "optimizer=adamw")
        captured.restore(copied(eager.state()))
        stepped(captured, 6)
        assert graphs.replays
        state = copied(captured.state())
    assert_same(captured, expected)
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["param_groups"])
    resumed = training(tmp_path, "moco", "optimizer=adamw")
    resumed.restore(state)
    stepped(expected, 2)
    stepped(resumed, 2)
    assert_same(resumed, expected)
    assert not any(group["fused"] for group in resumed.optimizer.param_groups)


@pytest.mark.parametrize(
    ("changes", "processes", "reason"),
    [
        ({}, 1, None),
        ({"cuda_graph": False}, 1, "cuda_graph=false"),
        ({"precision": "fp16"}, 1, "fp16"),
        ({}, 2, "2 processes"),
    ],
)
def test_when_steps_are_captured(changes, processes: int, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(distributed, "processes", lambda: processes)
    runtime = replace(hydra.utils.instantiate(config("moco").runtime), **changes)
    found = eager_reason(runtime, torch.device("cuda", 0))
    assert found is None if reason is None else reason in str(found)
    assert eager_reason(replace(runtime, precision="fp32"), torch.device("cpu")) == "on a CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DIFFERENT_CODE)
def test_on_a_gpu(name: str, precision: str, tmp_path: Path, capfd) -> None:
    """Replayed and eager steps, of which no two are alike in the last digits there."""
    losses = []
    for captured in ("true", "false"):
        overrides = (f"runtime.cuda_graph={captured}", f"runtime.precision={precision}", "runtime.accumulate=1")
        one = training(tmp_path, name, *overrides, device="cuda")
        losses.append([values["loss"] for values in stepped(one)])
        assert (one.step._graph is not None) == (captured == "true")
    assert "eager (no CUDA graph" not in capfd.readouterr().out
    assert losses[0] == pytest.approx(losses[1], rel=0.02, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("simsiam", "adamw"), ("byol", "lars"), ("simsiam", "larc"), ("swav", "sgd"), ("simsiam", "muon")],
)
def test_every_optimizer_on_a_gpu(name: str, optimizer: str, tmp_path: Path) -> None:
    losses = []
    for captured in ("true", "false"):
        frozen = ["method.freeze_prototypes_epochs=1"] if name == "swav" else []
        overrides = (f"optimizer={optimizer}", f"runtime.cuda_graph={captured}", "runtime.precision=fp32", *frozen)
        one = training(tmp_path, name, *overrides, device="cuda")
        losses.append([values["loss"] for values in stepped(one, 12)])
        assert (one.step._graph is not None) == (captured == "true")
    assert losses[0] == pytest.approx(losses[1], rel=0.02, abs=0.02)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_eager_steps_behind(tmp_path: Path, capfd) -> None:
    """What no eager step is told: that a graph cannot wait for the device. Random numbers are drawn as before."""
    one = training(tmp_path, "simsiam", device="cuda")

    def waiting() -> float:
        torch.rand(3, device="cuda")
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return 1.0

    method = Keeping(one.method.encoder, waiting)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, fused=True)
    one.method, one.step = method, TrainStep(method, optimizer, one.runtime, one.device, one.console.say)
    losses = [values["loss"] for values in stepped(one)]
    assert "eager (no CUDA graph" in capfd.readouterr().out and len(set(losses)) == STEPS


@pytest.fixture
def flags() -> Iterator[None]:
    """Those of torch that a deterministic training sets are as they were."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["moco", "simclr", "byol", "swav", "pcl", "deepcluster_v2"])
def test_deterministic_steps_are_the_same_bits(name: str, tmp_path: Path, flags: None) -> None:
    """In two trainings, of which one is interrupted and goes on from its checkpoint."""
    overrides = ("runtime.deterministic=true", "runtime.precision=bf16", "runtime.accumulate=1")
    whole = training(tmp_path, name, *overrides, device="cuda")
    expected = stepped(whole, 12)
    first = training(tmp_path, name, *overrides, device="cuda")
    found = stepped(first, 7)
    state = copied(first.state())
    torch.cuda.synchronize()
    second = training(tmp_path, name, *overrides, device="cuda")
    second.restore(state)
    found += stepped(second, 5)
    assert found == expected
