"""tracking.json in a run folder: where the run is sent to, and how much of it MLflow has."""

import json
import shlex
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

from twoviews import foreign
from twoviews.config.groups import ROOT
from twoviews.files import write_atomic
from twoviews.locks import locked_for_upload
from twoviews.ranges import Total
from twoviews.signatures import mismatch
from twoviews.tracking import uris

STATE_FILE = "tracking.json"
PARENT_TAG = "mlflow.parentRunId"  # MLflow nests runs by this tag
NAME_TAG = "mlflow.runName"  # setting it renames a run
WORKFLOW = "workflowType=machine_learning"  # without it MLflow's pages are those for language models


@dataclass
class UploadState:
    """What MLflow has of one run; changed only under `locked_for_upload`."""

    uri: str | None = None  # the tracking URI; None is the default one
    experiment: str = "twoviews"
    run_key: str = ""  # a random tag, known before MLflow answers, which finds a run whose id was never written down
    run_id: str | None = None  # of MLflow
    experiment_id: str | None = None  # of MLflow
    sent_bytes: Total = 0  # of metrics.jsonl
    status: str = ""  # that was sent last
    files: dict[str, list[int]] = field(default_factory=dict)  # [mtime in ns, bytes] of each artifact that was sent
    tags: dict[str, str] = field(default_factory=dict)  # of a job: the parent's id, its name, the varying values
    encoder: bool = True  # send the weights of the encoder, too
    # Names by step of values that were sent and then cut off metrics.jsonl, because an earlier checkpoint is resumed. They are
    # computed again, not always to the last digit (images_per_s never is), and must not be sent twice.
    already: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "UploadState":
        """The state in `folder`, or that of a run of which nothing was sent.

        Raises:
            BadInput: tracking.json is damaged or has other keys.
        """
        path, kinds = folder / STATE_FILE, get_type_hints(cls, include_extras=True)
        content = foreign.load(path)
        for key, value in content.items():
            if wrong := mismatch(value, kinds[key]) if key in kinds else "is no key of it":
                raise foreign.damaged(path, f"{key} {wrong}")
        return cls(**content)

    def save(self, folder: Path) -> None:
        """Replace tracking.json."""
        content = asdict(self)
        if self.encoder:  # code that a sweep froze before there was this key refuses it
            del content["encoder"]
        write_atomic(folder / STATE_FILE, json.dumps(content, indent=1))

    @property
    def tracking_uri(self) -> str:
        """The complete tracking URI; BadInput, if MLflow cannot use it."""
        return uris.resolve(self.uri)

    def forget_run(self) -> None:
        """Start over with a tracking URI that does not have the run; `run_key` stays, to find it there if it does."""
        self.run_id = self.experiment_id = None
        self.sent_bytes, self.status = 0, ""
        self.files, self.already = {}, {}


def set_target(
    folder: Path,
    uri: str | None,
    experiment: str,
    tags: Mapping[str, str] | None = None,
    encoder: bool | None = None,
) -> None:
    """Record where `folder` is to be sent, as a user asked for; a target other than before gets the whole run.

    Args:
        folder: the run folder.
        uri: the tracking URI, which is trusted from now on; None is the default one.
        experiment: MLflow's experiment.
        tags: of the run; None leaves them as they are.
        encoder: whether the weights of the encoder are sent; None leaves it as it is.

    Raises:
        BadInput: MLflow cannot use the URI.
    """
    uris.trust(uri)
    with locked_for_upload(folder):
        state = UploadState.load(folder)
        before = replace(state) if (folder / STATE_FILE).exists() else None
        if (uris.resolve(uri), experiment) != (state.tracking_uri, state.experiment):
            state.forget_run()
        state.uri, state.experiment = None if uri is None else uris.resolve(uri), experiment
        state.encoder = state.encoder if encoder is None else encoder
        if tags is not None and state.tags != tags:
            # Without a status, the next upload opens the run, also one that MLflow has already, and sets its tags.
            state.tags, state.status = dict(tags), ""
        if state != before:
            state.save(folder)


def new_run_key() -> str:
    """A random value for the tag by which a run is found in MLflow."""
    return uuid.uuid4().hex


def run_id(folder: Path) -> str | None:
    """MLflow's id of the run; None while MLflow has not answered."""
    return UploadState.load(folder).run_id


def run_page(folder: Path) -> str:
    """How to see the run: see `page`; before MLflow has it, the command that sends it."""
    state = UploadState.load(folder)
    if not state.run_id:
        return f"python -m twoviews.tracking sync {shlex.quote(str(folder))}"
    return page(state.tracking_uri, state.experiment_id, state.run_id)


def page(uri: str, experiment_id: str | None, run_id: str) -> str:
    """The address of a run on a server; for a database in two lines the command that serves MLflow's pages, and the address."""
    path = f"/#/experiments/{experiment_id}/runs/{run_id}?{WORKFLOW}"
    if uri.startswith("http"):
        return uri + path
    if uri == uris.resolve(None) and (ROOT / ".venv" / "train").exists():  # or make would install an environment first
        command = "make mlflow" if Path.cwd() == ROOT else f"make -C {shlex.quote(str(ROOT))} mlflow"
    else:
        mlflow = shlex.quote(str(Path(sys.executable).absolute().with_name("mlflow")))
        command = f"MLFLOW_DISABLE_TELEMETRY=true {mlflow} ui --workers 1 --backend-store-uri {shlex.quote(uri)}"
    return f"{command}\n        http://127.0.0.1:5000{path}"
