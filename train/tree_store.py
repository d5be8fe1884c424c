"""A pytree on disk: its leaves under their paths, in one piece or not at all, with a manifest.

Orbax (v1) moves the arrays, sharded and in the background. It is given a flat dict per top-level
part of the tree, not the tree itself: it would turn NamedTuples, dataclasses and registered nodes
into dicts, and it refuses arrays of size zero and empty trees. The structure comes from the
abstract tree that the reader gives, and the paths must agree.

Several processes write one folder, which all of them see: each its own shards, process 0 the
manifest and the name. They call `save_tree`, `start_write` and `read_leaves` together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from parallel.agreement import by_main, is_main, spread, together, whole_array
from train.manifest import (
    DamagedError,
    lock,
    publish,
    read_manifest,
    verify_files,
    write_manifest,
)

PyTree = Any


def save_tree(folder: str | os.PathLike[str], tree: PyTree) -> str:
    """Store one tree (a run's `frozen/`) with its manifest, in one piece or not at all.

    Args:
      folder: must not exist, or hold this very tree, which is then left as it is.
      tree: any pytree of arrays.

    Returns:
      `tree_hash(tree)`.

    Raises:
      ValueError: the folder holds something else, or a damaged copy.
      OSError: it could not be written; nothing is left behind.
      BlockingIOError: another process is writing it.
    """
    folder = Path(folder).absolute()  # Orbax refuses other paths
    leaves, digest = leaves_by_path(tree, "tree"), tree_hash(tree)
    content = {"hash": digest, "leaves": describe(leaves, "tree")}
    if by_main(lambda: _holds(folder, digest)):
        return digest
    workplace = folder.with_name(folder.name + ".writing")
    with contextlib.ExitStack() as held, quiet():

        def claim() -> str | None:
            """The folder to write into, or None: somebody else has just written the tree."""
            workplace.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(workplace / "lock"))
            clear(workplace / "tree")  # what a kill left
            return None if _holds(folder, digest) else f"tree-{attempt()}"

        def finish() -> None:
            write_manifest(temporary, content)
            publish(temporary, folder)

        name = by_main(claim)
        if name is not None:
            temporary = workplace / name
            with write_errors(f"tree {folder}", workplace):
                together(start_write(temporary, leaves))
                by_main(finish)
    if is_main():
        shutil.rmtree(workplace, ignore_errors=True)
    return digest


def _holds(folder: Path, digest: str) -> bool:
    if not folder.exists():
        return False
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
    except DamagedError as error:
        raise ValueError(f"{folder} is there but no intact tree: {error}; remove it") from error
    if manifest["hash"] != digest:
        raise ValueError(
            f"{folder} holds another tree (hash {manifest['hash'][:12]}, given {digest[:12]}): "
            "remove it or give another folder"
        )
    return True


def load_tree(folder: str | os.PathLike[str], abstract: PyTree = None) -> PyTree:
    """Read what `save_tree` wrote, every file checked first.

    Args:
      folder: from `save_tree`.
      abstract: structure, shapes, dtypes and shardings as in `Checkpoints.restore`. None gives
        nested dicts keyed by the names on each leaf's path, on the default device (an index is its
        digits, an empty subtree is not there).

    Raises:
      FileNotFoundError: no such folder.
      ValueError: damaged, naming the file; or another structure, naming the leaves.
    """
    folder = Path(folder).absolute()  # Orbax refuses other paths
    if not folder.is_dir():
        raise FileNotFoundError(f"no tree at {folder}")
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
    except DamagedError as error:
        raise ValueError(f"tree {folder} is damaged: {error}") from error
    saved = manifest["leaves"]
    if abstract is not None:
        wanted = leaves_by_path(abstract, "abstract tree")
        leaves = read_leaves(folder, saved, wanted, f"tree {folder}")
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    leaves = read_leaves(folder, saved, {name: _abstract(saved[name]) for name in saved}, "")
    tree: PyTree = {}
    for name, leaf in zip(saved, leaves, strict=True):
        if name == "":  # the tree was one leaf
            return leaf
        *parents, last = [unquote(part) for part in name.split("/")]
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


def tree_hash(tree: PyTree) -> str:
    """Sha256 of every leaf's path, dtype, shape and bytes; kinds of containers do not enter.

    >>> tree_hash({"a": jnp.ones(2)}) == tree_hash({"a": np.ones(2, np.float32)})
    True
    >>> tree_hash({"a": jnp.ones(2)}) == tree_hash({"b": jnp.ones(2)})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves_by_path(tree, "tree").items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        data = whole_array(data) if isinstance(data, jax.Array) else data
        digest.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def part_folder(name: str) -> str:
    """The sub-folder of the leaf's part; Orbax keeps bare names like "metrics" for itself."""
    return "part." + name.split("/")[0]


def leaves_by_path(tree: PyTree, what: str) -> dict[str, Any]:
    """Arrays (or abstract arrays) by path, such as "params/blocks/q/kernel".

    The names on a path are percent-quoted, so that a "/" in a key cannot be mistaken.

    Raises:
      ValueError: two leaves have the same path, or a leaf is no array that JAX can hold.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(quote(jax.tree_util.keystr((key,), simple=True), "") for key in path)
        if name in leaves:
            raise ValueError(f"{what} has two leaves called {name}: rename one")
        if isinstance(leaf, np.ndarray | np.generic):
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                raise ValueError(f"{what} leaf {name} is {leaf.dtype}; JAX would cut it: cast it")
            leaf = jnp.array(leaf)  # a copy: the caller may write into its own
        elif not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind = type(leaf).__name__
            raise ValueError(f"{what} leaf {name} is a {kind}, not an array: use jnp.asarray")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaves: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """Shape, dtype, key implementation and weak type of each leaf, as JSON.

    Raises:
      ValueError: a leaf has no values to save: abstract, traced or donated.
    """
    described: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            kind = type(leaf).__name__
            raise ValueError(f"{what} leaf {name} is a {kind}: it has no values to save")
        if leaf.is_deleted():
            raise ValueError(f"{what} leaf {name} has been donated: save what the step returned")
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            described[name]["key"] = str(jax.random.key_impl(leaf))
        elif leaf.weak_type:  # it promotes differently, so a resumed run would differ without it
            described[name]["weak"] = True
    return described


def _abstract(described: dict[str, Any]) -> jax.ShapeDtypeStruct:
    if "key" in described:
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=described["key"])).dtype
    else:
        dtype = jnp.dtype(described["dtype"])
    return jax.ShapeDtypeStruct(tuple(described["shape"]), dtype)


def _by_part(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        if leaf.size:  # Orbax refuses others; their description says all there is to know
            parts.setdefault(part_folder(name), {})[name] = leaf
    return parts


def start_write(folder: Path, leaves: dict[str, Any]) -> Callable[[], None]:
    """Copy the leaves off the devices and start to write them; what is returned waits for the end.

    Args:
      folder: must not exist, and does not until all is written; a kill leaves `FOLDER.orbax...`.
      leaves: from `leaves_by_path`. They may be donated as soon as this returns: on accelerators
        they have been copied, and on CPU JAX does not reuse a buffer of which Orbax holds a view.
    """
    from orbax.checkpoint import v1 as ocp

    parts = _by_part(leaves)
    if not parts:
        folder.mkdir(parents=True)
        return lambda: None
    context = ocp.Context()
    # Weights hardly compress (8 % of normal float32), and zstd takes four times the CPU time.
    context.array.saving.use_compression = False
    # Cutting replicated leaves among devices compiles a program a shape, for less than it gains.
    context.array.saving.use_replica_parallel = False
    with context:
        response = ocp.save_checkpointables_async(folder, parts)
    return response.result


def read_leaves(
    folder: Path, saved: dict[str, Any], wanted: dict[str, Any], where: str
) -> list[jax.Array]:
    """The leaves `wanted`, in its order and placed as it says.

    Args:
      folder: written by `start_write`; its files have been verified.
      saved: the descriptions of the leaves there (or of one part of them).
      wanted: shape, dtype and, optionally, sharding by path; must be exactly what is in `saved`.
      where: the start of the error message.

    Raises:
      ValueError: names the leaves that are missing, left over or of another shape or dtype.
    """
    from orbax.checkpoint import v1 as ocp

    _compare(saved, wanted, where)
    default = jnp.zeros(()).sharding
    targets = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        )
        for name, leaf in wanted.items()
    }
    leaves: dict[str, jax.Array] = {}
    if parts := _by_part(targets):
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # what `saved` says has been compared already
        with quiet(), context:
            for part in ocp.load_checkpointables(folder, parts).values():
                leaves.update(part)
    for name, target in targets.items():
        if not target.size:
            leaves[name] = spread(jnp.zeros(target.shape, target.dtype), target.sharding)
        if leaves[name].dtype != target.dtype:  # 64-bit leaves without jax_enable_x64
            raise ValueError(f"{where}: {name} would be cut from {target.dtype}: enable x64")
        if saved[name].get("weak"):
            leaves[name] = jax.jit(_weak, out_shardings=target.sharding)(leaves[name])
    return [leaves[name] for name in targets]


def _weak(x: jax.Array) -> jax.Array:
    """The same values, weakly typed: `full` of a Python number is, and `at` keeps that."""
    return jnp.full(x.shape, x.dtype.type(0).item()).at[...].set(x)


def _compare(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    text = {n: f"{d['dtype']}{d['shape']}" for n, d in saved.items()}
    asked = {n: f"{leaf.dtype}{list(leaf.shape)}" for n, leaf in wanted.items()}
    wrong = [f"{n} {asked[n]} is not in it" for n in asked if n not in text]
    wrong += [f"{n} {text[n]} is in it but not asked for" for n in text if n not in asked]
    wrong += [
        f"{n} is {text[n]} in it, {asked[n]} is asked for"
        for n in asked
        if n in text and text[n] != asked[n]
    ]
    if wrong:
        more = f"; and {len(wrong) - 12} more" if len(wrong) > 12 else ""  # a screenful
        raise ValueError(f"{where} has another structure: {'; '.join(wrong[:12])}{more}")


def attempt() -> str:
    """A name that no earlier attempt had: a failed one may still have writes under way."""
    return uuid.uuid4().hex[:8]


def clear(temporary: Path) -> None:
    """Remove a temporary folder and whatever Orbax was writing beside it (process 0 alone does)."""
    if not is_main():
        return
    for path in temporary.parent.glob(temporary.name + "*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def write_errors(what: str, temporary: Path) -> Iterator[None]:
    """Turn whatever stops a write into one OSError, and give its space back."""
    try:
        yield
    except Exception as error:
        clear(temporary)
        full = "No space left" in str(error) or "ENOSPC" in str(error)
        code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
        reason = "the disk is full" if full else str(error).strip().split("\n")[0]
        raise OSError(
            code, f"{what} could not be written: {reason}. Whatever was there before is intact"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Orbax's own log records from stderr; what matters in them is raised by us."""
    # Orbax first: its absl must be the one to create the logger of that name.
    from orbax.checkpoint import v1  # noqa: F401

    def others(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "orbax" not in record.getMessage()

    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)
