"""The report of a sweep, brought up to date beside the trainings while the sweep goes on."""

import os
import subprocess
import sys
import time

from twoviews.sweeps.folder import Sweep
from twoviews.tracking.mirror import SOURCES

SECONDS = 60.0  # between two reports at least


def is_due(sweep: Sweep) -> bool:
    """Whether the sweep has a page in MLflow, and its report is not from the last minute."""
    page = sweep.folder / "report.md"
    return bool(sweep.record["parent"]) and not (page.exists() and time.time() < page.stat().st_mtime + SECONDS)


class BackgroundReport:
    """A process of low priority that makes the report; nobody waits for it, and what it prints is not shown."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def update(self, sweep: Sweep) -> None:
        """Start the process after a job has ended, if the report is due and not in the making."""
        if (self._process and self._process.poll() is None) or not is_due(sweep):
            return
        paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twoviews.sweep", "report", str(sweep.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C in the terminal is for the jobs
            preexec_fn=lambda: os.nice(19),
        )

    def stop(self) -> None:
        """End the process: the report at the end of the sweep has what this one would have."""
        if self._process:
            self._process.terminate()
            self._process.wait()
