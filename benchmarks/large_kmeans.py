"""What the E-step of PCL costs on ImageNet, extrapolated: 1,281,167 x 128 embeddings, k = 25,000, 50,000 and 100,000.

    OMP_NUM_THREADS=1 python benchmarks/large_kmeans.py --json benchmarks/results/large_kmeans.json

Nearly all of it is the search for the nearest centroid of each point. One pass over a few thousand points is measured for
each k, at two numbers of points, to see that the time is in proportion; all points take as much longer as they are more.
An E-step from the assignment of the epoch before is at most 10 passes and one for the result, the recipe of PCL's own code
5 times 20 and one. Whether passes are all that counts is tried at a tenth of the points and of the clusters, where `kmeans`
runs whole and its time is compared with that of its passes. CPU seconds.

The plan for ImageNet, which follows from the numbers: warm starts, which `kmeans` takes from the assignment of the epoch
before and leaves where they do not pay; `iterations=5` (on CIFAR-10 at most 1.0 % more inertia than the recipe,
benchmarks/kmeans.py); and a GPU, on which faiss does the same search. The embeddings take 0.66 GB and the centroids at
most 0.05 GB; distances are never kept.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recording import record, seconds
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.clusters.kmeans import kmeans
from twoviews.clusters.passes import passes_on

POINTS, DIM = 1_281_167, 128
CLUSTERS = 25_000, 50_000, 100_000
PASSES = {"recipe": 5 * 20 + 1, "default": 10 + 1, "iterations=5": 5 + 1}
SAMPLE = 4_000  # points a pass is measured on, and half as many


def embeddings(count: int, groups: int, seed: int) -> Tensor:
    """Unit rows around as many directions as there are groups."""
    drawn = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, DIM, generator=drawn)
    which = torch.randint(groups, (count,), generator=drawn)
    return nnf.normalize(centres[which] + 0.7 * torch.randn(count, DIM, generator=drawn), dim=1)


def pass_seconds(x: Tensor, centroids: Tensor) -> float:
    """CPU seconds to find the nearest centroid of each point."""
    nearest = passes_on(torch.device("cpu")).nearest
    return seconds(lambda: nearest(x, centroids))


def extrapolate(k: int, rounds: int) -> dict[str, Any]:
    """One pass over all points, and whole E-steps."""
    centroids, x = embeddings(k, k, 1), embeddings(SAMPLE, k, 2)
    pairs = [(pass_seconds(x[: SAMPLE // 2], centroids), pass_seconds(x, centroids)) for _ in range(rounds)]
    grown = statistics.median(whole / half for half, whole in pairs)
    taken = statistics.median(whole for _, whole in pairs) * POINTS / SAMPLE
    rate = 2 * POINTS * k * DIM / taken / 1e9
    hours = {name: passes * taken / 3600 for name, passes in PASSES.items()}
    print(
        f"k = {k:7,}: a pass {taken / 60:6.1f} min at {rate:.0f} GFLOP/s; an E-step by the recipe "
        f"{hours['recipe']:.1f} h, ours up to {hours['default']:.1f} h, with iterations=5 {hours['iterations=5']:.1f} h; twice "
        f"the points took {grown:.2f} times as long",
        flush=True,
    )
    return {"k": k, "pass_seconds": taken, "gflop_per_s": rate, "hours": hours, "twice_the_points": grown}


def whole(rounds: int) -> dict[str, Any]:
    """All of `kmeans` over its passes alone, with a tenth of the points and of the clusters."""
    points, k = POINTS // 10, CLUSTERS[0] // 10
    x = embeddings(points, k, 3)
    ratios = []
    for number in range(rounds):
        previous = kmeans(x, k, seed=number, iterations=1).assignment
        start = time.process_time()
        clusters = kmeans(x, k, seed=number, start=previous, iterations=5, tolerance=0)
        taken = time.process_time() - start
        one = pass_seconds(x, clusters.centroids)
        ratios.append(taken / ((clusters.iterations + 1) * one))
        print(
            f"{points:,} points, k = {k:,}: {taken:.1f} s, {clusters.iterations + 1} passes of {one:.2f} s: "
            f"{ratios[-1]:.2f} times the passes alone",
            flush=True,
        )
    return {"points": points, "k": k, "of_the_passes": statistics.median(ratios)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    rows = [extrapolate(k, options.rounds) for k in CLUSTERS]
    record(options.json, f"large_kmeans.py --rounds {options.rounds}", rows, whole=whole(options.rounds))


if __name__ == "__main__":
    main()
