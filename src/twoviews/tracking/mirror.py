"""The mirror of a run in MLflow: a thread beside the training that sends the run folder."""

import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twoviews.errors import BadInput
from twoviews.tracking import client, uris
from twoviews.tracking.state import UploadState, saved_at, set_target
from twoviews.tracking.upload import pending_values, upload

FLUSH_TIMEOUT_S = 120.0
MAX_BACKOFF = 12  # times the interval, between two tries while MLflow does not answer


@dataclass(frozen=True)
class Tracking:
    """The group `tracking` of the configuration.

    Args:
        uri: MLflow's tracking URI, `sqlite:///<path>` or a server's address; None is mlflow.db at the root of the checkout.
        experiment: MLflow's experiment.
        mirror: send while the run goes on; otherwise by `python -m twoviews.tracking sync`.
    """

    uri: str | None
    experiment: str
    mirror: bool

    def check(self, optional: bool, say: Callable[[str], None] = print) -> None:
        """Refuse at the start of a run what would fail later.

        Args:
            optional: go on without an MLflow that does not answer, as a resumed run or one of a sweep does.
            say: prints a sentence for the user.

        Raises:
            BadInput: the tracking URI is wrong, or (in a run that is mirrored) MLflow is not installed, or (unless it is
                optional) does not answer.
        """
        if not self.experiment:
            raise BadInput("tracking.experiment is empty; name MLflow's experiment, for example twoviews.")
        uris.resolve(self.uri)
        if not self.mirror:
            return
        uris.require_mlflow()
        try:
            uris.check_reachable(self.uri)
        except BadInput as error:
            if not optional:
                raise
            say(f"The run goes on without MLflow until it answers: {error}")

    def start(self, folder: Path, say: Callable[[str], None] = print) -> "Mirror | None":
        """Start the mirror of `folder`; None where the configuration wants none. Only one process of a run calls this."""
        set_target(folder, self.uri, self.experiment)
        return Mirror(folder, say) if self.mirror else None


class Mirror:
    """A daemon thread that sends `folder` to MLflow every few seconds, whenever something in it is new.

    Args:
        folder: the run folder.
        say: prints a sentence for the user; called from the thread.
        interval_s: seconds between two tries; doubled while MLflow does not answer, up to twelve times as long.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, interval_s: float = 5.0):
        self._folder, self._say, self._interval_s = folder, say, interval_s
        self._closing = threading.Event()
        self._complete = False  # MLflow has everything, the final status included
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float | int = 60) -> int:
        """Send the rest and the final status from result.json; returns the number of values that MLflow does not have.

        Waits `timeout_s` seconds at most, and no more than `ANSWER_TIMEOUT_S` for a silent server; then says how to send
        the rest later.
        """
        self._closing.set()
        try:
            wait_for_upload(self._thread, self._folder, timeout_s)
        finally:  # also after a second Ctrl-C
            pending = pending_values(self._folder)
            if not self._complete:
                self._say(
                    f"MLflow does not have the end of this run yet ({pending} values left); send it with "
                    f"`python -m twoviews.tracking sync {shlex.quote(str(self._folder))}`."
                )
        return pending

    def _run(self) -> None:
        # Not at once: importing MLflow takes as long as importing torch, and would delay the first step.
        pause_s, failing = self._interval_s, False
        while True:
            closing = self._closing.wait(pause_s)
            try:
                upload(self._folder, closed=closing)
            except Exception as error:  # whatever is wrong with MLflow, the training goes on
                if not failing:
                    reason = client.logged_error(error, self._folder)
                    self._say(f"MLflow takes nothing now ({reason}); the values are kept and sent when it does.")
                failing, pause_s = True, min(MAX_BACKOFF * self._interval_s, max(self._interval_s, 2 * pause_s))
            else:
                if failing:
                    self._say("MLflow takes values again; everything kept so far is sent.")
                failing, pause_s, self._complete = False, self._interval_s, closing
            if closing:
                return


def flush(folder: Path, mirror: bool, say: Callable[[str], None] = print) -> None:
    """Send what is new in a run that nobody trains; if it is not mirrored, or that fails, say how to send it later."""
    later = f"`python -m twoviews.tracking sync {shlex.quote(str(folder))}` sends it."
    if not mirror:
        say(f"MLflow does not have this, because the run has tracking=files; {later}")
        return
    errors: list[str] = []

    def try_upload() -> None:
        try:
            upload(folder, closed=True)
        except Exception as error:  # whatever is wrong with MLflow, the results are in the folder
            errors.append(client.logged_error(error, folder))

    thread = threading.Thread(target=try_upload, name="mlflow-flush", daemon=True)
    thread.start()
    if not wait_for_upload(thread, folder, FLUSH_TIMEOUT_S):
        errors.append(client.NO_ANSWER)
    if errors:
        say(f"MLflow does not have this yet ({errors[0]}); {later}")


def wait_for_upload(thread: threading.Thread, folder: Path, timeout_s: float) -> bool:
    """Wait for a thread that sends `folder`, at most `timeout_s` seconds; whether it ended.

    A server that does not answer is waited for no longer than `uris.ANSWER_TIMEOUT_S`.
    """
    is_file, saved = uris.resolve(UploadState.load(folder).uri).startswith("sqlite:"), 0
    start = answered_at = time.monotonic()
    while thread.is_alive() and time.monotonic() < start + timeout_s:
        now = saved_at(folder)  # changes with each answer
        if is_file or now != saved or not client.mlflow_imported.is_set():
            saved, answered_at = now, time.monotonic()
        if time.monotonic() > answered_at + uris.ANSWER_TIMEOUT_S:
            break
        thread.join(0.1)
    return not thread.is_alive()
