"""What several processes have to agree on: settings, errors, files that one of them writes, stops.

All processes run the same program, and a collective that one of them does not reach leaves the
others waiting. So whatever only one process can know (a file that it found, an error, a signal) is
told to all before any of them acts on it. Each function of this file must be called by every
process, in the same order; in a process that is alone each is the plain thing it stands for.
"""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.mesh import BATCH_AXES

T = TypeVar("T")
PyTree = Any

SEEN_WITHIN = 60.0  # seconds: what a network file system may take to show a new file
_BLOCK = 1024  # bytes of a first message; most fit, and one length is one compiled program


def is_main() -> bool:
    """Whether this process is the one that writes logs and records.

    >>> is_main()
    True
    """
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Returns the text that each process gave, in their order.

    >>> gather_texts("here")
    ['here']
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    size = _BLOCK
    while size < longest:
        size *= 2
    block = np.zeros(size + 4, np.uint8)
    block[:4] = np.frombuffer(np.uint32(len(data)).tobytes(), np.uint8)
    block[4 : 4 + len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(block))
    lengths = [int(np.frombuffer(row[:4].tobytes(), np.uint32)[0]) for row in rows]
    return [
        row[4 : 4 + length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)
    ]


def by_main(work: Callable[[], T]) -> T:
    """Calls `work` in process 0 and returns what it returned in every process.

    None returns before process 0 is done, so that what it wrote is there.

    Args:
      work: returns JSON values; calls nothing that all processes must call.

    Raises:
      Whatever `work` raised; in the other processes an exception of the same kind and words.

    >>> by_main(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return work()
    if not is_main():
        return _unpack(gather_texts("")[0], 0)
    text, _, failure = _attempt(work, json.dumps)
    gather_texts(text)
    if failure is not None:
        raise failure
    return json.loads(text)["value"]  # as the others have it: a tuple is a list


def together(work: Callable[[], T]) -> T:
    """Calls `work` in every process; where it fails in one, it fails in all.

    Args:
      work: calls nothing that all processes must call.

    Returns:
      What this process's own `work` returned.

    Raises:
      What it raised here; otherwise the like of what it raised in the first process that failed.

    >>> together(lambda: 2)
    2
    """
    if jax.process_count() == 1:
        return work()
    text, result, failure = _attempt(work, lambda value: "null")
    texts = gather_texts(text)
    if failure is not None:
        raise failure
    for number, theirs in enumerate(texts):
        _unpack(theirs, number)
    return cast(T, result)


def wait_until_seen(path: Path, text: str | None = None) -> None:
    """Returns when a file that process 0 has written is there for this process as well.

    A network file system may show it a while later; a folder that is not shared never does.

    Args:
      path: of the file.
      text: that it has to hold, where an older file may be in its place.

    Raises:
      FileNotFoundError: it is not seen within `SEEN_WITHIN` seconds.
    """
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists() or (text is not None and path.read_text() != text):
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"process 0 has written {path}, but it does not appear here; choose a folder on a "
                "file system that all processes share"
            )
        time.sleep(0.1)


def check_same(
    value: Any, what: str, explain: Callable[[Any, Any], list[str]] = lambda ours, theirs: []
) -> None:
    """Checks that all processes have the same value.

    Args:
      value: settings, as JSON values.
      what: for the message.
      explain: of the value of process 0 and another, a line for each difference.

    Raises:
      ValueError (in every process): the value of some process differs from that of process 0.

    >>> check_same({"seed": 0}, "settings")
    """
    texts = gather_texts(json.dumps(value, sort_keys=True))
    different = [number for number, text in enumerate(texts) if text != texts[0]]
    if not different:
        return
    first = different[0]
    lines = explain(json.loads(texts[0]), json.loads(texts[first]))
    details = f" (process 0, then process {first}):\n  " + "\n  ".join(lines) if lines else ""
    raise ValueError(
        f"the {what} of process {', '.join(map(str, different))} of {len(texts)} differ from "
        f"those of process 0; start all processes with the same command{details}"
    )


def highest(mesh: Mesh) -> Callable[[int], jax.Array]:
    """Returns a function: number of this process -> the highest of all, there when it is done.

    It costs a tiny all-reduce over the mesh, which has devices of every process, and waits for
    nothing: it is dispatched like a step, and its result is read when that step's is.

    >>> from parallel.mesh import make_mesh
    >>> int(highest(make_mesh(devices=jax.devices()[:1]))(15))
    15
    """
    shape = (mesh.size,)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    known: dict[int, jax.Array] = {}  # the same number, mostly 0, is put onto the devices once

    def agree(number: int) -> jax.Array:
        if number not in known:
            own = np.full(shape, number, np.int32)
            known[number] = jax.make_array_from_callback(shape, sharding, own.__getitem__)
        return largest(known[number])

    return agree


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the rows of a global batch of which this process's devices need some part.

    >>> from parallel.mesh import make_mesh
    >>> local_rows(make_mesh(devices=jax.devices()[:1]), 3)
    [0, 1, 2]
    """
    parts = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,))
    return sorted({row for part in parts.values() if part for row in range(rows)[part[0]]})


def spread(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays that every process has whole onto devices of all of them.

    `device_put` in one process. In several, it would take an array on a device of this process
    for the only one, and move it between processes.

    Args:
      tree: of arrays, on this process's own devices or laid out over all.
      shardings: of each leaf.

    >>> from parallel.mesh import make_mesh
    >>> sharding = NamedSharding(make_mesh(devices=jax.devices()[:1]), P())
    >>> spread({"a": jnp.ones(2)}, {"a": sharding})["a"].sharding == sharding
    True
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError("a key lies on one process: draw it under jit with out_shardings")
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(put, tree, shardings)


def whole_array(array: jax.Array) -> np.ndarray:
    """Returns all of an array in every process, wherever its parts lie.

    >>> whole_array(jnp.arange(3))
    array([0, 1, 2], dtype=int32)
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _attempt(
    work: Callable[[], T], pack: Callable[[T], str]
) -> tuple[str, T | None, Exception | None]:
    """What to tell the others about a piece of work, its result, and its error."""
    try:
        result = work()
        return f'{{"value": {pack(result)}}}', result, None
    except Exception as error:
        said = {
            "error": _kind(error).__name__,
            "words": (error.strerror if isinstance(error, OSError) else None) or str(error),
            "errno": getattr(error, "errno", None),
        }
        return json.dumps(said), None, error


def _unpack(text: str, process: int) -> Any:
    """The value that a process told, or the like of its error raised."""
    said = json.loads(text)
    if "value" in said:
        return said["value"]
    kind, words = getattr(builtins, said["error"]), f"{said['words']} (in process {process})"
    raise kind(words) if said["errno"] is None else kind(said["errno"], words)


def _kind(error: Exception) -> type[Exception]:
    """The nearest kind that every process knows: ValueError for a subclass of ours, say."""
    for kind in type(error).__mro__:
        if getattr(builtins, kind.__name__, None) is kind and kind not in (
            UnicodeDecodeError,
            UnicodeEncodeError,
            UnicodeTranslateError,
        ):
            return kind
    return RuntimeError
