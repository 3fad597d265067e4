"""The linear probe with nine learning rates at once against one, on the same features.

    OMP_NUM_THREADS=1 python benchmarks/probe.py --rounds 5 --json benchmarks/results/probe.json

Both are the SGD of `protocol=linear_sgd`; what it learns does not matter here, so the features are made. Before any timing
the classifier of each rate is compared with the one that is trained alone. In every round both are run once, in turns;
what counts is the median of the ratios within a round. Times are CPU seconds of the process.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recording import record
from torch import Tensor

from twoviews.protocols.linear_sgd import Stack, sgd

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
CLASSES, BATCH = 10, 256
GOAL = 1.5


def features(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Ten clouds that overlap, standardised, and their labels."""
    made = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (count,), generator=made)
    x = torch.randn(CLASSES, dim, generator=made)[y] * 0.3 + torch.randn(count, dim, generator=made)
    return (x - x.mean(0)) / x.std(0), y


def trained(x: Tensor, y: Tensor, rates: list[float], epochs: int) -> tuple[Stack, float]:
    """A classifier for each rate, and the CPU seconds that took."""
    start = time.process_time()
    stack = sgd(x, y, CLASSES, [(rate, 1e-4) for rate in rates], momentum=0.9, batch_size=BATCH, epochs=epochs, seed=0)
    return stack, time.process_time() - start


def compare(count: int, dim: int, epochs: int, rounds: int) -> dict[str, Any]:
    """How many times as long nine rates take."""
    x, y = features(count, dim)
    together, _ = trained(x, y, RATES, 1)
    for number, rate in enumerate(RATES[:7]):  # the largest rates run away, and rounding with them
        alone, _ = trained(x, y, [rate], 1)
        torch.testing.assert_close(together.weight[number], alone.weight[0], rtol=1e-3, atol=1e-4)
    ratios, times = [], {1: [], len(RATES): []}
    for turn in range(rounds):
        for number in (1, len(RATES)) if turn % 2 else (len(RATES), 1):
            times[number].append(trained(x, y, RATES[:number], epochs)[1])
        ratios.append(times[len(RATES)][-1] / times[1][-1])
    ratio = statistics.median(ratios)
    one, nine = (statistics.median(times[number]) for number in times)
    print(
        f"{count:,} x {dim}, {epochs} epochs: one rate {one:.2f} s, nine {nine:.2f} s: {ratio:.2f} x "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {'reaches' if ratio <= GOAL else 'misses'} {GOAL}",
        flush=True,
    )
    row = {"features": dim, "images": count, "epochs": epochs, "one_seconds": one, "nine_seconds": nine, "ratio": ratio}
    return {**row, "smallest": min(ratios), "largest": max(ratios), "goal": GOAL}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512], help="widths of the features")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    rows = [compare(options.images, dim, options.epochs, options.rounds) for dim in options.dims]
    record(options.json, f"probe.py --epochs {options.epochs} --rounds {options.rounds}", rows)


if __name__ == "__main__":
    main()
