"""What runs on a GPU, on a pretended one (pretended_gpu.py): no tensors of two devices, and no waiting within an epoch."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from assembled import CONF, DIFFERENT_CODE, config
from conftest import SMALL_MOCO
from interpreted import interpreted
from kernel_on_cpu import Block, compile_for_cpu
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pretended_gpu import OnGPU, WrongDevice, created, pretended, waits
from recorded_graph import RecordedGraph
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twoviews import batch_size
from twoviews.assembly import Parts, load_data, make_parts, make_views
from twoviews.backbones import ResNet
from twoviews.checkpoints import load_checkpoint
from twoviews.clusters import kmeans, passes
from twoviews.config.building import build
from twoviews.console import Console
from twoviews.data import kernel_cuda, rendering
from twoviews.data.sources import digits
from twoviews.fused_norm import reason_for_plain
from twoviews.layers import Queue
from twoviews.loop import Training
from twoviews.protocols.protocol import EvaluationContext
from twoviews.step import EAGER_STEPS, eager_reason

STEPS = EAGER_STEPS + 3
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


@pytest.fixture(autouse=True)
def in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, and k-means by products, here and there alike."""
    monkeypatch.setenv("TWOVIEWS_KERNEL", "0")
    monkeypatch.setattr(kmeans, "passes_on", lambda device: passes.by_products())


def training(folder: Path, cfg: DictConfig, restored: dict[str, Any] | None = None) -> Training:
    """At the start of its first epoch, or where it was."""
    runtime = hydra.utils.instantiate(cfg.runtime)
    device = runtime.torch_device()
    data = load_data(cfg).to(device)
    parts: Parts = make_parts(cfg, data, make_views(cfg, data), runtime, device)
    one = Training(parts, folder=folder, metrics=None, console=Console(), epochs=4, seed=0)
    if restored:
        one.restore(restored)
    else:
        one.method.before_epoch(0, parts.embed, seed=0)
    one.method.train()
    return one


def stepped(one: Training, count: int = STEPS) -> list[torch.Tensor]:
    """Losses and metrics of the next steps; nothing is waited for, and no tensors of the CPU are made for a step."""
    one.loader.set_epoch(0, start=one.position.step)
    batches = iter(one.loader)
    batch, found = next(batches), []  # the order of an epoch is copied at its start
    waits.clear()
    for _ in range(count):
        created.clear()
        found += [value.clone() for value in one.train_on_batch(batch).values()]
        assert not created, created
        batch = next(batches)
    # GradScaler asks whether the gradients were finite before it lets the optimizer step, and a capture compares.
    waited = [wait for wait in waits if "cuda_graph.py" not in wait]
    assert one.dtype == torch.float16 or not waited, waited
    if count > EAGER_STEPS and eager_reason(one.runtime, one.device) is None:
        assert RecordedGraph.replays == count - EAGER_STEPS + 1  # one more, which is compared
    return found


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Of a checkpoint."""
    if isinstance(tree, torch.Tensor):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from tensors(branch)


CLUSTERED = ("pcl_masked", "deepcluster_v2")  # an image between two clusters is in either, as bf16 happens to round
IN_BF16 = ("moco", "simclr", "swav", *CLUSTERED)
# Gradients of a loss with weights of 25 are so large that rounding errors grow a thousandfold in each step of the usual rate.
SMALL_STEPS = {name: [f"optimizer.lr={lr}"] for name, lr in {"vicreg": 0.0005, "barlow": 0.02, "nnclr": 0.1}.items()}


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in DIFFERENT_CODE), *((name, "bf16") for name in IN_BF16)]
)
def test_a_step_waits_for_nothing_and_computes_what_it_does_on_a_cpu(name: str, precision: str, tmp_path: Path) -> None:
    overrides = [f"runtime.precision={precision}", "runtime.channels_last=true", "runtime.accumulate=1"]
    overrides += SMALL_STEPS.get(name, [])
    with pretended():
        there = training(tmp_path, config(name, *overrides, "runtime.device=cuda"))
        found = stepped(there)
        assert {type(one) for one in found} == {OnGPU}
        assert {type(one) for one in there.method.state_dict(keep_vars=True).values()} <= {OnGPU, torch.Tensor}
        found = [one.item() for one in found]
    if precision == "bf16" and name in CLUSTERED:
        assert all(map(math.isfinite, found))
        return
    expected = [one.item() for one in stepped(training(tmp_path, config(name, *overrides, "runtime.device=cpu")))]
    # Relative as well: VICReg's loss is about 25.
    assert found == pytest.approx(
        expected, **{"fp32": {"rel": 1e-4, "abs": 1e-4}, "bf16": {"rel": 0.02, "abs": 0.02}}[precision]
    )


@pytest.fixture(scope="module")
def views_kernel(tmp_path_factory) -> Block:
    return Block(compile_for_cpu(kernel_cuda.SOURCE, tmp_path_factory.mktemp("kernel")), threads=1)


def test_a_step_by_the_paths_of_a_gpu(views_kernel: Block, tmp_path: Path) -> None:
    """Views by kernel.cu, fused norms and a captured step, as a GPU has them by default."""
    overrides = ["runtime.precision=fp32", "runtime.channels_last=true", "runtime.accumulate=1"]
    with pretended(views_kernel), interpreted() as launched:
        there = training(tmp_path, config("moco", *overrides, "runtime.device=cuda"))
        assert rendering.compiled(there.device) and eager_reason(there.runtime, there.device) is None
        assert reason_for_plain(there.device) is None
        launched.clear()
        found = [one.item() for one in stepped(there)]
        assert {"statistics", "normalise", "sums", "input_gradient"} <= set(launched)
    expected = [one.item() for one in stepped(training(tmp_path, config("moco", *overrides, "runtime.device=cpu")))]
    assert found == pytest.approx(expected, abs=1e-3)


class Counter(TorchDispatchMode):
    """Counts operators of torch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_an_eager_step_has_few_operators(tmp_path: Path) -> None:
    """Those of torch, and for each of six batch norms three launches for queries, three for keys and three backward."""
    network = [
        "backbone=resnet18_cifar",
        "backbone.depths=[1,1]",
        "backbone.width=4",
        "data.train_images=64",
        "batch_size=16",
        "augmentation=digits",
        "optimizer=sgd_short",
    ]
    shared = ["data=digits", "protocol=[]", "runtime.device=cuda", "runtime.precision=bf16", "tracking=files"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", ["method=moco", "method.queue_size=32", *network, *shared])
    with pretended(), interpreted() as launched:
        one = training(tmp_path, cfg)
        assert reason_for_plain(one.device) is None
        one.loader.set_epoch(0)
        batch = next(iter(one.loader))
        one.train_on_batch(batch)
        launched.clear()
        with Counter() as counter:
            one.train_on_batch(batch)
    assert counter.count <= 248
    assert len(launched) == 54


OPTIMIZERS = {"sgd": "fp32", "lars": "bf16", "larc": "fp16", "adamw": "bf16", "muon": "bf16"}


@pytest.mark.parametrize(("optimizer", "precision"), OPTIMIZERS.items())
def test_a_training_goes_on_from_its_checkpoint(optimizer: str, precision: str, tmp_path: Path) -> None:
    """With every optimizer, in micro-batches, and the scaler of fp16."""
    overrides = [f"optimizer={optimizer}", f"runtime.precision={precision}", "runtime.accumulate=2"]
    # torch's fused Adam asks in C++ for the device of its parameters, which is not the pretended one.
    overrides += ["runtime.cuda_graph=false"] if optimizer in ("adamw", "muon") else []
    with pretended():
        cfg = config("simclr", *overrides, "runtime.device=cuda")
        one = training(tmp_path, cfg)
        stepped(one, 2)
        one.save()
        expected = [loss.item() for loss in stepped(one, 2)]
        one.checkpoints.wait()
        state = load_checkpoint(tmp_path / "last.pt")
        assert {type(tensor) for tensor in tensors(state)} == {torch.Tensor}
        found = [loss.item() for loss in stepped(training(tmp_path / "other", cfg, state), 2)]
        assert found == expected


def context(device: torch.device, folder: Path) -> EvaluationContext:
    """A random network, whose batch norms have seen some digits, with some more of them."""
    data = digits()
    small = {"train": 300, "memory": 300, "test": 100}
    data = replace(data, **{name: getattr(data, name).subset(torch.arange(n)) for name, n in small.items()})
    torch.manual_seed(0)
    encoder = ResNet(channels=1, image_size=32, block="basic", depths=[1, 1], width=8, stem="strided")
    with torch.no_grad():
        encoder(data.train.pixels / 255.0)
    folder.mkdir()
    return EvaluationContext(
        encoder.to(device), data.to(device), device, torch.float32, channels_last=True, folder=folder
    )


def shrunk(node: dict[str, Any]) -> dict[str, Any]:
    """Of a protocol's configuration, with a node for each of its parts."""
    return {key: shrunk(one) if isinstance(one, dict) else SMALL.get(key, one) for key, one in node.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "protocol").glob("*.yaml")))
def test_a_protocol_finds_what_it_does_on_a_cpu(name: str, tmp_path: Path) -> None:
    (node,), picture = config("simclr", f"protocol=[{name}]").protocol.values(), tmp_path / "picture.png"
    node = shrunk(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    if name == "predict":
        Image.new("L", (32, 32), 99).save(picture)
        node["images"] = str(picture)
    with pretended():
        there = build(DictConfig(node))(context(torch.device("cuda", 0), tmp_path / "there"))
        assert type(there.probabilities) in (OnGPU, torch.Tensor, type(None))
    here = build(DictConfig(node))(context(torch.device("cpu"), tmp_path / "here"))
    assert there.values.keys() == here.values.keys() and there.values
    assert there.values == pytest.approx(here.values, rel=1e-3, abs=1.5)  # percent: a picture may change sides
    assert there.tables.keys() == here.tables.keys()
    files = [{path.relative_to(side) for path in side.rglob("*")} for side in (tmp_path / "there", tmp_path / "here")]
    assert files[0] == files[1]


def test_commands_from_training_to_clusters(command) -> None:
    """With a run's own GPU for all of them, an E-step, and the largest batch found before."""
    small = [argument for argument in SMALL_MOCO if not argument.startswith(("runtime.device", "epochs"))]
    pcl = ["method=pcl", "method.clusters=[5]", "method.warmup_epochs=1", "epochs=2", "hydra.run.dir=run"]
    with pretended():
        trained = command("train", *small, *pcl, "protocol=[knn_small,health]", "runtime.device=auto")
        assert trained.code == 0, trained.out + trained.err
        lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
        assert any("e_step/k5/nmi" in line for line in lines) and lines[-1]["memory/gpu_mb"] == 1000
        environment = json.loads(Path("run", "environment.json").read_text())
        assert environment["gpu"] == "a GPU" and "device    a GPU, bfloat16" in trained.out
        judging = command("evaluate", "run=run", "protocol=[linear,knn]")
        assert judging.code == 0, judging.out + judging.err
        clustered = command("cluster", "run=run", "clusters=[5]")
        assert clustered.code == 0, clustered.out + clustered.err


def test_the_largest_batch_is_tried_on_the_gpu(tmp_path: Path) -> None:
    with pretended():
        cfg = config("moco", "runtime.device=cuda")
        runtime = hydra.utils.instantiate(cfg.runtime)
        trial = batch_size._two_steps(cfg, runtime, runtime.torch_device(), tmp_path)
        assert trial.fits and trial.peak == 1e9 and trial.size == cfg.batch_size


def test_a_tensor_on_the_wrong_device_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pretence itself, at places where a mistake was planted."""

    def forgotten(self: Queue, z: torch.Tensor) -> None:
        self.rows[(self.position + torch.arange(len(z))) % self.size] = z

    monkeypatch.setattr(Queue, "push", forgotten)
    with pretended():
        with pytest.raises(WrongDevice, match="add of tensors on two devices"):
            stepped(training(tmp_path, config("moco", "runtime.device=cuda")))
        x = torch.ones(3, device="cuda:0")
        assert x.device == torch.device("cuda", 0) and (x.new_zeros(2) + torch.tensor(1.0)).device == x.device
        assert x.cpu().numpy().sum() == 3 and type(x.to("cpu")) is torch.Tensor
        for mistake in (
            lambda: x.numpy(),
            lambda: x + torch.ones(3),
            lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
            lambda: torch.ones(3)[x.long()],
            lambda: torch.ones(3).add_(x),
            lambda: nn.Linear(3, 1)(x),
            lambda: x.to("cpu", non_blocking=True),
        ):
            with pytest.raises(WrongDevice):
                mistake()
        waits.clear()
        assert x.sum() == 3 and x.tolist() and len(x.nonzero()) == len(x[x > 0])
        torch.zeros(3).to(x.device), torch.zeros(3).to(x.device, non_blocking=True)
        assert [wait.split(" in ")[0].rpartition(".")[2] for wait in waits] == [
            *("__bool__", "tolist", "nonzero", "__getitem__", "copy")
        ]
