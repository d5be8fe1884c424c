"""A progress bar for work that is measured in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# ``progress(description, total)`` gives a context whose value is ``advance(amount)``.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

MOMENT = 1.0  # seconds of work for which a bar would be noise


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error (bytes, time left), shown once the work has taken a second.

    >>> with progress_bar("reading", 10) as advance:
    ...     advance(10)
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(description, total=total)
    began = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if not bar.live.is_started and time.monotonic() - began > MOMENT:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:  # a bar that was never shown would still end its line
            bar.stop()


@contextmanager
def no_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Nothing is shown."""
    yield lambda amount: None
