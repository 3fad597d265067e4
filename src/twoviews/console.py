"""Output for a person: messages, progress of long work, and tables."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from twoviews.errors import printable

PLAIN_SECONDS = 10.0  # between two progress lines where the output is not a terminal
ROWS = 40  # the most that are shown of a table
FILE_WIDTH = 200  # characters per line where the output is not a terminal


class ProgressBar:
    """Progress of long work: a bar at a terminal, elsewhere a plain line every PLAIN_SECONDS.

    Args:
        output: the bar or the lines go there.
        total: units of work.
        done: units done before.
        wait: print no plain line in the first PLAIN_SECONDS.
    """

    def __init__(self, output: RichConsole, total: int, done: int = 0, wait: bool = False):
        self._output, self._total, self._printed_at = output, total, time.monotonic() if wait else -PLAIN_SECONDS
        self._bar: Progress | None = None
        if output.is_terminal:
            percent = TextColumn("{task.percentage:.0f}%")
            columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
            self._bar = Progress(*columns, console=output, transient=True)
            self._bar.start()
            self._bar.add_task("", total=total, completed=done)

    def update(self, done: int, line: str, important: bool = False) -> None:
        """Show that `done` units are done; an important plain line is printed whenever it comes."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, description=line)
        elif important or time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self._output.print(_plain(line))
            self._output.file.flush()

    def stop(self) -> None:
        """End the progress: the bar leaves the terminal, and lines that were printed stay."""
        if self._bar:
            self._bar.stop()


class Console:
    """Messages, progress and tables on standard output.

    Args:
        quiet: print nothing, as on all processes but the first.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        if not self._rich.is_terminal and "COLUMNS" not in os.environ:
            self._rich.width = FILE_WIDTH
        self._progress: ProgressBar | None = None
        self._said: set[str] = set()

    def say(self, sentence: str) -> None:
        """Print a sentence for the user as a line of its own, unless the console is quiet."""
        if not self.quiet:
            self._rich.print(_plain(sentence))
            sys.stdout.flush()

    def say_once(self, sentence: str) -> None:
        """Print a sentence, unless this console has printed it before."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(sentence)

    def start(self, steps: int, done: int) -> None:
        """Begin to show the progress of a training of `steps` steps, of which some are done."""
        if not self.quiet:
            self._progress = ProgressBar(self._rich, steps, done)

    def progress(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Show how far the training is, and some values by name."""
        if self._progress and values:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._progress.update(step, f"epoch {epoch:.2f}  step {step}  {numbers}")

    def stop(self) -> None:
        """End the progress of a training."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Print a table of two columns, names and values."""
        if self.quiet:
            return
        table = Table(title=_plain(title, "table.title"), show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(_plain(name), _plain(value))
        self._rich.print(table)

    def rows(self, title: str, rows: Sequence[Mapping[str, object]], count: int | None = None) -> None:
        """Print a table with a column for each key, at most the first ROWS rows.

        Args:
            title: above the table.
            rows: values by column; only the first ROWS are needed.
            count: how many rows there are; the length of `rows` by default.
        """
        if self.quiet or not rows:
            return
        title += f" (the first {ROWS} of {count:,})" if (count := count or len(rows)) > ROWS else ""
        table = Table(title=_plain(title, "table.title"))
        for name in rows[0]:
            table.add_column(_plain(name), overflow="fold", min_width=len(name))
        for row in rows[:ROWS]:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            table.add_row(*map(_plain, cells))
        self._rich.print(table)


@contextmanager
def image_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of work on images, on standard error; yields a function that takes the number of images just done."""
    if not _is_first_process():
        yield lambda count: None
        return
    bar, done = ProgressBar(RichConsole(stderr=True, highlight=False, soft_wrap=True), total, wait=True), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done, f"{title}: {done} of {total} images", important=done >= total)

    try:
        yield advance
    finally:
        bar.stop()


def say_on_stderr(sentence: str) -> None:
    """Print a sentence on standard error, once for all processes of a run."""
    if _is_first_process():
        print(sentence, file=sys.stderr, flush=True)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _plain(text: str, style: str = "") -> Text:
    """A text in which brackets and colons are not markup."""
    return Text(printable(text), style)


def in_bytes(count: float) -> str:
    """A number of bytes with three digits and a unit: 480 bytes, 52.1 kB, 3.12 MB, 12.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EB"


def duration(seconds: float) -> str:
    """Seconds as a text: 48 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
