"""A CUDA graph where there is no GPU: it records the operators of a capture and replays them on the same memory.

As on a GPU, numbers of Python and the order of operators are those of the capture, inputs are read where they lay then,
and results come to lie where they lay. Random operators draw from the CPU's generator, which is seeded for each replay.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from twoviews import cuda_graph, fused_norm_cpu


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple]):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


_capturing: list[list[tuple]] = []  # calls of the graphs that are being captured


def recorded(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call what is no operator of torch, such as the launch of a kernel; within a capture it is recorded, too."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():  # whatever operators it uses itself
        function(*args, **kwargs)
    if _capturing:
        _capturing[-1].append((function, args, kwargs, None))


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    replays = 0  # of all graphs

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        """Every operator again."""
        RecordedGraph.replays += 1
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def _capture(graph: RecordedGraph, capture_error_mode: str = "") -> Iterator[None]:
    _capturing.append(graph.calls)
    try:
        with _Recorder(graph.calls):
            yield
    finally:
        _capturing.pop()


def patch_graphs(patch: pytest.MonkeyPatch) -> None:
    """Captures are recorded in place of CUDA graphs, with the compiled batch norms of the CPU."""
    RecordedGraph.replays = 0
    stand_ins = {
        "CUDAGraph": RecordedGraph,
        "graph": _capture,
        "current_stream": lambda: None,
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(cuda_graph, "_recover", lambda: None)
    run = fused_norm_cpu.Compiled._run
    patch.setattr(fused_norm_cpu.Compiled, "_run", lambda *arguments: recorded(run, *arguments))


@contextlib.contextmanager
def recorded_graphs() -> Iterator[type[RecordedGraph]]:
    """Within it, steps on the CPU are captured as they would be on a GPU."""
    from twoviews import muon, optim, step

    with pytest.MonkeyPatch.context() as patch:
        patch_graphs(patch)
        patch.setattr(step, "eager_reason", lambda runtime, device: None)
        for module in (optim, muon):
            patch.setattr(module, "is_fused", lambda groups: True)
        yield RecordedGraph
