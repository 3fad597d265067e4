"""Whole training loops: ours against lightly's MoCo example and the SimSiam loop that is usually copied.

    OMP_NUM_THREADS=1 python benchmarks/loops.py data.root=<cifar10> --rounds 40 --json benchmarks/results/loops.json
    OMP_NUM_THREADS=1 python benchmarks/loops.py data.root=<cifar10> --rounds 9 backbone=resnet18_cifar batch_size=16

Same backbone, images, batch, optimizer and losses on both sides. The peers' loops are written as their examples are: PIL
images through torchvision's transforms in a DataLoader without workers, one forward pass a view, an optimizer step, and
for MoCo the update of the momentum encoder and lightly's memory bank. Both sides begin from images in memory: the peers
from decoded pictures, ours from the store. A round is `--steps` steps of each, in turns, after a warm-up; what counts is
the median of the ratios within a round. Many short rounds tell small differences: in rounds of ten steps, during which the
machine changes, the share of views was anything from 0.90 to 1.02. Each side is a process, and times are its CPU seconds.
Then the losses of both are compared: with other random views they cannot be equal, but their means over the last steps have
to be near each other. In the same turns our loop runs on one batch of views again and again: its time over that of the
whole loop is the share of the time that is not spent on making views.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from PIL import Image
from recording import arguments, record, run
from torch import nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, Dataset

from twoviews.assembly import Parts, load_data, make_parts, make_views
from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.config.groups import CONF
from twoviews.console import Console
from twoviews.data.images import ImageData
from twoviews.data.loader import Batch
from twoviews.loop import Training

BATCH, QUEUE, TEMPERATURE, MOMENTUM, LR = 128, 4096, 0.1, 0.99, 0.06
LAST = 10  # losses that are compared
APART = 0.15  # of the losses of both sides, as a share of the scale
SCALES = {"moco": math.log(1 + QUEUE), "simsiam": 1.0}  # the loss of chance, and its range
GOALS = {"moco": 1.9, "simsiam": 1.4}

Steps = Iterator[float]  # the loss of each step, made when it is asked for


class Pictures(Dataset):
    """Two views of decoded pictures."""

    def __init__(self, images: ImageData, count: int):
        from torchvision import transforms

        pixels = next(images.train.batches(count))[0]
        self.pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(images.size, (0.2, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.ToTensor(),
                transforms.Normalize(images.mean, images.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.pictures[row]), self.transform(self.pictures[row])


def endless(data: ImageData, batch_size: int) -> Iterator[list[torch.Tensor]]:
    """Batches of a DataLoader, epoch after epoch."""
    loader = DataLoader(Pictures(data, 50 * batch_size), batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def moco_of_lightly(encoder: nn.Module, features: int, data: ImageData, batch_size: int) -> Steps:
    """The loop of lightly's MoCo example."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    head = MoCoProjectionHead(features, features, 128)
    key_encoder, key_head = deepcopy(encoder), deepcopy(head)
    deactivate_requires_grad(key_encoder)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, 128))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4)
    for query_view, key_view in endless(data, batch_size):
        update_momentum(encoder, key_encoder, m=MOMENTUM)
        update_momentum(head, key_head, m=MOMENTUM)
        query = head(encoder(query_view))
        with torch.no_grad():
            key = key_head(key_encoder(key_view))
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def simsiam_as_copied(encoder: nn.Module, features: int, data: ImageData, batch_size: int) -> Steps:
    """A SimSiam loop as most repositories have it: D(p1, z2) / 2 + D(p2, z1) / 2, each view by itself."""

    def layer(inputs: int, outputs: int, last: bool) -> list[nn.Module]:
        norm = nn.BatchNorm1d(outputs, affine=not last)
        return [nn.Linear(inputs, outputs, bias=False), norm, *([] if last else [nn.ReLU(inplace=True)])]

    projector = nn.Sequential(*layer(features, 512, False), *layer(512, 512, True))
    predictor = nn.Sequential(*layer(512, 128, False), nn.Linear(128, 512))
    parameters = [*encoder.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4)
    for one, other in endless(data, batch_size):
        z1, z2 = projector(encoder(one)), projector(encoder(other))
        p1, p2 = predictor(z1), predictor(z2)
        loss = -(nnf.cosine_similarity(p1, z2.detach()).mean() + nnf.cosine_similarity(p2, z1.detach()).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


PEERS: dict[str, Callable[[nn.Module, int, ImageData, int], Steps]] = {
    "moco": moco_of_lightly,
    "simsiam": simsiam_as_copied,
}
METHODS = {
    "moco": [
        f"method.queue_size={QUEUE}",
        f"method.temperature={TEMPERATURE}",
        "method.mlp_head=true",
        "method.bn_splits=1",
    ],
    "simsiam": ["method.embed_dim=512", "method.hidden_dim=128", "method.fix_predictor_lr=false"],
}


def ours(parts: Parts, cfg: DictConfig, folder: Path, ready: bool = False, read: bool = True) -> Steps:
    """The steps of loop.py; all of the same batch, if its views shall be ready; NaN for losses that are not to be read."""
    training = Training(
        parts, folder=folder, metrics=None, console=Console(quiet=True), epochs=cfg.epochs, seed=cfg.seed
    )
    training.method.train()
    batches = _batches(parts, cfg.epochs)
    for batch in repeat(next(batches)) if ready else batches:
        loss = training.train_on_batch(batch)["loss"]
        yield loss.item() if read else math.nan


def _batches(parts: Parts, epochs: int) -> Iterator[Batch]:
    for epoch in range(epochs):
        parts.loader.set_epoch(epoch)
        yield from parts.loader


def composed(method: str, overrides: list[str]) -> DictConfig:
    """experiment=laptop with whole-sized views and the numbers of both sides."""
    shared = [
        "experiment=laptop",
        "optimizer=sgd_short",
        f"method={method}",
        "data=folder",
        "augmentation.views.both.size=null",
    ]
    numbers = [f"batch_size={BATCH}", "optimizer.lr_scaling=none", f"optimizer.lr={LR}", "schedule.warmup_epochs=0"]
    numbers += ["optimizer.weight_decay=0.0005", "protocol=[]", "tracking=files", "epochs=50"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [*shared, *numbers, *METHODS[method], *overrides])
    check("train", cfg)
    return cfg


def seconds(steps: Steps, count: int) -> tuple[float, list[float]]:
    """CPU time of so many steps, and their losses."""
    start = time.process_time()
    losses = [next(steps) for _ in range(count)]
    return time.process_time() - start, losses


def _parts(cfg: DictConfig) -> tuple[Parts, ImageData]:
    data, runtime = load_data(cfg), build(cfg.runtime)
    return make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu")), data


def _run_side(pipe: Connection, side: str, method: str, overrides: list[str], encoder: nn.Module) -> None:
    """Time as many steps of one side as are asked for, until 0 are.

    The peer's process does not have the settings of ours, as of the memory allocator.
    """
    cfg = composed(method, overrides)
    if side == "peer":
        steps = PEERS[method](encoder, encoder.out_dim, load_data(cfg), cfg.batch_size)  # type: ignore[arg-type]
    else:
        steps = ours(_parts(cfg)[0], cfg, Path(tempfile.gettempdir()), ready=side == "ready")  # writes nothing
    while count := pipe.recv():
        pipe.send(seconds(steps, count))


def compare(method: str, overrides: list[str], rounds: int, count: int) -> dict[str, Any]:
    """Images a second of both sides and the ratio."""
    cfg = composed(method, overrides)
    precision = build(cfg.runtime).dtype(torch.device("cpu"))
    encoder = _parts(cfg)[0].method.encoder
    context, sides = torch.multiprocessing.get_context("spawn"), ("ours", "ready", "peer")
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    pipes, processes = {}, []
    for side in sides:
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=_run_side, args=(end, side, method, overrides, encoder), daemon=True))
        processes[-1].start()
        end.close()  # so that `recv` fails if that process dies
    for turn in range(-1, rounds):
        for side in sides if turn % 2 else sides[::-1]:
            pipes[side].send(count)
            taken, found = pipes[side].recv()
            losses[side] += found
            if turn >= 0:
                times[side].append(taken)
    for side, process in zip(sides, processes, strict=True):
        pipes[side].send(0)
        process.join()
    ends = {side: statistics.mean(losses[side][-max(count, LAST) :]) for side in ("ours", "peer")}
    apart = abs(ends["ours"] - ends["peer"]) / SCALES[method]
    assert apart < APART, f"{method}: the losses end at {ends}, so these are not the same trainings"
    ratios = [peer / own for peer, own in zip(times["peer"], times["ours"], strict=True)]
    rates = {side: count * cfg.batch_size / statistics.median(taken) for side, taken in times.items()}
    ratio = statistics.median(ratios)
    share = statistics.median(ready / own for ready, own in zip(times["ready"], times["ours"], strict=True))
    goal = GOALS[method]
    if named := [one.partition("=")[2] for one in overrides if one.startswith("backbone=")]:
        goal = 1.0 if precision == torch.float32 else 1.8  # in fp32 it is arithmetic that both sides do alike
    elif precision != torch.float32:
        goal = 2.5
    verdict = "reaches" if ratio >= goal else "misses"
    print(
        f"{method:8} {rates['ours']:7.0f} images/s, the peer {rates['peer']:7.0f}: {ratio:.2f} x "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {verdict} {goal}; losses {ends['ours']:.3f} and {ends['peer']:.3f}\n"
        f"         {share:.3f} of the speed on ready-made views",
        flush=True,
    )
    row = {
        "method": method,
        "backbone": " ".join(named),
        "of_ready_made": share,
        "ratio": ratio,
        "goal": goal,
        "smallest": min(ratios),
        "largest": max(ratios),
        "losses": ends,
    }
    return {**row, "images_per_s": rates, "precision": str(precision)}


def main() -> None:
    """Command line."""
    options = arguments(__doc__, rounds=40, steps=1)
    rows = [compare(method, options.overrides, options.rounds, options.steps) for method in PEERS]
    named = " ".join(["data.root=<cifar10>", *options.overrides[1:]])
    command = f"loops.py {named} --rounds {options.rounds} --steps {options.steps}"
    record(options.json, command, rows)


if __name__ == "__main__":
    run(main)
