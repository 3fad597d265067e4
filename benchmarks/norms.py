"""Fused batch norms on a GPU against torch's modules, and each of their passes against a copy.

    python benchmarks/norms.py --json benchmarks/results/norms.json
    python benchmarks/norms.py --tune

Activations of a ResNet-18 for CIFAR with 512 images, bf16 in channels_last: batch norm and ReLU, with a residual between
them and without. All is timed in CUDA graphs, over so many tensors in turn that none of them is still in the L2 cache.
A copy of one activation is timed as well: launches cost what it is slower than a large one.
`--tune` tries other sizes of blocks for each pass and says which are best (`BLOCKS` of fused_norm_triton.py).
"""

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import record, run
from torch import Tensor, nn

from twoviews import fused_norm, fused_norm_triton
from twoviews.batch_norms import SplitBatchNorm
from twoviews.errors import BadInput
from twoviews.fused_norm import batch_norm_act
from twoviews.fused_norm_triton import Blocks

SHAPES = [(512, 64, 32, 32), (512, 128, 16, 16), (512, 256, 8, 8), (512, 512, 4, 4)]
SPLITS = [1, 8]
ROTATED = 2**28  # bytes, several times an L2 cache
REPLAYS = 3  # between two events: the first of them waits for the host
GOAL = 0.75  # of the bytes a second of a copy, for each pass
# Activations that a pass reads and writes: without residual, with one.
PASSES = {"statistics": (1, 1), "normalise": (2, 3), "sums": (2, 4), "input_gradient": (3, 3)}
ADDING = ("statistics", "sums")
Call = tuple[str, tuple, dict[str, Any]]


class Case:
    """Batch norm and ReLU of several activations of one shape in turn."""

    def __init__(self, shape: tuple[int, ...], splits: int, residual: bool, device: torch.device):
        made = torch.Generator(device).manual_seed(0)
        self.norm = (SplitBatchNorm if splits > 1 else nn.BatchNorm2d)(shape[1]).to(device)
        if isinstance(self.norm, SplitBatchNorm):
            self.norm.splits = splits
        self.act, self.residual = nn.ReLU(inplace=True), residual

        def activation() -> Tensor:
            x = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=made)
            return x.to(memory_format=torch.channels_last)

        self.bytes = 2 * torch.Size(shape).numel()
        self.xs = [activation().requires_grad_() for _ in range(max(2, ROTATED // self.bytes))]
        self.residuals = [activation().requires_grad_() if residual else None for _ in self.xs]
        self.grads = [activation() for _ in self.xs]

    def fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """By `batch_norm_act`."""
        return batch_norm_act(self.norm, x, self.act, residual)

    def plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """By the modules."""
        y = self.norm(x)
        return self.act(y if residual is None else y + residual)

    def forward(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Of all activations, without gradients."""
        with torch.no_grad():
            for x, residual in zip(self.xs, self.residuals, strict=True):
                function(x, residual)

    def both(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Forward and backward of all activations."""
        for x, residual, grad in zip(self.xs, self.residuals, self.grads, strict=True):
            leaves = [t for t in (x, residual, self.norm.weight, self.norm.bias) if t is not None]
            torch.autograd.grad(function(x, residual), leaves, grad)

    def copy(self) -> None:
        """One activation to another, all of them."""
        with torch.no_grad():
            for x, grad in zip(self.xs, self.grads, strict=True):
                grad.copy_(x)

    def calls(self) -> dict[str, list[Call]]:
        """What forward and backward of all activations launch, by kernel."""
        launch, found = fused_norm_triton.launch, {}

        def note(kernel: str, *arguments: Any, **constants: Any) -> None:
            launch(kernel, *arguments, **constants)
            found.setdefault(kernel, []).append((kernel, arguments, constants))

        fused_norm_triton.launch = note
        try:
            self.both(self.fused)
        finally:
            fused_norm_triton.launch = launch
        return found


def seconds(function: Callable[[], object], rounds: int) -> float:
    """Median time of a replay of what it launches, after it ran once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        function()
        graph.capture_end()
        times = []
        for _ in range(rounds + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / (1e3 * REPLAYS))
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times[1:])


def launch_all(calls: list[Call]) -> None:
    """Again."""
    for kernel, arguments, constants in calls:
        fused_norm_triton.launch(kernel, *arguments, **constants)


def copy_rate(device: torch.device, rounds: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    one, other = (torch.empty(2**29, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * len(one) / seconds(lambda: other.copy_(one), rounds)


def measure(case: Case, rate: float, rounds: int) -> dict[str, Any]:
    """Milliseconds of an activation, and shares of the copy's rate for each pass."""
    count, row = len(case.xs), {}
    functions = {"fused": case.fused, "plain": case.plain}
    for name, function in functions.items():
        for what, work in (("forward", case.forward), ("both", case.both)):
            row[f"{name}_{what}_ms"] = (
                1e3 * seconds(lambda work=work, function=function: work(function), rounds) / count
            )
    for kernel, calls in case.calls().items():
        each = seconds(lambda calls=calls: launch_all(calls), rounds) / count
        row[f"{kernel}_ms"] = 1e3 * each
        if kernel in PASSES:
            row[f"{kernel}_of_copy"] = PASSES[kernel][case.residual] * case.bytes / each / rate
    row["copy_of_copy"] = 2 * case.bytes * count / seconds(case.copy, rounds) / rate
    return row


def candidates(kernel: str) -> list[Blocks]:
    """Blocks to try: few combinations that have to be compiled, each with several numbers of programs."""
    if kernel in ADDING:
        compiled = [(8192, 8, 4), (8192, 8, 1), (4096, 4, 4), (8192, 4, 4), (16384, 8, 3), (16384, 8, 1)]
        programs = [1, 2, 3, 4, 6]
    else:
        compiled = [(8192, 8, 1), (4096, 4, 1), (8192, 4, 1), (16384, 8, 1), (8192, 8, 3), (4096, 4, 3)]
        programs = [4, 8, 16, 32, 64]
    return [
        Blocks(tile, warps, number, stages) for (tile, warps, stages), number in itertools.product(compiled, programs)
    ]


def tune(device: torch.device, rate: float, rounds: int) -> list[dict[str, Any]]:
    """For each pass the blocks that are best over all shapes, and for each of them; 8 parts, ReLU, no residual."""
    cases = [Case(shape, 8, False, device) for shape in SHAPES]
    shipped, rows = copy.copy(fused_norm_triton.BLOCKS), []
    for kernel, (moved, _) in PASSES.items():
        shares: dict[Blocks, list[float]] = {}
        for blocks in dict.fromkeys([shipped[kernel], *candidates(kernel)]):
            fused_norm_triton.BLOCKS[kernel] = blocks
            fused_norm_triton.plan.cache_clear()
            try:
                shares[blocks] = []
                for case in cases:
                    calls = case.calls()[kernel]
                    each = seconds(lambda calls=calls: launch_all(calls), rounds) / len(case.xs)
                    shares[blocks].append(moved * case.bytes / each / rate)
            except Exception as error:  # too much shared memory, for example
                print(f"{kernel} {blocks}: {type(error).__name__}")
                del shares[blocks]
        fused_norm_triton.BLOCKS[kernel] = shipped[kernel]
        order = sorted(shares, key=lambda blocks: statistics.harmonic_mean(shares[blocks]), reverse=True)
        for place, blocks in enumerate(dict.fromkeys([shipped[kernel], *order[:3]])):
            name = "as shipped" if place == 0 else "best" if blocks == order[0] else "then"
            print(
                f"{kernel:15} {name:10} {blocks}: {' '.join(f'{share:4.0%}' for share in shares[blocks])}", flush=True
            )
        rows += [{"pass": kernel, **vars(blocks), "of_copy": shares[blocks]} for blocks in order]
    fused_norm_triton.plan.cache_clear()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tune", action="store_true", help="try other blocks instead")
    parser.add_argument("--json", type=Path, help="write all numbers here, for example below benchmarks/results/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("fused norms run on a GPU that torch can use, and there is none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := fused_norm.reason_for_plain(device):
        raise BadInput(f"The fused norms are not used on {device}: {reason}.")
    rate = copy_rate(device, options.rounds)
    print(
        f"{torch.cuda.get_device_name(device)}: a copy moves {rate / 1e12:.2f} TB/s; passes should reach {GOAL:.0%} of it"
    )
    rows = tune(device, rate, options.rounds) if options.tune else []
    for shape, splits, residual in [] if options.tune else itertools.product(SHAPES, SPLITS, (False, True)):
        row = measure(Case(shape, splits, residual, device), rate, options.rounds)
        rows.append({"shape": shape, "splits": splits, "residual": residual, "goal": GOAL, **row})
        times = [
            f"{what} {row[f'fused_{key}_ms']:.3f} ms, plain {row[f'plain_{key}_ms']:.3f} "
            f"({row[f'plain_{key}_ms'] / row[f'fused_{key}_ms']:.1f}x)"
            for what, key in (("forward", "forward"), ("and backward", "both"))
        ]
        shares = [f"{kernel} {row[f'{kernel}_of_copy']:.0%}" for kernel in (*PASSES, "copy")]
        small = 1e3 * (row["finish_statistics_ms"] + row["finish_sums_ms"])
        print(
            f"{list(shape)} splits {splits}{' + residual' if residual else ''}: {', '.join(times)}; {', '.join(shares)}, "
            f"the small ones {small:.1f} us",
            flush=True,
        )
    switches = " --tune" if options.tune else ""
    record(options.json, f"norms.py --rounds {options.rounds}{switches}", rows, device=device, copy_bytes_a_second=rate)


if __name__ == "__main__":
    run(main)
