"""The mirror of a run in MLflow: the thread beside the training, and what the entry point asks of it."""

import contextlib
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twoviews.errors import BadInput, without_secrets
from twoviews.tracking import stores
from twoviews.tracking.sending import PARENT, aim, send, unsent
from twoviews.tracking.state import State, replace

LOG, NO_ANSWER = "mlflow.log", "it does not answer"


@dataclass(frozen=True)
class Tracking:
    """The group `tracking` of the configuration.

    Args:
        uri: MLflow's store, `sqlite:///<path>` or a server's address; None is mlflow.db at the root of the checkout.
        experiment: MLflow's experiment.
        mirror: send while the run goes on; otherwise by `python -m twoviews.tracking sync`.
    """

    uri: str | None
    experiment: str
    mirror: bool

    def check(self, expected: bool, say: Callable[[str], None] = print) -> None:
        """Refuse at the start what would fail later.

        Args:
            expected: MLflow was there when this was begun, a run that is resumed or a sweep: it does without until it answers.
            say: where a sentence for the user goes.

        Raises:
            BadInput: the address is wrong, or (in a run that is mirrored) MLflow is not installed, or (in one that is not
                expected, too) the store does not answer.
        """
        if not self.experiment:
            raise BadInput("tracking.experiment is empty; name MLflow's experiment, for example twoviews.")
        stores.resolved(self.uri)
        if not self.mirror:
            return
        stores.installed()
        try:
            stores.check(self.uri)
        except BadInput as error:
            if not expected:
                raise
            say(f"The run goes on without MLflow until it answers: {error}")

    def start(self, folder: Path, say: Callable[[str], None] = print) -> "Mirror | None":
        """The mirror of `folder`, running; None where the configuration wants none. One process of a run calls it."""
        aim(folder, self.uri, self.experiment)
        return Mirror(folder, say) if self.mirror else None


class Mirror:
    """A daemon thread that sends `folder` to MLflow every few seconds, whenever something in it is new.

    Args:
        folder: the run folder.
        say: where a sentence for the user goes; called from the thread.
        every_s: seconds between two looks; doubled while the store does not answer, up to twelve times as long.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, every_s: float = 5.0):
        self._folder, self._say, self._every_s = folder, say, every_s
        self._closing = threading.Event()
        self._complete = False  # everything is in MLflow, the end included
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float | int = 60) -> int:
        """Send the rest and the final status from result.json; returns the number of points that are left.

        Waits `timeout_s` seconds at most, and for a store that is silent some of them only, and says how to send later what
        is left.
        """
        self._closing.set()
        try:
            wait_for(self._thread, self._folder, timeout_s)
        finally:  # a second Ctrl-C included
            left = unsent(self._folder)
            if not self._complete:
                self._say(
                    f"MLflow does not have the end of this run yet ({left} points left); send it with "
                    f"`python -m twoviews.tracking sync {shlex.quote(str(self._folder))}`."
                )
        return left

    def _follow(self) -> None:
        # Not at once: to import MLflow takes as long as torch, and the training would wait for it with its first step.
        pause_s, away = self._every_s, False
        while True:
            closing = self._closing.wait(pause_s)
            try:
                send(self._folder, closed=closing)
            except Exception as error:  # whatever is wrong with MLflow, the training goes on
                if not away:
                    self._say(
                        f"MLflow takes nothing now ({kept(self._folder, error)}); the points are kept and sent when it does."
                    )
                away, pause_s = True, min(12 * self._every_s, max(self._every_s, 2 * pause_s))
            else:
                if away:
                    self._say("MLflow takes points again; everything kept so far is sent.")
                away, pause_s, self._complete = False, self._every_s, closing
            if closing:
                return


def wait_for(thread: threading.Thread, folder: Path, timeout_s: float) -> bool:
    """Wait for a thread that sends `folder`; whether it ended.

    It is waited for no longer than `timeout_s` seconds, and than `stores.ANSWER_S` while nothing is heard of the store, unless
    that is a file.
    """
    file, written = stores.resolved(State.load(folder).uri).startswith("sqlite:"), 0
    end = heard = time.monotonic()
    while thread.is_alive() and time.monotonic() < end + timeout_s:
        now = State.written(folder)  # after each answer
        if file or now != written or not stores.loaded.is_set():
            written, heard = now, time.monotonic()
        if time.monotonic() > heard + stores.ANSWER_S:
            break
        thread.join(0.1)
    return not thread.is_alive()


def run_id(folder: Path) -> str | None:
    """MLflow's id of the run, or None while MLflow has not answered."""
    return State.load(folder).run_id


def is_child(folder: Path) -> bool:
    """Whether the run is a point of a sweep whose parent run MLflow has taken already."""
    return PARENT in State.load(folder).tags


def page(folder: Path) -> str:
    """What to do to see the run: the command that serves MLflow's pages, and the run's address on them."""
    state = State.load(folder)
    if not state.run_id:
        return f"python -m twoviews.tracking sync {shlex.quote(str(folder))}"
    uri = stores.resolved(state.uri)
    place = f"/#/experiments/{state.experiment_id}/runs/{state.run_id}"
    if uri.startswith("http"):
        return uri + place
    command = os.path.relpath(Path(sys.executable).with_name("mlflow"))
    return (
        f"MLFLOW_DISABLE_TELEMETRY=true {shlex.quote(command)} ui --workers 1 --backend-store-uri {shlex.quote(uri)}"
        f"  then open http://127.0.0.1:5000{place}"
    )


def kept(folder: Path, error: Exception) -> str:
    """`reason`, and where in the run folder all of it is: MLflow's errors are often pages long."""
    if isinstance(error, BadInput) or (short := reason(error)) == NO_ANSWER:
        return reason(error)
    with contextlib.suppress(OSError):  # the store may be at fault because the disk is full
        replace(folder / LOG, without_secrets("".join(traceback.format_exception(error))))
        return f"{short}; all of it is in {folder / LOG}"
    return short


def reason(error: Exception) -> str:
    """One short line for what a store answered."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError) or "Max retries exceeded" in text or "timed out" in text:
        return NO_ANSWER
    text = without_secrets(text)
    return text if len(text) <= 300 else text[:300] + "…"
