"""What a run computes with: device, precision, memory format, choice of kernels."""

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from twoviews.errors import BadInput
from twoviews.ranges import Count, NotNegative

# Parameters of mallopt(3) by their numbers in glibc, with values in bytes: what is freed at the end of the heap stays with the
# process up to the first, and what is smaller than the second (the largest that glibc accepts) comes from the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = (-1, 2**30), (-3, 2**25)
_MADV_HUGEPAGE = 14  # of madvise(2) in Linux
_HUGE_BLOCKS = 7  # of the heap, just below _M_MMAP_THRESHOLD each: about the activations of a small network


@dataclass(frozen=True)
class Runtime:
    """How to compute, not what.

    Args:
        device: "auto" is the GPU of this process where there is one, else the CPU.
        precision: number format of forward passes. "auto" trains in bf16 on GPUs and CPUs with fast bf16 arithmetic, else
            in fp32, and always evaluates in fp32 (evaluate.py, cluster.py); fp16 needs a GPU.
        channels_last: keep images as [B, H, W, C] in memory, which convolutions like.
        cuda_graph: on a single GPU, capture the training step as a CUDA graph and replay it.
        deterministic: on a GPU, the same bits again on the same machine: without kernels chosen by trial and those that add
            in any order, which takes longer.
        accumulate: micro-batches an optimizer step; batch_size counts all of them. Queues, moving averages and
            the like advance once a step; negatives within a batch, and batch norm, see one micro-batch.
        log_every: optimizer steps between two lines of metrics.jsonl. A line has the values of that step alone, and the last
            step of an epoch has one, too.
        checkpoint_seconds: shortest time between two checkpoints at epoch ends; the last step and signals always write one.
        checkpoint_minutes: longest time between two checkpoints within an epoch; 0 writes them at epoch ends only.
    """

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: bool
    cuda_graph: bool
    deterministic: bool
    accumulate: Count
    log_every: Count
    checkpoint_seconds: NotNegative
    checkpoint_minutes: NotNegative

    def torch_device(self) -> torch.device:
        """The device of this process.

        Raises:
            BadInput: a GPU was asked for and there is none, or there are more processes than GPUs on this machine.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("device=cuda, but torch finds no GPU; use device=cpu or check the driver with nvidia-smi.")
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1))
        if processes > count:  # found by all of them, because only the first one prints
            raise BadInput(
                f"{processes} processes on this machine would need a GPU each, and torch finds {count}; start at most {count} "
                f"(torchrun --nproc-per-node {count}), or use device=cpu."
            )
        return torch.device("cuda", number)

    def dtype(self, device: torch.device) -> torch.dtype:
        """The number format of forward passes in training, and of what a training measures about itself.

        Raises:
            BadInput: fp16 on a CPU.
        """
        if self.precision == "fp16" and device.type == "cpu":
            raise BadInput("precision=fp16 needs a GPU; use bf16 or fp32 on a CPU.")
        if self.precision == "auto":
            return torch.bfloat16 if native_bf16(device) else torch.float32
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def evaluation_dtype(self, device: torch.device) -> torch.dtype:
        """The number format of evaluate.py and cluster.py: "auto" is fp32, so results do not depend on the processor.

        Raises:
            BadInput: fp16 on a CPU.
        """
        return torch.float32 if self.precision == "auto" else self.dtype(device)

    def configure(self, device: torch.device) -> None:
        """How libraries choose kernels and keep memory in a training, whose sizes stay the same."""
        if device.type == "cpu":
            _keep_freed_memory()
        if device.type == "cuda":
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(self.deterministic)
            torch.backends.cudnn.benchmark = not self.deterministic
            # Products of matrices stay in full fp32, as losses need them: at a temperature of 0.1, TF32's rounding of
            # cosines would be one of 0.005 in the logits.
            torch.backends.cudnn.allow_tf32 = not self.deterministic

    def configure_evaluation(self, device: torch.device) -> None:
        """The same for an evaluation, whose batches are of several sizes, and in which fp32 is fp32: without TF32."""
        self.configure(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of a step for the next one, in place of thousands of page faults: 4 % of a step.

    What the environment says of glibc's memory (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES and the like) is left as it is.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if not chosen and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, value)
        _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let Linux back the part of the heap that is used next by pages of 2 MB, which cost fewer misses of the TLB: 2 % of a step.

    As glibc.malloc.hugetlb=1 does, which only the environment of a new process can set.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p]
    page, size = resource.getpagesize(), _M_MMAP_THRESHOLD[1] - 2**16
    blocks = [block for _ in range(_HUGE_BLOCKS) if (block := libc.malloc(size))]
    for block in blocks:
        start = -(-block // page) * page
        # It is advice: where the kernel refuses it, nothing is lost.
        libc.madvise(start, (block + size - start) // page * page, _MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


def native_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic that is faster than fp32.

    Of CPUs, those with AMX, and AMD's with avx512_bf16. Intel's issue one of avx512_bf16's instructions a cycle and two of fp32,
    so that without AMX, as in many virtual machines, a step in bf16 takes 1.1 to 1.4 times as long. TWOVIEWS_CPU_BF16=0 or 1
    answers for the CPU, for tests of the other kind.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    pretended = os.environ.get("TWOVIEWS_CPU_BF16")
    if pretended:
        return pretended == "1"
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")))


def format_name(dtype: torch.dtype) -> str:
    """Such as float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context of a forward pass in that number format."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process had since its start, in MB: of the machine, and what torch took of its GPU."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    taken = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    if taken is None:  # what also counts the program that started this one, where that is larger
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    peaks = {"memory/process_mb": taken * 1024 / 1e6}
    if device.type == "cuda":
        peaks["memory/gpu_mb"] = torch.cuda.max_memory_reserved(device) / 1e6
    return peaks
