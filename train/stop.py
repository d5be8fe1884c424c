"""Leaving in good order: SIGTERM and Ctrl-C ask the loop to stop after the step at hand."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yields `requested() -> signal number or None`; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.

    >>> with stop_requests() as requested:
    ...     requested()
    """
    caught: list[int] = []

    def handler(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)
