"""kNN against the bare matrix product of normalised queries and bank, in one process.

    OMP_NUM_THREADS=1 python benchmarks/knn.py --rounds 5 --json benchmarks/results/knn.json
    OMP_NUM_THREADS=1 python benchmarks/knn.py --features run/features.npz --rounds 5

First the predicted classes are compared with those of whole rows of cosines, sorted, with one-hot votes. Then, in each
round, every function is run once, in turns that change, and what counts is its time over that of the product in the same
round. The features are random rows, on which all cosines are alike, and mixtures as encoders make them: non-negative, of
few directions, in ten unequal clouds; or those of an .npz with memory_x, memory_y and test_x.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import record
from torch import Tensor
from torch.nn import functional as nnf

from twoviews.features import Features
from twoviews.protocols import knn
from twoviews.protocols.knn_grid import KNNGrid

KS, TEMPERATURES = [1, 5, 10, 20, 50, 100, 200], [0.07, 0.1, 0.2, 0.5]
CLASSES = 10
GOAL = 1.25


def random_features(bank: int, queries: int, dim: int) -> tuple[Features, Features]:
    """Independent normal numbers: (bank, queries)."""
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(bank + queries, dim, generator=made), torch.randint(CLASSES, (bank + queries,), generator=made)
    return Features(x[:bank], y[:bank]), Features(x[bank:], y[bank:])


def clouded_features(bank: int, queries: int, dim: int) -> tuple[Features, Features]:
    """Rectified clouds of different size and direction, with spectra that fall as 1 / sqrt(rank): (bank, queries)."""
    made = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (bank + queries,), generator=made)
    scales = torch.arange(1, dim + 1).rsqrt()
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=made))[0]
    centres = torch.randn(CLASSES, dim, generator=made) * scales * torch.linspace(0.3, 1, CLASSES)[:, None]
    x = (((centres[y] + torch.randn(bank + queries, dim, generator=made) * scales) @ turn) + 0.05).relu()
    return Features(x[:bank], y[:bank]), Features(x[bank:], y[bank:])


def read_features(path: Path) -> tuple[Features, Features]:
    """Of a run: (bank, queries)."""
    with np.load(path) as file:
        bank = Features(torch.from_numpy(file["memory_x"]).float(), torch.from_numpy(file["memory_y"]).long())
        x = torch.from_numpy(file["test_x"]).float()
    return bank, Features(x, torch.zeros(len(x), dtype=torch.long))


def other_predictions(bank: Features, queries: Features, k: int, temperature: float) -> int:
    """Queries whose class is not that of a plain implementation, which sorts whole rows."""
    found = knn.knn_scores(queries.x, bank, CLASSES, k, temperature).argmax(1)
    rows, hot, differ = nnf.normalize(bank.x, dim=1), nnf.one_hot(bank.y, CLASSES).float(), 0
    for part in torch.arange(len(queries.x)).split(200):
        cosines, order = (nnf.normalize(queries.x[part], dim=1) @ rows.T).sort(dim=1, descending=True)
        scores = torch.einsum("qk,qkc->qc", (cosines[:, :k] / temperature).exp(), hot[order[:, :k]])
        differ += int((scores.argmax(1) != found[part]).sum())
    return differ


def product(bank: Tensor, queries: Tensor) -> None:
    """The cosines in chunks of the size that kNN takes, thrown away; the rows are normalised already."""
    chunk = max(1, knn.CHUNK_BYTES // (4 * len(bank)))
    for start in range(0, len(queries), chunk):
        queries[start : start + chunk] @ bank.T


def grid(bank: Features, queries: Features) -> None:
    """All scores of the grid."""
    for _, scores, _ in KNNGrid(KS, TEMPERATURES, 0)._scores(queries, bank, CLASSES):
        scores.argmax(1)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """CPU time of one call, which other programs disturb least; on a GPU wall time."""
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(name: str, bank: Features, queries: Features, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds of the times over the product's."""
    device = bank.x.device
    differ = other_predictions(bank, queries, 200, 0.1)
    bank_rows, unit = nnf.normalize(bank.x, dim=1), nnf.normalize(queries.x, dim=1)
    functions: dict[str, Callable[[], object]] = {
        "product": lambda: product(bank_rows, unit),
        "kNN, k=200": lambda: knn.knn_scores(queries.x, bank, CLASSES, 200, 0.1),
        "kNN, k=20": lambda: knn.knn_scores(queries.x, bank, CLASSES, 20, 0.1),
        f"grid of {len(KS)} x {len(TEMPERATURES)}": lambda: grid(bank, queries),
    }
    names, times = list(functions), {name: [] for name in functions}
    seconds(functions["kNN, k=20"], device)  # memory is claimed, threads start
    for turn in range(rounds):
        for offset in range(len(names)):
            current = names[(turn + offset) % len(names)]
            times[current].append(seconds(functions[current], device))
    print(
        f"{name}: {len(queries.x):,} x {len(bank.x):,} x {bank.x.shape[1]}, {device}, {torch.get_num_threads()} thread(s); "
        f"predictions other than a plain implementation's: {differ}"
    )
    rows = []
    for current in names:
        ratios = [t / base for t, base in zip(times[current], times["product"], strict=True)]
        ratio, middle = statistics.median(ratios), statistics.median(times[current])
        rows.append({"features": name, "what": current, "seconds": middle, "of_the_product": ratio, "goal": GOAL})
        rows[-1].update(lowest=min(ratios), highest=max(ratios), other_predictions=differ)
        verdict = "" if current == "product" else f"  {'reaches' if ratio <= GOAL else 'misses'} {GOAL}"
        print(f"  {current:16} {middle:8.3f} s {ratio:6.2f} x{verdict}", flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--features", type=Path, help=".npz of a run, instead of made features")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none here; use --device cpu.")
    sizes = (options.bank, options.queries, options.dim)
    if options.features:
        sets = {str(options.features): read_features(options.features)}
    else:
        sets = {"random": random_features(*sizes), "clouds": clouded_features(*sizes)}
    rows = []
    for name, both in sets.items():
        bank, queries = (Features(one.x.to(options.device), one.y.to(options.device)) for one in both)
        rows += compare(name, bank, queries, options.rounds)
    record(
        options.json,
        f"knn.py --queries {options.queries} --rounds {options.rounds}"
        + (f" --device {options.device}" if options.device.type != "cpu" else ""),
        rows,
        device=options.device,
        bank=options.bank,
        dim=options.dim,
    )


if __name__ == "__main__":
    main()
