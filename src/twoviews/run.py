"""A run is a folder that rebuilds itself: configuration, code state, environment, checkpoints, encoder and results.

The checkpoint is written beside, flushed to the disk and renamed, and the one before it is kept; whatever moment a
process dies at, one whole checkpoint is there.
"""

import io
import itertools
import json
import os
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twoviews import distributed, foreign
from twoviews.backbones import Encoder
from twoviews.code import code_state
from twoviews.config.building import build
from twoviews.config.digest import NOT_IN_DIGEST, flat
from twoviews.data import rendering
from twoviews.errors import BadInput, nearest, system_reason
from twoviews.files import sync, write_atomic
from twoviews.locks import locked_for_upload
from twoviews.ranges import Total
from twoviews.signatures import complaint
from twoviews.tracking.metrics import durable_bytes

CHECKPOINTS = ("last.pt", "previous.pt")

STATE = ("method", "optimizer", "scaler", "position", "metrics_bytes", "latest")  # what a checkpoint has


class Run:
    """A run folder and its files.

    Args:
        folder: made if it is not there.

    Raises:
        BadInput: something in it is no regular file.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign.refuse_links(self.folder)

    @classmethod
    def existing(cls, folder: Path | str) -> "Run":
        """A run that is there.

        Raises:
            BadInput: it is not.
        """
        path = Path(folder)
        if not (path / "config.yaml").exists():
            runs = sorted(
                (config.parent for config in path.parent.glob("*/config.yaml")), key=lambda run: run.stat().st_mtime
            )
            close = nearest(path.name, [run.name for run in runs])
            hint = f"; the latest beside it is {runs[-1]}" if runs and not close else ""
            if path.is_file() and (path.parent / "config.yaml").exists():
                raise BadInput(f"{path} is a file of a run; give its folder, run={path.parent}.")
            raise BadInput(
                f"{path} holds no run (no config.yaml); give the folder that a run's last line names, run=<folder>{hint}."
                f"{close}"
            )
        foreign.refuse_links(path)
        return cls(path)

    # ------------------------------------------------------------------------------------------ what the run consists of

    def begin(self, config: dict[str, Any], digest: str, data: dict[str, Any], device: torch.device) -> None:
        """Record configuration, code state, environment and data; or, where a run has begun, insist that it is this one.

        Raises:
            BadInput: the folder holds a run with another configuration or other images.
        """
        from omegaconf import OmegaConf

        recorded = self.read("environment.json")
        if recorded and recorded["digest"] != digest:
            changed = self._changed(config)
            raise BadInput(
                f"{self.folder} holds a run with other settings ({changed}); start over with fresh=true, which keeps the "
                "old results beside it, or choose another folder with hydra.run.dir=."
            )
        if recorded:
            if self.read("data.json", needed=True)["digest"] != data["digest"]:
                raise BadInput(
                    f"the images of {data['name']} are not those that {self.folder} was trained on; put them back, or start over "
                    "with fresh=true, which keeps the old results beside it."
                )
            return
        write_atomic(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        commit, difference = code_state()
        write_atomic(self.folder / "commit.txt", commit + "\n")
        if difference:
            write_atomic(self.folder / "diff.patch", difference)
        self.write("data.json", data)
        self.write("environment.json", {**environment(device), "digest": digest})

    def _changed(self, config: dict[str, Any]) -> str:
        before, now = flat(self.config()), flat(config)
        keys = [
            key
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
            and not key.startswith(NOT_IN_DIGEST)
            and (key, before.get(key)) != ("runtime.compile", False)  # a former option
        ]
        shown = [f"{key} is {before.get(key, 'absent')} there and {now.get(key, 'absent')} here" for key in keys[:3]]
        return "; ".join(shown) + ("; …" if len(keys) > 3 else "")

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            BadInput: config.yaml is damaged, or more than plain values.
        """
        path = self.folder / "config.yaml"
        config = foreign.load(path, needed=True)
        if missing := [key for key in ("backbone", "data", "method", "tracking") if key not in config]:
            raise foreign.damaged(path, f"{missing[0]} is missing")
        return config

    def read(self, name: str, needed: bool = False) -> dict[str, Any]:
        """A JSON file of the run; empty when it is not there.

        Raises:
            BadInput: it is damaged, or more than plain values; or it is needed and missing.
        """
        return foreign.load(self.folder / name, needed)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_atomic(self.folder / name, json.dumps(content, indent=2) + "\n")

    def set_aside(self) -> Path | None:
        """Rename the folder to <name>.1 (.2, …) and begin an empty one; None when there was nothing.

        Who holds its lock holds that of the renamed folder afterwards.
        """
        if not any((self.folder / name).exists() for name in ("config.yaml", "metrics.jsonl", *CHECKPOINTS)):
            return None
        number = 1
        while (other := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        with locked_for_upload(self.folder):  # what is being sent to MLflow would go on with the new folder
            self.folder.rename(other)
        self.folder.mkdir(exist_ok=True)
        return other

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self, state: dict[str, Any]) -> None:
        """Make `state` the last checkpoint and keep the one before it as previous.pt."""
        new = self.folder / "new.pt"
        # By way of memory: torch reports a full disk as a defect of its own when it writes the file itself.
        content = io.BytesIO()
        torch.save(state, content)
        try:
            with new.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            new.unlink(missing_ok=True)
            raise
        self._keep(new)

    def _keep(self, new: Path) -> None:
        last = self.folder / "last.pt"
        if last.exists():
            last.replace(self.folder / "previous.pt")
        new.replace(last)
        sync(self.folder)

    def _finish_save(self) -> None:
        """What a kill left of a save: a whole new.pt becomes the last checkpoint, a part of one goes."""
        new, last = self.folder / "new.pt", self.folder / "last.pt"
        if not new.exists():
            return
        try:
            load_checkpoint(new)
        except ValueError:
            if last.exists() or not last.with_name("previous.pt").exists():
                new.unlink()
            else:  # killed between the renames of a save, it was whole and is damaged
                new.replace(last)
        except OSError:  # it may be whole, and readable at another time
            return
        else:
            self._keep(new)

    def load(self, say) -> dict[str, Any] | None:
        """The last whole checkpoint, on the CPU, or None; says so when it had to fall back to the one before.

        Raises:
            BadInput: there are checkpoints and none is whole, or there were some.
        """
        if distributed.rank() == 0:
            self._finish_save()
        damaged = {}
        for path in (self.folder / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
                if missing := [key for key in STATE if key not in state]:
                    raise ValueError(f"{missing[0]} is missing")
                if wrong := complaint(state["metrics_bytes"], Total):
                    raise ValueError(f"metrics_bytes {wrong}")
            except (OSError, ValueError) as error:
                damaged[path] = str(error).splitlines()[0]
                continue
            for bad, reason in damaged.items():
                if distributed.rank() == 0:
                    # Out of the way, or the next save would keep it in place of the good one.
                    bad.replace(kept := self._unused("damaged"))
                    say(f"warning: {bad} is damaged ({reason}) and kept as {kept.name}; the one before it is used.")
            return state
        if damaged:
            found = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
            raise BadInput(
                f"no checkpoint in {self.folder} is whole ({found}); put one back, or start over with fresh=true, which keeps "
                "the old results beside it."
            )
        if durable_bytes(self.folder) or (self.folder / "damaged.pt").exists():
            raise BadInput(
                f"the checkpoints of {self.folder} are gone ({' and '.join(CHECKPOINTS)}); put one back, or start over with "
                "fresh=true, which keeps the old results beside it."
            )
        return None

    def _unused(self, stem: str) -> Path:
        """The first of <stem>.pt, <stem>.2.pt, … that is not there."""
        names = itertools.chain([f"{stem}.pt"], (f"{stem}.{number}.pt" for number in itertools.count(2)))
        return next(path for name in names if not (path := self.folder / name).exists())

    # ---------------------------------------------------------------------------------------------------------- encoder

    def save_encoder(self, encoder: Encoder, description: dict[str, Any]) -> None:
        """Weights as encoder.safetensors, and beside them what is needed to build and use the network."""
        write_atomic(self.folder / "encoder.safetensors", weight_file(encoder.state_dict()))
        self.write("encoder.json", {**description, "features": encoder.out_dim})

    def encoder(self) -> Encoder:
        """The trained encoder, rebuilt from encoder.json and encoder.safetensors.

        Raises:
            BadInput: the run has not written an encoder yet.
        """
        if not (self.folder / "encoder.json").exists() or not (self.folder / "encoder.safetensors").exists():
            raise BadInput(
                f"{self.folder} holds no encoder (encoder.json and encoder.safetensors); let the run finish (the same command "
                "goes on), or interrupt it (Ctrl-C), which writes one."
            )
        return load_encoder(self.folder / "encoder.safetensors")[0]


def weight_file(weights: Mapping[str, Tensor]) -> bytes:
    """The content of a .safetensors file; safetensors' own `save_file` makes files that only their owner may read."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in weights.items()})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        SafetensorError, OSError: it is damaged, or cannot be read.
    """
    from safetensors.torch import load, load_file

    try:
        str(path).encode()
    except UnicodeEncodeError:  # names that are no UTF-8, which safetensors does not open
        return load(path.read_bytes())
    return load_file(path)


def load_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a file of weights with encoder.json beside it, and what that says.

    Raises:
        BadInput: the two do not make an encoder.
    """
    from safetensors import SafetensorError

    beside = path.with_name("encoder.json")
    foreign.regular(path)
    description = foreign.load(beside, needed=True)
    try:
        sizes = {"channels": description["channels"], "image_size": description["image_size"]}
        encoder = build(description["backbone"], **sizes)
        if not isinstance(encoder, Encoder):
            raise TypeError("the backbone is no encoder")
        encoder.load_state_dict(weights := read_weights(path))
        if not len(description["mean"]) == len(description["std"]) == description["channels"]:
            raise TypeError("mean and std are not those of the channels")
        check_finite(weights)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({system_reason(error)}); make it readable.") from error
    except (BadInput, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(
            f"{path} and {beside.name} beside it do not make an encoder: {reason[:200]}; put the files back that the run "
            "wrote, or delete both and result.json, and the same train.py command writes them again from its last checkpoint."
        ) from error
    return encoder, description


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that make no features.

    Raises:
        ValueError: a number is NaN or infinite, or a variance is negative.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
        if name.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{name} holds negative variances")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content after its checksums were compared.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    if path.is_dir() or not zipfile.is_zipfile(path):
        raise ValueError("not a complete file")
    try:
        refuse_compressed(path)
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds; nothing in the file can have done more than fail to be read
        raise ValueError(foreign.short(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("method"), dict):
        raise ValueError("not a checkpoint of a run")
    return state


def refuse_compressed(path: Path) -> None:
    """Refuse an archive that torch did not write: it compresses nothing, and a few compressed bytes can fill the memory.

    Raises:
        ValueError: something in it is compressed, or is said to lie in several places.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(one.file_size for one in members)
    if any(one.compress_type != zipfile.ZIP_STORED for one in members) or size > path.stat().st_size:
        raise ValueError("it is no archive that torch.save wrote")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as far as they can change the result of a training on that device."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ("torch", "torchvision", "timm", "hydra-core", "mlflow", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),  # of each process
        "processes": distributed.processes(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "views": "compiled" if rendering.compiled(device) else "tensors",
    }


def _version(package: str) -> str | None:
    """None where it is not installed, as MLflow need not be."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
