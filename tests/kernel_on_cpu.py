"""kernel.cu compiled for the CPU, its threads as threads of the machine (block.cpp)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from torch import Tensor

from twoviews import compiled
from twoviews.data import kernel_cuda

BLOCK = Path(__file__).parent / "data" / "block.cpp"


class Block:
    """Calls kernel.cu as torch's compiled kernels are called, with so many threads in this order (see block.cpp)."""

    def __init__(self, library: ctypes.CDLL, threads: int, order: int = 1):
        self.library, self.threads, self.order = library, threads, order

    def __call__(self, grid: tuple, block: tuple, args: list, shared_mem: int) -> None:
        assert block == (kernel_cuda.THREADS, 1, 1)
        assert shared_mem < kernel_cuda.SHARED
        assert all(x.is_contiguous() for x in args[:-1] if isinstance(x, Tensor))
        kinds = {int: ctypes.c_int, float: ctypes.c_double}  # as torch has it
        given = [compiled.address(x) if isinstance(x, Tensor) else kinds[type(x)](x) for x in args]
        # Fewer threads need fewer of the numbers that their sums are put together from.
        shared_mem -= 8 * (block[0] - self.threads)
        assert self.library.launch(grid[0], self.threads, self.order, shared_mem, *given) == 0


def compile_for_cpu(source: Path, folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler: c++"
    built = folder / f"{source.stem}.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f'-DKERNEL="{source}"']
    subprocess.run([*command, str(BLOCK), "-o", str(built)], check=True, timeout=120)
    return ctypes.CDLL(str(built))
