"""One shard of an asynchronous parameter server, and a worker's step against many: plain Python.

    push: stale? refuse | seen? say so again | log it, fsync | apply | acknowledge

Each push has its worker's name and number, so that one which is sent again, because its answer was
lost with the server or the worker, is applied once. A shard that comes back replays its log over
its snapshot and is where it was, bit for bit; an update is acknowledged only once it is in the log.
Shards decide each for themselves, as usual for parameter servers (Li et al. 2014, "Scaling
Distributed Machine Learning with the Parameter Server"); the bound on staleness is that of Ho et
al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", counted
in updates, where an update that is too old is refused.

`parallel.parameter_server_ray` puts these classes into Ray actors.

Shapes: n numbers of all parameters laid end to end, s of one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parallel.parameter_server_elementwise import check_elementwise
from parallel.parameter_server_log import Arrays, Disk, Log

PyTree = Any


class Push(NamedTuple):
    """A worker's gradient for one shard.

    Attributes:
      worker: its name; a worker that is started again has a new one, as a push of the old one may
        still be on its way.
      number: counts the pushes of that name, from 1, and is the same when one is sent again.
      version: that was pulled.
      gradient: [s].
    """

    worker: str
    number: int
    version: int
    gradient: np.ndarray


class Reply(NamedTuple):
    """What became of a push: "applied" and "seen" (applied before) are acknowledgements.

    "stale" was refused, and "skipped" was never sent (see `work`).
    """

    outcome: Literal["applied", "seen", "stale", "skipped"]
    version: int

    @property
    def acknowledged(self) -> bool:
        """Whether the update is in the shard for good."""
        return self.outcome in ("applied", "seen")


class Counts(NamedTuple):
    """What a shard has done.

    Attributes:
      applied: updates, since the very beginning; equal to the version.
      numbers: worker -> the number of its last push that was applied.
      of_worker: worker -> how many of its pushes were applied.
      seen: pushes that were sent again, since the last start.
      stale: pushes that were refused, since the last start.
      replayed: records that the last start took from the log.
    """

    applied: int
    numbers: dict[str, int]
    of_worker: dict[str, int]
    seen: int
    stale: int
    replayed: int


class Shard:
    """A part of the parameters, its optimizer state, and the durable record of both.

    Args:
      folder: of its log and snapshot, of this shard alone. What is there is taken up.
      initial: [s] float32 or float64, where the folder is empty.
      optimizer: any Optax transformation that treats each number by itself.
      bound: largest staleness: updates applied between a worker's pull and its push.
      compact_every: records after which the log becomes a snapshot.
      disk: what writes.

    Raises:
      ValueError: an optimizer that is not elementwise, other types or shapes, a damaged folder, or
        numbers below what makes sense.
    """

    def __init__(
        self,
        folder: Path | str,
        initial: np.ndarray,
        optimizer: optax.GradientTransformation,
        *,
        bound: int,
        compact_every: int = 100,
        disk: Disk | None = None,
    ) -> None:
        if bound < 0 or compact_every < 1:
            raise ValueError(
                f"a staleness bound of {bound} and a snapshot every {compact_every} records; they "
                "are at least 0 and 1"
            )
        initial = np.asarray(initial)
        if initial.ndim != 1 or initial.dtype not in (np.float32, np.float64):
            raise ValueError(
                f"a shard holds a vector of float32 or float64, not {initial.dtype} of shape "
                f"{initial.shape}; lay the parameters end to end and cast them (`flatten`)"
            )
        self._params: Any = jnp.array(initial)
        if self._params.dtype != initial.dtype:
            raise ValueError(f"{initial.dtype} needs jax_enable_x64; or cast to float32")
        check_elementwise(optimizer, initial)
        self._bound, self._compact_every = bound, compact_every

        @jax.jit
        def update(params: jax.Array, state: PyTree, gradient: jax.Array) -> tuple:
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._update = update
        self._state = optimizer.init(self._params)
        self._version = self._seen = self._stale = self._logged = self._replayed = 0
        self._numbers: dict[str, int] = {}
        self._of_worker: dict[str, int] = {}
        self._log = Log(Path(folder), disk)
        if (snapshot := self._log.snapshot()) is not None:
            self._take(snapshot)
        for record in self._log.open():
            self._logged += 1
            if int(record["update"]) > self._version:
                worker, number = str(record["worker"]), int(record["number"])
                self._apply(worker, number, record["gradient"])
                self._replayed += 1

    def pull(self) -> tuple[int, np.ndarray]:
        """Returns the version and the parameters [s]."""
        return self._version, np.array(self._params)  # a copy: the buffer is JAX's

    def push(self, push: Push) -> Reply:
        """Applies a gradient once; returns when it is durable, or refused.

        Raises:
          ValueError: a gradient of another shape or with numbers that are not finite, a version
            from the future, or the log was closed by an error.
          OSError: the disk refused.
        """
        if push.number <= self._numbers.get(push.worker, 0):
            self._seen += 1
            return Reply("seen", self._version)
        if not 0 <= push.version <= self._version:
            raise ValueError(
                f"{push.worker!r} computed at version {push.version}, and the shard is at "
                f"{self._version}; its folder is not the one that this version came from"
            )
        if self._version - push.version > self._bound:
            self._stale += 1
            return Reply("stale", self._version)
        gradient = np.asarray(push.gradient, self._params.dtype)
        if gradient.shape != self._params.shape or not np.isfinite(gradient).all():
            raise ValueError(
                f"{push.worker!r} pushed a gradient of shape {gradient.shape}, where finite "
                f"numbers of shape {self._params.shape} are held; skip a step whose gradient is "
                "not finite, as `work` does"
            )
        record: Arrays = {
            "update": np.int64(self._version + 1),
            "worker": np.str_(push.worker),
            "number": np.int64(push.number),
            "gradient": gradient,
        }
        self._log.append(record)
        self._logged += 1
        self._apply(push.worker, push.number, gradient)
        if self._logged >= self._compact_every:
            self._log.compact(self._arrays())
            self._logged = 0
        return Reply("applied", self._version)

    def counts(self) -> Counts:
        """Returns what the shard has done."""
        numbers, of_worker = dict(self._numbers), dict(self._of_worker)
        return Counts(self._version, numbers, of_worker, self._seen, self._stale, self._replayed)

    def close(self) -> None:
        """Lets go of the log; nothing is lost without it."""
        self._log.close()

    def _apply(self, worker: str, number: int, gradient: np.ndarray) -> None:
        new = self._update(self._params, self._state, gradient)
        self._params, self._state = jax.block_until_ready(new)  # JAX may look into `gradient`
        self._version += 1
        self._numbers[worker] = number
        self._of_worker[worker] = self._of_worker.get(worker, 0) + 1

    def _arrays(self) -> Arrays:
        workers = list(self._numbers)
        leaves = jax.tree.leaves((self._params, self._state))
        return {
            "update": np.int64(self._version),
            "workers": np.array(workers, np.str_),
            "numbers": np.array([self._numbers[w] for w in workers], np.int64),
            "of_worker": np.array([self._of_worker[w] for w in workers], np.int64),
            **{f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)},
        }

    def _take(self, arrays: Arrays) -> None:
        old, structure = jax.tree.flatten((self._params, self._state))
        new = [arrays[f"leaf {i}"] for i in range(len(arrays) - 4)]
        kinds = [[(leaf.shape, leaf.dtype) for leaf in leaves] for leaves in (old, new)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the snapshot in {self._log.folder} is of other parameters or another optimizer "
                "than the shard is given; use an empty folder, or the settings that it was made by"
            )
        self._params, self._state = jax.tree.unflatten(structure, map(jnp.array, new))
        self._version = int(arrays["update"])
        workers = [str(worker) for worker in arrays["workers"]]
        self._numbers = dict(zip(workers, arrays["numbers"].tolist(), strict=True))
        self._of_worker = dict(zip(workers, arrays["of_worker"].tolist(), strict=True))


class Server(Protocol):
    """A shard as a worker sees it, here or far away."""

    def pull(self) -> tuple[int, np.ndarray]:
        """See `Shard.pull`."""

    def push(self, push: Push) -> Reply:
        """See `Shard.push`; calls again, with the same push, until there is an answer."""


def work(
    servers: Sequence[Server],
    gradient: Callable[[np.ndarray], tuple[np.ndarray, float]],
    worker: str,
    number: int,
) -> tuple[list[Reply], float]:
    """One step of a worker: pulls all shards, computes, pushes to all; returns replies and loss.

    A gradient with numbers that are not finite is pushed to none of them, and all replies are
    "skipped": one bad batch neither spoils the parameters nor ends the run.

    Args:
      servers: in the order of the parameters.
      gradient: parameters [n] -> gradient [n] and the loss.
      worker: name of this worker.
      number: of this push, from 1, one more with every step.
    """
    pulled = [server.pull() for server in servers]
    grads, loss = gradient(np.concatenate([params for _, params in pulled]))
    if not np.isfinite(grads).all():
        return [Reply("skipped", version) for version, _ in pulled], loss
    ends = np.cumsum([len(params) for _, params in pulled])[:-1]
    rows = zip(servers, pulled, np.split(grads, ends), strict=True)
    replies = [
        server.push(Push(worker, number, version, part)) for server, (version, _), part in rows
    ]
    return replies, loss


def flatten(params: PyTree, dtype: Any = np.float32) -> np.ndarray:
    """Returns all parameters end to end, [n].

    >>> flatten({"a": jnp.ones((1, 2)), "b": jnp.zeros(1)}).tolist()
    [1.0, 1.0, 0.0]
    """
    return np.concatenate([np.asarray(p, dtype).reshape(-1) for p in jax.tree.leaves(params)])


def unflatten(flat: Any, shapes: PyTree) -> PyTree:
    """Returns the parameters out of [n], in the shapes and types of `shapes`; traceable.

    >>> unflatten(jnp.arange(3.0), {"a": jnp.ones((1, 2)), "b": jnp.zeros(1)})["b"].tolist()
    [2.0]
    """
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [leaf.size for leaf in leaves]
    if sum(sizes) != flat.size:
        raise ValueError(f"{flat.size} numbers for parameters of {sum(sizes)}")
    parts = jnp.split(jnp.asarray(flat), np.cumsum(sizes)[:-1].tolist())
    shaped = [p.reshape(s.shape).astype(s.dtype) for p, s in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def cut(flat: np.ndarray, servers: int) -> list[np.ndarray]:
    """Returns the parts of [n] that the servers hold, equal but for one number.

    Raises:
      ValueError: fewer numbers than servers, or no server.

    >>> [part.tolist() for part in cut(np.arange(3), 2)]
    [[0, 1], [2]]
    """
    if not 1 <= servers <= flat.size:
        raise ValueError(f"{servers} servers for {flat.size} numbers; from 1 to one for each")
    return np.array_split(flat, servers)
