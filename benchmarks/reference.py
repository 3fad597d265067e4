"""An independent implementation of the same recipe, trained on the same images: kNN of both sides over several seeds.

    python benchmarks/reference.py data.root=<cifar10> backbone=tiny --epochs 10 --json benchmarks/results/reference.json
    python benchmarks/reference.py data.root=<cifar10> backbone=resnet18_cifar --epochs 100 --methods moco simclr byol

The recipe is experiment=<method>_cifar10 with the overrides given, as of train.py. The reference side is built from lightly:
its residual networks with its SplitBatchNorm, projection heads, NT-Xent loss with memory bank, negative cosine similarity,
momentum update, batch shuffling and cosine schedule, with torch.optim.SGD and a loop of its own. backbone=resnet18_cifar is
ResNetGenerator("resnet-18"); backbone=tiny, which lightly does not have, is made of the residual blocks of that generator.

Both sides get the same views of the same images in the same order from our loader, the same precision, and the same judge:
our kNN on the features and on the projections. For each seed the weights start from other random numbers on each side.

Where lightly's examples do otherwise than the recipe, the reference follows the recipe, because its results are compared:
convolutions start as in torchvision's ResNet, which MoCo's demo trains (lightly's start from torch's default, with 0.4 of that
deviation); a linear projector has one layer, and only hidden layers of projectors have batch norms; SimCLR's two views
are one batch; BYOL's loss is 2 - 2 cos of both directions, added. LARS and LARC (solo-learn's LARS) change the gradients
before the step of SGD, as apex does. Logits are computed in float32.

A line is printed and the JSON file written after each training. The interval of a difference is Student's t over the seeds,
paired, as both sides of a seed see the same views.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from recording import record, run
from speedrun import processor, without_paths
from torch import Tensor, nn

from twoviews.assembly import load_data, make_parts, make_views
from twoviews.config import checks
from twoviews.config.building import build
from twoviews.config.groups import CONF
from twoviews.console import Console
from twoviews.data.images import ImageData
from twoviews.data.loader import Loader
from twoviews.errors import BadInput
from twoviews.features import Features, embed
from twoviews.loop import Training
from twoviews.protocols.classification import top1
from twoviews.protocols.knn import knn_scores
from twoviews.protocols.protocol import EvaluationContext, EvaluationResult, Protocol
from twoviews.runtime import Runtime, autocast
from twoviews.stop_signal import StopSignal
from twoviews.tracking.metrics import Metrics, read

METHODS = ("moco", "simclr", "byol")
SIDES = ("reference", "ours")
MEASURES = ("features", "projections")
NAMES = {  # of lightly's networks, by block and depths
    ("basic", (2, 2, 2, 2)): "resnet-18",
    ("basic", (3, 4, 6, 3)): "resnet-34",
    ("bottleneck", (3, 4, 6, 3)): "resnet-50",
}
LIGHTLYS_SIZE = 32  # px; its networks end in a 4 x 4 average pool


# ------------------------------------------------------------------------------------------------------------ the reference


def residual_network(recipe: DictConfig, channels: int, size: int, splits: int) -> tuple[nn.Module, int]:
    """Lightly's network for a node of conf/backbone, and its number of features.

    Args:
        recipe: the node.
        channels: C of the images.
        size: of images and views in px; 0 where they differ.
        splits: of its batch norms; 1 is ordinary batch norm.

    Raises:
        BadInput: lightly has no such network.
    """
    from lightly.models import ResNetGenerator
    from lightly.models.batchnorm import get_norm_layer
    from lightly.models.resnet import BasicBlock, Bottleneck

    if not recipe._target_.endswith(".ResNet") or recipe.stem == "imagenet" or recipe.zero_init_residual:
        raise BadInput(
            "the reference has only residual networks for small images; use backbone=tiny or resnet18_cifar."
        )
    splits = splits if splits > 1 else 0  # 0 is lightly's number for ordinary batch norm
    name = NAMES.get((recipe.block, tuple(recipe.depths)))
    if name and recipe.width == 64 and recipe.stem == "cifar":
        if channels != 3 or size != LIGHTLYS_SIZE:
            raise BadInput(
                f"lightly's {name} takes colour images and views of {LIGHTLYS_SIZE} px, and these are of {channels} channel(s) "
                f"and {size or 'several'} px; use backbone=tiny."
            )
        network: nn.Module = ResNetGenerator(name, num_splits=splits)
        features = network.linear.in_features
        network.add_module("linear", nn.Identity())
    else:
        kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[recipe.block]
        stride = 2 if recipe.stem == "strided" else 1
        convolution = nn.Conv2d(channels, recipe.width, 3, stride, padding=1, bias=False)
        layers: list[nn.Module] = [convolution, get_norm_layer(recipe.width, splits), nn.ReLU()]
        features = recipe.width
        for stage, depth in enumerate(recipe.depths):
            for block in range(depth):
                width = recipe.width * 2**stage
                layers.append(kind(features, width, 2 if stage and not block else 1, splits))
                features = width * kind.expansion
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not (module is stem and recipe.stem == "cifar"):  # as ours
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network, features


class Model(nn.Module):
    """Abstract: what a method trains; `outputs` runs under autocast, `loss` in float32."""

    encoder: nn.Module
    head: nn.Module

    def outputs(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """What the loss of two views [B, C, H, W] needs."""
        raise NotImplementedError

    def loss(self, *outputs: Tensor) -> Tensor:
        """Of a batch."""
        raise NotImplementedError

    def follow(self, done: int, steps: int) -> None:
        """Update the momentum network before the step after `done` of so many."""


class MoCo(Model):
    """Lightly's MoCo example with the head of the recipe, SplitBatchNorm and shuffled keys."""

    def __init__(self, encoder: nn.Module, features: int, recipe: DictConfig):
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead, ProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.encoder, self.momentum = encoder, recipe.momentum
        self.head = (
            MoCoProjectionHead(features, features, recipe.embed_dim)
            if recipe.mlp_head
            else ProjectionHead([(features, recipe.embed_dim, None, None)])
        )
        self.key_encoder, self.key_head = deepcopy(self.encoder), deepcopy(self.head)
        deactivate_requires_grad(self.key_encoder)
        deactivate_requires_grad(self.key_head)
        self.criterion = NTXentLoss(recipe.temperature, memory_bank_size=(recipe.queue_size, recipe.embed_dim))

    def _apply(self, *arguments: Any, **options: Any) -> "MoCo":
        super()._apply(*arguments, **options)
        # Lightly reads it at each step, which on a GPU would wait for all that is still to be computed.
        self.criterion.memory_bank.bank_ptr = self.criterion.memory_bank.bank_ptr.cpu()
        return self

    def outputs(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys."""
        from lightly.models.utils import batch_shuffle, batch_unshuffle

        query = self.head(self.encoder(one))
        with torch.no_grad():
            shuffled, order = batch_shuffle(other)
            key = batch_unshuffle(self.key_head(self.key_encoder(shuffled)), order)
        return query, key

    def loss(self, *outputs: Tensor) -> Tensor:
        """InfoNCE with the memory bank, which takes the keys."""
        return self.criterion(*outputs)

    def follow(self, done: int, steps: int) -> None:
        """Before the forward pass, as in lightly's example: after the step is the same, except after the last one."""
        from lightly.models.utils import update_momentum

        if done:  # both begin with the same weights
            update_momentum(self.encoder, self.key_encoder, m=self.momentum)
            update_momentum(self.head, self.key_head, m=self.momentum)


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """A head with batch norm and ReLU behind its hidden layer only, which lightly has for BYOL."""
    from lightly.models.modules.heads import BYOLProjectionHead

    return BYOLProjectionHead(inputs, hidden, outputs)


class SimCLR(Model):
    """Lightly's SimCLR example with the head of the recipe, both views as one batch."""

    def __init__(self, encoder: nn.Module, features: int, recipe: DictConfig):
        from lightly.loss import NTXentLoss

        super().__init__()
        self.encoder, self.head = encoder, two_layers(features, recipe.hidden_dim, recipe.embed_dim)
        self.criterion = NTXentLoss(recipe.temperature)

    def outputs(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Projections of both."""
        return self.head(self.encoder(torch.cat([one, other]))).chunk(2)

    def loss(self, *outputs: Tensor) -> Tensor:
        """NT-Xent with the negatives of the batch."""
        return self.criterion(*outputs)


class BYOL(Model):
    """Lightly's BYOL example with the sizes and the momentum of the recipe."""

    def __init__(self, encoder: nn.Module, features: int, recipe: DictConfig):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import BYOLPredictionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.encoder, self.head = encoder, two_layers(features, recipe.hidden_dim, recipe.embed_dim)
        self.predictor = BYOLPredictionHead(recipe.embed_dim, recipe.hidden_dim, recipe.embed_dim)
        self.target, self.target_head = deepcopy(self.encoder), deepcopy(self.head)
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_head)
        self.criterion, self.momentum = NegativeCosineSimilarity(), recipe.momentum

    def outputs(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Predictions of both, and the target's projections of both."""
        p1, p2 = (self.predictor(self.head(self.encoder(view))) for view in (one, other))
        with torch.no_grad():
            t1, t2 = (self.target_head(self.target(view)) for view in (one, other))
        return p1, p2, t1, t2

    def loss(self, *outputs: Tensor) -> Tensor:
        """Eq. 2 of the paper, 2 - 2 cos, of both directions."""
        p1, p2, t1, t2 = outputs
        return 4 + 2 * self.criterion(p1, t2) + 2 * self.criterion(p2, t1)

    def follow(self, done: int, steps: int) -> None:
        """With a momentum that rises to 1."""
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        if done:
            momentum = cosine_schedule(done, steps + 1, self.momentum, 1.0)
            update_momentum(self.encoder, self.target, m=momentum)
            update_momentum(self.head, self.target_head, m=momentum)


MODELS: dict[str, Callable[[nn.Module, int, DictConfig], Model]] = {"moco": MoCo, "simclr": SimCLR, "byol": BYOL}


def check(method: str, cfg: DictConfig) -> None:
    """Whether the reference can express a recipe.

    Raises:
        BadInput: it cannot.
    """
    kind, wanted = cfg.method._target_.rpartition(".")[2], MODELS[method].__name__
    optimizer, schedule = (cfg[group]._target_.rpartition(".")[2] for group in ("optimizer", "schedule"))
    if kind != wanted:
        raise BadInput(f"--methods {method} with method={kind} is not the method it names; choose it with --methods.")
    if method == "moco" and cfg.method.symmetric:
        raise BadInput(
            "lightly's memory bank takes keys at each loss, so method.symmetric=true is beyond the reference."
        )
    if method == "moco" and cfg.method.queue_size % cfg.batch_size:
        usable = max(1, cfg.method.queue_size // cfg.batch_size) * cfg.batch_size
        raise BadInput(
            f"lightly's memory bank would drop keys: method.queue_size={cfg.method.queue_size} is not a multiple of "
            f"batch_size={cfg.batch_size}; use method.queue_size={usable}."
        )
    if optimizer not in ("sgd", "lars", "larc"):
        raise BadInput(f"the reference has no optimizer={optimizer}; use sgd, lars or larc.")
    if schedule != "Cosine":
        raise BadInput("the reference has only schedule=cosine.")
    if cfg.runtime.accumulate > 1 or cfg.runtime.precision == "fp16":
        raise BadInput(
            "the reference has neither runtime.accumulate above 1 nor runtime.precision=fp16; use bf16 or fp32."
        )


class Reference:
    """A training of the reference side.

    Args:
        method: "moco", "simclr" or "byol".
        cfg: the recipe.
        channels: C of the images.
        size: of images and views in px; 0 where they differ.
        steps: in an epoch.
        device: where to compute.
        dtype: number format of the forward pass.
    """

    def __init__(
        self,
        method: str,
        cfg: DictConfig,
        channels: int,
        size: int,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        check(method, cfg)
        torch.manual_seed(cfg.seed)
        splits = cfg.method.get("bn_splits", 1)
        encoder, features = residual_network(cfg.backbone, channels, size, splits)
        # Lightly's SplitBatchNorm takes its input apart with Tensor.view, which channels_last does not allow.
        last = cfg.runtime.channels_last and splits == 1
        self.form = torch.channels_last if last else torch.contiguous_format
        self.model = MODELS[method](encoder, features, cfg.method).to(device).to(memory_format=self.form)
        self.cfg, self.steps, self.device, self.dtype, self.done = cfg, steps, device, dtype, 0
        self.adaptive = cfg.optimizer._target_.rpartition(".")[2].removeprefix("sgd")
        recipe = cfg.optimizer
        self.base_lr = (
            recipe.lr * {"none": 1, "linear": cfg.batch_size / 256, "sqrt": cfg.batch_size**0.5}[recipe.lr_scaling]
        )
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        plain = [weight for weight in trained if weight.ndim == 1 and recipe.exclude_norm_and_bias]
        self.decayed = [weight for weight in trained if weight.ndim > 1 or not recipe.exclude_norm_and_bias]
        decay = 0.0 if self.adaptive else recipe.weight_decay
        groups = [{"params": self.decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
        options = {"momentum": recipe.momentum, "nesterov": recipe.get("nesterov", False)}
        self.optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=1.0, **options)
        self.model.train()

    def rate(self) -> float:
        """The learning rate of the next step."""
        from lightly.utils.scheduler import cosine_schedule

        schedule, at = self.cfg.schedule, self.done
        if schedule.every != "step":
            at = (self.done // self.steps + (schedule.every == "epoch_from_1")) * self.steps
        warmup, whole = schedule.warmup_epochs * self.steps, schedule.epochs * self.steps
        if at < warmup:
            return self.base_lr * (schedule.warmup_start + (1 - schedule.warmup_start) * at / warmup)
        return self.base_lr * cosine_schedule(at - warmup, whole - warmup + 1, 1.0, schedule.final)

    def step(self, views: Sequence[Tensor]) -> Tensor:
        """Train on two views of a batch; the loss, on the device."""
        self.model.follow(self.done, self.cfg.epochs * self.steps)
        one, other = (view.to(self.device, memory_format=self.form, non_blocking=True) for view in views)
        with autocast(self.device, self.dtype):
            outputs = self.model.outputs(one, other)
        loss = self.model.loss(*(output.float() for output in outputs))
        self.optimizer.zero_grad()
        loss.backward()
        self._adapt(rate := self.rate())
        for group in self.optimizer.param_groups:
            group["lr"] = 1.0 if self.adaptive == "lars" else rate
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def _adapt(self, rate: float) -> None:
        """Gradients with layer-wise rates, for a step of SGD without weight decay.

        LARC: rates by |w| / (|g| + decay |w|). LARS: by |w| / |g + decay w|, and the learning rate is part of the momentum.
        """
        recipe = self.cfg.optimizer
        for weight in self.decayed if self.adaptive else ():
            gradient, decay = weight.grad, recipe.weight_decay
            assert gradient is not None
            full = gradient + decay * weight
            if self.adaptive == "lars":
                w, g = weight.norm(), full.norm()
                weight.grad = torch.where(w * g > 0, recipe.trust_coefficient * w / g, 1.0) * full
            else:
                w, g = weight.norm(), gradient.norm()
                ratio = recipe.trust_coefficient * w / (g + decay * w)
                ratio = (ratio / rate).clamp(max=1.0) if recipe.clip else ratio
                weight.grad = torch.where(w * g > 0, ratio * full, gradient)
        if self.adaptive == "lars":
            for group in self.optimizer.param_groups:
                torch._foreach_mul_([weight.grad for weight in group["params"]], rate)


# ---------------------------------------------------------------------------------------------------------------- both sides


@dataclass(frozen=True)
class Judge:
    """KNN on features and projections, the same for both sides.

    Args:
        data: with labels.
        device: where to compute.
        dtype: number format of the forward pass.
        k: neighbours.
        temperature: of their votes.
    """

    data: ImageData
    device: torch.device
    dtype: torch.dtype
    k: int
    temperature: float

    @torch.no_grad()
    def __call__(self, encoder: nn.Module, head: nn.Module) -> dict[str, float]:
        """top1 of what the encoder makes of the images, and of what the head makes of that, in percent."""
        head = deepcopy(head).eval()
        found: dict[str, list[Features]] = {name: [] for name in MEASURES}
        for images in (self.data.memory, self.data.test):
            assert images is not None and images.labels is not None
            labels = images.labels.to(self.device).long()
            x = embed(encoder, images, self.data, self.device, self.dtype, channels_last=True)
            with autocast(self.device, self.dtype):
                projections = torch.cat([head(rows).float() for rows in x.split(1000)])
            found["features"].append(Features(x, labels))
            found["projections"].append(Features(projections, labels))
        classes, top = len(self.data.classes), {}
        for name, (memory, test) in found.items():
            top[name] = top1(knn_scores(test.x, memory, classes, self.k, self.temperature), test.y)
        return top


class Watching(Protocol):
    """The judge, as a protocol of our loop; keeps what it found, and the time it took.

    Args:
        judge: of both sides.
        head: behind the encoder.
        every: epochs; 0 is at the end only.
    """

    def __init__(self, judge: Judge, head: nn.Module, every: int):
        self.judge, self.head, self.every_epochs = judge, head, every
        self.found: list[dict[str, float]] = []
        self.seconds = 0.0

    def __call__(self, judged: EvaluationContext) -> EvaluationResult:
        """Also what the loop logs."""
        start = _now(self.judge.device)
        self.found.append(self.judge(judged.encoder, self.head))
        self.seconds += _now(self.judge.device) - start
        return EvaluationResult(self.found[-1])


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _moments(epochs: int, every: int) -> list[int]:
    """Epochs after which both sides are judged."""
    return [epoch for epoch in range(1, epochs + 1) if epoch == epochs or (every and epoch % every == 0)]


@dataclass(frozen=True)
class Task:
    """A recipe with a seed, and what both sides share."""

    method: str
    cfg: DictConfig
    data: ImageData
    runtime: Runtime
    device: torch.device
    every: int

    @property
    def dtype(self) -> torch.dtype:
        """Of both forward passes."""
        return self.runtime.dtype(self.device)

    @property
    def judge(self) -> Judge:
        """Of both sides."""
        return Judge(self.data, self.device, self.dtype, self.cfg.protocol.knn.k, self.cfg.protocol.knn.temperature)

    def result(self, found: list[dict[str, float]], loss: float, seconds: float) -> dict[str, Any]:
        """Numbers at the end, and on the way if asked for: the mean loss of the last epoch, seconds without judging."""
        values: dict[str, Any] = {**found[-1], "loss": loss, "seconds": seconds}
        if self.every:
            epochs = _moments(self.cfg.epochs, self.every)
            values["curve"] = [{"epoch": epoch, **one} for epoch, one in zip(epochs, found, strict=True)]
        return values


def reference(task: Task) -> dict[str, Any]:
    """Train the reference side."""
    cfg, data, device, views = task.cfg, task.data, task.device, make_views(task.cfg, task.data)
    loader = Loader(data.train, views, batch_size=cfg.batch_size, seed=cfg.seed, device=device)
    (size,) = sizes if len(sizes := {data.size, *views.sizes}) == 1 else (0,)
    training = Reference(task.method, cfg, data.channels, size, len(loader), device, task.dtype)
    found, losses, seconds = [], [], 0.0
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    for epoch in range(cfg.epochs):
        start = _now(device)
        loader.set_epoch(epoch)
        losses = [training.step(batch.views) for batch in loader]
        seconds += _now(device) - start
        if epoch + 1 in _moments(cfg.epochs, task.every):
            found.append(task.judge(training.model.encoder, training.model.head))
    torch.backends.cudnn.benchmark = before
    return task.result(found, torch.stack(losses).mean().item(), seconds)


def ours(task: Task) -> dict[str, Any]:
    """Train our side, as train.py does.

    Raises:
        KeyboardInterrupt: it was stopped by a signal.
    """
    parts = make_parts(task.cfg, task.data, make_views(task.cfg, task.data), task.runtime, task.device)
    watching = Watching(task.judge, parts.method.get_submodule("projector"), task.every)
    parts.protocols = {"reference": watching}
    with tempfile.TemporaryDirectory() as name, StopSignal() as stop:
        folder = Path(name)
        metrics, console = Metrics(folder), Console(quiet=True)
        training = Training(
            parts, folder=folder, metrics=metrics, console=console, epochs=task.cfg.epochs, seed=task.cfg.seed
        )
        start = _now(task.device)
        if not training.fit(stop):
            raise KeyboardInterrupt
        seconds = _now(task.device) - start - watching.seconds
        metrics.close()
        last = [line for line in read(folder) if line["epoch"] > task.cfg.epochs - 1 and "train/loss" in line]
    return task.result(watching.found, statistics.mean(line["train/loss"] for line in last), seconds)


# ------------------------------------------------------------------------------------------------------------------ summary


def interval(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of their mean, by Student's t; None of fewer than two, or without scipy."""
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        return None
    count = len(differences)
    if count < 2:
        return None
    return float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method: the seeds trained by both sides, means, and ours minus the reference with its interval."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        pairs = [row for row in rows if row["method"] == method and all(side in row for side in SIDES)]
        if not pairs:
            continue
        found[method] = {"seeds": len(pairs)}
        for measure in (*MEASURES, "loss", "seconds"):
            means = {side: statistics.mean(row[side][measure] for row in pairs) for side in SIDES}
            differences = [row["ours"][measure] - row["reference"][measure] for row in pairs]
            spread = {"difference": statistics.mean(differences), "half_interval": interval(differences)}
            found[method][measure] = means | (spread if measure != "seconds" else {})
    return found


def composed(method: str, epochs: int, seed: int, overrides: Sequence[str]) -> DictConfig:
    """The recipe of a method."""
    images = [] if any(one.startswith("data=") for one in overrides) else ["data=folder"]
    fixed = ["tracking=files", "protocol=[knn]", f"epochs={epochs}", f"seed={seed}"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [f"experiment={method}_cifar10", *images, *overrides, *fixed])
    checks.check("train", cfg)
    check(method, cfg)
    return cfg


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["moco"])
    parser.add_argument("--every", type=int, default=0, help="epochs between judgements; 0: only at the end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many no further training is begun")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="data.root=<folder of images>, as of train.py"
    )
    options = parser.parse_intermixed_args()  # options and overrides in any order
    if options.epochs < 1 or options.seeds < 1:
        raise BadInput(f"--epochs {options.epochs} and --seeds {options.seeds} have to be at least 1.")
    return options


def main() -> None:
    """Train all, the seeds of a method one after the other, both sides in turns."""
    options, begin, rows = arguments(), time.monotonic(), []
    recipes = {method: composed(method, options.epochs, 0, options.overrides) for method in options.methods}
    some = recipes[options.methods[0]]
    runtime: Runtime = build(some.runtime)
    device = runtime.torch_device()
    data = load_data(some).to(device)
    if data.memory is None or data.test is None:
        raise BadInput(f"{data.name} has no labelled training and test images, and kNN cannot be measured.")
    for cfg in recipes.values():  # what cannot be trained is refused before the first training
        make_parts(cfg, data, make_views(cfg, data), runtime, device)
    named = " ".join("data.root=<cifar10>" if one.startswith("data.root=") else one for one in options.overrides)
    every = f" --every {options.every}" if options.every else ""
    chosen = f"--epochs {options.epochs} --seeds {options.seeds} --methods {' '.join(options.methods)}{every}"
    facts = {
        "processor": processor(),
        "precision": str(runtime.dtype(device)).removeprefix("torch."),
        "recipes": {name: without_paths(_plain(cfg)) for name, cfg in recipes.items()},
    }
    trainings = [(name, seed, side) for name in options.methods for seed in range(options.seeds) for side in SIDES]
    for number, (method, seed, side) in enumerate(trainings):
        if (time.monotonic() - begin) / 60 > options.minutes:
            print(
                f"{options.minutes:g} minutes are over: {len(trainings) - number} trainings are not begun", flush=True
            )
            break
        if side == SIDES[0]:
            rows.append({"method": method, "seed": seed})
        cfg = composed(method, options.epochs, seed, options.overrides)
        task = Task(method, cfg, data, runtime, device, options.every)
        row = {"reference": reference, "ours": ours}[side](task)
        rows[-1][side] = row
        print(
            f"{method:7} seed {seed} {side:9} kNN {row['features']:.2f} % on features, {row['projections']:.2f} % on "
            f"projections; loss {row['loss']:.4f}, {row['seconds']:.0f} s",
            flush=True,
        )
        record(options.json, f"reference.py {named} {chosen}", rows, device, **facts, summary=summary(rows))
    for method, found in summary(rows).items():
        for measure in MEASURES:
            one = found[measure]
            half = f" ± {one['half_interval']:.2f}" if one["half_interval"] is not None else ""
            print(
                f"{method:7} {measure}: ours {one['ours']:.2f} %, the reference {one['reference']:.2f} %, difference "
                f"{one['difference']:+.2f}{half} over {found['seeds']} seed(s)"
            )


if __name__ == "__main__":
    run(main)
