"""What a run computes with, beside what the tests of whole runs see of it."""

import subprocess
import sys

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


def test_peak_memory_is_this_processs_alone() -> None:
    hoard = bytearray(1_500_000_000)
    hoard[::4096] = bytes([1]) * len(hoard[::4096])  # memory is only there once it was touched
    subprocess.run([sys.executable, "-c", PEAK], check=True)
