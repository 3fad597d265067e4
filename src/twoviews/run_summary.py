"""What the user reads about a run: what it will do, and a table of its results at the end."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from twoviews import distributed
from twoviews.assembly import Parts
from twoviews.backbones import ResNet
from twoviews.batch_norms import SyncBatchNorm
from twoviews.config.parameter_names import qualify
from twoviews.console import Console, duration, in_bytes
from twoviews.data.rendering import compiled
from twoviews.errors import counted
from twoviews.fallbacks import slower, unrecorded
from twoviews.fused_norm import reason_for_plain
from twoviews.optim import parameter_count
from twoviews.protocols.units import KNN_TOP1, LINEAR_TOP1, MAX_SHOWN, PIXELS_KNN_TOP1, UNTRAINED_KNN_TOP1, with_unit
from twoviews.runtime import format_name
from twoviews.step import eager_reason
from twoviews.tracking.metrics import read
from twoviews.tracking.state import run_page

SPREAD = "train/spread"
FEW_STEPS = 10  # of a training, with fewer of which an encoder stays as it was
SMALL_BATCH = 16  # images; a smaller batch is not advised


def print_summary(cfg: DictConfig, parts: Parts, folder: Path, console: Console) -> None:
    """Print what a run will do."""
    for line in (*_data_lines(parts), *_method_lines(parts), *_length_lines(cfg, parts), *_device_lines(parts)):
        console.say(line)
    console.say(f"results   {folder}")


def _data_lines(parts: Parts) -> Iterator[str]:
    data = parts.data
    labelled = counted(len(data.classes), "class") if data.classes else "no labels"
    yield (
        f"data      {data.name}: {counted(len(data.train), 'training image')} of {data.size}x{data.size} px, "
        f"{'colour' if data.channels == 3 else f'channels: {data.channels}'}, {labelled}"
        + (f"; kNN bank {len(data.memory):,}, test {len(data.test):,}" if data.memory and data.test else "")
        + (f"; {in_bytes(data.resident_bytes)} of pixels in memory" if data.resident_bytes else "")
    )
    if not data.test:
        yield "          without labelled test images there is no kNN or linear accuracy; watch train/spread."
    how, loader = "compiled" if compiled(parts.device) else "tensors", parts.loader
    yield f"views     {how}, {len(parts.views)} of each image: {_shapes(parts.views.sizes)}" + (
        f"; in the first {counted(loader.small_epochs, 'epoch')} {_shapes(parts.views.scaled_sizes(loader.small_scale))}"
        if loader.small_epochs
        else ""
    )


def _shapes(sizes: Sequence[int]) -> str:
    counts = Counter(sizes)
    return " and ".join(
        f"{count} of {side}x{side} px" if len(counts) > 1 else f"{side}x{side} px" for side, count in counts.items()
    )


def _method_lines(parts: Parts) -> Iterator[str]:
    yield (
        f"method    {type(parts.method).__name__}: {parameter_count(parts.method) / 1e6:.2f} million parameters, of which "
        f"the encoder {parameter_count(parts.method.encoder) / 1e6:.2f}; {parts.method.encoder.out_dim} features"
    )
    for note in parts.notes:
        yield f"          {note}"


def _length_lines(cfg: DictConfig, parts: Parts) -> Iterator[str]:
    steps, size, left_over = len(parts.loader), cfg.batch_size, parts.loader.left_over
    lr, base, scaling = parts.optimizer.param_groups[0]["lr"], cfg.optimizer.lr, cfg.optimizer.lr_scaling
    rule = {"linear": f" = {base:g} x {size} / 256", "sqrt": f" = {base:g} x sqrt({size})", "none": ""}[scaling]
    name = type(parts.optimizer).__name__
    yield f"lr        {lr:g}{rule} ({name}, optimizer.lr={base:g}, lr_scaling={scaling})"
    left = f"; the other {left_over:,} sit out, different ones each epoch" if left_over else ""
    length = f"{counted(cfg.epochs, 'epoch')} of {counted(steps, 'step')} of {size}"
    yield f"length    {length}: {steps * size:,} images an epoch{left}"
    if steps * cfg.epochs < FEW_STEPS:
        helps = len(parts.data.train) // SMALL_BATCH * cfg.epochs >= FEW_STEPS
        smaller = f" or a smaller batch_size= (now {size})" if helps else ""
        yield (
            f"          {counted(steps * cfg.epochs, 'optimizer step')} in all: an encoder learns next to nothing below some "
            f"hundred; use more epochs= (now {cfg.epochs}){smaller}."
        )


def _device_lines(parts: Parts) -> Iterator[str]:
    dtype = format_name(parts.runtime.dtype(parts.device))
    device = (
        torch.cuda.get_device_name(parts.device)
        if parts.device.type == "cuda"
        else f"CPU, threads: {torch.get_num_threads()}"
    )
    yield f"device    {device}, {dtype}, processes: {distributed.processes()}"
    reason, plain = eager_reason(parts.runtime, parts.device), _plain_norms(parts)
    yield "step      " + ("CUDA graph" if reason is None else f"eager ({qualify(reason)})")
    fused = plain is None and reason_for_plain(parts.device) is None  # a reason of the device follows in `slower`
    yield "norms     " + ("fused" if fused else f"plain ({plain})" if plain else "plain")
    yield from slower(parts.runtime.device, parts.device, norms=plain is None)
    yield from unrecorded()


def _plain_norms(parts: Parts) -> str | None:
    """Why the settings of a run do not allow fused batch norms; None if they do."""
    if not isinstance(parts.method.encoder, ResNet):
        return f"{type(parts.method.encoder).__name__} has norms of its own"
    if not parts.runtime.channels_last:
        return "runtime.channels_last=false"
    if any(isinstance(part, (SyncBatchNorm, nn.SyncBatchNorm)) for part in parts.method.encoder.modules()):
        return "their statistics are shared by processes"
    return None


def show_result(folder: Path, result: dict[str, Any], protocols: Iterable[str], console: Console) -> None:
    """Print the table at the end of a run.

    Args:
        folder: of the run.
        result: the content of result.json.
        protocols: names of those that were run.
        console: to print to.
    """

    def accuracy(name: str) -> str:
        return with_unit(name, result[name]) if name in result else "-"

    rates = [line["images_per_s"] for line in read(folder) if "images_per_s" in line]
    rows = {
        "kNN": accuracy(KNN_TOP1),
        "linear": accuracy(LINEAR_TOP1),
        # Where there is no accuracy, it alone tells a collapsed encoder from others.
        **({"spread": f"{result[SPREAD]:.4g}"} if KNN_TOP1 not in result and SPREAD in result else {}),
        **_further_values(result, protocols),
        "kNN, untrained encoder": accuracy(UNTRAINED_KNN_TOP1),
        "kNN, raw pixels": accuracy(PIXELS_KNN_TOP1),
        "images/s": f"{statistics.median(rates):.0f}" if rates else "-",
        "time": duration(result["seconds"]),
        "precision": result.get("precision", "-"),
        "memory": ", ".join(
            f"{where} {in_bytes(1e6 * result[f'memory/{where}_mb'])}"
            for where in ("process", "gpu")
            if f"memory/{where}_mb" in result
        )
        or "-",
    }
    console.table(f"{folder.name}: {result['state']} after {counted(result['epoch'], 'epoch', '.4g')}", rows)
    console.say(f"MLflow: {run_page(folder)}")  # not in the table, which would break a command that is to be copied
    knn = result.get(KNN_TOP1, 100.0)
    floors = {"the untrained encoder": UNTRAINED_KNN_TOP1, "raw pixels": PIXELS_KNN_TOP1}
    ahead = [
        f"{label} ({result[name]:.2f} %)" for label, name in floors.items() if name in result and knn <= result[name]
    ]
    if result["state"] == "finished" and ahead:
        console.say(
            f"advice: kNN ({knn:.2f} %) does not beat that of {' and '.join(ahead)}; train longer (epochs=) or change "
            "optimizer.lr."
        )


def _further_values(result: Mapping[str, Any], protocols: Iterable[str]) -> dict[str, str]:
    """Rows of the values of all protocols but kNN and linear, which have rows of their own."""
    rows = {}
    for protocol in protocols:
        values = {name: value for name, value in result.items() if name.startswith(f"{protocol}/")}
        if protocol in ("knn", "linear") or not values:
            continue
        if len(values) > MAX_SHOWN:
            rows[protocol] = f"{len(values)} values, in result.json"
        else:
            rows |= {name: with_unit(name, value) for name, value in values.items()}
    return rows
