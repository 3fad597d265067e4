"""K-means of an E-step on made embeddings: seconds from random centroids, and from the assignment of the epoch before.

    python benchmarks/e_step.py --device cuda --json benchmarks/results/e_step.json

Unit rows in clouds, of which the second set is the first one moved a little, as an epoch of training does. Times are those of
the clock until the device is done, medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import record
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.clusters.kmeans import Clusters, concentration, kmeans

CLOUDS, SPREAD, MOVED = 2000, 0.5, 0.1  # how many, and lengths of what is added to unit rows
TEMPERATURE = 0.2


def embeddings(images: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of two epochs, one after the other."""
    made = torch.Generator().manual_seed(0)

    def noise(rows: int) -> Tensor:
        return nnf.normalize(torch.randn(rows, dim, generator=made), dim=1)

    centres = noise(CLOUDS)[torch.randint(CLOUDS, (images,), generator=made)]
    before = nnf.normalize(centres + SPREAD * noise(images), dim=1)
    return before.to(device), nnf.normalize(before + MOVED * noise(images), dim=1).to(device)


def timed(function: Callable[[], Clusters], device: torch.device) -> tuple[Clusters, float]:
    """Its result and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    clusters = function()
    concentration(clusters, TEMPERATURE)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clusters, time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none here; use --device cpu.")
    before, now = embeddings(options.images, options.dim, options.device)
    rows: list[dict[str, Any]] = []
    for k in options.k:
        times: dict[str, list[float]] = {"cold": [], "warm": []}
        clusters, _ = timed(lambda k=k: kmeans(before, k, seed=0), options.device)  # and memory is claimed
        for _ in range(options.rounds):
            first, taken = timed(lambda k=k: kmeans(before, k, seed=0), options.device)
            times["cold"].append(taken)
            clusters, taken = timed(lambda k=k, s=first.assignment: kmeans(now, k, seed=0, start=s), options.device)
            times["warm"].append(taken)
        rows.append({"k": k, **{name: statistics.median(taken) for name, taken in times.items()}})
        rows[-1]["inertia"] = clusters.distance.mean().item()
    print("; ".join(f"k={row['k']} {row['cold']:.3f} s cold, {row['warm']:.3f} s warm" for row in rows))
    facts = {"images": options.images, "dim": options.dim}
    record(options.json, f"e_step.py --device {options.device}", rows, device=options.device, **facts)


if __name__ == "__main__":
    main()
