"""The compiled form of the augmentation for CPUs: kernel.c, built by the machine's C compiler when it is first used.

Without a compiler, or with TWOVIEWS_KERNEL=0, views.py does the same in tensors; the results agree to some 1e-6.
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

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-shared", "-fPIC")
COMPILE_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be built."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("TWOVIEWS_KERNEL") == "0":
        return None
    try:
        path = _folder() / f"kernel-{_key(compiler)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / "kernel.so"
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "twoviews"


def _key(compiler: str) -> str:
    """Changes with the source, the compiler and the processor: a folder may be shared by different machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_S).stdout
    info = Path("/proc/cpuinfo")
    flags = sorted(
        {line for line in info.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))}
        if info.exists()
        else {platform.processor()}
    )
    text = repr((SOURCE.read_text(), version, FLAGS, platform.machine(), flags))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="views")


def render(library: ctypes.CDLL, images: Tensor, size: int, *arrays: Tensor | float) -> Tensor:
    """[B, C, size, size] float32, normalised, of images [B, C, S, S] uint8 on the CPU.

    Args:
        library: from `library`.
        images: the canvases.
        size: side of the view in px.
        arrays: the arguments of `render` in kernel.c from `start` to `std`.

    Raises:
        MemoryError: there is none left.
    """
    count, channels, side, _ = images.shape
    out = torch.empty(count, channels, size, size)
    whole = [images.contiguous(), *(one.contiguous() if isinstance(one, Tensor) else one for one in arrays), out]
    given = [ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_float(one) for one in whole]
    sizes = (ctypes.c_int(channels), ctypes.c_int(side), ctypes.c_int(size))
    threads = max(1, min(torch.get_num_threads(), count))
    ends = [count * part // threads for part in range(threads + 1)]

    def share(part: int) -> int:
        first, last = ctypes.c_int64(ends[part]), ctypes.c_int64(ends[part + 1])
        return library.render(given[0], first, last, *sizes, *given[1:])

    run: Callable = map if threads == 1 else _pool(threads).map
    if any(run(share, range(threads))):
        raise MemoryError("no memory is left for views; use a smaller batch_size.")
    return out
