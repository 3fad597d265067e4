"""Large data: photographs against torchvision's ImageFolder and DataLoader, and the cost per image of ever larger sets.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --rounds 5 --largest 1000000 --json benchmarks/results/decoding.json

The photographs are made on the fly: cuts of scikit-learn's two, enlarged to 500 x 375 px, with noise, as JPEG files of
quality 90. Compared are decoding alone, and two views of 160 px by MoCo v2's recipe (crop, flip, jitter, grayscale, blur),
from our store of decoded canvases of 160 px and from our loader that decodes on demand, both without worker processes as
the peer is. Before any timing the store is compared with what decoding gives. In every round all go over the same number
of images, in turns; what counts is the median of the ratios within a round. Times are CPU seconds of the process.

The larger sets are arrays of 32 px with random values. Their cost per image is that of building the store, and of an
epoch: the order of all images, by their number, and the views of a batch, by its size; batches of all sets in turns.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recording import record, seconds
from torch.utils.data import DataLoader
from views import JITTER, MEAN, STD

from twoviews.data.images import ImageData
from twoviews.data.loader import Loader
from twoviews.data.picture_files import decode
from twoviews.data.sources import array, folder
from twoviews.data.views import Views

SIDE, BATCH = 160, 32
STORE_GOAL, DEMAND_GOAL, FLAT = 3.0, 1.5, 1.3
SMALL, SMALL_BATCH, SMALL_BATCHES = 32, 256, 200


def make_photographs(root: Path, count: int) -> list[str]:
    """JPEG files in two class folders below root/train."""
    from sklearn.datasets import load_sample_images

    pictures, where, paths = load_sample_images().images, np.random.default_rng(0), []
    for number in range(count):
        side = int(where.integers(120, 400))
        top, left = where.integers(427 - side), where.integers(640 - side)
        cut = Image.fromarray(pictures[number % 2][top : top + side, left : left + side]).resize((500, 375))
        noisy = np.asarray(cut).astype(np.int16) + where.integers(-8, 9, (375, 500, 3))
        path = root / "train" / f"class_{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths


def endless(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from start()


def ours(data: ImageData) -> Iterator[Any]:
    """Batches of our loader."""
    numbers = {"count": 2, "scale": [0.2, 1], "flip": 0.5, "grayscale": 0.2, **JITTER, "blur": 0.5, "size": SIDE}
    views = Views({"both": numbers}, size=data.size, channels=3, mean=MEAN, std=STD)
    loader = Loader(data.train, views, batch_size=BATCH, seed=0, device="cpu")
    return endless(lambda: iter(loader))


def imagefolder(root: Path) -> Iterator[Any]:
    """Batches of torchvision's data set in torch's loader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, (0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(2 * (SIDE // 20) + 1, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pictures = ImageFolder(str(root / "train"), lambda picture: (one(picture), one(picture)))
    loader = DataLoader(pictures, batch_size=BATCH, shuffle=True, drop_last=True)
    return endless(lambda: iter(loader))


def silent(function: Callable[[], Any]) -> Any:
    """What it returns; what it says is for users."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return function()


def photographs(place: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way to decode or to make views: images a second, and times torchvision's."""
    paths = make_photographs(place, count)
    cache, stored = str(place / "cache"), []

    def build() -> None:
        stored.append(silent(lambda: folder(root=str(place), size=SIDE, workers=0, cache=cache)))

    build_rate = count / seconds(build)
    print(f"store of {count} photographs built at {build_rate:.0f} images/s", flush=True)
    data = stored[0].to("cpu")
    for row in range(0, count, 97):
        canvas, _ = decode(sorted(paths)[row], SIDE, 3)
        assert np.array_equal(data.train.pixels[row], canvas), "the store is not what decoding gives"
    demand = silent(lambda: folder(root=str(place), size=224, workers=0, cache=cache))
    batches = {"imagefolder": imagefolder(place), "store": ours(data), "demand": ours(demand)}
    files = itertools.cycle(paths)

    def decoded(one: Callable[[str], object]) -> None:
        for path in itertools.islice(files, BATCH):
            one(path)

    def as_torchvision(path: str) -> None:
        with Image.open(path) as picture:
            picture.convert("RGB")

    ways: dict[str, tuple[str, Callable[[], object], float | None]] = {
        "decoding by PIL": ("", lambda: decoded(as_torchvision), None),
        f"decoding to {SIDE} px": ("decoding by PIL", lambda: decoded(lambda path: decode(path, SIDE, 3)), None),
        "ImageFolder and DataLoader": ("", lambda: next(batches["imagefolder"]), None),
        f"photographs from the store, two views of {SIDE} px with blur": (
            "ImageFolder and DataLoader",
            lambda: next(batches["store"]),
            STORE_GOAL,
        ),
        "the same, decoded on demand": ("ImageFolder and DataLoader", lambda: next(batches["demand"]), DEMAND_GOAL),
    }
    names, times = list(ways), {name: [] for name in ways}
    for turn in range(-1, rounds):
        for offset in range(len(names)):
            current = names[(turn + offset) % len(names)]
            taken = seconds(ways[current][1])
            if turn >= 0:
                times[current].append(taken)
    rows: list[dict[str, Any]] = [{"what": "store built", "images_per_s": build_rate}]
    for name, (base, _, goal) in ways.items():
        ratios = [other / own for other, own in zip(times[base or name], times[name], strict=True)]
        row = {"what": name, "against": base, "images_per_s": BATCH / statistics.median(times[name])}
        row |= {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios), "target": goal}
        rows.append(row)
        verdict = f", {'reaches' if row['ratio'] >= goal else 'misses'} {goal}" if goal else ""
        print(f"{name:58} {row['images_per_s']:7.1f} images/s {row['ratio']:6.2f} x{verdict}", flush=True)
    return rows


def larger_sets(place: Path, counts: list[int]) -> list[dict[str, Any]]:
    """One row for each number of images: microseconds of building and of an epoch, an image."""
    block = np.random.default_rng(0).integers(0, 256, (1000, SMALL, SMALL, 3), dtype=np.uint8)
    numbers = {"count": 2, "scale": [0.2, 1], "flip": 0.5, "grayscale": 0.2, **JITTER, "blur": 0.0}
    views = Views({"both": numbers}, size=SMALL, channels=3, mean=MEAN, std=STD)
    costs, loaders = [], []
    for count in counts:
        path, stored = place / f"{count}.npy", []
        made = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SMALL, SMALL, 3))
        for start in range(0, count, len(block)):
            made[start : start + len(block)] = block
        del made

        def build(root: Path = path, stored: list[ImageData] = stored) -> None:
            stored[:] = [silent(lambda: array(root=str(root), cache=str(place / "cache")))]

        building, opening = seconds(build), seconds(build)  # the second time it is there
        path.unlink()
        loader = Loader(stored[0].to("cpu").train, views, batch_size=SMALL_BATCH, seed=0, device="cpu")
        loaders.append(endless(partial(iter, loader)))
        ordering = seconds(lambda loader=loader: torch.randperm(len(loader.images)).to(loader.device))
        costs.append({"images": count, "build_us": 1e6 * building / count, "open_seconds": opening})
        costs[-1]["epoch_us"] = 1e6 * ordering / count
    batches = [[seconds(partial(next, loader)) for loader in loaders] for _ in range(SMALL_BATCHES)]
    for row, own in zip(costs, zip(*batches[1:], strict=True), strict=True):
        row["epoch_us"] += 1e6 * statistics.median(own) / SMALL_BATCH
        print(
            f"{row['images']:9,} images of {SMALL} px: store built at {row['build_us']:.1f} us an image, opened in "
            f"{row['open_seconds']:.2f} s, an epoch {row['epoch_us']:.1f} us an image",
            flush=True,
        )
    compared: list[dict[str, Any]] = []
    for key, what in (("build_us", "building the store"), ("epoch_us", "an epoch of loading")):
        ratio = costs[-1][key] / costs[0][key]
        verdict = "reaches" if ratio <= FLAT else "misses"
        print(f"{what}, an image of {counts[-1]:,} against one of {counts[0]:,}: {ratio:.2f} x, {verdict} {FLAT}")
        name = {"what": f"{what}, an image of {counts[-1]:,}", "against": f"an image of {counts[0]:,}"}
        compared.append({**name, "ratio": ratio, "target": FLAT, "at_most": True})
    return [*costs, *compared]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=100_000, help="1,000,000 takes 7 GB of disk for a while")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's for temporary files")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    counts = [count for count in (10_000, 100_000, 1_000_000) if count <= options.largest]
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        rows = photographs(Path(place), options.photographs, options.rounds)
        rows += larger_sets(Path(place), counts)
    record(options.json, f"decoding.py --rounds {options.rounds} --largest {counts[-1]}", rows)


if __name__ == "__main__":
    main()
