"""Parallel text: two files of lines, `.gz` or plain, of which line n of one translates line n.

Lines that are empty or no UTF-8 are bad rows, with their numbers (`train.tasks.rows`).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from train.tasks.rows import BadRow, Row

SOURCE, TARGET = "source", "target"
SIDES = (SOURCE, TARGET)


def both_files(text: str) -> tuple[Path, Path] | None:
    """Returns the two paths of "SOURCE,TARGET", or None for one path.

    >>> both_files("a.en,a.de")
    (PosixPath('a.en'), PosixPath('a.de'))
    """
    source, comma, target = text.partition(",")
    if not comma:
        return None
    if not source or not target or "," in target:
        raise ValueError(f"{text!r} are not two files; give SOURCE,TARGET, as in a.en,a.de")
    return Path(source), Path(target)


def read_parallel(source: Path, target: Path) -> Iterator[Row | BadRow]:
    """Yields the pairs of lines.

    Raises:
      ValueError: a file is not there or no gzip; the files have different numbers of lines.
    """
    sides = {SOURCE: _lines(source), TARGET: _lines(target)}
    counts = {name: len(lines) for name, lines in sides.items()}
    if counts[SOURCE] != counts[TARGET]:
        raise ValueError(
            f"{source} has {counts[SOURCE]:,} lines and {target} has {counts[TARGET]:,}; line by "
            "line each has to translate the other"
        )
    for number, pair in enumerate(zip(*sides.values(), strict=True), start=1):
        texts, reasons = {}, []
        for name, line in zip(sides, pair, strict=True):
            try:
                texts[name] = line.decode().strip()
            except UnicodeDecodeError as error:
                reasons.append(f"the {name} is no UTF-8 (byte {error.start}): another encoding")
                continue
            if not texts[name]:
                reasons.append(f"the {name} is empty")
        yield BadRow(number, ", ".join(reasons)) if reasons else Row(number, texts)


def _lines(path: Path) -> list[bytes]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {what}; give a text file of one sentence a line, plain or .gz")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; write it as UTF-8")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines
