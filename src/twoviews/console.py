"""Output for a person: messages, progress of long work, and tables."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from twoviews import processes
from twoviews.errors import printable

PLAIN_SECONDS = 10.0  # between two progress lines where the output is not a terminal
HIDDEN_SECONDS = 1.0  # a bar appears later: most of the work inside a training is done before
FORECAST_SECONDS = 2.0  # of work, from which the time that is left is estimated
ROWS = 40  # the most that are shown of a table
FILE_WIDTH = 200  # characters per line where the output is not a terminal


class _Bars(Progress):
    """Bars of one terminal, one below the other; a clock beside each moves also while the work reports nothing."""

    def __init__(self, output: RichConsole):
        # On a narrow terminal the line gives way.
        shortened = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        line = TextColumn("{task.description}", markup=False, table_column=shortened)
        left = TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True))
        columns = (line, BarColumn(bar_width=10), TaskProgressColumn(), left, TimeElapsedColumn())
        super().__init__(
            *columns,
            console=output,
            transient=True,
            expand=True,
            # What is printed meanwhile goes above the bars, unless it goes into a file.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars of work that takes longer than HIDDEN_SECONDS."""
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= HIDDEN_SECONDS])


class ProgressBar:
    """Progress of long work: a bar at a terminal, elsewhere a plain line every PLAIN_SECONDS; with the time that is left.

    Bars may be nested: they share a display, because two would overwrite each other.

    Args:
        output: the bar or the lines go there.
        total: units of work; None: it is done in one piece.
        done: units done before.
        title: shown until the first update.
        wait: print no plain line in the first PLAIN_SECONDS.
    """

    _bars: _Bars | None = None  # of this process

    def __init__(self, output: RichConsole, total: int | None, done: int = 0, title: str = "", wait: bool = False):
        self._output, self._total, self._first, self._began_at = output, total, done, time.monotonic()
        self._printed_at, self.printed = self._began_at if wait else -PLAIN_SECONDS, False
        self._last_line = ""
        self._task: TaskID | None = None
        if output.is_terminal:
            if ProgressBar._bars is None:
                ProgressBar._bars = _Bars(output)
                ProgressBar._bars.start()
            self._task = ProgressBar._bars.add_task(title, total=total, completed=done, left="")

    def update(self, done: int, line: str, left: float | None = None, important: bool = False) -> None:
        """Show that `done` units are done.

        Args:
            done: of `total`.
            line: what else is known.
            left: seconds until the end; None: as for the units that are done.
            important: print a plain line whenever it comes.
        """
        now = time.monotonic()
        if self._task is None and not important and now - self._printed_at < PLAIN_SECONDS:
            return
        rest = (self._total or done) - done
        if left is None and done > self._first and now - self._began_at >= FORECAST_SECONDS:
            left = rest * (now - self._began_at) / (done - self._first)
        shown = f"{duration(left)} left" if left is not None and rest else ""
        if self._task is None:
            self._printed_at, self.printed = now, True
            if line != self._last_line:  # of the last step and of the last evaluation, if that adds nothing
                self._output.print(_plain(f"{line}  {shown}".rstrip()))
                self._output.file.flush()
            self._last_line = line
        elif ProgressBar._bars is not None:
            ProgressBar._bars.update(self._task, completed=done, description=printable(line), left=shown)

    def stop(self) -> None:
        """End the progress: the bar leaves the terminal, and lines that were printed stay."""
        bars = ProgressBar._bars
        if self._task is not None and bars is not None:
            bars.remove_task(self._task)
            if not bars.tasks:
                bars.stop()
                ProgressBar._bars = None
        self._task = None


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

    def progress(
        self, step: int, epoch: float, values: Mapping[str, str], left: float | None, important: bool = False
    ) -> None:
        """Show how far the training is, some values by name, and the seconds that are left, if they are known.

        Where the output is not a terminal, what is important is printed whenever it comes.
        """
        if self._progress and values:
            numbers = "  ".join(f"{name} {value}" for name, value in values.items())
            self._progress.update(step, f"epoch {epoch:.2f}  step {step}  {numbers}", left, important)

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

    def rows(
        self,
        title: str,
        rows: Sequence[Mapping[str, object]],
        count: int | None = None,
        limit: int = ROWS,
        rest: str = "",
    ) -> None:
        """Print a table with a column for each key, at most the first `limit` rows.

        Args:
            title: above the table.
            rows: values by column; only the first `limit` are needed.
            count: how many rows there are; the length of `rows` by default.
            limit: the most that are printed.
            rest: said behind the number of rows where not all are printed.
        """
        if self.quiet or not rows:
            return
        title += f" (the first {limit} of {count:,}{rest})" if (count := count or len(rows)) > limit else ""
        table = Table(title=_plain(title, "table.title"))
        for name in rows[0]:
            table.add_column(_plain(name), overflow="fold", min_width=len(name))
        for row in rows[:limit]:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            table.add_row(*map(_plain, cells))
        self._rich.print(table)


@contextmanager
def progress_of(
    title: str, total: int | None = None, unit: str = "", *, at_end: bool = False
) -> Iterator[Callable[[int], None]]:
    """Progress of a part of the work, on standard error; yields a function that takes the number of units just done.

    Args:
        title: what is done.
        total: units of work; None: it is done in one piece, and only a terminal shows that it goes on.
        unit: what they are.
        at_end: print a plain line at the end even if none was needed before.
    """
    if processes.rank() > 0:
        yield lambda count: None
        return
    output = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    bar, done = ProgressBar(output, total, title=title, wait=True), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        last = done >= (total or 0) and (at_end or bar.printed)
        bar.update(done, f"{title}: {done:,} of {total or done:,} {unit}", important=last)

    try:
        yield advance
    finally:
        bar.stop()


def say_on_stderr(sentence: str) -> None:
    """Print a sentence on standard error, once for all processes of a run."""
    if processes.rank() == 0:
        print(sentence, file=sys.stderr, flush=True)


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
