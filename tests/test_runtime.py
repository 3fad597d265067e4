"""What a run computes with, beside what the tests of whole runs see of it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twoviews.errors import BadInput
from twoviews.runtime import Runtime, native_bf16

PEAK = """
import numpy, torch
from twoviews.runtime import peak_memory

def taken():
    return peak_memory(torch.device("cpu"))["memory/process_mb"]

before = taken()
assert 50 < before < 1_000
numpy.ones(50_000_000)
after = taken()
assert 380 < after - before < 420, (before, after)  # freed again by now
"""

HUGE = """
import re, torch
from pathlib import Path
from twoviews.runtime import Runtime, peak_memory

before = peak_memory(torch.device("cpu"))["memory/process_mb"]
Runtime("cpu", "auto", True, True, False, 1, 10, 30, 5).configure(torch.device("cpu"))
advised = 0
for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M):
    if "[heap]" in area and " hg" in area:
        advised += int(re.search(r"Size: +([0-9]+) kB", area).group(1))
print(advised)
assert peak_memory(torch.device("cpu"))["memory/process_mb"] < before + 20  # nothing was touched

def reserved():
    return int(re.search(r"VmSize:\\s+([0-9]+) kB", Path("/proc/self/status").read_text()).group(1))

first = reserved()
Runtime("cpu", "auto", True, True, False, 1, 10, 30, 5).configure(torch.device("cpu"))
assert reserved() < first + 50_000  # it was freed
"""


@pytest.mark.parametrize(("environment", "advised"), [({}, True), ({"MALLOC_TOP_PAD_": "131072"}, False)], ids=str)
def test_a_training_on_a_cpu_asks_for_huge_pages(environment, advised) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists() or platform.libc_ver()[0] != "glibc":
        pytest.skip("of Linux with glibc")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, env={**clean, **environment})
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 200_000) == advised


def test_peak_memory_is_this_processs_alone() -> None:
    hoard = bytearray(1_100_000_000)
    hoard[::4096] = bytes([1]) * len(hoard[::4096])  # memory is only there once it was touched
    subprocess.run([sys.executable, "-c", PEAK], check=True)


@pytest.mark.parametrize(("bf16", "trained"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_auto_is_bf16_in_training_where_it_is_native_and_fp32_in_evaluation(bf16, trained, monkeypatch) -> None:
    monkeypatch.setenv("TWOVIEWS_CPU_BF16", bf16)
    cpu = torch.device("cpu")
    auto = Runtime("cpu", "auto", True, True, False, 1, 10, 30, 5)
    assert (auto.dtype(cpu), auto.evaluation_dtype(cpu)) == (trained, torch.float32)
    asked = Runtime("cpu", "bf16", True, True, False, 1, 10, 30, 5)
    assert asked.dtype(cpu) == asked.evaluation_dtype(cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_cpus_train_in_bf16_where_it_is_faster(capabilities, native, monkeypatch) -> None:
    monkeypatch.delenv("TWOVIEWS_CPU_BF16", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_bf16(torch.device("cpu")) == native


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runtime = Runtime(device, "auto", True, True, False, 1, 10, 30, 5)  # type: ignore[arg-type]
    assert runtime.torch_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.torch_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for number in ("0", "2"):  # the first one, which alone prints, too
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(BadInput, match="3 processes on this machine .* torch finds 2; .*--nproc-per-node 2"):
            runtime.torch_device()
