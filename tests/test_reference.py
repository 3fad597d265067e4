"""benchmarks/reference.py: its losses, steps and judgement are those of our methods, from parts of its own."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "benchmarks"))

import loops  # noqa: E402
import recording  # noqa: E402
import reference  # noqa: E402

from twoviews.assembly import Parts, load_data, make_parts, make_views  # noqa: E402
from twoviews.config.building import build  # noqa: E402
from twoviews.errors import BadInput  # noqa: E402
from twoviews.randomness import seed_of  # noqa: E402

torch.set_num_threads(1)
DIGITS = [
    "data=digits",
    "data.train_images=256",
    "augmentation=digits",
    "augmentation.views.both.size=null",
    "batch_size=64",
]
SMALL = [*DIGITS, "backbone=tiny", "backbone.width=8", "runtime.device=cpu", "runtime.precision=fp32"]
SIZES = {
    "moco": ["method.queue_size=192", "method.embed_dim=16", "method.momentum=0.9"],
    "simclr": [
        *("method.hidden_dim=24", "method.embed_dim=16", "method.temperature=0.5"),
        *("schedule.warmup_epochs=0.1", "optimizer.lr=1.0"),
    ],
    "byol": ["method.hidden_dim=24", "method.embed_dim=16", "method.momentum=0.9", "schedule.warmup_epochs=0.1"],
}
# Every part of a recipe that the reference expresses in its own way.
CASES = {
    "moco": ("moco", ["schedule.every=step", "schedule.final=0.1"]),
    "moco_epochs": ("moco", ["schedule.warmup_epochs=1", "schedule.warmup_start=0.2"]),
    "moco_mlp": ("moco", ["method.mlp_head=true", "method.bn_splits=1", "optimizer.nesterov=true"]),
    "moco_excluded": ("moco", ["optimizer.exclude_norm_and_bias=true", "optimizer.weight_decay=0.1"]),
    "simclr": ("simclr", ["optimizer.weight_decay=0.1", "optimizer.trust_coefficient=0.02"]),
    "byol": ("byol", ["optimizer.weight_decay=0.1"]),
    "byol_larc": ("byol", ["optimizer.clip=false", "optimizer.exclude_norm_and_bias=false"]),
}


def assembled(method: str, *overrides: str) -> tuple[DictConfig, Parts]:
    cfg = reference.composed(method, 2, 0, [*SMALL, *SIZES[method], *overrides])
    data, runtime = load_data(cfg), build(cfg.runtime)
    return cfg, make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu"))


def the_other(method: str, cfg: DictConfig, parts: Parts) -> reference.Reference:
    size = parts.data.size
    return reference.Reference(
        method, cfg, parts.data.channels, size, len(parts.loader), torch.device("cpu"), torch.float32
    )


def networks(method: str, model: nn.Module) -> list[nn.Module]:
    """Of either side, in the same order."""
    if isinstance(model, reference.Model):
        names = {"moco": ("key_encoder", "key_head"), "simclr": (), "byol": ("predictor", "target", "target_head")}
        return [model.encoder, model.head, *(getattr(model, name) for name in names[method])]
    names = {"moco": ("key_encoder",), "simclr": (), "byol": ("predictor", "target")}
    return [model.encoder, model.projector, *(getattr(model, name) for name in names[method])]  # type: ignore[list-item]


def weights(method: str, model: nn.Module) -> list[Tensor]:
    return [weight for network in networks(method, model) for weight in network.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_the_same_losses_weights_and_judgement_step_by_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batch norms of torch on both sides: at the kinks of ReLU, roundings of 1e-6 grow to 1e-3 within eight steps.
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    method, overrides = CASES[name]
    cfg, parts = assembled(method, *overrides)
    other = the_other(method, cfg, parts)
    with torch.no_grad():
        for own, its in zip(weights(method, parts.method), weights(method, other.model), strict=True):
            assert own.shape == its.shape
            its.copy_(own)
    if isinstance(other.model, reference.MoCo):
        other.model.criterion.memory_bank.bank = parts.method.queue.rows.clone()  # type: ignore[union-attr]
    steps, batches = loops.ours(parts, cfg, tmp_path), loops._batches(parts, cfg.epochs)
    losses = []
    for number in range(2 * len(parts.loader)):  # two epochs, and around the queue
        batch = next(batches)
        torch.manual_seed(seed_of(cfg.seed, "step", number, 0))  # of the order in which keys are shuffled
        losses.append(other.step(batch.views).item())
        assert next(steps) == pytest.approx(losses[-1], abs=1e-4 if number == 0 else 1e-3)
    assert len(set(losses)) == len(losses) == 8
    for own, its in zip(weights(method, parts.method), weights(method, other.model), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-3, atol=1e-3)


def test_the_judge_sees_both_alike() -> None:
    """After the same forward passes running statistics agree as well, whose parts lightly keeps apart until eval mode."""
    cfg, parts = assembled("moco")
    other = the_other("moco", cfg, parts)
    with torch.no_grad():
        for own, its in zip(weights("moco", parts.method), weights("moco", other.model), strict=True):
            its.copy_(own)
    batch = next(iter(parts.loader))
    parts.method(batch.views, batch.index)
    other.model.outputs(*batch.views)
    for judged in (parts.method.encoder, other.model.encoder):
        judged.train()
    few = replace(parts.data, memory=parts.data.memory.subset(torch.arange(400)))  # type: ignore[union-attr]
    judge = reference.Judge(few, parts.device, torch.float32, 20, 0.1)
    ours = judge(parts.method.encoder, parts.method.projector)  # type: ignore[arg-type]
    theirs = judge(other.model.encoder, other.model.head)
    assert ours == pytest.approx(theirs, abs=0.6)  # two of the 360 images
    assert ours["features"] > 15


def test_resnet18_is_lightlys_with_split_batch_norms() -> None:
    from lightly.models.batchnorm import SplitBatchNorm
    from lightly.models.resnet import ResNet

    cfg = reference.composed("moco", 1, 0, ["data.root=somewhere"])
    network, features = reference.residual_network(cfg.backbone, 3, 32, cfg.method.bn_splits)
    assert isinstance(network, ResNet) and features == 512
    assert network(torch.zeros(16, 3, 32, 32)).shape == (16, 512)
    assert sum(isinstance(module, SplitBatchNorm) and module.num_splits == 8 for module in network.modules()) == 20
    own = build(cfg.backbone, channels=3, image_size=32)
    assert [one.shape for one in own.parameters()] == [one.shape for one in network.parameters()]
    deviations = [network.conv1.weight.std().item(), own.conv1.weight.std().item()]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.1)


REFUSED = [
    ("moco", ["method.symmetric=true"], "symmetric"),
    ("moco", ["batch_size=500"], "method.queue_size=4000"),
    ("moco", ["method=simclr"], "--methods"),
    ("moco", ["optimizer=adamw"], "optimizer=adamw"),
    ("simclr", ["schedule=constant", "~schedule.warmup_epochs"], "schedule=cosine"),
    ("byol", ["runtime.precision=fp16"], "fp16"),
    ("byol", ["runtime.accumulate=2"], "accumulate"),
]


@pytest.mark.parametrize(("method", "overrides", "part"), REFUSED)
def test_what_the_reference_cannot_express(method: str, overrides: list[str], part: str) -> None:
    with pytest.raises(BadInput, match=part):
        reference.composed(method, 1, 0, ["data.root=somewhere", *overrides])


@pytest.mark.parametrize(("override", "channels", "size"), [("resnet18_cifar", 1, 32), ("resnet18_cifar", 3, 0)])
def test_what_lightlys_generator_cannot_take(override: str, channels: int, size: int) -> None:
    cfg = reference.composed("moco", 1, 0, ["data.root=somewhere", f"backbone={override}"])
    with pytest.raises(BadInput, match="backbone=tiny"):
        reference.residual_network(cfg.backbone, channels, size, 8)
    cfg = reference.composed("moco", 1, 0, ["data.root=somewhere", "backbone=resnet18"])
    with pytest.raises(BadInput, match="small images"):
        reference.residual_network(cfg.backbone, 3, 32, 8)


def row(seed: int, ours: float, theirs: float | None) -> dict[str, Any]:
    def side(value: float) -> dict[str, float]:
        return {"features": value, "projections": value / 2, "loss": 1.0, "seconds": 10.0}

    found = {"method": "moco", "seed": seed, "ours": side(ours)}
    return found if theirs is None else {**found, "reference": side(theirs)}


def test_means_and_interval() -> None:
    rows = [row(0, 51.0, 50.0), row(1, 52.0, 50.0), row(2, 53.0, 50.0), row(3, 99.0, None)]
    found = reference.summary(rows)["moco"]
    assert found["seeds"] == 3 and found["seconds"] == {"ours": 10.0, "reference": 10.0}
    features = found["features"]
    assert (features["ours"], features["reference"], features["difference"]) == (52.0, 50.0, 2.0)
    assert features["half_interval"] == pytest.approx(4.30265 / 3**0.5, rel=1e-4)  # t of two degrees of freedom
    assert found["projections"]["difference"] == 1.0
    assert reference.summary(rows[:1])["moco"]["features"]["half_interval"] is None
    assert reference.summary(rows[3:]) == {}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    small = [*SMALL, *SIZES["moco"], "protocol.knn.k=20", "--epochs", "2", "--every", "1", "--json", str(path)]

    def call(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["reference.py", *small, *arguments])
        recording.run(reference.main)
        return capsys.readouterr()

    out, _ = call("--seeds", "2")
    assert out.count(" seed 0 ") == out.count(" seed 1 ") == 2
    found = json.loads(path.read_text())
    assert [row["seed"] for row in found["rows"]] == [0, 1]
    assert found["summary"]["moco"]["seeds"] == 2
    for one in found["rows"]:
        for side in reference.SIDES:
            assert [point["epoch"] for point in one[side]["curve"]] == [1, 2]
            assert one[side]["curve"][-1]["features"] == one[side]["features"] > 15
            assert one[side]["seconds"] > 0
    out, _ = call("--minutes", "0")
    assert "6 trainings are not begun" in out
    with pytest.raises(SystemExit, match="2"):
        call("--seeds", "0")
    assert "error: --epochs 2 and --seeds 0 have to be at least 1." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call("method.bn_splits=7")
    assert capsys.readouterr().out == ""  # before anything is trained
