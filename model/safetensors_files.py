"""Writing safetensors with the rights that other new files have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.extras import from_extra


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes arrays by name.

    The library makes its file for the owner alone, whatever the umask says; here it gets the rights
    of any file that is made in this place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     write_safetensors(Path(name) / "a.safetensors", {"w": np.ones(2, np.float32)})
    ...     (Path(name) / "b").touch()
    ...     [path.stat().st_mode & 0o777 for path in sorted(Path(name).iterdir())][0] == (
    ...         (Path(name) / "b").stat().st_mode & 0o777
    ...     )
    True
    """
    save_file = from_extra("safetensors.numpy", "hf").save_file
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(arrays), path, metadata=metadata)
    path.chmod(mode)
