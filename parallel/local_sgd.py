"""Local SGD and DiLoCo: workers that train alone and speak once every H steps.

    H times, on each worker:  its own step on its own rows             (`inner_round`)
    then, together:           d = old - mean of the workers' params
                              old <- old - outer(d), and all go on from there  (`outer_step`)

With an outer rate of 1 and no momentum this is local SGD (Stich 2018, arXiv:1805.09767); with
Nesterov momentum on d, and Adam as the inner optimizer, it is DiLoCo (Douillard et al. 2023,
arXiv:2311.08105). It is another loop around the training step, which is an argument: any step
`(state, frozen, batch) -> (state, metrics)` with whatever is plugged into it.

Every worker has an equal say in the mean, whatever the number of positions it saw.

Shapes: W workers, H inner steps, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.reduce import accumulator, all_reduce_bytes

PyTree = Any


class TrainState(Protocol):
    """What is asked of the state of a step, as `train.plugs.State` has it."""

    params: PyTree
    rng: jax.Array

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with other fields."""


Step = Callable[[Any, PyTree, PyTree], tuple[Any, PyTree]]


class LocalState(NamedTuple):
    """What local training changes, one pytree.

    Attributes:
      workers: the state of every worker's step, each leaf with a leading axis [W, ...].
      params: where the workers last met.
      outer: the state of the outer optimizer.
    """

    workers: Any
    params: PyTree
    outer: PyTree


def nesterov(rate: float = 0.7, momentum: float = 0.9) -> optax.GradientTransformation:
    """Returns the outer optimizer of DiLoCo, with the settings that its paper recommends.

    >>> tx = nesterov(rate=1.0, momentum=0.5)
    >>> updates, _ = tx.update(jnp.float32(2), tx.init(jnp.float32(0)))
    >>> float(updates)  # -(d + momentum * d)
    -3.0
    """
    return optax.sgd(rate, momentum, nesterov=True)


def init_local(state: TrainState, workers: int, outer: optax.GradientTransformation) -> LocalState:
    """Returns the state before the first round: every worker starts as a copy.

    Worker 0 keeps the run's key, the others draw from keys of their own.

    Args:
      state: of the step, as for training without workers.
      workers: W.
      outer: the outer optimizer.

    Raises:
      ValueError: for less than one worker.
    """
    _check_workers(workers)
    copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (workers, *a.shape)), state)
    copies = copies.replace(rng=_keys(state.rng, workers))
    # A copy, so that a donated state holds every buffer once.
    params = jax.tree.map(jnp.copy, state.params)
    return LocalState(copies, params, outer.init(params))


def shardings(mesh: Mesh, state: LocalState, one: Any = None, axis: str = "data") -> LocalState:
    """Returns the `NamedSharding` of each leaf: workers along `axis`.

    Args:
      mesh: has that axis.
      state: or its shapes.
      one: the `NamedSharding` of each leaf of one worker's state over the other axes, as
        `parallel.placement.state_shardings` gives them; None for whole leaves. Parameters follow
        it, the outer optimizer is on every device.
      axis: the mesh axis of the workers.

    >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    >>> state = LocalState({"step": jnp.zeros(4)}, jnp.ones(2), ())
    >>> found = shardings(mesh, state)
    >>> found.workers["step"].spec, found.params.spec
    (P('data',), P())
    """
    whole = NamedSharding(mesh, P())
    if one is None:
        workers = jax.tree.map(lambda _: NamedSharding(mesh, P(axis)), state.workers)
        params = jax.tree.map(lambda _: whole, state.params)
    else:
        workers = jax.tree.map(lambda s: NamedSharding(mesh, P(axis, *s.spec)), one)
        params = one.params
    return LocalState(workers, params, jax.tree.map(lambda _: whole, state.outer))


def inner_round(
    step: Step, axis: str = "data"
) -> Callable[[LocalState, PyTree, PyTree], tuple[LocalState, PyTree]]:
    """Returns `(state, frozen, batches) -> (state, metrics)`: H steps of every worker, in silence.

    Batches have leaves [H, B, ...], H batches as training without workers would see them; worker w
    takes the w-th of W equal parts of their rows. Metrics have leaves [H, W, ...]. The workers lie
    along `axis` of the mesh of `jax.set_mesh`, several of them on one device if W is a multiple of
    its size; all other axes stay automatic.

    Args:
      step: the training step, not yet compiled.
      axis: the mesh axis of the workers.

    Raises:
      ValueError: when called, if the mesh has no such axis, it does not divide W, or W does not
        divide the rows.
    """

    def train(worker: Any, frozen: PyTree, batches: PyTree) -> tuple[Any, PyTree]:
        return lax.scan(lambda state, batch: step(state, frozen, batch), worker, batches)

    def run(workers: Any, frozen: PyTree, batches: PyTree) -> tuple[Any, PyTree]:
        # One after the other where a device has several: it holds the activations of one.
        return lax.map(lambda each: train(each[0], frozen, each[1]), (workers, batches))

    def apply(state: LocalState, frozen: PyTree, batches: PyTree) -> tuple[LocalState, PyTree]:
        workers = count_workers(state)
        _check_mesh(workers, axis)
        _check_rows(batches, workers)
        parts = jax.tree.map(
            lambda a: a.reshape(a.shape[0], workers, -1, *a.shape[2:]).swapaxes(0, 1), batches
        )
        # check_vma=False: a worker's gradient is its own; with it on, JAX would sum over workers.
        trained, metrics = jax.shard_map(
            run,
            in_specs=(P(axis), P(), P(axis)),
            out_specs=P(axis),
            axis_names={axis},
            check_vma=False,
        )(state.workers, frozen, parts)
        metrics = jax.tree.map(lambda m: m.swapaxes(0, 1), metrics)
        return state._replace(workers=trained), metrics

    return apply


def outer_step(
    outer: optax.GradientTransformation, axis: str = "data"
) -> Callable[[LocalState], LocalState]:
    """Returns `state -> state`: the workers meet at `old - outer(old - mean of their params)`.

    Optimizer states of the workers stay with them. The parameters cross the wire once, summed in at
    least float32.

    Args:
      outer: an Optax transformation; it sees `old - mean` as a gradient.
      axis: the mesh axis of the workers.

    Raises:
      ValueError: when called, as `inner_round`.
    """

    def apply(state: LocalState) -> LocalState:
        workers = count_workers(state)
        _check_mesh(workers, axis)

        def total(params: PyTree) -> PyTree:
            sums = jax.tree.map(lambda p: p.astype(accumulator(p.dtype)).sum(axis=0), params)
            return lax.psum(sums, axis)

        sums = jax.shard_map(total, in_specs=P(axis), out_specs=P(), axis_names={axis})(
            state.workers.params
        )
        moved = jax.tree.map(
            lambda old, s: (old.astype(s.dtype) - s / workers).astype(old.dtype), state.params, sums
        )
        # Optax promotes where it should not have to; our own code is kept strict around it.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = outer.update(moved, state.outer, state.params)
            params = optax.apply_updates(state.params, updates)

        # Left to itself, the compiler would give every device the copies of all workers.
        def copy(params: PyTree) -> PyTree:
            here = workers // lax.axis_size(axis)
            return jax.tree.map(lambda p: jnp.broadcast_to(p, (here, *p.shape)), params)

        copies = jax.shard_map(copy, in_specs=P(), out_specs=P(axis), axis_names={axis})(params)
        return LocalState(state.workers.replace(params=copies), params, new)

    return apply


def redistribute(state: LocalState, workers: int) -> LocalState:
    """Returns the state for another number of workers, outside of shard_map.

    The rule: what all workers share stays as it is. Of what each has for itself, floating-point
    leaves (parameters, moments, residuals) become their mean over the old workers, on every new
    one, so that the mean which the outer step sees does not change; all others (counts, masks) are
    those of worker 0; keys are drawn anew from the run's key, which worker 0 has. With as many
    workers as before nothing changes.

    Args:
      state: at any point of a round.
      workers: W from now on.

    Raises:
      ValueError: for less than one worker.
    """
    _check_workers(workers)
    if workers == count_workers(state):
        return state

    def share(leaf: jax.Array) -> jax.Array:
        one = leaf[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            one = leaf.astype(accumulator(leaf.dtype)).mean(axis=0).astype(leaf.dtype)
        return jnp.broadcast_to(one, (workers, *one.shape))

    keys = _keys(state.workers.rng[0], workers)
    return state._replace(workers=jax.tree.map(share, state.workers).replace(rng=keys))


def bytes_per_token(shapes: PyTree, workers: int, inner_steps: int, tokens: int) -> float:
    """Returns the bytes that one worker sends for each token that it sees.

    A round is one all-reduce of the parameters, 2 (W - 1) / W of their bytes as a ring; with H = 1
    that is synchronous data parallelism.

    Args:
      shapes: the parameters, or their shapes.
      workers: W.
      inner_steps: H.
      tokens: of one worker in one step.

    Raises:
      ValueError: a number below 1.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((10, 10), jnp.float32)}
    >>> bytes_per_token(shapes, workers=4, inner_steps=1, tokens=30)
    20.0
    >>> bytes_per_token(shapes, workers=4, inner_steps=100, tokens=30)
    0.2
    """
    if min(workers, inner_steps, tokens) < 1:
        raise ValueError(
            f"{workers} workers, {inner_steps} inner steps, {tokens} tokens; each is at least 1"
        )
    size = sum(leaf.size * accumulator(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes))
    return all_reduce_bytes(size, workers) / (inner_steps * tokens)


def count_workers(state: LocalState) -> int:
    """Returns W.

    >>> count_workers(LocalState(jnp.zeros((4, 2)), jnp.zeros(2), ()))
    4
    """
    return jax.tree.leaves(state.workers)[0].shape[0]


def _keys(key: jax.Array, workers: int) -> jax.Array:
    """The run's own key for worker 0: a run of one worker draws what a run without workers does."""
    numbers = jnp.arange(1, workers, dtype=jnp.uint32)
    others = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return jnp.concatenate([key[None], others])


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"{workers} workers; there must be at least 1")


def _check_mesh(workers: int, axis: str) -> None:
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"the workers lie along the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    if workers % shape[axis]:
        raise ValueError(
            f"{workers} workers do not divide over {axis!r} of size {shape[axis]}; make them a "
            f"multiple of it (redistribute), or the axis smaller"
        )


def _check_rows(batches: PyTree, workers: int) -> None:
    for leaf in jax.tree.leaves(batches):
        if leaf.ndim < 2 or leaf.shape[1] % workers:
            raise ValueError(
                f"batches of shape {leaf.shape} are not [inner steps, rows, ...] with rows that "
                f"divide over {workers} workers; stack whole batches, with a multiple of {workers} "
                "rows"
            )
