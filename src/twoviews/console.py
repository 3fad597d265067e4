"""What a person watching a run sees: sentences, a live line while it trains, and a table at the end."""

import os
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from twoviews.errors import printable

PLAIN_SECONDS = 10.0  # between two progress lines where the output is not a terminal
ROWS = 40  # of a table that are shown
FILE_WIDTH = 200  # characters of a line where the output is not a terminal, which says how many it has


class Console:
    """Prints on the first process only.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._rich = RichConsole(highlight=False, soft_wrap=True)
        if not self._rich.is_terminal and "COLUMNS" not in os.environ:
            self._rich.width = FILE_WIDTH
        self._live: Progress | None = None
        self._last_line = 0.0
        self._said: set[str] = set()

    def say(self, sentence: str) -> None:
        """One line."""
        if not self.quiet:
            self._rich.print(_plain(sentence))
            sys.stdout.flush()

    def say_once(self, sentence: str) -> None:
        """One line, unless it was said before."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(sentence)

    def start(self, steps: int, done: int) -> None:
        """Begin the live line of a training of that many steps."""
        if self._rich.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self._rich, transient=True)
            self._live.start()
            self._live.add_task("training", total=steps, completed=done)

    def progress(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Show where training is: in the live line, or as a plain line now and then."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"epoch {epoch:.2f}  step {step}  {numbers}"
        if not values:
            return
        if self._live:
            self._live.update(self._live.task_ids[0], completed=step, description=line)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(line)

    def stop(self) -> None:
        """End the live line."""
        if self._live:
            self._live.stop()
            self._live = None

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Two columns: what, and its value."""
        if self.quiet:
            return
        table = Table(title=_plain(title, "table.title"), show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(_plain(name), _plain(value))
        self._rich.print(table)

    def rows(self, title: str, rows: Sequence[Mapping[str, object]], count: int | None = None) -> None:
        """A table with a column for each key; of many rows the first ones, which may be all that is given of `count`."""
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


def _plain(text: str, style: str = "") -> Text:
    """A text that is no markup."""
    return Text(printable(text), style)


def in_bytes(count: float) -> str:
    """Bytes in a unit that suits them, in three digits: 480 bytes, 52.1 kB, 3.12 MB, 12.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EB"


def duration(seconds: float) -> str:
    """Seconds in words: 48 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
