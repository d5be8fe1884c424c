"""The progress bar of training: loss, tokens a second, utilization where known, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from train.loop import Reporter


@contextlib.contextmanager
def progress_bar(description: str, start: int, until: int) -> Iterator[Reporter]:
    """Yields a reporter that draws a bar in a terminal, and prints only its lines elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    bar = Progress(
        TextColumn("{task.description}", markup=False),  # the name of a folder
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(description, total=until, completed=start, numbers="compiling")

    class Bar:
        def advance(self, step: int, values: dict[str, float]) -> None:
            numbers = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
            if "utilization" in values:
                numbers += f"  {values['utilization']:.1%} of peak"
            bar.update(task, completed=step, numbers=numbers)

        def say(self, text: str) -> None:
            bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield Bar()
