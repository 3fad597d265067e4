"""What test_contract, test_distributed and test_golden share: methods built from conf/, small, and several processes."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
import yaml
from omegaconf import DictConfig

from twoviews import distributed, process_group
from twoviews.assembly import Parts, load_data, make_parts, make_views
from twoviews.config.checks import check
from twoviews.data.loader import Batch
from twoviews.methods.method import Progress
from twoviews.signatures import signature

# Networks as small as these only wait for each other's threads, and recorded numbers depend on how sums are split.
torch.set_num_threads(1)
# Processes are forked from one that has imported this already, which takes each of them 2 s otherwise.
multiprocessing.set_forkserver_preload(["twoviews.assembly"])

CONF = Path(__file__).parents[1] / "conf"
# Every method file, and the variants of one that are other code.
METHODS = {path.stem: [] for path in sorted((CONF / "method").glob("*.yaml"))} | {
    # Of conf/method, not of conf/special, which is for short trainings on digits.
    "byol": ["method.momentum=0.99"],
    "simclr": ["method.temperature=0.5"],
    "nnclr": ["method.temperature=0.2"],
    "moco_symmetric": ["method.symmetric=true"],
    "moco_plain_norms": ["method.bn_splits=1"],
    "simclr_decoupled": ["method.decoupled=true", "method.temperature=0.5"],
    "pcl_masked": ["method.mask_same_cluster=true"],
    "pcl_drawn": ["method.negative_prototypes=3"],
}
# One name for each: moco_v1 and pcl_v1 are moco and pcl with other numbers, and pcl_v2 has the head of moco_v2.
DIFFERENT_CODE = [name for name in METHODS if name not in ("moco_v1", "pcl_v1", "pcl_v2")]
# Where a method has such a parameter, the test gives it this value.
SMALL = {
    "embed_dim": 16,
    "hidden_dim": 24,
    "predictor_hidden_dim": 24,
    "directions": 32,
    "queue_size": 80,
    "bn_splits": 4,
    "prototypes": 12,
    "clusters": [20, 40],
    "negative_prototypes": "null",
    "warmup_epochs": 0,
}
BATCH = 16


def fitting(method: str, values: Mapping[str, Any]) -> list[str]:
    """Overrides that give a method these values, of the parameters that it has."""
    target = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())["_target_"]
    return [f"++method.{key}={value}" for key, value in values.items() if key in signature(target)]


def config(name: str, *overrides: str) -> DictConfig:
    """conf/train.yaml with a method, digits and a network of 20,000 parameters."""
    method = name if (CONF / "method" / f"{name}.yaml").exists() else name.split("_")[0]
    shared = [
        f"method={method}",
        "data=digits",
        "augmentation=digits",
        "backbone=tiny",
        "backbone.stem=strided",
        "backbone.width=8",
        "backbone.depths=[1,1]",
        "optimizer=sgd_short",
        f"batch_size={BATCH}",
        "epochs=4",
        "runtime.device=cpu",
        "runtime.precision=fp32",
    ]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [*shared, *fitting(method, SMALL), *METHODS[name], *overrides])
    check("train", cfg)
    return cfg


def build(cfg: DictConfig) -> Parts:
    """The parts of that training, as the entry point makes them, at the start of its first epoch."""
    data = load_data(cfg)
    runtime = hydra.utils.instantiate(cfg.runtime)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu"))
    parts.method.before_epoch(0, parts.embed, seed=0)
    return parts


def batch_of(parts: Parts, number: int) -> Batch:
    """The loader's batch of that number in epoch 0."""
    parts.loader.set_epoch(0, start=number)
    return next(iter(parts.loader))


def step(parts: Parts, number: int, batch: Batch | None = None, wrapped: Callable | None = None) -> torch.Tensor:
    """One optimizer step on the loader's batch of that number, or another; its loss (of this process)."""
    batch = batch or batch_of(parts, number)
    parts.method.train()
    torch.manual_seed(number)
    output = (wrapped or parts.method)(batch.views, batch.index)
    output.loss.backward()
    parts.method.before_step(parts.method.phase(number / len(parts.loader)))
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    rows = {name: distributed.gather(x) for name, x in output.rows.items()}
    parts.method.after_step(progress(number + 1, len(parts.loader), 4), rows)
    return output.loss.detach()


def progress(step: int, steps: int, epochs: int) -> Progress:
    """After so many steps of a training."""
    return Progress(*(torch.tensor(share, dtype=torch.float64) for share in (step / steps, step / (steps * epochs))))


def _process(rank: int, processes: int, folder: Path, function: Callable, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    process_group.join(dist.FileStore(f"{folder}/meeting", processes), processes, torch.device("cpu"))
    try:
        assert distributed.rank() == rank
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        process_group.leave()


def in_processes(processes: int, folder: Path, function: Callable, *arguments: Any) -> list[Any]:
    """What a function of a test module returns in each of several processes that know each other."""
    torch.multiprocessing.start_processes(
        _process, (processes, folder, function, arguments), processes, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
