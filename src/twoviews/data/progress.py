"""Progress of long preparations on standard error: a bar at a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 10.0


def spoken() -> bool:
    """Whether this process speaks for the run: of several processes only the first does."""
    return os.environ.get("RANK", "0") == "0"


def say(sentence: str) -> None:
    """Print a sentence on standard error, once for all processes of a run."""
    if spoken():
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of images just done."""
    if not spoken():
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.advance(task, done)
    else:
        yield _plain(title, total)


def _plain(title: str, total: int) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if done >= total or time.monotonic() - said > PLAIN_EVERY_S:
            said = time.monotonic()
            print(f"{title}: {done} of {total} images", file=sys.stderr, flush=True)

    return advance
