"""Features of 50,000 CIFAR-sized images by ResNet-18, along each path that a GPU has for convolutions and what follows them.

    python benchmarks/features.py --device cuda --json benchmarks/results/features_gpu.json

Times are of `embed` from the call until the features are there, the median of the rounds after a first one, in which cuDNN
chooses its algorithms; `host` is when the call returns, and `forward` the network alone on a batch that is ready, for as
many images. Errors are of the features, relative to those of plain float32 (without TF32, by batches of 1024): of their
norm, and the smallest cosine of an image. bf16 and fp16
are measured as in a training (cudnn.benchmark), fp32 as in an evaluation.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recording import record, run
from torch import nn
from torch.nn import functional as nnf

from twoviews import features, inference
from twoviews.backbones import ResNet
from twoviews.data.images import ImageData, Images
from twoviews.features import embed
from twoviews.inference import choose_backend, fold_batchnorm
from twoviews.runtime import autocast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-3}
COSINE = 0.999
# Path, number format, batch size, multiple of the images' channels; the most important first.
CASES = [
    *((path, "bf16", 1024, 8) for path in ("plain", "cudnn", "triton")),
    *((path, "bf16", size, 8) for size in (2048, 512) for path in ("plain", "cudnn", "triton")),
    *((path, "fp32", 1024, 8) for path in ("plain", "cudnn", "triton")),
    *((path, "bf16", 1024, 1) for path in ("cudnn", "triton")),
    *((path, "fp16", 1024, 8) for path in ("plain", "triton")),
]


def random_images(count: int, device: torch.device) -> ImageData:
    """Random pixels on the device."""
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=made)
    images = Images(pixels.to(device), torch.full((count, 2), 32), None)
    half, quarter = (0.5,) * 3, (0.25,) * 3
    return ImageData("random", images, None, None, (), 3, 32, half, quarter, "", ())


def resnet18_cifar(device: torch.device, width: int) -> ResNet:
    """Random weights; the batch norms have seen some random images."""
    torch.manual_seed(0)
    encoder = ResNet(3, 32, "basic", [2, 2, 2, 2], width=width)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, std=0.1)
    encoder = encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        encoder(torch.randn(64, 3, 32, 32, device=device))
    return encoder


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Any, device: torch.device) -> tuple[float, float]:
    """Of a call: until it returns, and until its result is there."""
    wait(device)
    start = time.perf_counter()
    function()
    returned = time.perf_counter() - start
    wait(device)
    return 1e3 * returned, 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def forward(
    encoder: ResNet, path: str | None, dtype: torch.dtype, size: int, count: int, device: torch.device
) -> float:
    """Milliseconds of the network for `count` images, by batches that are ready."""
    network = fold_batchnorm(encoder, path, dtype).to(device)
    x, batches = torch.randn(size, 3, 32, 32, device=device), -(-count // size)
    x = x.to(memory_format=torch.channels_last)

    def some() -> None:
        with autocast(device, dtype):
            for _ in range(min(10, batches)):
                network(x)

    some()
    return milliseconds(some, device)[1] * batches / min(10, batches)


def case(
    encoder: ResNet, data: ImageData, exact: torch.Tensor, path: str, name: str, size: int, aligned: int, rounds: int
) -> dict[str, Any]:
    """The row of one path."""
    device, dtype = exact.device, DTYPES[name]
    features.BATCH[device.type], inference.CHANNEL_MULTIPLE = size, aligned
    inference.PREFERRED_BACKENDS[device.type] = () if path == "plain" else (path,)
    inference._reasons.clear()
    torch.backends.cudnn.benchmark = name != "fp32"
    row: dict[str, Any] = {"path": path, "dtype": name, "batch": size, "channels": aligned if path != "plain" else 3}
    used = None
    if path != "plain":
        start = time.perf_counter()
        used = choose_backend(encoder, device, dtype, 32, size)
        row["trial_ms"] = 1e3 * (time.perf_counter() - start)
        if used != path:
            return {**row, "reason": next(filter(None, inference._reasons.values()), "does not serve here")}

    def all_images() -> torch.Tensor:
        return embed(encoder, data.train, data, device, dtype, channels_last=True)

    row["first_ms"] = milliseconds(all_images, device)[1]
    x = all_images()
    row["error"] = ((x - exact).norm() / exact.norm()).item()
    row["cosine"] = nnf.cosine_similarity(x, exact).min().item()
    row["right"] = row["error"] <= LIMITS[name] and row["cosine"] >= COSINE
    times = [milliseconds(all_images, device) for _ in range(rounds)]
    row["host_ms"], row["ms"] = (statistics.median(column) for column in zip(*times, strict=True))
    row["forward_ms"] = forward(encoder, used, dtype, size, len(x), device)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=64, help="of the ResNet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=22, help="after these no other case is begun")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device, start = torch.device(given.device), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False
    data, encoder = random_images(given.images, device), resnet18_cifar(device, given.width)
    features.BATCH[device.type], inference.PREFERRED_BACKENDS[device.type] = 1024, ()
    exact = embed(encoder, data.train, data, device, torch.float32, channels_last=True)
    title = f"{'path':8}{'dtype':>6}{'batch':>7}{'channels':>10}{'ms':>9}{'host':>9}{'forward':>9}{'first':>9}"
    print(f"{title}{'error':>10}{'cosine':>9}", flush=True)
    rows = []
    for path, name, size, aligned in CASES:
        if time.perf_counter() - start > given.seconds:
            print(f"{path:8}{name:>6}{size:7}{aligned:10}  left out: no time", flush=True)
            continue
        row = case(encoder, data, exact, path, name, size, aligned, given.rounds)
        rows.append(row)
        line = f"{path:8}{name:>6}{size:7}{row['channels']:10}"
        if "ms" not in row:
            print(f"{line}  left out: {row['reason']}", flush=True)
            continue
        line += "".join(f"{row[key]:9.1f}" for key in ("ms", "host_ms", "forward_ms", "first_ms"))
        line += f"{row['error']:10.1e}{row['cosine']:9.5f}"
        print(line + ("" if row["right"] else "  WRONG"), flush=True)
    record(given.json, "features.py --device cuda --json <file>", rows, device, images=given.images)


if __name__ == "__main__":
    run(main)
