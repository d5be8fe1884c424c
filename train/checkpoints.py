"""Checkpoints of a run: written while training goes on, checked before they are trusted.

    checkpoints/
      lock                       held by the one process that writes
      500/
        manifest.json            step, info, loss, every leaf's shape and dtype, every file's sha256
        part.params/ ...         one Orbax checkpointable per top-level part of the state
      1000.writing...            a save under way, or what a kill left of one

The arrays go through the free functions of Orbax v1 (`train/tree_store.py`). Not its
`training.Checkpointer`, which also lists and deletes steps, for three things tried on 0.12.8: it
deletes the old step once the new one is renamed, before a manifest can vouch for the new one; one
damaged metrics file makes the whole folder impossible to open; and a NaN loss makes its `BestN`
delete the best step. Here a step gets its name when its manifest is complete, and only then do
older ones go.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import jax

from parallel.agreement import by_main, is_main, together, wait_until_seen
from train.manifest import (
    DamagedError,
    as_json,
    lock,
    publish,
    read_manifest,
    recover,
    verify_files,
    withdraw,
    write_manifest,
)
from train.tree_store import (
    attempt,
    describe,
    leaves_by_path,
    load_tree,
    part_folder,
    quiet,
    read_leaves,
    save_tree,
    start_write,
    tree_hash,
    write_errors,
)

__all__ = [
    "CheckpointSettings",
    "Checkpoints",
    "Restored",
    "load_tree",
    "save_tree",
    "tree_hash",
]

PyTree = Any


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save and what to keep.

    Attributes:
      every: steps between two checkpoints; the loop reads it, `Checkpoints.save` saves when called.
      keep_last: how many of the newest to keep; with 2, a bad block on the disk costs one interval.
      keep_best: how many of those with the lowest validation loss to keep besides.
    """

    every: int = 500
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        for name, least in (("every", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Restored:
    """The state and info of `step`; `skipped` holds newer steps and what is wrong with them."""

    step: int
    state: PyTree
    info: dict[str, Any]
    skipped: list[tuple[int, str]]


class Checkpoints:
    """The checkpoints of one run, in one folder; use it as a context manager.

    Saves are one at a time and asynchronous; what goes wrong in the background is raised by the
    next `save`, `wait` or `close`.

    Several processes write one folder, which all of them see, and call every method together in
    the same order. Each writes its own shards; process 0 decides, holds the lock, vouches for the
    whole, names it and lets old steps go. What goes wrong in one is raised in all.

    Args:
      folder: usually `RUN/checkpoints`.
      settings: what to keep.
      mode: "write" makes the folder, locks it against other writers until `close`, and clears what
        a killed run left behind. "read" needs no lock and changes nothing.

    Raises:
      BlockingIOError: another process is writing there.
      ValueError: unknown mode.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"params": jnp.arange(3.0), "step": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name)) as checkpoints:
    ...     checkpoints.save(7, state, {"phase": 0}, loss=2.5, wait=True)
    ...     found = checkpoints.restore(state)
    >>> found.step, found.info, found.state["params"]
    (7, {'phase': 0}, Array([0., 1., 2.], dtype=float32))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: CheckpointSettings = CheckpointSettings(),
        *,
        mode: Literal["read", "write"] = "write",
    ):
        if mode not in ("read", "write"):
            raise ValueError(f"mode is {mode!r}; it is 'read' or 'write'")
        # Absolute: Orbax refuses other paths, and the caller may change its working directory.
        self.folder, self.settings = Path(folder).absolute(), settings
        self._pending: concurrent.futures.Future[None] | None = None
        self._damaged: set[int] = set()
        self._share: Callable[[Callable[[], None]], None] = together
        self._writable = mode == "write"
        self._open = contextlib.ExitStack()
        if mode == "write":
            holder = by_main(self._claim)
            together(lambda: wait_until_seen(self.folder / "lock", holder))
            # Entered here, not at the first save, which would wait for the import of Orbax.
            self._open.enter_context(quiet())
            self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._open.callback(self._pool.shutdown)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._share = _alone  # the others may be elsewhere
            self.close()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what stopped the run is the news; this is not lost

    def save(
        self,
        step: int,
        state: PyTree,
        info: dict[str, Any],
        *,
        loss: float | None = None,
        wait: bool = False,
    ) -> None:
        """Copy `state` off the devices, then write it in the background.

        Args:
          step: at least every step that is there; the same step is replaced once it is written. An
            integer, or an array of one such as `state.step`, which is waited for.
          state: any pytree of arrays. It may be donated as soon as this returns.
          info: JSON values that the run needs to go on (phase, hash of `frozen`, ...).
          loss: validation loss for `keep_best`. One that is not finite never counts as best.
          wait: return only when the checkpoint is on the disk.

        Raises:
          OSError: this checkpoint (or, without `wait`, the one before) could not be written; older
            ones are intact, and saving again is allowed.
          ValueError: a later step is there, a leaf is not an array, or `info` is not JSON.
        """
        self.wait()
        if not self._writable:
            raise ValueError(f"{self.folder} is closed or was opened for reading: nothing is saved")
        step = operator.index(step)
        temporary = self._path(step, by_main(lambda: self._ending(step)))
        leaves = leaves_by_path(state, "state")
        content = {
            "step": step,
            "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
            "info": as_json(info),
            "leaves": describe(leaves, "state"),
        }
        with write_errors(f"checkpoint of step {step} in {self.folder}", temporary):
            finish = start_write(temporary, leaves)
        self._pending = self._pool.submit(self._commit, step, temporary, finish, content)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save under way is on the disk; raise OSError if it could not be."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])  # Ctrl-C here loses nothing
            pending, self._pending = self._pending, None
            self._share(pending.result)

    def close(self) -> None:
        """Wait, then let go of the lock. Closing twice is harmless."""
        self._writable = False
        with self._open:
            self.wait()

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending. Their files are checked by `restore` only."""

        def listed() -> list[int]:
            there = self._committed()
            return [step for step in there if (self._path(step) / "manifest.json").exists()]

        return by_main(listed) if self._writable else listed()

    def best_step(self) -> int | None:
        """The step with the lowest validation loss (the first of equals); None if none has one."""
        return next(iter(_ranked(self._losses())), None)

    def info(self, step: int) -> dict[str, Any]:
        """The `info` saved with `step`, without reading arrays.

        Raises:
          FileNotFoundError: there is no such step.
          ValueError: its manifest is damaged.
        """
        if not self._path(step).is_dir():
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}")
        try:
            return read_manifest(self._path(step))["info"]
        except DamagedError as error:
            raise ValueError(f"checkpoint {self._path(step)} is damaged: {error}") from error

    def restore(
        self, abstract_state: PyTree | Callable[[dict], PyTree], step: int | None = None
    ) -> Restored:
        """The newest intact state, every file checked against its sha256 before it is used.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` (or arrays) of the same structure as what
            was saved. Leaves are placed by its shardings, whatever mesh they were saved from, or
            on the default device where it has none. A function gives it for the `info` of the
            step that is read.
          step: this one and no other; None takes the newest that is intact.

        Raises:
          FileNotFoundError: there is no checkpoint (at that step).
          ValueError: all (or the one asked for) are damaged, naming the files, or the structure
            differs, naming the leaves.
          OSError: a save was under way and failed (see `wait`).
        """
        return self._restore(None, abstract_state, step)

    def restore_part(self, part: str, abstract: PyTree, step: int | None = None) -> Restored:
        """`restore` for one part of the state, such as "params"; reads no other part.

        Below the top level the names are joined by "/", as in "extra/prune".
        """
        return self._restore(part, abstract, step)

    def _restore(self, part: str | None, abstract: PyTree, step: int | None) -> Restored:
        self.wait()
        prefix = "" if part is None else "/".join(quote(name, "") for name in part.split("/"))
        inside = part_folder(prefix) if prefix else None
        if self._writable:  # one process checks the files for all
            step, manifest, skipped = by_main(lambda: self._choose(step, inside))
        else:
            step, manifest, skipped = self._choose(step, inside)
        skipped = [(number, reason) for number, reason in skipped]  # JSON has no tuples
        abstract = abstract(manifest["info"]) if callable(abstract) else abstract
        saved, wanted = manifest["leaves"], leaves_by_path(abstract, "abstract state")
        if prefix:
            saved = {n: saved[n] for n in saved if n == prefix or n.startswith(f"{prefix}/")}
            wanted = {f"{prefix}/{n}" if n else prefix: leaf for n, leaf in wanted.items()}
        leaves = read_leaves(self._path(step), saved, wanted, f"checkpoint {self._path(step)}")
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return Restored(step, state, manifest["info"], skipped)

    def _choose(self, step: int | None, inside: str | None) -> tuple[int, dict, list]:
        """The step to use, its verified manifest, and the newer steps passed over with reasons."""
        there = self._committed()
        if not there or (step is not None and step not in there):
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"{what} in {self.folder} (steps there: {there or 'none'})")
        skipped: list[tuple[int, str]] = []
        for candidate in reversed(there) if step is None else [step]:
            try:
                return candidate, self._verified(candidate, inside), skipped
            except DamagedError as error:
                skipped.append((candidate, str(error)))
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in skipped)
        raise ValueError(f"no intact checkpoint in {self.folder}: {reasons}")

    def _verified(self, step: int, inside: str | None = None) -> dict[str, Any]:
        try:
            manifest = read_manifest(self._path(step))
            verify_files(self._path(step), manifest, inside)
        except DamagedError:
            self._damaged.add(step)
            raise
        return manifest

    def _is_intact(self, step: int) -> bool:
        if step not in self._damaged:
            with contextlib.suppress(DamagedError):
                self._verified(step)
        return step not in self._damaged

    def _claim(self) -> str:
        """In process 0: the folder is ours, and tidy; returns what the lock says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(lock(self.folder / "lock"))
        recover(self.folder)
        return (self.folder / "lock").read_text()

    def _ending(self, step: int) -> str:
        """In process 0: the ending of the temporary folder, if `step` may be saved at all."""
        later = [s for s in self._committed() if s > step and self._is_intact(s)]
        if later:
            raise ValueError(
                f"cannot save step {step} in {self.folder}, which has steps {later}: go on from "
                f"step {later[-1]}, or start a new run from the earlier step in another folder"
            )
        return f".writing-{attempt()}"

    def _path(self, step: int, ending: str = "") -> Path:
        return self.folder / f"{step}{ending}"

    def _committed(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def _losses(self) -> dict[int, float | None]:
        """Loss by step, ascending, of the steps that are intact as far as one can tell cheaply."""
        losses: dict[int, float | None] = {}
        for step in self._committed():
            with contextlib.suppress(DamagedError):  # `restore` is what reports it
                if step not in self._damaged:
                    losses[step] = read_manifest(self._path(step))["loss"]
        return losses

    def _commit(
        self, step: int, temporary: Path, finish: Callable[[], None], content: dict[str, Any]
    ) -> None:
        """In the background: wait for the arrays, vouch for them, and let old steps go.

        No process speaks to another here, for the steps of the main thread do; Orbax's own waiting
        goes past the devices. When `finish` returns, all processes have written.
        """
        with write_errors(f"checkpoint of step {step} in {self.folder}", temporary):
            finish()
            if not is_main():
                return
            write_manifest(temporary, content)
            publish(temporary, self._path(step))
        self._damaged.discard(step)
        losses = self._losses()
        newest = list(losses)[-self.settings.keep_last :]
        kept = {*newest, *_ranked(losses)[: self.settings.keep_best]}
        for old in self._committed():
            # Damaged ones do not count, and go when they are older than what is kept.
            if old not in kept and old < min(newest, default=0):
                try:
                    withdraw(self._path(old))
                except OSError as error:
                    what = f"step {step} is saved, but step {old} could not be removed"
                    raise OSError(error.errno, f"{what}: {error}") from error


def _alone(work: Callable[[], None]) -> None:
    work()


def _ranked(losses: dict[int, float | None]) -> list[int]:
    """Steps that have a loss, the best first, and of equals the earlier: as patience has it."""
    return [s for _, s in sorted((x, s) for s, x in losses.items() if x is not None)]
