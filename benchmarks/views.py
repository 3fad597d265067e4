"""Two views of each image: ours against the pipelines that are usually copied, on one thread, or on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/views.py --rounds 7 --json benchmarks/results/views.json
    python benchmarks/views.py --device cuda --json benchmarks/results/views_gpu.json

Recipes: `moco` (crop, flip, colour jitter, grayscale) at 32 px, and `moco_v2` (the same with blur) at 96 and 224 px. Peers:
torchvision's transforms on PIL images, its v2 on tensors, image by image, lightly's MoCo transforms, and kornia's, which
work on batches too. Everything starts from decoded images in memory. Before any timing our compiled views are compared with
those in tensors, which tests/data/test_views.py compares with torchvision's own float operations. In every round all are run
once, in turns; what counts is the median of the ratios within a round. Times are CPU seconds of the process.

On a GPU: batches of 512 at 32 px and of 256 at 224 px with blur, both views of one batch after the other, the draws on
the CPU included; our kernel, our tensors and, where it is installed, kornia, which works on batches too. Times are those
between two CUDA events around some batches; `host` is how long the calls keep the thread that makes them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recording import record, seconds
from torch import Tensor

from twoviews.data import rendering, views
from twoviews.randomness import generator

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
JITTER = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
RECIPES: dict[str, dict[str, Any]] = {
    "moco, 32 px": {"size": 32, "blur": 0.0},
    "moco_v2, 96 px": {"size": 96, "blur": 0.5},
    "moco_v2, 224 px": {"size": 224, "blur": 0.5},
}
ON_GPU: dict[str, dict[str, Any]] = {
    "moco, 512 x 32 px": {"images": 512, "size": 32, "blur": 0.0},
    "moco_v2, 256 x 224 px": {"images": 256, "size": 224, "blur": 0.5},
}
BATCHES = 10  # a round, on a GPU
GOAL = 40.0  # times torchvision at 32 px


def photographs(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], cut from scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    where, cut = np.random.default_rng(0), []
    pictures = load_sample_images().images
    for number in range(count):
        picture = pictures[number % 2]
        side = int(where.integers(size, min(3 * size, picture.shape[0])))
        top, left = where.integers(picture.shape[0] - side), where.integers(picture.shape[1] - side)
        cut.append(np.asarray(Image.fromarray(picture[top : top + side, left : left + side]).resize((size, size))))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def ours(images: Tensor, recipe: dict[str, Any], compiled: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Draws and views of the whole batch, compiled or in tensors."""
    numbers = {"count": 2, "scale": [0.2, 1], "flip": 0.5, "grayscale": 0.2, **JITTER, "blur": recipe["blur"]}
    make = views.Views({"both": numbers}, size=recipe["size"], channels=3, mean=MEAN, std=STD)
    sizes = torch.tensor(images.shape[2:]).expand(len(images), 2)

    def run() -> tuple[Tensor, ...]:
        return make(images, make.draw(sizes, generator(0, "benchmark")))

    def in_tensors() -> tuple[Tensor, ...]:
        before, rendering.compiled = rendering.compiled, lambda device: None
        try:
            return run()
        finally:
            rendering.compiled = before

    return run if compiled else in_tensors


def peers(images: Tensor, recipe: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Two views by other pipelines, of the same recipe."""
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    size, blur = recipe["size"], recipe["blur"]
    kernel_size = max(3, 2 * (size // 20) + 1)

    def pipeline(module: Any, ends: list[Any]) -> Any:
        blurred = [module.RandomApply([module.GaussianBlur(kernel_size, (0.1, 2.0))], blur)] if blur else []
        jitter = module.RandomApply([module.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        crop = module.RandomResizedCrop(size, (0.2, 1.0), antialias=True)
        return module.Compose(
            [crop, module.RandomHorizontalFlip(), jitter, module.RandomGrayscale(0.2), *blurred, *ends]
        )

    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    on_pil = pipeline(v1, [v1.ToTensor(), v1.Normalize(MEAN, STD)])
    on_tensors = pipeline(v2, [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    found: dict[str, Callable[[], object]] = {
        "torchvision, PIL": lambda: [torch.stack([on_pil(one) for one in pictures]) for _ in range(2)],
        "torchvision v2, tensors": lambda: [torch.stack([on_tensors(one) for one in images]) for _ in range(2)],
    }
    try:
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        return found
    lightly = MoCoV2Transform(
        input_size=size, cj_strength=0.5, cj_bright=0.8, cj_contrast=0.8, cj_sat=0.8, cj_hue=0.2, gaussian_blur=blur
    )
    found["lightly"] = lambda: [torch.stack(view) for view in zip(*(lightly(one) for one in pictures), strict=True)]
    return found


def kornia(images: Tensor, recipe: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Two views by kornia, of the same recipe; nothing where it is not installed."""
    try:
        import kornia.augmentation as transforms
    except ImportError:
        return {}
    size, blur = recipe["size"], recipe["blur"]
    side = max(3, 2 * (size // 20) + 1)
    pipeline = torch.nn.Sequential(
        transforms.RandomResizedCrop((size, size), (0.2, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *([transforms.RandomGaussianBlur((side, side), (0.1, 2.0), p=blur)] if blur else []),
        transforms.Normalize(*(torch.tensor(values, device=images.device) for values in (MEAN, STD))),
    )
    return {"kornia": lambda: [pipeline(images.float() / 255) for _ in range(2)]}


def compare(name: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each pipeline: images a second and times torchvision's PIL pipeline, medians and extremes."""
    recipe = RECIPES[name]
    images = photographs(count, recipe["size"])
    run, in_tensors = ours(images, recipe, compiled=True), ours(images, recipe, compiled=False)
    for one, other in zip(run(), in_tensors(), strict=True):
        assert (one - other).abs().max() < 1e-4, "the compiled views are not those of the tensors"
    functions: dict[str, Callable[[], object]] = {
        **peers(images, recipe),
        **kornia(images, recipe),
        "twoviews, tensors": in_tensors,
        **({"twoviews, compiled": run} if rendering.kernel.library() else {}),
    }
    names, times = list(functions), {one: [] for one in functions}
    for turn in range(rounds):
        for offset in range(len(names)):
            current = names[(turn + offset) % len(names)]
            times[current].append(seconds(functions[current]))
    rows = []
    for current in names:
        ratios = [base / own for base, own in zip(times["torchvision, PIL"], times[current], strict=True)]
        rows.append(
            {
                "recipe": name,
                "pipeline": current,
                "images_per_s": count / statistics.median(times[current]),
                "ratio": statistics.median(ratios),
                "smallest": min(ratios),
                "largest": max(ratios),
            }
        )
        print(f"{name:16} {current:24} {rows[-1]['images_per_s']:9.0f} images/s {rows[-1]['ratio']:7.1f} x", flush=True)
    return rows


def seconds_on_gpu(function: Callable[[], object]) -> tuple[float, float]:
    """Of one call of several in a row: until the GPU has done it, and until the call returns."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    for _ in range(BATCHES):
        function()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / BATCHES, host / BATCHES


def compare_on_gpu(name: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each pipeline: images a second, milliseconds a batch, and times our tensors."""
    recipe = ON_GPU[name]
    images = photographs(recipe["images"], recipe["size"]).to(device)
    fused, in_tensors = ours(images, recipe, compiled=True), ours(images, recipe, compiled=False)
    functions = {"twoviews, tensors": in_tensors, **kornia(images, recipe)}
    if rendering.compiled(device):
        functions["twoviews, kernel"] = fused
        for one, other in zip(fused(), in_tensors(), strict=True):
            assert (one - other).abs().max() < 1e-4, "the kernel's views are not those of the tensors"
    else:
        print(f"kernel.cu is not used on {device}")
    times: dict[str, list[tuple[float, float]]] = {one: [] for one in functions}
    for function in functions.values():
        seconds_on_gpu(function)
    for turn in range(rounds):
        for offset in range(len(functions)):
            current = list(functions)[(turn + offset) % len(functions)]
            times[current].append(seconds_on_gpu(functions[current]))
    rows = []
    for current, own in times.items():
        batch, host = (statistics.median(each) for each in zip(*own, strict=True))
        ratios = [base[0] / one[0] for base, one in zip(times["twoviews, tensors"], own, strict=True)]
        rows.append(
            {
                "recipe": name,
                "pipeline": current,
                "images_per_s": recipe["images"] / batch,
                "milliseconds": 1e3 * batch,
                "host_milliseconds": 1e3 * host,
                "ratio": statistics.median(ratios),
                "smallest": min(ratios),
                "largest": max(ratios),
            }
        )
        print(
            f"{name:22} {current:18} {rows[-1]['images_per_s']:9.0f} images/s {1e3 * batch:8.3f} ms a batch "
            f"(host {1e3 * host:.3f} ms) {rows[-1]['ratio']:6.1f} x",
            flush=True,
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=256, help="a batch on a CPU; fewer at more px")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    rows = []
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that torch can use, and there is none here; use --device cpu.")
        device = torch.device("cuda", torch.cuda.current_device())
        for name in ON_GPU:
            rows += compare_on_gpu(name, options.rounds, device)
        record(options.json, f"views.py --device cuda --rounds {options.rounds}", rows, device=device)
        return
    for name, recipe in RECIPES.items():
        rows += compare(name, max(2, options.images // {32: 1, 96: 4, 224: 16}[recipe["size"]]), options.rounds)
    best = max(row["ratio"] for row in rows if row["recipe"] == "moco, 32 px")
    print(f"{'reaches' if best >= GOAL else 'misses'} {GOAL:g} times torchvision at 32 px")
    record(options.json, f"views.py --images {options.images} --rounds {options.rounds}", rows)


if __name__ == "__main__":
    main()
