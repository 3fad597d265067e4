"""A run is a folder that rebuilds itself: `Run` reads and writes its files. What trains into it is in recording.py."""

import json
from pathlib import Path
from typing import Any

from twoviews import foreign
from twoviews.backbones import Encoder
from twoviews.checkpoints import has_checkpoint
from twoviews.encoder_file import DESCRIPTION_FILE, WEIGHTS_FILE, load_encoder
from twoviews.errors import BadInput, nearest
from twoviews.figures import training_title
from twoviews.files import write_atomic
from twoviews.locks import locked_for_upload

REQUIRED_GROUPS = ("backbone", "data", "method", "tracking")  # in every config.yaml


class Run:
    """A run folder and its files.

    Args:
        folder: made if it does not exist.

    Raises:
        BadInput: something in it is not a regular file.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign.refuse_links(self.folder)

    @classmethod
    def existing(cls, folder: Path | str) -> "Run":
        """A run that exists.

        Raises:
            BadInput: there is no run in the folder; names the closest one beside it.
        """
        path = Path(folder)
        if (path / "config.yaml").exists():
            return cls(path)
        if path.is_file() and (path.parent / "config.yaml").exists():
            raise BadInput(f"{path} is a file of a run; give its folder, run={path.parent}.")
        if (path / "views.png").exists():
            raise BadInput(
                f"{path} holds views.png alone, which preview=true wrote, and no run; train it by the same command without "
                "preview=true."
            )
        runs = [config.parent for config in path.parent.glob("*/config.yaml")]
        close = nearest(path.name, [run.name for run in runs])
        latest = max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime, default=None)  # as run=latest
        hint = f"; the latest beside it is {latest}" if latest and not close else ""
        raise BadInput(
            f"{path} holds no run (no config.yaml); give the folder that a run's last line names, run=<folder>{hint}.{close}"
        )

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            BadInput: config.yaml is missing, damaged, or more than plain values.
        """
        path = self.folder / "config.yaml"
        config = foreign.load(path, needed=True)
        if missing := [key for key in REQUIRED_GROUPS if key not in config]:
            raise foreign.damaged(path, f"{missing[0]} is missing")
        return config

    def read(self, name: str, needed: bool = False) -> dict[str, Any]:
        """The content of a JSON file of the run; empty where it does not exist.

        Raises:
            BadInput: the file is damaged, or more than plain values; or it is needed and missing.
        """
        return foreign.load(self.folder / name, needed)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the run."""
        write_atomic(self.folder / name, json.dumps(content, indent=2) + "\n")

    def title(self) -> str:
        """See `training_title`.

        Raises:
            BadInput: a file of the run is damaged.
        """
        config, data = self.config(), self.read("data.json")
        return training_title(config, data.get("name", "its images"), self.read("result.json").get("epoch"))

    def encoder(self) -> Encoder:
        """The trained encoder.

        Raises:
            BadInput: the run has not written an encoder yet, or its files are damaged.
        """
        if not all((self.folder / name).exists() for name in (DESCRIPTION_FILE, WEIGHTS_FILE)):
            raise BadInput(
                f"{self.folder} holds no encoder ({DESCRIPTION_FILE} and {WEIGHTS_FILE}); let the run finish (the same command "
                "goes on), or interrupt it (Ctrl-C), which writes one."
            )
        return load_encoder(self.folder / WEIGHTS_FILE)[0]

    def set_aside(self) -> Path | None:
        """Rename the folder to <name>.1 (.2, …) and make an empty one; returns the new name, None if there was nothing.

        A lock that is held on the folder is then one on the renamed folder.
        """
        if not has_checkpoint(self.folder) and not any(
            (self.folder / name).exists() for name in ("config.yaml", "metrics.jsonl")
        ):
            return None
        number = 1
        while (renamed := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        with locked_for_upload(self.folder):  # or an upload in progress would go on with the new folder
            self.folder.rename(renamed)
        self.folder.mkdir(exist_ok=True)
        return renamed
