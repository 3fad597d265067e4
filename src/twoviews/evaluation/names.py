"""Runs by name: `run=` may be a folder or its name, several, a folder of runs, "latest", or MLflow's id."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from twoviews.errors import BadInput
from twoviews.run import Run
from twoviews.tracking.client import prepare_environment
from twoviews.tracking.state import UploadState
from twoviews.tracking.uris import is_trusted, resolve

RUN_FOLDERS = ("outputs", "multirun")
NAME = re.compile(r"[^/~:]+")  # of a folder, as tables and MLflow show it
RUN_ID = re.compile(r"[0-9a-f]{32}")  # MLflow's


def named(run: str | Sequence[str]) -> list[str]:
    """Each of several, and for a folder that is no run but holds some, such as that of a sweep, these."""
    found = []
    for one in [run] if isinstance(run, str) else run:
        folder = Path(one).expanduser()
        folder = folder if folder.exists() or not NAME.fullmatch(one) else Path("multirun", one)
        within = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*/config.yaml"))
        found += [str(config.parent) for config in within] or [one]
    return found


def by_name(run: str) -> Path | None:
    """The folder of the run that was begun last, for "latest", or of the one with this name or id in MLflow; else None.

    Raises:
        BadInput: there is no such run on this machine, or there are several of this name.
    """
    if run == "latest":
        if runs := _runs():
            return runs[0]
        raise BadInput(f"run=latest: there is no run below {Path.cwd()}/outputs or multirun; give a run's folder.")
    if Path(run).exists() or not NAME.fullmatch(run):
        return None
    called = [folder for folder in _runs() if folder.name == run]
    if len(called) > 1:
        raise BadInput(f"run={run}: several runs have this name; give a folder: {', '.join(map(str, called))}.")
    if called:
        return called[0]
    return _of_mlflow(run) if RUN_ID.fullmatch(run) else None


def _runs() -> list[Path]:
    """All run folders below outputs/ and multirun/, the newest first."""
    found = [
        config for name in RUN_FOLDERS for config in Path(name).rglob("config.yaml") if config.parent.name[0] != "."
    ]
    return [config.parent for config in sorted(found, key=lambda config: config.stat().st_mtime, reverse=True)]


def _of_mlflow(run_id: str) -> Path:
    """The folder of the run that has this id in MLflow: what run folders here say of themselves, else what MLflow says."""
    uris = {resolve(None)}
    for folder in _runs():
        with contextlib.suppress(BadInput, ValueError):  # a folder that cannot be read must not hide the others
            state = UploadState.load(folder)
            if run_id in (state.run_id, Run(folder).read("result.json").get("mlflow_run_id")):
                return folder
            uris.add(state.tracking_uri)
    recorded = next((folder for uri in sorted(uris) if (folder := _told(uri, run_id))), None)
    if recorded is None:
        raise BadInput(
            f"run={run_id}: no run below {Path.cwd()}/outputs or multirun has this id, and MLflow knows none; give its folder."
        )
    if not (recorded / "config.yaml").exists():
        raise BadInput(
            f"run={run_id} was trained into {recorded}, which is not on this machine; give the folder it is in now."
        )
    return recorded


def _told(uri: str, run_id: str) -> Path | None:
    """The folder that a store of MLflow has for a run; None when it has none or does not answer."""
    if not is_trusted(uri) or uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None  # a folder from elsewhere names it; or opening it would make it
    prepare_environment()
    try:
        from mlflow import MlflowClient

        folder = MlflowClient(uri).get_run(run_id).data.tags.get("folder")
    except Exception:  # of many kinds: whatever is wrong with a store, another may know the run
        return None
    return Path(folder) if folder else None
