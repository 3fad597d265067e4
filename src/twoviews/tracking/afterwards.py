"""What is measured of a run when its training is over: another line of its metrics.jsonl, and into the same MLflow run."""

import json
import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from twoviews.errors import BadInput
from twoviews.tracking.metrics import NAME, lines, read
from twoviews.tracking.mirror import kept, wait_for
from twoviews.tracking.sending import send
from twoviews.tracking.state import evaluation_lock, is_written

PATIENCE_S = 120.0  # for MLflow to take it


@contextmanager
def using(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a run, or another folder of results, while its encoder is evaluated; waits for others that do the same.

    Raises:
        BadInput: the run is being trained, and its encoder is about to be another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = evaluation_lock(folder)
    if not lock.acquire():
        say(f"waiting for another command that evaluates {folder} …")
        while not lock.acquire(60):
            pass
    try:
        if is_written(folder):
            raise BadInput(f"{folder} is being trained at this moment; wait for its end, or interrupt it (Ctrl-C).")
        yield
    finally:
        lock.remove()


def add(folder: Path, values: Mapping[str, float]) -> None:
    """Write the finite ones of these numbers as measured at the run's last step, unless they were the last ones, too.

    Within `using`. An interrupted run that goes on cuts them off again, like everything after its last checkpoint.
    """
    head, last = {"step": 0, "epoch": 0}, {}
    for line in read(folder):
        head = {key: line[key] for key in head}
        last.update({name: (line["step"], value) for name, value in line.items()})
    new = {name: value for name, value in values.items() if math.isfinite(value)}
    new = {name: value for name, value in new.items() if last.get(name) != (head["step"], value)}
    if not new:
        return
    path = folder / NAME
    whole = max((end for end, _ in lines(path)), default=0)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(whole)  # what a crash tore
        file.seek(whole)
        file.write(json.dumps({**head, "time": round(time.time(), 3), **new}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def deliver(folder: Path, mirror: bool, say: Callable[[str], None] = print) -> None:
    """Send what is new in `folder` if the run is mirrored; otherwise, or if that fails, say how to send it later."""
    later = f"`python -m twoviews.tracking sync {shlex.quote(str(folder))}` sends it."
    if not mirror:
        say(f"MLflow was not told, because the run has tracking=files; {later}")
        return
    failed: list[str] = []

    def deliver() -> None:
        try:
            send(folder, closed=True)
        except Exception as error:  # whatever is wrong with MLflow, the results are in the folder
            failed.append(kept(folder, error))

    thread = threading.Thread(target=deliver, name="mlflow-delivery", daemon=True)
    thread.start()
    if not wait_for(thread, folder, PATIENCE_S):
        failed.append("it does not answer")
    if failed:
        say(f"MLflow does not have this yet ({failed[0]}); {later}")
