"""C code of the project, built by the machine's C compiler when it is first used, for what is slow in tensors on a CPU.

Without a compiler, or with TWOVIEWS_KERNEL=0, tensors do the same: callers have both forms.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-shared", "-fPIC")
COMPILE_S = 120


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """A compiled C file; None where it cannot be built."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("TWOVIEWS_KERNEL") == "0":
        return None
    try:
        path = _folder() / f"{source.stem}-{_key(source, compiler)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / "built.so"
                command = [compiler, *FLAGS, str(source), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "twoviews"


def _key(source: Path, compiler: str) -> str:
    """Changes with the source, the compiler and the processor: a folder may be shared by different machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_S).stdout
    info = Path("/proc/cpuinfo")
    flags = sorted(
        {line for line in info.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))}
        if info.exists()
        else {platform.processor()}
    )
    text = repr((source.read_text(), version, FLAGS, platform.machine(), flags))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="compiled")


def address(x: Tensor) -> ctypes.c_void_p:
    """Where the numbers of a contiguous tensor on the CPU begin."""
    return ctypes.c_void_p(x.data_ptr())


def in_shares(function: Callable[[ctypes.c_int64, ctypes.c_int64], int], count: int) -> int:
    """Call function(first, last) for parts of range(count), one to each of torch's threads: the largest result."""
    threads = max(1, min(torch.get_num_threads(), count))
    if threads == 1:
        return function(ctypes.c_int64(0), ctypes.c_int64(count))
    ends = [count * part // threads for part in range(threads + 1)]

    def share(part: int) -> int:
        return function(ctypes.c_int64(ends[part]), ctypes.c_int64(ends[part + 1]))

    return max(_pool(threads).map(share, range(threads)))
