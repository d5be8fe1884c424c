"""A gradient function that lets a reduce see what every worker computed (plug 3a).

    local gradients, one a worker   ->   reduce(local, carry, key)   ->   one gradient

Under plain jit the compiler sums the gradients of all devices as soon as they exist. Here each
worker's own gradient is an array of its own first, so that it can be encoded, sent and decoded; any
optimizer follows unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.reduce import Carry, Reduce

PyTree = Any
Loss = Callable[[PyTree, PyTree, Any], tuple[jax.Array, PyTree]]
LocalGradient = Callable[[Loss, PyTree, PyTree, Any], tuple[PyTree, PyTree]]

# Folded into the step's key for the draws of the reduce, so that they are not those of dropout.
_REDUCE = 0x5EDCE


class PerWorker(NamedTuple):
    """The plug: `train.plugs.Gradient(*per_worker(...))`.

    Attributes:
      name: its key in `State.extra`.
      init: `(params, frozen) -> Carry`, worker leaves with a leading axis [W, ...].
      apply: `(loss, params, batch, context, carry) -> (grads, metrics, carry)`.
    """

    name: str
    init: Callable[[PyTree, PyTree], Carry]
    apply: Callable[..., tuple[PyTree, PyTree, Carry]]


def whole(loss: Loss, params: PyTree, batch: PyTree, context: Any) -> tuple[PyTree, PyTree]:
    """The gradient of all rows of this worker at once.

    >>> loss = lambda params, batch, context: (params * batch.sum(), {})
    >>> float(whole(loss, jnp.float32(2), jnp.ones(3), None)[0])
    3.0
    """
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, context)
    return grads, metrics


def per_worker(
    reduce: Reduce,
    local: LocalGradient = whole,
    name: str = "per_worker",
    workers: int | None = None,
) -> PerWorker:
    """Returns the gradient function that hands every worker's gradient to the reduce.

    The workers are the places along `reduce.axis` of the mesh of `jax.set_mesh`; the other axes
    stay automatic. The batch is cut by rows. Each worker computes the gradient of the loss over its
    own rows, already divided by counts over the whole batch, with a random key of its own; the
    shares are handed to `reduce.apply` and metrics are summed.

    Args:
      reduce: from `parallel.reduce*`.
      local: the gradient function that each worker runs, `train.plugs.whole` or one that
        accumulates over micro-batches: so there is one exchange a step, however many of those.
      name: its key in `State.extra`.
      workers: W, for the carry to be made where there is no mesh; by default the mesh says.

    Raises:
      ValueError: when called, if the mesh has no such axis or not W places on it, the rows do not
        divide, or the context has no key.

    >>> from parallel.reduce import all_reduce
    >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    >>> loss = lambda params, batch, context: (params * batch.sum(), {"loss": params * batch.sum()})
    >>> class Context(NamedTuple):
    ...     rng: jax.Array
    ...     extra: dict
    >>> plug, w, context = per_worker(all_reduce()), jnp.float32(2), Context(jax.random.key(0), {})
    >>> with jax.set_mesh(mesh):
    ...     grads, metrics, carry = jax.jit(plug.apply, static_argnums=0)(
    ...         loss, w, jnp.ones(3), context, plug.init(w, {})
    ...     )
    >>> float(grads), float(metrics["loss"])
    (3.0, 6.0)
    """
    axis = reduce.axis

    def init(params: PyTree, frozen: PyTree) -> Carry:
        number = _workers(axis) if workers is None else workers
        carry = reduce.init(params, number)
        copies = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (number, *a.shape)), carry.worker)
        return carry._replace(worker=copies)

    def apply(
        loss: Loss, params: PyTree, batch: PyTree, context: Any, carry: Carry
    ) -> tuple[PyTree, PyTree, Carry]:
        here = _workers(axis)
        if workers not in (None, here):
            raise ValueError(
                f"made for {workers} workers, and the mesh has {here} places along {axis!r}; make "
                "the mesh that large, or redistribute what the workers carry"
            )
        _check_rows(batch, here, axis)
        if context.rng is None:
            raise ValueError(
                "per_worker draws from context.rng, which is None; give the step's key"
            )
        key = jax.random.fold_in(context.rng, _REDUCE)
        # The loss has no use for what the workers carry, and each would be given that of all.
        others = {key: value for key, value in context.extra.items() if key != name}
        context = context._replace(extra=others)

        # check_vma=False: with it on, JAX would sum the gradient of the replicated parameters by
        # itself, and refuse every scan in the loss that starts from plain zeros.
        def compute(params: PyTree, batch: PyTree, context: Any):
            rng = jax.random.fold_in(context.rng, lax.axis_index(axis))
            context = context._replace(rng=rng)
            return jax.tree.map(lambda a: a[None], local(loss, params, batch, context))

        grads, metrics = jax.shard_map(
            compute,
            in_specs=(P(), P(axis), P()),
            out_specs=P(axis),
            axis_names={axis},
            check_vma=False,
        )(params, batch, context)

        # Here it is on, and proves that all workers end with the same gradient.
        def exchange(grads: PyTree, carry: Carry, key: jax.Array):
            mine = Carry(_first(carry.worker), carry.shared)
            total, mine = reduce.apply(_first(grads), mine, key)
            return total, mine._replace(worker=jax.tree.map(lambda a: a[None], mine.worker))

        spec = Carry(P(axis), P())
        total, carry = jax.shard_map(
            exchange, in_specs=(P(axis), spec, P()), out_specs=(P(), spec), axis_names={axis}
        )(grads, carry, key)
        return total, jax.tree.map(lambda m: m.sum(axis=0), metrics), carry

    return PerWorker(name, init, apply)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.squeeze(0), tree)


def _workers(axis: str) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"the workers lie along the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    return shape[axis]


def _check_rows(batch: PyTree, workers: int, axis: str) -> None:
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
        if rows % workers:
            raise ValueError(
                f"a batch of {rows} rows does not divide over {workers} workers along {axis!r}; "
                f"make it a multiple of {workers}"
            )
