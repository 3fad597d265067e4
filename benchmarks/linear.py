"""The linear probe on features computed once, against a classifier trained while the frozen backbone is run again.

    OMP_NUM_THREADS=1 python benchmarks/linear.py outputs/<run> --rounds 3

The usual probe runs the backbone over all training images in each of its 100 epochs. Of these one in `--share` images is
measured in every round, beside the whole of ours (features, all weight decays, the last fit, the test images); what
counts is their ratio. Without augmentation the backbone's features are the same in every epoch, so that the usual
probe's accuracy is that of the same SGD on features computed once: best of the learning rates, chosen on held-out
training images. Times are CPU seconds of the process.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from recording import record
from torch.nn import functional as nnf

from twoviews.assembly import load_data
from twoviews.config.building import build
from twoviews.config.groups import CONF
from twoviews.data.images import Images
from twoviews.data.views import eval_view
from twoviews.protocols.protocol import EvaluationContext
from twoviews.run import Run
from twoviews.runtime import autocast

EPOCHS, BATCH, LR = 100, 256, 0.1
GOAL, APART = 20, 0.3  # times faster; points of accuracy


def context(folder: Path) -> EvaluationContext:
    """The encoder of a run with its images, nothing computed yet."""
    run = Run.existing(folder)
    config = OmegaConf.create(run.config())
    assert isinstance(config, DictConfig)
    runtime = build(config.runtime)
    device = runtime.torch_device()
    data = load_data(config).to(device)
    return EvaluationContext(run.encoder().to(device), data, device, runtime.dtype(device), runtime.channels_last)


def protocol(name: str) -> Any:
    """As conf/protocol/<name>.yaml has it."""
    return build(DictConfig(OmegaConf.load(CONF / "protocol" / f"{name}.yaml")))


def usual_epoch(context: EvaluationContext, images: Images, linear: torch.nn.Linear, train: bool) -> None:
    """One pass of the frozen backbone, in eval mode, over some images, with a step of SGD after each batch."""
    data, encoder = context.data, context.encoder.eval()
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR, momentum=0.9)
    for pixels, sizes, index in images.batches(BATCH):
        x = eval_view(pixels.to(context.device), sizes, size=data.size, crop=1.0, mean=data.mean, std=data.std)
        with torch.no_grad(), autocast(context.device, context.dtype):
            x = encoder(x.to(memory_format=torch.channels_last)).float()
        logits = linear(x)
        if train:
            optimizer.zero_grad()
            assert images.labels is not None
            nnf.cross_entropy(logits, images.labels[index].long().to(context.device)).backward()
            optimizer.step()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the CPU seconds that took."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def ours(folder: Path) -> tuple[float, EvaluationContext]:
    """Accuracy of the protocol `linear`, everything included."""
    one = context(folder)
    return protocol("linear")(one).values["top1"], one


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=int, default=10, help="one in so many images is measured of the usual probe")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    one = context(options.run)
    memory, test = one.data.memory, one.data.test
    assert memory is not None and test is not None
    part = memory.subset(torch.arange(0, len(memory), options.share))
    linear = torch.nn.Linear(one.encoder.out_dim, len(one.data.classes), device=one.device)
    usual_epoch(one, part, linear, train=True)  # memory is claimed, files are read
    rows = []
    for turn in range(options.rounds):
        seconds: dict[str, float] = {}
        for name in ("usual", "ours") if turn % 2 == 0 else ("ours", "usual"):
            if name == "usual":
                _, epoch = timed(lambda: usual_epoch(one, part, linear, train=True))
                _, last = timed(lambda: usual_epoch(one, test, linear, train=False))
                seconds[name] = EPOCHS * epoch * len(memory) / len(part) + last
            else:
                (accuracy, fresh), seconds[name] = timed(lambda: ours(options.run))
        rows.append({**seconds, "ratio": seconds["usual"] / seconds["ours"], "top1": accuracy})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    ratio = statistics.median(row["ratio"] for row in rows)
    sgd = protocol("linear_sgd")(fresh)
    apart = abs(rows[-1]["top1"] - sgd.values["top1"])
    print(f"{len(memory):,} training and {len(test):,} test images, {one.encoder.out_dim} features, {EPOCHS} epochs")
    print(
        f"usual  {statistics.median(row['usual'] for row in rows):9.1f} s (extrapolated), top1 {sgd.values['top1']:.2f}"
    )
    print(f"ours   {statistics.median(row['ours'] for row in rows):9.1f} s, top1 {rows[-1]['top1']:.2f}")
    print(f"ratio  {ratio:9.1f}  {'reaches' if ratio >= GOAL else 'misses'} {GOAL}")
    print(f"apart  {apart:9.2f} points  {'reaches' if apart <= APART else 'misses'} {APART}")
    command = f"linear.py <run> --rounds {options.rounds} --share {options.share}"
    record(options.json, command, rows, sgd_top1=sgd.values["top1"])


if __name__ == "__main__":
    main()
