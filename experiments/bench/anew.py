"""What `--fresh` forgets: all that was measured, once; a command that was stopped goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from experiments.json_files import read_json, write_json

ANEW = "anew.json"
"""Beside the measurements: the keys of a series that was begun anew and is not over."""


def begin_anew(keys: Sequence[str], folder: Path) -> None:
    """Forgets measurements, but for those of a series that was begun anew and was stopped.

    Args:
      keys: of the measurements to make again.
      folder: holds a file for each.
    """
    path = folder / ANEW
    begun = set(read_json(path)) if path.exists() else set()
    if kept := sum((folder / f"{key}.json").exists() for key in begun.intersection(keys)):
        print(
            f"goes on with a series that was begun anew and stopped: {kept} of its measurements "
            f"stay; delete {path} to begin over",
            flush=True,
        )
    for key in keys:
        if key not in begun:
            (folder / f"{key}.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, sorted(begun.union(keys)))


def end_if_whole(known: Collection[str], folder: Path) -> None:
    """Ends the series once all of it has been tried, what failed included.

    Args:
      known: keys of all measurements that there are today.
      folder: see `begin_anew`.
    """
    path = folder / ANEW
    if path.exists() and all(
        (folder / f"{key}.json").exists() for key in read_json(path) if key in known
    ):
        path.unlink()
