"""Sentences about what runs more slowly on this machine than it could, and about what a run cannot record."""

import os
from pathlib import Path

import torch

from twoviews.code import SUFFIXES, left_out, no_commit
from twoviews.data.rendering import reason_for_tensors
from twoviews.errors import counted
from twoviews.fused_norm import reason_for_plain
from twoviews.inference import convolutions_fuse

MAX_SHOWN_FILES = 5
DRIVER = Path("/dev/nvidiactl")  # exists if NVIDIA's driver is running, also in containers with access to a GPU


def slower(asked: str, device: torch.device, norms: bool = False) -> list[str]:
    """A sentence for each reason why a GPU or compiled code is not used.

    Args:
        asked: runtime.device.
        device: the device that this means here.
        norms: whether a training could use fused batch norms.
    """
    reasons = {"views (about five times as long)": reason_for_tensors(device)}
    if norms:
        reasons["batch norms"] = reason_for_plain(device)
    if device.type == "cpu" and not convolutions_fuse(torch.float32):
        reasons["convolutions of features"] = "this build of torch has no oneDNN"
    parts: dict[str, list[str]] = {}
    for part, reason in reasons.items():
        if reason:
            parts.setdefault(reason, []).append(part)
    plain = [f"slower    in plain torch: {', '.join(names)}; {reason}." for reason, names in parts.items()]
    return [*([] if asked == "cpu" else _unused_gpu()), *plain]


def _unused_gpu() -> list[str]:
    """A sentence if this machine has a GPU that torch does not find although no environment variable hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or torch.cuda.is_available() or not DRIVER.exists():
        return []
    cause = (
        "this build of torch is for CPUs" if torch.version.cuda is None else "nvidia-smi tells more about the driver"
    )
    return [f"slower    on a CPU: this machine has a GPU, and torch does not find it ({cause})."]


def unrecorded() -> list[str]:
    """A sentence if a run cannot record the commit of its code, or if files are part of neither the commit nor diff.patch."""
    if reason := no_commit():
        return [f"code      no commit is recorded: {reason}."]
    files = [path for path in left_out() if path.endswith(SUFFIXES)]
    if not files:
        return []
    shown = ", ".join(files[:MAX_SHOWN_FILES]) + (" …" if len(files) > MAX_SHOWN_FILES else "")
    return [
        f"code      not recorded by commit.txt and diff.patch: {counted(len(files), 'file')} that git does not track: {shown}; "
        "`git add` them."
    ]
