"""C code of the project, built by the machine's C compiler when it is first used, for what is slow in tensors on a CPU.

Without a compiler, or with TWOVIEWS_KERNEL=0, tensors do the same: callers have both forms. `reason` says why.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
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
_reasons: dict[Path, str] = {}  # why a file is not compiled


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """A compiled C file; None where it cannot be built."""
    _reasons.pop(source, None)
    try:
        return _built(source)
    except (OSError, subprocess.SubprocessError, _NotBuilt) as error:
        _reasons[source] = " ".join(str(error).split())
        return None


def reason(source: Path) -> str | None:
    """Why a C file is not compiled, in words that go behind a colon; None if it is."""
    return None if library(source) else _reasons[source]


class _NotBuilt(Exception):
    """Says why."""


def _built(source: Path) -> ctypes.CDLL:
    name = os.environ.get("CC", "cc")
    if os.environ.get("TWOVIEWS_KERNEL") == "0":
        raise _NotBuilt("TWOVIEWS_KERNEL=0")
    compiler = shutil.which(name)
    if compiler is None:
        raise _NotBuilt(f"there is no C compiler {name}; install one, or name another by the environment's CC")
    path = _folder() / f"{source.stem}-{_key(source, compiler)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "built.so"
            command = [compiler, *FLAGS, str(source), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S)
            if done.returncode or not built.exists():
                log = path.with_suffix(".log")
                log.write_text(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}")
                lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
                first = next((line for line in lines if "error" in line), lines[-1])
                raise _NotBuilt(
                    f"{name} does not compile {source.name} ({first.strip()}); all that it says is in {log}"
                )
            built.replace(path)
    return ctypes.CDLL(str(path))


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


def parallel_for(function: Callable[[ctypes.c_int64, ctypes.c_int64], int], count: int) -> int:
    """Call function(first, last) for parts of range(count), one to each of torch's threads: the largest result."""
    threads = max(1, min(torch.get_num_threads(), count))
    if threads == 1:
        return function(ctypes.c_int64(0), ctypes.c_int64(count))
    ends = [count * part // threads for part in range(threads + 1)]

    def share(part: int) -> int:
        return function(ctypes.c_int64(ends[part]), ctypes.c_int64(ends[part + 1]))

    return max(_pool(threads).map(share, range(threads)))
