"""The process of a mirror: python -m twoviews.tracking.mirror_process <run folder> <pid> <interval in s> <tracking URI>.

It is started by `mirror.Mirror`, which is told on standard output what the user should know.
"""

import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import Literal, TextIO

from twoviews.tracking import uris
from twoviews.tracking.client import logged_error, prepare_environment
from twoviews.tracking.upload import upload

MAX_BACKOFF = 12  # times the interval, between two tries while MLflow does not answer
PARENT_CHECK_S = 1.0


def mirror(folder: Path, interval_s: float, closing: threading.Event, messages: TextIO) -> None:
    """Send a run folder until `closing` is set, and its end then.

    Args:
        folder: the run folder.
        interval_s: seconds between two tries, at first and while all goes well.
        closing: the run has ended.
        messages: a line of JSON, [kind, text], for each thing that the training process must know.
    """

    def send(kind: Literal["imported", "say", "failed", "complete"], text: str = "") -> None:
        print(json.dumps([kind, text]), file=messages, flush=True)

    # Not at once: importing MLflow takes as long as importing torch, and would slow down the first steps.
    pause_s, failing, imported = interval_s, False, False
    while True:
        closed = closing.wait(pause_s)
        try:
            if not imported:
                prepare_environment()
                import mlflow  # noqa: F401

                imported = True
                send("imported")
            upload(folder, closed)
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
        if closed:
            return


def watch(parent: int, closing: threading.Event) -> None:
    """Set `closing` when the parent process asks for it, and end this process when the parent has ended."""
    asked = False
    while os.getppid() == parent:
        readable, _, _ = select.select([] if asked else [sys.stdin], [], [], PARENT_CHECK_S)
        if readable:
            if not os.read(sys.stdin.fileno(), 16):
                break
            asked = True
            closing.set()
    os._exit(1)


def main() -> None:
    """Mirror the run folder that the arguments name."""
    folder, parent, interval_s, uri = sys.argv[1:]
    uris.trust(uri)  # the parent process has checked that the user trusts it, which may be written down nowhere
    # Whatever MLflow prints must not come between the messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    closing = threading.Event()
    threading.Thread(target=watch, args=(int(parent), closing), daemon=True).start()
    mirror(Path(folder), float(interval_s), closing, messages)


if __name__ == "__main__":
    main()
