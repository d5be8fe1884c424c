"""Libraries that only an extra of `pyproject.toml` brings, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def from_extra(module: str, extra: str, what: str | None = None) -> Any:
    """Imports a library.

    Args:
      module: its name.
      extra: that brings it.
      what: the beginning of the error, by default that it is needed.

    Raises:
      ImportError: it is not installed; what to install is said.

    >>> from_extra("json", "hf").dumps([1])
    '[1]'
    >>> from_extra("no_such_library", "hf")
    Traceback (most recent call last):
    ...
    ImportError: this needs no_such_library: pip install -e '.[hf]'
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, and lacks something itself
        said = f"this needs {package}" if what is None else what
        raise ImportError(f"{said}: pip install -e '.[{extra}]'") from None
    return importlib.import_module(module)
