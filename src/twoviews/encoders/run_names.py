"""Find run folders: by name, by "latest", by MLflow's run id, or all in a folder."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from twoviews.errors import BadInput
from twoviews.run import Run
from twoviews.tracking.client import prepare_environment
from twoviews.tracking.state import UploadState
from twoviews.tracking.uris import is_trusted, resolve

ROOTS = ("outputs", "multirun")  # of all run folders
LATEST = "latest"  # the name of the run that was started last
FOLDER_NAME = re.compile(r"[^/~:]+")
RUN_ID = re.compile(r"[0-9a-f]{32}")  # of MLflow


def expand_runs(run: str | Sequence[str]) -> list[str]:
    """The names in `run`, see `open_encoder`; a folder of runs, such as that of a sweep, becomes the folders of its runs."""
    expanded = []
    for name in [run] if isinstance(run, str) else run:
        folder = Path(name).expanduser()
        folder = folder if folder.exists() or not FOLDER_NAME.fullmatch(name) else Path("multirun", name)
        inner = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*/config.yaml"))
        expanded += [str(config.parent) for config in inner] or [name]
    return expanded


def find_run(run: str) -> Path | None:
    """The run folder with a name or an MLflow run id, or for "latest" the one that was started last.

    None if `run` is a path, or if no run has this name and it is no run id.

    Raises:
        BadInput: there is no latest run, no run with this id, or there are several with this name.
    """
    if run == LATEST:
        if runs := _run_folders():
            return runs[0]
        raise BadInput(f"run=latest: there is no run below {Path.cwd()}/outputs or multirun; give a run's folder.")
    if Path(run).exists() or not FOLDER_NAME.fullmatch(run):
        return None
    same_name = [folder for folder in _run_folders() if folder.name == run]
    if len(same_name) > 1:
        raise BadInput(f"run={run}: several runs have this name; give a folder: {', '.join(map(str, same_name))}.")
    if same_name:
        return same_name[0]
    return _find_run_id(run) if RUN_ID.fullmatch(run) else None


def known_names() -> list[str]:
    """What `find_run` knows: "latest", and the names of all run folders."""
    return [LATEST, *(folder.name for folder in _run_folders())]


def _run_folders() -> list[Path]:
    """All run folders below `ROOTS`, the newest first."""
    configs = [config for root in ROOTS for config in Path(root).rglob("config.yaml") if config.parent.name[0] != "."]
    return [config.parent for config in sorted(configs, key=lambda config: config.stat().st_mtime, reverse=True)]


def _find_run_id(run_id: str) -> Path:
    """The folder of a run by its id in MLflow, which is looked up in the run folders first and then in MLflow."""
    uris = {resolve(None)}
    for folder in _run_folders():
        with contextlib.suppress(BadInput, ValueError):  # a folder that cannot be read must not hide the others
            state = UploadState.load(folder)
            if run_id in (state.run_id, Run(folder).read("result.json").get("mlflow_run_id")):
                return folder
            uris.add(state.tracking_uri)
    recorded = next((folder for uri in sorted(uris) if (folder := _mlflow_folder(uri, run_id))), None)
    if recorded is None:
        raise BadInput(
            f"run={run_id}: no run below {Path.cwd()}/outputs or multirun has this id, and MLflow knows none; give its folder."
        )
    if not (recorded / "config.yaml").exists():
        raise BadInput(
            f"run={run_id} was trained into {recorded}, which is not on this machine; give the folder it is in now."
        )
    return recorded


def _mlflow_folder(uri: str, run_id: str) -> Path | None:
    """The folder that a tracking server or database has recorded for a run; None if it has none or does not answer."""
    if not is_trusted(uri) or uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None  # a folder from elsewhere names it; or opening it would make it
    prepare_environment()
    try:
        from mlflow import MlflowClient

        folder = MlflowClient(uri).get_run(run_id).data.tags.get("folder")
    except Exception:  # of many kinds: whatever is wrong with a store, another may know the run
        return None
    return Path(folder) if folder else None
