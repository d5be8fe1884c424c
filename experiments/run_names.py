"""How a run is named on a command line: RUN (its newest checkpoint, a task's best) or RUN@STEP."""

from __future__ import annotations

from pathlib import Path


def parse_parent(text: str) -> tuple[Path, int | None]:
    """Splits "RUN" or "RUN@STEP".

    >>> parse_parent("runs/a@300")
    (PosixPath('runs/a'), 300)
    """
    folder, at, step = text.rpartition("@")
    return (Path(folder), int(step)) if at and step.isdecimal() else (Path(text), None)


def folder_of(name: str) -> Path:
    """Returns the folder of "RUN" or "RUN@STEP".

    >>> folder_of("runs/a@300")
    PosixPath('runs/a')
    """
    return parse_parent(name)[0]
