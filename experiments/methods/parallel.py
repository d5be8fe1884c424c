"""Methods of parallel training: compressed gradients, delayed gradients, DiLoCo.

    --method compressed_reduce --compressed-reduce.codec int8      any optimizer follows unchanged
    --method delayed --delayed.steps 4
    --method diloco --diloco.every 50 --diloco.workers 4

What they are made of lies in `parallel/` and `compress/`; here it is put together. Workers lie
along the mesh axis `data`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from compress.gradients import int8, top_k
from compress.gradients_lowrank import power_sgd
from parallel.delayed import constant, delayed, uniform
from parallel.local_sgd import (
    LocalState,
    init_local,
    inner_round,
    nesterov,
    outer_step,
    redistribute,
)
from parallel.per_worker import per_worker
from parallel.reduce import Carry, Reduce, all_reduce
from parallel.reduce_exchange import exchange_reduce
from parallel.reduce_factored import factored_reduce
from parallel.reduce_gather import gather_reduce
from train.methods import Around, Plugs, Setup
from train.plugs import NONFINITE, Batch, Gradient, Metrics, PyTree, State
from train.step import Step, in_parts


@dataclass(frozen=True)
class CompressedReduce:
    """Sends codes of the gradients between workers in place of the gradients.

    Each worker adds what its code left out to its next gradient. How many workers there are is the
    mesh's to say (its axis `data`); a run that goes on with another number shares what was left
    out among them.

    Attributes:
      codec: "int8", "top_k", "powersgd", or "none" for the plain sum by one all-reduce.
      block: values that share a scale ("int8").
      density: part of the entries that is sent ("top_k").
      rank: of the factors ("powersgd").
      matrices: regex over parameter paths of those that are factored, all others are summed as
        they are ("powersgd"); `blocks/.*/kernel` leaves embedding and head alone.
      seed: of the first factor ("powersgd").
    """

    name: ClassVar[str] = "compressed_reduce"
    codec: Literal["int8", "top_k", "powersgd", "none"] = "int8"
    block: int = 256
    density: float = 0.01
    rank: int = 2
    matrices: str = ".*"
    seed: int = 0

    def __post_init__(self):
        if self.codec not in _REDUCES:
            raise ValueError(f"no codec is called {self.codec!r}; there are {', '.join(_REDUCES)}")
        if self.codec != "powersgd" and self.matrices != ".*":
            raise ValueError(
                f"matrices {self.matrices!r} are for the codec powersgd, not for {self.codec}; "
                "leave it out"
            )

    def reduce(self) -> Reduce:
        """Returns what the workers do with their gradients.

        Raises:
          ValueError: a block or rank below 1, a density outside (0, 1].
        """
        return _REDUCES[self.codec](self)

    def build(self, setup: Setup) -> Plugs:
        """Makes the gradient function, one exchange a step.

        Raises:
          ValueError: as `reduce`.
        """
        reduce = self.reduce()
        local: Any = in_parts(setup.micro_batches)
        plug = per_worker(reduce, local, self.name, setup.workers)
        return Plugs(gradient=Gradient(*plug), redistribute={self.name: reduce.redistribute})


_REDUCES: dict[str, Any] = {
    "int8": lambda method: exchange_reduce(int8(method.block)),
    "top_k": lambda method: gather_reduce(top_k(method.density)),
    "powersgd": lambda method: factored_reduce(
        power_sgd(method.rank, jax.random.key(method.seed)), matrices=method.matrices
    ),
    "none": lambda method: all_reduce(),
}


@dataclass(frozen=True)
class Delayed:
    """Takes each gradient at older parameters, as the workers of an asynchronous server do.

    Attributes:
      steps: the age, in steps.
      ages: "constant", or "uniform" for an age of its own for each worker, 0 to `steps`.
      workers: parts of the batch with an age and a random key of their own; no mesh is needed.
    """

    name: ClassVar[str] = "delayed"
    steps: int = 1
    ages: Literal["constant", "uniform"] = "constant"
    workers: int = 1

    def build(self, setup: Setup) -> Plugs:
        """Makes the gradient function.

        Raises:
          ValueError: an unknown draw of ages, less than 0 steps or 1 worker.
        """
        draws = {"constant": constant, "uniform": uniform}
        if self.ages not in draws:
            raise ValueError(f"no ages are called {self.ages!r}; there are {', '.join(draws)}")
        local: Any = in_parts(setup.micro_batches)
        plug = delayed(draws[self.ages](self.steps), self.workers, local, self.name)
        return Plugs(gradient=Gradient(*plug), rows=self.workers * setup.micro_batches)


@dataclass(frozen=True)
class Diloco:
    """Workers train alone and meet every so often: local SGD, DiLoCo.

    Every step each worker makes one of its own on its rows; after `every` of them, and at the end
    of the run, the outer optimizer moves the parameters where they last met towards their mean,
    and all go on from there. Those parameters are what is evaluated, saved and opened.

    Attributes:
      every: inner steps H between two meetings.
      workers: W, a multiple of the mesh axis `data`; by default as many as that is, and a run that
        goes on with another number averages what each worker had for itself.
      outer_rate: of the outer Nesterov steps; 1, with no momentum, is local SGD.
      outer_momentum: see there.
    """

    name: ClassVar[str] = "diloco"
    every: int = 50
    workers: int | None = None
    outer_rate: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self):
        for name in ("every", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.outer_rate <= 0 or not 0 <= self.outer_momentum < 1:
            raise ValueError(
                f"the outer rate is {self.outer_rate} and its momentum {self.outer_momentum}; they "
                "must be above 0, and at least 0 and below 1"
            )

    def build(self, setup: Setup) -> Plugs:
        """Puts the loop around the step."""
        workers = setup.workers if self.workers is None else self.workers
        outer = nesterov(self.outer_rate, self.outer_momentum)

        def init(state: Any) -> State:
            memories = [name for name, has in state.extra.items() if jax.tree.leaves(has)]
            if memories != [NONFINITE]:
                raise ValueError(
                    f"{', '.join(name for name in memories if name != NONFINITE)} remembers "
                    f"something from step to step, and with {self.name} every worker would "
                    "remember its own; leave one of them out"
                )
            local = init_local(state, workers, outer)
            return _joined(self.name, state, local, local.workers.extra[NONFINITE])

        def around(step: Step) -> Step:
            alone, meet = inner_round(step), outer_step(outer)

            def run(state: State, frozen: PyTree, batch: Batch) -> tuple[State, Metrics]:
                before = _local(self.name, state)
                after, metrics = alone(before, frozen, jax.tree.map(lambda a: a[None], batch))
                theirs = after.workers.extra[NONFINITE]
                # A worker that has given up no longer counts its steps: then nobody goes on.
                idle = after.workers.step == before.workers.step
                # Nothing else is sent beside the meeting, which waits for this: XLA:CPU runs what
                # does not depend on each other in any order, and devices that each wait for the
                # others in another collective wait for ever.
                idle, theirs, metrics = _known_to_all((idle, theirs, metrics))
                done, stopped = state.step + 1, idle.any()
                together = ((done % self.every == 0) | (done == setup.steps)) & ~stopped
                new = jax.lax.cond(together, meet, _as_they_are, after)
                new = dataclasses.replace(_joined(self.name, state, new, theirs), step=done)
                new = jax.tree.map(lambda n, o: jax.lax.select(stopped, o, n), new, state)
                return new, {name: _over_workers(name, m) for name, m in metrics.items()}

            return run

        def elsewhere(carry: Carry, workers: int) -> Carry:
            return carry._replace(
                worker=redistribute(LocalState(carry.worker, {}, {}), workers).workers
            )

        return Plugs(
            around=Around(init, around),
            workers=workers,
            rows=workers * setup.micro_batches,
            redistribute={} if self.workers is not None else {self.name: elsewhere},
        )


PARALLEL_METHODS: dict[str, type[Any]] = {m.name: m for m in (CompressedReduce, Delayed, Diloco)}


def _as_they_are(local: LocalState) -> LocalState:
    return local


def _local(name: str, state: State) -> LocalState:
    """What the workers have, out of the state of the run."""
    carry = state.extra[name]
    workers, counters = carry.worker, state.extra[NONFINITE]
    # Whoever resets the count of the run resets it for all workers.
    theirs = workers.extra[NONFINITE]
    again = jnp.where(counters["in_a_row"] == 0, 0, theirs["in_a_row"])
    extra = {**workers.extra, NONFINITE: {**theirs, "in_a_row": again}}
    return LocalState(workers.replace(extra=extra), state.params, carry.shared)


def _known_to_all(tree: PyTree) -> PyTree:
    """Gives every device all numbers of all workers, by one all-gather of their bytes."""
    leaves, form = jax.tree.flatten(tree)
    numbers = [leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf for leaf in leaves]
    parts = [jax.lax.bitcast_convert_type(n, jnp.uint8).reshape(-1) for n in numbers]
    together = jax.lax.with_sharding_constraint(jnp.concatenate(parts), PartitionSpec())
    found, at = [], 0
    for leaf, number, part in zip(leaves, numbers, parts, strict=True):
        sizes = () if number.dtype.itemsize == 1 else (number.dtype.itemsize,)
        here = together[at : at + part.size].reshape(*number.shape, *sizes)
        found.append(jax.lax.bitcast_convert_type(here, number.dtype).astype(leaf.dtype))
        at += part.size
    return jax.tree.unflatten(form, found)


def _joined(name: str, state: State, local: LocalState, theirs: PyTree) -> State:
    """The state of the run: where the workers last met, and under `name` what they have.

    Of bad steps in a row it has those of the worst of them, of all bad steps the sum.
    """
    counters = {"in_a_row": theirs["in_a_row"].max(), "total": theirs["total"].sum()}
    extra = {**state.extra, name: Carry(local.workers, local.outer), NONFINITE: counters}
    return dataclasses.replace(state, params=local.params, optimizer={}, extra=extra)


def _over_workers(name: str, metric: PyTree) -> PyTree:
    """One number of those of one step of all workers, [1, W, ...]."""
    if name == "tokens":
        return metric.sum(axis=(0, 1))
    if name in ("skipped", "nonfinite_in_a_row"):
        return metric.max(axis=(0, 1))
    return jax.tree.map(lambda m: m.mean(axis=(0, 1)), metric)
