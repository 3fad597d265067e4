"""K-means of an E-step against the recipe of PCL's own code, on the features of consecutive epochs.

    OMP_NUM_THREADS=1 python benchmarks/kmeans.py --train features data=folder data.root=<images>
    OMP_NUM_THREADS=1 python benchmarks/kmeans.py --features features/*.npy --k 1000 --rounds 5

The first command trains and keeps the embeddings that each E-step clusters; the second compares. In every round each
setting goes through the epochs in a chain, from its own assignment of the epoch before, and the recipe (five times twenty
steps from random points, the best of them, faiss on all points) is run beside it on the same features. Times are CPU
seconds of the process, which other programs disturb least; what counts are ratios within a round.

    python benchmarks/kmeans.py --device cuda --json benchmarks/results/kmeans_gpu.json

On a GPU: seconds by the clock of the E-steps of 50,000 embeddings with PCL's k, concentrations included, as many epochs in a
chain as there are files; without --features three epochs of groups of random points that move. In the first round the same
is done on the CPU, and the two are compared.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import record
from torch import Tensor

from twoviews.clusters.kmeans import Clusters, concentration, kmeans

SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "iterations=5": {"iterations": 5}}
GOALS = (
    (4.5, 1.005),
    (9.0, 1.011),
)  # times faster than the recipe, at an inertia of at most so many times the recipe's
RECIPE = "recipe"
ON_GPU = [250, 500, 1000]  # clusters of PCL for CIFAR's 50,000 images


def recipe(x: Tensor, k: int, seed: int) -> Clusters:
    """K-means as salesforce/PCL calls it, but on the CPU."""
    import faiss

    rows = x.numpy()
    clustering = faiss.Clustering(x.shape[1], k)
    clustering.niter, clustering.nredo, clustering.seed = 20, 5, seed
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = 1000, 10
    index = faiss.IndexFlatL2(x.shape[1])
    clustering.train(rows, index)
    distance, assignment = index.search(rows, 1)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(k, -1)
    return Clusters(
        torch.from_numpy(assignment[:, 0]),
        torch.from_numpy(centroids),
        torch.from_numpy(distance[:, 0]),
        iterations=100,
    )


def recipe_concentration(clusters: Clusters, temperature: float) -> list[float]:
    """The same code's phi: point by point."""
    members: list[list[float]] = [[] for _ in clusters.centroids]
    for cluster, squared in zip(clusters.assignment.tolist(), clusters.distance.tolist(), strict=True):
        members[cluster].append(squared)
    phi = np.zeros(len(members))
    for cluster, own in enumerate(members):
        if len(own) > 1:
            phi[cluster] = np.sqrt(own).mean() / math.log(len(own) + 10)
    phi[[len(own) <= 1 for own in members]] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return (temperature * phi / phi.mean()).tolist()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the CPU seconds that took."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def load(path: Path) -> Tensor:
    """Features [N, D] of an .npy or .pt file."""
    x = torch.load(path, weights_only=True) if path.suffix == ".pt" else torch.from_numpy(np.load(path))
    return x.float().contiguous()


def check(x: Tensor, clusters: Clusters, again: Callable[[], Clusters]) -> None:
    """Nearest centroids, true distances, the same bits a second time, and the loop's concentration."""
    some = slice(None, None, max(1, len(x) // 2000))
    squared = torch.cdist(x[some].double(), clusters.centroids.double()).square()
    own = squared.gather(1, clusters.assignment[some, None])[:, 0]
    scale = squared.max()
    assert ((own - squared.amin(1)) / scale).max() < 1e-6, "not the nearest centroids"
    assert ((own - clusters.distance[some]) / scale).abs().max() < 1e-6, "not the distances"
    second = again()
    for name in ("assignment", "centroids", "distance"):
        assert torch.equal(getattr(second, name), getattr(clusters, name)), f"another {name} the second time"
    loop = torch.tensor(recipe_concentration(clusters, 0.2))
    assert torch.allclose(concentration(clusters, 0.2), loop, rtol=1e-5), "not the loop's concentration"


def once(name: str, x: Tensor, k: int, number: int, epoch: int, start: Tensor | None) -> Clusters:
    """One setting, or the recipe, on one epoch's features."""
    if name == RECIPE:
        return recipe(x, k, seed=number)
    return kmeans(x, k, seed=1000 * number + epoch, start=start, **SETTINGS[name])


def compare(epochs: list[Tensor], k: int, rounds: int) -> list[dict[str, Any]]:
    """One row a round, epoch and setting: CPU seconds, inertia, and both against the recipe's."""
    rows = []
    names = [RECIPE, *SETTINGS]
    for number in range(rounds):
        previous: dict[str, Tensor] = {}
        for epoch, x in enumerate(epochs):
            turn = (number + epoch) % len(names)
            found: dict[str, tuple[Clusters, float]] = {}
            for name in names[turn:] + names[:turn]:
                run = partial(once, name, x, k, number, epoch, previous.get(name))
                found[name] = timed(run)
                if number == 0 and epoch < 2 and name != RECIPE:
                    check(x, found[name][0], run)
            best, seconds = found[RECIPE]
            for name, (clusters, taken) in found.items():
                previous[name] = clusters.assignment
                rows.append(
                    {
                        "round": number,
                        "epoch": epoch,
                        "setting": name,
                        "cpu_seconds": taken,
                        "speed": seconds / taken,
                        "inertia": clusters.inertia / best.inertia,
                        "iterations": clusters.iterations,
                        "empty": int((clusters.sizes == 0).sum()),
                    }
                )
            print(f"round {number + 1} of {rounds}, epoch {epoch}: recipe {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Medians over rounds for each epoch, and which goals every epoch reaches."""
    print(f"{'setting':14} {'epoch':>5} {'x faster':>9} {'inertia':>8} {'worst':>8} {'iterations':>10} {'empty':>6}")
    for name in SETTINGS:
        speeds, inertias = [], []
        for epoch in sorted({row["epoch"] for row in rows}):
            own = [row for row in rows if row["setting"] == name and row["epoch"] == epoch]
            middle = {
                key: statistics.median(row[key] for row in own) for key in ("speed", "inertia", "iterations", "empty")
            }
            worst = max(row["inertia"] for row in own)
            speeds.append(middle["speed"])
            inertias.append(middle["inertia"])
            print(
                f"{name:14} {epoch:5} {middle['speed']:9.1f} {middle['inertia']:8.4f} {worst:8.4f} "
                f"{middle['iterations']:10.0f} {middle['empty']:6.0f}"
            )
        for speed, inertia in GOALS:
            reached = min(speeds) >= speed and max(inertias) <= inertia
            print(
                f"  {'reaches' if reached else 'misses '}: >= {speed} x faster at <= {inertia} of the inertia, every epoch"
            )


def compare_concentration(x: Tensor, k: int) -> None:
    """The loop's time over ours for phi."""
    clusters = kmeans(x, k, seed=0, iterations=1)
    ratios = []
    for _ in range(5):
        _, loop = timed(lambda: recipe_concentration(clusters, 0.2))
        _, ours = timed(lambda: [concentration(clusters, 0.2) for _ in range(10)])
        ratios.append(10 * loop / ours)
    print(f"concentration: {statistics.median(ratios):.0f} x faster than the loop")


def groups_that_move(points: int = 50_000, dim: int = 128, epochs: int = 3) -> list[Tensor]:
    """Unit rows around a thousand centres that overlap, and what they are after some steps at random."""
    drawn = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, dim, generator=drawn)
    x = centres[torch.randint(1000, (points,), generator=drawn)] + torch.randn(points, dim, generator=drawn)
    found = []
    for _ in range(epochs):
        found.append(torch.nn.functional.normalize(x, dim=1))
        x = x + 0.3 * torch.randn(points, dim, generator=drawn)
    return found


def e_step(x: Tensor, k: int, start: Tensor | None) -> tuple[Clusters, float]:
    """One clustering with its concentrations, and the seconds by the clock until they are there."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    begin = time.perf_counter()
    clusters = kmeans(x, k, seed=0, start=start)
    concentration(clusters, 0.2)
    synchronize()
    return clusters, time.perf_counter() - begin


def compare_on_gpu(epochs: list[Tensor], ks: list[int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a k and epoch: median seconds, and how far the result is the CPU's."""
    rows, there = [], [x.to(device) for x in epochs]
    e_step(there[0], ks[0], None)  # loads the kernels
    for k in ks:
        previous: list[Tensor | None] = [None] * rounds
        before = None  # on the CPU
        for epoch, (x, on_cpu) in enumerate(zip(there, epochs, strict=True)):
            found = [e_step(x, k, start) for start in previous]
            previous = [clusters.assignment for clusters, _ in found]
            clusters = found[0][0]
            expected, seconds = e_step(on_cpu, k, before)
            before = expected.assignment
            rows.append(
                {
                    "k": k,
                    "epoch": epoch,
                    "seconds": statistics.median(taken for _, taken in found),
                    "cpu": seconds,
                    "iterations": clusters.iterations,
                    "inertia": clusters.inertia / expected.inertia,
                    "equal": (clusters.assignment.cpu() == expected.assignment).float().mean().item(),
                    "repeats": all(torch.equal(one, previous[0]) for one in previous),
                }
            )
            last = rows[-1]
            print(
                f"k = {k:5}, epoch {epoch}: {1e3 * last['seconds']:7.1f} ms, {last['iterations']:2} steps; CPU "
                f"{last['cpu']:6.2f} s; inertia {last['inertia']:.5f} of the CPU's, {100 * last['equal']:.2f} % in the same "
                f"cluster; every round {'the same' if last['repeats'] else 'DIFFERENT'}",
                flush=True,
            )
    for epoch in range(len(epochs)):
        whole = sum(row["seconds"] for row in rows if row["epoch"] == epoch)
        print(f"epoch {epoch}: {1e3 * whole:.1f} ms for k = {', '.join(map(str, ks))}")
    return rows


def train(folder: Path, overrides: list[str]) -> None:
    """Keep what each E-step of train.py clusters, as <folder>/epoch_00.npy and so on."""
    import runpy

    from twoviews.config.groups import ROOT
    from twoviews.methods import pcl

    folder.mkdir(parents=True, exist_ok=True)
    seen: list[Tensor] = []

    def keep(x: Tensor, k: int, **options: Any) -> Clusters:
        if not seen or seen[-1] is not x:  # each E-step clusters its features several times
            np.save(folder / f"epoch_{len(seen):02d}.npy", x.cpu().numpy())
            seen.append(x)
        return kmeans(x, k, **options)

    pcl.kmeans = keep
    sys.argv = [str(ROOT / "train.py"), "experiment=laptop", "method=pcl", "optimizer=sgd_short", *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="train, and write the features of each epoch here")
    parser.add_argument(
        "--features", type=Path, nargs="+", help="files of consecutive epochs, .npy or .pt, [N, D] each"
    )
    parser.add_argument("--k", type=int, nargs="+", help="1000, and on a GPU 250 500 1000")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for --train, as of train.py")
    options = parser.parse_args()
    if options.train:
        train(options.train, options.overrides)
        return
    if options.device == "cuda" and not options.overrides:
        epochs = [load(path) for path in options.features] if options.features else groups_that_move()
        device, (points, dim) = torch.device("cuda", 0), epochs[0].shape
        rows = compare_on_gpu(epochs, options.k or ON_GPU, options.rounds, device)
        record(options.json, f"kmeans.py --device cuda --rounds {options.rounds}", rows, device, points=points, dim=dim)
        return
    if not options.features or options.overrides:
        parser.error("give --train FOLDER or --features FILES")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    epochs = [load(path) for path in options.features]
    points, dim = epochs[0].shape
    (k,) = options.k or [1000]
    print(f"{len(epochs)} epochs of {points:,} x {dim}, k = {k}, {torch.get_num_threads()} thread(s)")
    rows = compare(epochs, k, options.rounds)
    report(rows)
    compare_concentration(epochs[-1], k)
    command = f"kmeans.py --features features/*.npy --k {k} --rounds {options.rounds}"
    facts = {"points": points, "dim": dim, "k": k, "faiss": faiss.__version__}
    record(options.json, command, rows, **facts)


if __name__ == "__main__":
    main()
