"""JSON files that appear whole, and that say their name where they are damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      ValueError: the file is damaged; it is named.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty") from None
        raise ValueError(f"{path} is damaged ({error}); put it back from a copy") from None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text under a temporary name, then renames it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value a line, under a temporary name that is then changed."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
