"""The files of a Hugging Face folder: opened but not read, and written; pickles are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.extras import from_extra
from model.mismatch import some
from model.safetensors_files import write_safetensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Stored(NamedTuple):
    """A tensor in an open file, not yet read."""

    file: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.key).get_dtype()

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.key)


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder by its key.

    Args:
      directory: holds `model.safetensors`, or shards and their index.
      stack: keeps the files open.

    Raises:
      ValueError: if a file is missing, damaged, not what the index says, or all are pickled.
    """
    safetensors = from_extra("safetensors", "hf")
    stored: dict[str, Stored] = {}
    for path, promised in _weight_files(directory).items():
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not an intact safetensors file ({error}); fetch or copy it again"
            ) from error
        keys = file.keys()
        if absent := sorted(promised - set(keys)):
            raise ValueError(f"{path} lacks what {INDEX} says it holds: {some(absent)}")
        if double := sorted(set(keys) & set(stored)):
            raise ValueError(f"{path} holds tensors that another file holds too: {some(double)}")
        stored |= {key: Stored(file, key) for key in keys}
    return stored


def _weight_files(directory: Path) -> dict[Path, set[str]]:
    """The files to open, each with the keys that the index says are in it."""
    if directory.is_file() and directory.suffix in PICKLES:
        raise ValueError(_about_pickles(directory.parent, [directory.name]))
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder; give the one that holds config.json and {WEIGHTS}"
        )
    if (directory / WEIGHTS).is_file():
        return {directory / WEIGHTS: set()}
    if not (directory / INDEX).is_file():
        names = sorted(path.name for path in directory.iterdir())
        if pickles := [name for name in names if Path(name).suffix in PICKLES]:
            raise ValueError(_about_pickles(directory, pickles))
        raise ValueError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}; there is {some(names) or 'nothing'}"
        )
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no weight_map from keys to files")
    files: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        # A plain name: an index from elsewhere must not make us open files outside its folder.
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise ValueError(
                f"{directory / INDEX} places {key} in {name!r}; only the plain name of a "
                ".safetensors file beside it is read"
            )
        files.setdefault(directory / name, set()).add(key)
    if absent := sorted(path.name for path in files if not path.is_file()):
        raise ValueError(f"{directory} lacks files that {INDEX} names: {some(absent)}")
    return files


def _about_pickles(directory: Path, names: list[str]) -> str:
    target = f"{directory.resolve()}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(directory.resolve())!r})"
        f".save_pretrained({target!r}, safe_serialization=True)"
    )
    return (
        f"the weights in {directory} are pickled ({some(names)}): opening them can run any code, "
        "so they are never loaded. If you trust them, convert them once, where torch and "
        f'transformers are installed, and load the new folder: python -c "{code}"'
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that must be there."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; it says what the weights beside it mean")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of decoding, too
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_shards(
    directory: Path, stream: Iterator[tuple[str, np.ndarray]], plan: list[dict[str, int]]
) -> None:
    """Writes tensors into files, and the index if there is more than one.

    Args:
      directory: there, and empty.
      stream: key and values, in the order of the plan.
      plan: keys of each file, and their bytes.
    """
    names = [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        names = [WEIGHTS]
    for name, sizes in zip(names, plan, strict=True):
        shard = dict(islice(stream, len(sizes)))
        assert shard.keys() == sizes.keys()
        write_safetensors(directory / name, shard, {"format": "pt"})
        del shard  # before the next is built
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in plan)},
            "weight_map": {
                key: name for name, sizes in zip(names, plan, strict=True) for key in sizes
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
