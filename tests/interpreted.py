"""The fused norms' Triton kernels in Triton's interpreter, for tensors on the CPU and on the pretended GPU.

conftest.py asks Triton for its interpreter where there is no GPU; that has to happen before Triton is imported.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_graph import recorded
from torch import Tensor

from twoviews import fused_norm, fused_norm_check, fused_norm_triton
from twoviews.fused_norm_triton import BLOCKS, Blocks

# Several chunks and tiles of small activations, too; and few programs, each of whose operators takes a millisecond.
SMALL = {name: Blocks(1024, 4, 4, 2) for name in BLOCKS}
FEW = {name: Blocks(65536, 4, 1, 1) for name in BLOCKS}
CASE = ((16, 6, 3, 3), 1, 8, True, True, torch.bfloat16)


def _forget() -> None:
    for function in (fused_norm._checked, fused_norm_triton.plan, fused_norm_triton.processors):
        function.cache_clear()


@contextlib.contextmanager
def interpreted(blocks: dict[str, Blocks] = FEW) -> Iterator[list[str]]:
    """Within it, batch norms of ResNets are fused on CPUs, too; gives the names of the kernels that ran."""
    launched: list[str] = []
    launch = fused_norm_triton.launch

    def plain(value: Any) -> Any:
        return value.as_subclass(Tensor) if isinstance(value, Tensor) else value

    def note(kernel: str, grid: Any, arguments: tuple, *others: Any, **constants: Any) -> None:
        launched.append(kernel)
        recorded(launch, kernel, grid, tuple(map(plain, arguments)), *others, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_norm, "DEVICES", {"cpu", "cuda"})
        patch.setattr(fused_norm_triton, "BLOCKS", blocks)
        patch.setattr(fused_norm_check, "CASES", (CASE,))  # the check takes seconds otherwise
        patch.setattr(fused_norm_triton, "launch", note)
        patch.setenv("TWOVIEWS_KERNEL", "1")
        _forget()
        try:
            yield launched
        finally:
            _forget()
