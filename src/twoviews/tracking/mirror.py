"""The mirror of a run in MLflow: a process beside the training that sends the run folder.

The process imports MLflow and talks to the server, so that the training never shares its interpreter lock with them. It is
`python -m twoviews.tracking.mirror <run folder> <pid> <interval in s> <tracking URI>`. A line on its standard input asks it to
send the end of the run and to end; on its standard output it tells the training, in lines of JSON, [kind, text], that MLflow is
"imported", what to "say", why the end "failed", or that it is "complete".
"""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twoviews.code import python_path
from twoviews.errors import BadInput, counted
from twoviews.tracking import uris
from twoviews.tracking.client import NO_ANSWER, logged_error, prepare_environment, short_error
from twoviews.tracking.state import STATE_FILE, UploadState, set_target
from twoviews.tracking.upload import is_uploaded, pending_artifact_bytes, pending_values, upload

FLUSH_TIMEOUT_S = 120.0
POLL_SECONDS = 0.1
SLOW_BYTES_PER_S = 5e6  # a server that takes the encoder more slowly counts as silent; it answers when it has all of it
LISTENER_TIMEOUT_S = 5.0  # for the last messages of a process that has ended
MAX_BACKOFF = 12  # longest pause between two tries while MLflow does not answer, in intervals
PARENT_CHECK_S = 1.0
# The mirror must outlive these signals, which SLURM sends to all processes of a job, to send the end of the run.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True)
class Tracking:
    """The group `tracking` of the configuration.

    Args:
        uri: MLflow's tracking URI, `sqlite:///<path>` or a server's address; None is mlflow.db at the root of the checkout.
        experiment: MLflow's experiment.
        mirror: send while the run goes on; otherwise by `python -m twoviews.tracking sync`.
        encoder: send the weights of the encoder, too, at the end.
    """

    uri: str | None
    experiment: str
    mirror: bool
    encoder: bool = True  # configurations of earlier versions lack it

    def check(self, optional: bool, say: Callable[[str], None] = print) -> None:
        """Refuse at the start of a run what would fail later.

        Args:
            optional: go on without an MLflow that does not answer, as a resumed run or one of a sweep does.
            say: prints a sentence for the user.

        Raises:
            BadInput: the tracking URI is wrong, or (in a run that is mirrored) MLflow is not installed, or (unless it is
                optional) does not answer.
        """
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
        set_target(folder, self.uri, self.experiment, encoder=self.encoder)
        try:
            return Mirror(folder, say) if self.mirror else None
        except OSError as error:  # no process can be started; the training goes on
            say(f"MLflow gets nothing during this run ({short_error(error)}); {_later(folder)}")
            return None


class Mirror:
    """Sends `folder` to MLflow every few seconds, whenever something in it is new, until `close`.

    The process ends when it is closed, and within seconds when this process ends without that.

    Args:
        folder: the run folder, with a target (`set_target`) that the user trusts.
        say: prints a sentence for the user; called from a thread.
        interval_s: seconds between two tries; doubled while MLflow does not answer, up to twelve times as long.

    Raises:
        BadInput: the tracking URI is not trusted.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, interval_s: float = 5.0):
        self._folder, self._say = folder, say
        self._told: dict[str, str] = {}  # the last message of each kind
        uri = UploadState.load(folder).tracking_uri
        uris.refuse_untrusted(uri)
        self._is_server = not uri.startswith(uris.SQLITE)
        arguments = [str(folder), str(os.getpid()), str(interval_s), uri]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the new process inherits this
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "twoviews.tracking.mirror", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": python_path()},
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid
        self._listener = threading.Thread(target=self._listen, name="mlflow-mirror", daemon=True)
        self._listener.start()

    def close(self, timeout_s: float | int = 60) -> int:
        """Send the rest and the final status from result.json; returns the number of values that MLflow does not have.

        Waits `timeout_s` seconds at most, and for a silent server no more than `ANSWER_TIMEOUT_S`, with the time that the encoder
        may take; then says how to send the rest later.
        """
        assert self._process.stdin
        try:
            with contextlib.suppress(OSError):  # the process may have died
                self._process.stdin.write(b"close\n")
                self._process.stdin.close()
            self._wait(timeout_s)
        finally:  # also after a second Ctrl-C
            ended = self._process.poll() is not None
            self._process.kill()
            self._process.wait()
            self._listener.join(LISTENER_TIMEOUT_S)
            pending = pending_values(self._folder)
            if "complete" not in self._told:
                if ended:
                    reason = "the mirror has ended"
                elif "imported" not in self._told:
                    reason = f"the process that sends it was still starting after {timeout_s:g} s"
                else:
                    reason = NO_ANSWER if self._is_server else f"sending took longer than {timeout_s:g} s"
                left = f"{self._told.get('failed', reason)}; {counted(pending, 'value')} left"
                self._say(f"MLflow does not have all of this run ({left}); {_later(self._folder)}")
        return pending

    def _wait(self, timeout_s: float) -> None:
        path, saved = self._folder / STATE_FILE, 0
        start = answered_at = time.monotonic()
        while self._process.poll() is None and time.monotonic() < start + timeout_s:
            now = path.stat().st_mtime_ns if path.exists() else 0  # changes with each answer
            if now != saved or "imported" not in self._told:
                saved, answered_at = now, time.monotonic()
            silent_s = time.monotonic() - answered_at - uris.ANSWER_TIMEOUT_S
            if self._is_server and silent_s > 0 and silent_s > pending_artifact_bytes(self._folder) / SLOW_BYTES_PER_S:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL_SECONDS)

    def _listen(self) -> None:
        """Take the messages of the process."""
        assert self._process.stdout
        with self._process.stdout as messages:
            for line in messages:
                kind, text = json.loads(line)
                if kind == "say":
                    self._say(text)
                self._told[kind] = text


def flush(folder: Path, mirror: bool, say: Callable[[str], None] = print) -> None:
    """Send what is new in a run that nobody trains; if it is not mirrored, or that fails, say how to send it later."""
    if not mirror:
        say(f"MLflow does not have this, because the run has tracking=files; {_later(folder)}")
        return
    try:
        if not is_uploaded(folder):
            Mirror(folder, say).close(FLUSH_TIMEOUT_S)
    except (BadInput, OSError) as error:  # the results are in the folder
        say(f"MLflow does not have all of this run ({short_error(error)}); {_later(folder)}")


def _later(folder: Path) -> str:
    return f"`python -m twoviews.tracking sync {shlex.quote(str(folder))}` sends the rest."


def _end_with(parent: int) -> None:
    """End this process, whatever it waits for, when the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _main() -> None:
    """What the process does: send the run folder again and again, and its end when it is asked to."""
    folder, parent, interval_s, uri = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    uris.trust(uri)  # the parent process has checked that the user trusts it, which may be written down nowhere
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever MLflow prints must not come between the messages

    def send(kind: str, text: str = "") -> None:
        print(json.dumps([kind, text]), file=messages, flush=True)

    # Not at once: importing MLflow takes as long as importing torch, and would slow down the first steps.
    pause_s, failing, imported, closed = interval_s, False, False, False
    while not closed:
        closed = bool(select.select([sys.stdin], [], [], pause_s)[0])
        if closed and not sys.stdin.readline():
            return  # the training has ended without asking
        try:
            if not imported:
                prepare_environment()
                import mlflow  # noqa: F401

                imported = True
                send("imported")
            upload(folder, training_ended=closed)
        except Exception as error:  # whatever is wrong with MLflow, the next try may succeed
            reason = logged_error(error, folder)
            if closed:
                send("failed", reason)
            elif not failing:
                send("say", f"MLflow takes nothing now ({reason}); the values are kept and sent when it does.")
            failing, pause_s = True, min(MAX_BACKOFF * interval_s, max(interval_s, 2 * pause_s))
        else:
            if failing:
                send("say", "MLflow takes values again; everything kept so far is sent.")
            if closed:
                send("complete")
            failing, pause_s = False, interval_s


if __name__ == "__main__":
    _main()
