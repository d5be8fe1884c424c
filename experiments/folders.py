"""Folders and files that appear under their name when they are complete, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_free(out: Path) -> None:
    """Raises ValueError where something is called `out` already.

    >>> check_free(Path("/"))
    Traceback (most recent call last):
    ...
    ValueError: / exists already and nothing is overwritten; give a free name
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already and nothing is overwritten; give a free name")


@contextmanager
def made_at_once(out: Path) -> Iterator[Path]:
    """A name beside `out` for what is to be made; it is called `out` once it is complete.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name, made_at_once(Path(name) / "a") as temporary:
    ...     _ = temporary.write_text("whole")
    """
    out = out.absolute()
    check_free(out)
    missing = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        check_free(out)
        os.rename(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        for parent in missing:
            with suppress(OSError):  # not empty, as it should be
                parent.rmdir()
