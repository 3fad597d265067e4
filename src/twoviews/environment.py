"""The software and the machine of a training, as far as they can change its result."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from twoviews import distributed
from twoviews.data import rendering
from twoviews.errors import without_secrets

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "mlflow", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """The content of environment.json for a training on that device."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),  # per process
        "processes": distributed.processes(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "command": _command(),
        "views": "compiled" if rendering.compiled(device) else "tensors",
    }


def _command() -> str:
    """The command of this training, without what may be credentials."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["torchrun", "--nproc-per-node", count] if count != "1" else ["python"]
    return shlex.join([*launcher, *map(without_secrets, sys.argv)])


def _version(package: str) -> str | None:
    """None where the package is not installed, as MLflow need not be."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
