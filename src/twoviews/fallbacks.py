"""What runs more slowly on this machine than it could, or is not recorded: a sentence each, none where all is as it should be."""

import os
from pathlib import Path

import torch

from twoviews.code import no_commit
from twoviews.data.views import reason_for_tensors
from twoviews.fused_norm import reason_for_plain
from twoviews.inference import convolutions_fuse

DRIVER = Path("/dev/nvidiactl")  # there as soon as a driver of NVIDIA's runs, also in containers that were given a GPU


def slower(asked: str, device: torch.device, norms: bool = False) -> list[str]:
    """Sentences about a GPU and about compiled code that are not used, one for each reason.

    Args:
        asked: runtime.device.
        device: what it came to.
        norms: whether batch norms of a training should be fused there.
    """
    reasons = {"views (about five times as long)": reason_for_tensors(device)}
    if norms:
        reasons["batch norms"] = reason_for_plain(device)
    if device.type == "cpu" and not convolutions_fuse():
        reasons["convolutions of features"] = "this build of torch has no oneDNN"
    parts: dict[str, list[str]] = {}
    for part, reason in reasons.items():
        if reason:
            parts.setdefault(reason, []).append(part)
    plain = [f"slower    in plain torch: {', '.join(names)}; {reason}." for reason, names in parts.items()]
    return [*([] if asked == "cpu" else _unused_gpu()), *plain]


def _unused_gpu() -> list[str]:
    """A sentence where this machine has a GPU that torch does not find, and that nobody has hidden from it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or torch.cuda.is_available() or not DRIVER.exists():
        return []
    cause = (
        "this build of torch is for CPUs" if torch.version.cuda is None else "nvidia-smi tells more about the driver"
    )
    return [f"slower    on a CPU: this machine has a GPU, and torch does not find it ({cause})."]


def unrecorded() -> list[str]:
    """A sentence where a run cannot record the commit of its code."""
    reason = no_commit()
    return [f"code      no commit is recorded: {reason}."] if reason else []
