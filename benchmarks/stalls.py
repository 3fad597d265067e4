"""What logging and checkpoints cost the thread that trains, against what is usually done there.

    OMP_NUM_THREADS=1 python benchmarks/stalls.py --rounds 15 --json benchmarks/results/stalls.json

Logging: `Metrics.log` with three numbers a step, as loop.py calls it, against MLflow's client on a SQLite store, which
writes them at once, number by number and as one batch. Checkpoints: `Training.save` of MoCo's whole state with ResNet-18
(two encoders, queue, momentum buffers: 168 MB), followed by a training step, against torch.save with fsync in the training
thread. Another thread copies most of the state while that step computes its gradients, and writes it; what counts are the
seconds in `Training.save` and those for which the step waits for the copy; that the copying thread takes a core and a part
of the memory's speed from the step is not counted. Before any timing what was written is read back
and compared. In every round all are run once, in turns; each waits for what the one before left to be written. Ratios are
of CPU seconds of the training thread, which other programs disturb least, of checkpoints of wall seconds, because waiting
takes no others. A copy of as many bytes as a checkpoint has, from one place to another, shows what copying costs at least.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from recording import medians, record

from twoviews.assembly import load_data, make_parts, make_views
from twoviews.checkpoints import load_checkpoint
from twoviews.config.building import build
from twoviews.config.groups import CONF
from twoviews.console import Console
from twoviews.data.images import Images
from twoviews.loop import Training
from twoviews.tracking.metrics import Metrics, read

STEPS = 200  # a round of logging
LOG_GOAL = 20e-6  # seconds a step
SAVE_GOAL = 30e-3  # seconds
VALUES = {"train/loss": 7.25, "train/spread": 0.5, "lr": 0.06}
OVERRIDES = ["data=digits", "backbone=resnet18_cifar", "method=moco", "method.queue_size=65536", "protocol=[]"]
OVERRIDES += ["batch_size=16"]

Seconds = tuple[float, float]  # wall, and CPU of the thread


def timed(function: Callable[[], object]) -> Seconds:
    """What it takes."""
    wall, cpu = time.perf_counter(), time.thread_time()
    function()
    return time.perf_counter() - wall, time.thread_time() - cpu


def logging(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds a step of each way to log; MLflow's get a tenth of the steps."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    number = client.create_run(client.create_experiment("stalls")).info.run_id
    metrics, step = Metrics(folder), 0

    def ours() -> None:
        nonlocal step
        for _ in range(STEPS):
            step += 1
            metrics.log(step, step / 97, VALUES)

    def one_by_one() -> None:
        for at in range(STEPS // 10):
            for name, value in VALUES.items():
                client.log_metric(number, name, value, step=at)

    def in_batches() -> None:
        for at in range(STEPS // 10):
            client.log_batch(number, [Metric(name, value, 0, at) for name, value in VALUES.items()])

    ours()
    metrics.flush()
    lines = list(read(folder))
    assert len(lines) == STEPS and all(line[name] == value for line in lines for name, value in VALUES.items())
    ways: dict[str, tuple[Callable[[], None], int]] = {
        "Metrics.log": (ours, STEPS),
        "MLflow's log_metric, SQLite": (one_by_one, STEPS // 10),
        "MLflow's log_batch, SQLite": (in_batches, STEPS // 10),
    }
    rows = compare({name: (lambda way=way: timed(way), count) for name, (way, count) in ways.items()}, rounds)
    metrics.close()
    taken = rows[0]["cpu_seconds"]
    print(f"  {'reaches' if taken <= LOG_GOAL else 'misses'} {LOG_GOAL * 1e6:g} microseconds a step")
    return [{**rows[0], "goal_seconds": LOG_GOAL}, *rows[1:]]


def checkpoints(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds that a checkpoint keeps the training thread."""
    training = moco(folder)
    (folder / "other").mkdir()

    training.method.train()
    batch, wait_for_copy = next(iter(training.loader)), training.checkpoints.wait_for_copy

    def ours() -> Seconds:
        stalls = [timed(training.save)]
        training.train_step.before_update = lambda: stalls.append(timed(wait_for_copy))
        training.train_on_batch(batch)
        assert len(stalls) == 2
        return stalls[0][0] + stalls[1][0], stalls[0][1] + stalls[1][1]

    def wait() -> None:
        training.checkpoints.wait()

    def usual() -> None:
        with (folder / "other" / "new.pt").open("wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())

    training.save()
    wait()
    same(load_checkpoint(folder / "last.pt"), training.state())
    size = (folder / "last.pt").stat().st_size
    assert 165e6 < size < 172e6, f"{size:,} bytes"
    one, other = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    ways = {
        "Training.save": (ours, 1),
        "copy of as many bytes": (lambda: timed(lambda: other.copy_(one)), 1),
        "torch.save with fsync": (lambda: timed(usual), 1),
    }
    found = compare(ways, rounds, wait, of=0)
    assert training.metrics
    training.metrics.close()
    stall = found[0]["wall_seconds"]
    print(f"  {'reaches' if stall <= SAVE_GOAL else 'misses'} {1e3 * SAVE_GOAL:.0f} ms: {1e3 * stall:.0f} ms")
    return [{**found[0], "goal_seconds": SAVE_GOAL}, *found[1:]]


def moco(folder: Path) -> Training:
    """A training whose optimizer has its momentum."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", OVERRIDES)
    data, runtime = load_data(cfg), build(cfg.runtime)
    many = 70_000  # images, more than the queue has keys; nothing looks at them
    blank = Images(torch.zeros(1, dtype=torch.uint8).expand(many, 1, 32, 32), torch.full((many, 2), 32), None)
    data = replace(data, train=blank)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, runtime.torch_device())
    for parameter in parts.method.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    return Training(
        parts, folder=folder, metrics=Metrics(folder), console=Console(quiet=True), epochs=cfg.epochs, seed=cfg.seed
    )


def same(one: Any, other: Any) -> None:
    """Two states, but for the seconds in them, are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds"}:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def compare(
    ways: dict[str, tuple[Callable[[], Seconds], int]],
    rounds: int,
    wait: Callable[[], None] = lambda: None,
    of: int = 1,
) -> list[dict[str, Any]]:
    """One row for each way, with what to divide its seconds by: medians, and how many times those of the first way."""
    names, times = list(ways), {name: [] for name in ways}
    for turn in range(-1, rounds):
        for offset in range(len(names)):
            current = names[(turn + offset) % len(names)]
            way, count = ways[current]
            wall, cpu = way()
            wait()
            if turn >= 0:
                times[current].append((wall / count, cpu / count))
    rows = []
    for name in names:
        ratios = [other[of] / own[of] for other, own in zip(times[name], times[names[0]], strict=True)]
        wall, cpu = zip(*times[name], strict=True)
        row = medians(name, cpu, wall, ratios)
        rows.append(row)
        print(
            f"{name:28} {row['cpu_seconds'] * 1e3:9.4f} ms of CPU, {row['wall_seconds'] * 1e3:9.4f} ms, "
            f"{row['ratio']:8.1f} x ours",
            flush=True,
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in (checkpoints, logging):
        with tempfile.TemporaryDirectory(prefix="stalls") as folder:
            rows += part(Path(folder), options.rounds)
    record(options.json, f"stalls.py --rounds {options.rounds}", rows)


if __name__ == "__main__":
    main()
