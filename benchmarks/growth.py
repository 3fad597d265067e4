"""How time and memory grow: with batch, views, queue, bank, clusters and processes, each with its slope and the reason.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --rounds 5 --json benchmarks/results/growth.json

Steps are those of loop.py with the small backbone on made images of 32 px, views included; kNN and k-means are those of the
monitor and of E-steps, on made features. Times are CPU seconds, medians of rounds in which all sizes of an axis are run in
turns; of several processes (gloo, one batch of 128 shared out) the sum. Memory is the peak of a process of its own above
what Python and torch take, as Linux counts it, weights and data included, again the sum over processes of several. A slope
is that of the logarithms, fitted over all sizes: 1 is proportional, 0 is constant.
"""

import argparse
import contextlib
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from recording import record
from torch import distributed as dist
from torch import multiprocessing

from twoviews import process_group
from twoviews.assembly import load_data, make_parts, make_views
from twoviews.clusters.kmeans import kmeans
from twoviews.config.building import build
from twoviews.config.groups import CONF
from twoviews.console import Console
from twoviews.data.images import ImageData, Images
from twoviews.features import Features
from twoviews.loop import Training
from twoviews.protocols.knn import knn_scores
from twoviews.runtime import Runtime

SHARED = ["experiment=laptop", "optimizer=sgd_short", "data=digits", "protocol=[]", "tracking=files", "epochs=1000"]
STEPS = 3  # a round
CPU = Runtime(
    "cpu",
    "fp32",
    channels_last=True,
    cuda_graph=False,
    deterministic=False,
    accumulate=1,
    log_every=1,
    checkpoint_seconds=0,
    checkpoint_minutes=0,
)
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Axis:
    """What grows, through which sizes, and why time and memory follow as they do."""

    name: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]  # the work of a size
    reason: str


def made(count: int) -> ImageData:
    """So many colour images of 32 px, all the same one, which takes no memory."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        digits = load_data(hydra.compose("train", SHARED))
    one = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(one.expand(count, 3, 32, 32), torch.full((count, 2), 32), None)
    grey = (0.5, 0.5, 0.5)
    return replace(digits, train=images, memory=None, test=None, channels=3, mean=grey, std=grey)


def training(overrides: list[str]) -> Callable[[], object]:
    """Some steps of a training."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [*SHARED, *overrides])
    data, runtime = made(70_000), build(cfg.runtime)
    parts = make_parts(cfg, data, make_views(cfg, data), runtime, torch.device("cpu"))
    one = Training(
        parts, folder=Path("run"), metrics=None, console=Console(quiet=True), epochs=cfg.epochs, seed=cfg.seed
    )
    batches = iter(parts.loader)
    one.method.train()

    def steps() -> None:
        for _ in range(STEPS):
            assert one.train_on_batch(next(batches))["loss"].isfinite()

    return steps


def step(*overrides: str) -> Callable[[int], Callable[[], object]]:
    """Steps with the size put into these overrides."""
    return lambda size: training([one.format(size) for one in overrides])


def search(bank: int) -> Callable[[], object]:
    """KNN of 500 images."""
    made = torch.Generator().manual_seed(0)
    known = Features(torch.randn(bank, 128, generator=made), torch.randint(10, (bank,), generator=made))
    queries = torch.randn(500, 128, generator=made)
    return lambda: knn_scores(queries, known, 10, 200, 0.1)


def cluster(k: int) -> Callable[[], object]:
    """Five iterations on 20,000 points."""
    x = torch.randn(20_000, 128, generator=torch.Generator().manual_seed(0))
    return lambda: kmeans(x, k, seed=0, iterations=5, tolerance=0.0)


MOCO = ("method=moco", "method.queue_size=4096", "augmentation.views.both.size=32", "runtime.precision=fp32")
AXES = (
    Axis(
        "batch",
        (32, 64, 128, 256),
        step(*MOCO, "batch_size={}"),
        "every image goes through the network by itself, and its activations are kept for the backward pass; "
        "weights, queue and the start of each operator do not grow",
    ),
    Axis(
        "views of an image",
        (2, 4, 8),
        step("method=swav", "augmentation.views.both.count={}", "augmentation.views.both.size=32", "batch_size=64"),
        "each view is one more image for the network; the assignments of SwAV are small beside it",
    ),
    Axis(
        "length of the queue",
        (1024, 4096, 16384, 65536),
        step(*MOCO[:1], *MOCO[2:], "method.queue_size={}", "batch_size=128"),
        "only the logits [B, K] grow, and they are little beside the network until the queue is long",
    ),
    Axis(
        "bank of kNN",
        (6250, 12500, 25000, 50000),
        search,
        "a product with every row of the bank; memory is the bank and a normalised copy of it, and similarities of a "
        "fixed number of bytes",
    ),
    Axis(
        "k of k-means",
        (64, 256, 1024),
        cluster,
        "each point is compared with each centroid; with few of them, what is done once for each point is most of it",
    ),
)
WHY_PROCESSES = (
    "the batch is shared out, so that its images cost the same together; on top come the exchange of gradients and norms, "
    "and for each process the weights and what one takes anyhow"
)


def status(name: str) -> float:
    """MB that Linux gives for this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def peak(axis: Axis, size: int) -> float:
    """MB that a process of its own takes at most for the work and what it works on, above what it began with."""
    fork = multiprocessing.get_context("fork")  # so that torch is there already
    answer = fork.SimpleQueue()

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        axis.make(size)()
        answer.put(status("VmHWM") - before)

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return answer.get()


def seconds(axis: Axis, rounds: int) -> list[float]:
    """CPU time of each size, medians."""
    works, times = [axis.make(size) for size in axis.sizes], [[] for _ in axis.sizes]
    for turn in range(-1, rounds):
        for offset in range(len(works)):
            current = (turn + offset) % len(works)
            start = time.process_time()
            works[current]()
            if turn >= 0:
                times[current].append(time.process_time() - start)
    return [statistics.median(own) for own in times]


def one_of(rank: int, count: int, port: int, rounds: int, path: str) -> None:
    """A process among several: the first writes CPU seconds and MB, of all together."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    times, before = [], status("VmRSS")
    with process_group.group(CPU.torch_device()):
        steps = training([*MOCO, "batch_size=128"])
        steps()
        for _ in range(rounds):
            start = time.process_time()
            steps()
            times.append(time.process_time() - start)
        sums = torch.tensor([statistics.median(times), status("VmHWM") - before])
        if count > 1:
            dist.all_reduce(sums)
    if rank == 0:
        torch.save(sums, path)


def together(rounds: int) -> list[tuple[float, float]]:
    """Sums over 1, 2 and 4 processes."""
    found = []
    for count in PROCESSES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(one_of, (count, port, rounds, "sums.pt"), nprocs=count)  # type: ignore[attr-defined]
        cpu, megabytes = torch.load("sums.pt", weights_only=True).tolist()
        found.append((cpu, megabytes))
    return found


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Of the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-3)) for value in values]
    middle = statistics.mean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def row(name: str, sizes: tuple[int, ...], found: list[tuple[float, float]], reason: str) -> dict[str, Any]:
    """What is recorded of an axis."""
    times, megabytes = [s for s, _ in found], [mb for _, mb in found]
    slopes = slope(sizes, times), slope(sizes, megabytes)
    shown = ", ".join(f"{size:,}: {s:.3f} s {mb:.0f} MB" for size, s, mb in zip(sizes, times, megabytes, strict=True))
    print(f"{name:20} time ^{slopes[0]:.2f}, memory ^{slopes[1]:.2f}   {shown}", flush=True)
    numbers = {"sizes": list(sizes), "cpu_seconds": times, "megabytes": megabytes}
    return {"what": name, "time_slope": slopes[0], "memory_slope": slopes[1], **numbers, "reason": reason}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    json = options.json and options.json.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        peaks = [[peak(axis, size) for size in axis.sizes] for axis in AXES]  # before this process has threads
        rows = []
        for axis, megabytes in zip(AXES, peaks, strict=True):
            found = list(zip(seconds(axis, options.rounds), megabytes, strict=True))
            rows.append(row(axis.name, axis.sizes, found, axis.reason))
        rows.append(row("processes", PROCESSES, together(options.rounds), WHY_PROCESSES))
    record(json, f"growth.py --rounds {options.rounds}", rows)


if __name__ == "__main__":
    main()
