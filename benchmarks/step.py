"""Training steps of five methods: images a second, as a share of what the arithmetic and the memory of the device allow.

    python benchmarks/step.py data=cifar10 --json benchmarks/results/step.json
    OMP_NUM_THREADS=1 python benchmarks/step.py data=folder data.root=<cifar10> backbone=tiny batch_size=64 --steps 3

ResNet-18 with the CIFAR stem, 512 images, unless overrides say otherwise; with the precision and the memory format that a
training has on the device, views included. In every round each method does `--steps` steps, in turns; the device is waited
for only at the ends. Two ceilings are measured on the device first, in its own precision: a large matrix product and a
large copy. The floors count the operations of a step by torch's counter, over all its networks and the backward pass, and
the bytes of the outputs of convolutions, which a forward pass writes and reads again in 5 passes altogether (convolution,
statistics, normalisation with ReLU) and a backward pass in 9: `floor` is the larger of the two times, as if they overlapped
wholly, `floor_sum` both one after the other. `--profile METHOD` prints the most expensive operators of a step of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from loops import ours
from recording import record, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from twoviews.assembly import Parts, load_data, make_parts, make_views
from twoviews.config.building import build
from twoviews.config.checks import check
from twoviews.config.groups import CONF
from twoviews.run import parameter_count

METHODS = {  # the overrides that its CIFAR-10 recipe needs, beside the shared ones
    "simclr": ["augmentation=simclr"],
    "moco": ["augmentation=moco_cifar"],
    "byol": ["augmentation=byol_cifar"],
    "swav": ["augmentation=swav_cifar", "method.prototypes=512"],
    "pcl": ["augmentation=moco_cifar", "method.warmup_epochs=0"],
}
PASSES = {False: 5, True: 14}  # over the outputs of convolutions: forward alone, and with the backward pass
SIZES = {"cpu": (1024, 2**26), "cuda": (8192, 2**32)}  # rows of the square matrices, bytes of the copy


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(function: Callable[[], Any], device: torch.device, repetitions: int = 10) -> float:
    """The fastest of some runs, after two to warm up."""
    taken = []
    for _ in range(repetitions + 2):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[2:])


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product of random numbers, and bytes/s read and written by a copy."""
    side, size = SIZES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    one, other = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    product = 2 * side**3 / best_seconds(lambda: a @ b, device)
    return product, 2 * size / best_seconds(lambda: other.copy_(one), device)


def counted(parts: Parts, dtype: torch.dtype, one_step: Callable[[], Any]) -> tuple[float, float]:
    """Operations and bytes of a step."""
    moved = 0

    def look(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal moved
        moved += output.numel() * dtype.itemsize * PASSES[output.requires_grad]

    hooks = [one.register_forward_hook(look) for one in parts.method.modules() if isinstance(one, nn.Conv2d)]
    with FlopCounterMode(display=False) as counter:
        one_step()
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), float(moved)


def prepared(method: str, overrides: list[str]) -> tuple[Parts, Any]:
    """A training of that method."""
    shared = ["backbone=resnet18_cifar", "batch_size=512", *METHODS[method]]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", [f"method={method}", *shared, "tracking=files", "protocol=[]", *overrides])
    check("train", cfg)
    runtime = build(cfg.runtime)
    device = runtime.torch_device()
    data = load_data(cfg).to(device)
    return make_parts(cfg, data, make_views(cfg, data), runtime, device), cfg


def network(parts: Parts) -> str:
    """Its kind and size."""
    return f"{type(parts.method.encoder).__name__} of {parameter_count(parts.method.encoder) / 1e6:.1f} million"


def profile(steps: Iterator[Any], device: torch.device) -> str:
    """The most expensive operators of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        next(steps)
        wait(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="a round")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--profile", choices=METHODS, help="print the operators of a step of this method")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of train.py")
    options = parser.parse_intermixed_args()
    overrides = options.overrides
    rows, trainings = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            parts, cfg = prepared(method, overrides)
            device, dtype = parts.device, parts.runtime.dtype(parts.device)
            parts.method.before_epoch(0, parts.embed, 0)
            steps = trainings[method] = ours(parts, cfg, Path(folder), read=False)
            for _ in range(2):
                next(steps)
            operations, moved = counted(parts, dtype, lambda steps=steps: next(steps))
            rows[method] = {
                "method": method,
                "batch_size": cfg.batch_size,
                "backbone": network(parts),
                "flop": operations,
                "bytes": moved,
            }
        product, copy = ceilings(device, dtype)
        print(f"{device}, {dtype}: {product / 1e12:.3g} TFLOP/s in a product, {copy / 1e12:.3g} TB/s in a copy")
        times: dict[str, list[float]] = {method: [] for method in trainings}
        for turn in range(-1, options.rounds):
            for method, steps in trainings.items():
                wait(device)
                start = time.perf_counter()
                for _ in range(options.steps):
                    next(steps)
                wait(device)
                if turn >= 0:
                    times[method].append((time.perf_counter() - start) / options.steps)
        for method, row in rows.items():
            taken = statistics.median(times[method])
            arithmetic, memory = row["flop"] / product, row["bytes"] / copy
            row |= {
                "step_seconds": taken,
                "images_per_s": row["batch_size"] / taken,
                "flop_per_s": row["flop"] / taken,
                "of_product": arithmetic / taken,
                "of_floor": max(arithmetic, memory) / taken,
                "of_floor_sum": (arithmetic + memory) / taken,
            }
            print(
                f"{method:8} {row['images_per_s']:9.0f} images/s, {1e3 * taken:.1f} ms a step; "
                f"{row['flop_per_s'] / 1e12:.3g} TFLOP/s; {100 * row['of_floor']:.0f} % of the floor, "
                f"{100 * row['of_floor_sum']:.0f} % of arithmetic and memory one after the other",
                flush=True,
            )
        if options.profile:
            print(profile(trainings[options.profile], device))
    named = " ".join(["--methods", *options.methods]) if options.methods != list(METHODS) else ""
    shown = ["data.root=<cifar10>" if one.startswith("data.root=") else one for one in overrides]
    command = " ".join(filter(None, ["step.py", *shown, named, f"--rounds {options.rounds} --steps {options.steps}"]))
    facts = {"precision": str(dtype), "product_flop_per_s": product, "copy_bytes_per_s": copy}
    record(options.json, command, list(rows.values()), device=device, **facts)


if __name__ == "__main__":
    run(main)
