"""A synchronous parameter server whose shards are the devices themselves.

    pull    slices of the parameters  --all-gather-->      whole parameters, on every worker
    work    each worker computes the gradient of its own rows
    push    whole gradients           --reduce-scatter-->  the sum, each slice where it lives
    update  the optimizer runs on the slice, whose state lies beside it

A sharded server with workers on the same machines (Li et al. 2014, "Scaling Distributed Machine
Learning with the Parameter Server"), every round synchronous. It computes what data parallelism
does, with a W-th of parameters and optimizer state on each device (Rajbhandari et al. 2020,
arXiv:1910.02054). Every leaf is laid flat, padded and cut into W slices, so the optimizer must look
at each number by itself: SGD, Adam, AdamW, Lion and so on, but not Muon, Adafactor or LAMB, which
look at whole matrices. Which is which is tried out, not listed.

    state = init_server(params, optimizer, workers=8)
    step = jax.jit(server_step(loss_function(model, terms), optimizer, params), donate_argnums=0)
    with jax.set_mesh(make_mesh(data=8)):
        for batch in batches:
            state, metrics = step(state, batch, context)
    params = whole_params(state, params)

It is a step of its own and no method of `experiments.pretrain`: methods plug into a step over whole
parameters, in whose shapes and paths rules, optimizers of matrices, checkpoints and exports speak,
and flat slices have neither. There, `--mesh fsdp=8` (or `--mesh data=8 --strategies zero1`) keeps
an eighth of the state on each device and composes with all of them; the collectives are then the
compiler's, and are the same ones.

Shapes: W workers, n numbers of a leaf, N = n padded to a multiple of W, S = N / W of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.parameter_server_elementwise import check_elementwise
from parallel.reduce import accumulator, all_gather_bytes

PyTree = Any
Loss = Callable[[PyTree, PyTree, Any], tuple[jax.Array, PyTree]]


class ServerState(NamedTuple):
    """What the servers hold; every leaf that is not a scalar is [N], cut into slices [S].

    Attributes:
      params: leaves [N] in the structure of the parameters.
      optimizer: the optimizer's state for them.
    """

    params: PyTree
    optimizer: PyTree


def init_server(
    params: PyTree, optimizer: optax.GradientTransformation, workers: int
) -> ServerState:
    """Returns the state before the first step.

    Args:
      params: whole parameters.
      optimizer: one that looks at each number by itself.
      workers: W.

    Raises:
      ValueError: for less than one worker, or an optimizer that is not elementwise.

    >>> state = init_server({"kernel": jnp.ones((2, 3))}, optax.adam(0.1), workers=4)
    >>> state.params["kernel"].shape
    (8,)
    """
    check_elementwise(optimizer, params)
    return _init(params, optimizer, workers)


def server_specs(state: ServerState, axis: str = "data") -> ServerState:
    """Returns the `PartitionSpec` of each leaf: slices along the axis, scalars everywhere.

    >>> server_specs(ServerState(jnp.ones(8), jnp.int32(0)))
    ServerState(params=P('data',), optimizer=P())
    """
    return jax.tree.map(lambda leaf: P(axis) if leaf.ndim else P(), state)


def server_shardings(mesh: Mesh, state: ServerState, axis: str = "data") -> ServerState:
    """Returns the `NamedSharding` of each leaf, for `device_put`, `out_shardings` and restoring.

    >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    >>> server_shardings(mesh, ServerState(jnp.ones(8), jnp.int32(0))).params.spec
    P('data',)
    """
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        server_specs(state, axis),
        is_leaf=lambda x: isinstance(x, P),
    )


def server_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    shapes: PyTree,
    *,
    clip: float | None = None,
    axis: str = "data",
) -> Callable[[ServerState, PyTree, Any], tuple[ServerState, PyTree]]:
    """Returns `(state, batch, context) -> (state, metrics)`: pull, work, push, update.

    The workers are the places along `axis` of the mesh of `jax.set_mesh`; other axes stay
    automatic. The batch is cut by rows. The loss is divided by counts over the whole batch, so
    gradients and metrics of the workers are summed. `context.rng` is made each worker's own.

    Args:
      loss: `(params, batch, context) -> (loss, metrics)`, as of `train.losses.loss_function`.
      optimizer: as given to `init_server`.
      shapes: the whole parameters, or their shapes.
      clip: largest norm of the gradient over all slices, as `optax.clip_by_global_norm`, which
        would see a slice alone.
      axis: the mesh axis of the workers.

    Raises:
      ValueError: for an optimizer that is not elementwise; when called, if the mesh has no such
        axis, or W does not divide the slices or rows.

    >>> params, optimizer = {"w": jnp.ones(3)}, optax.sgd(0.5)
    >>> loss = lambda params, batch, context: ((batch["x"] @ params["w"]).sum(), {})
    >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    >>> step = jax.jit(server_step(loss, optimizer, params))
    >>> context = NamedTuple("Context", [("rng", jax.Array)])(jax.random.key(0))
    >>> with jax.set_mesh(mesh):
    ...     state = init_server(params, optimizer, workers=1)
    ...     state, _ = step(state, {"x": jnp.eye(3)[:2]}, context)
    >>> whole_params(state, params)["w"].tolist()
    [0.5, 0.5, 1.0]
    """
    check_elementwise(optimizer, shapes)
    optimizer = optax.with_extra_args_support(optimizer)

    def run(state: ServerState, batch: PyTree, context: Any) -> tuple[ServerState, PyTree]:
        params = pull(state.params, shapes, axis)
        context = context._replace(rng=jax.random.fold_in(context.rng, lax.axis_index(axis)))
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, context)
        value, metrics = lax.psum((value, metrics), axis)
        sums = push(grads, axis)
        if clip is not None:
            sums = _clip(sums, clip, axis)
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            updates, new = optimizer.update(
                sums, state.optimizer, state.params, value=value, grads=sums
            )
            slices = optax.apply_updates(state.params, updates)
        return ServerState(slices, new), metrics

    def apply(state: ServerState, batch: PyTree, context: Any) -> tuple[ServerState, PyTree]:
        _check(state, shapes, batch, context, axis)
        specs = server_specs(state, axis)
        # check_vma=False: each worker's gradient is to be its own, and is summed by `push`.
        sharded = jax.shard_map(
            run,
            in_specs=(specs, P(axis), P()),
            out_specs=(specs, P()),
            axis_names={axis},
            check_vma=False,
        )
        return sharded(state, batch, context)

    return apply


def pull(slices: PyTree, shapes: PyTree, axis: str = "data") -> PyTree:
    """Returns whole parameters from slices [S], inside shard_map: one all-gather a leaf."""
    return jax.tree.map(
        lambda s, like: unflatten(lax.all_gather(s, axis, tiled=True), like), slices, shapes
    )


def push(grads: PyTree, axis: str = "data") -> PyTree:
    """Returns each worker's slice [S] of the summed gradients: one reduce-scatter a leaf."""
    workers = lax.axis_size(axis)
    return jax.tree.map(lambda g: lax.psum_scatter(flatten(g, workers), axis, tiled=True), grads)


def flatten(leaf: jax.Array, workers: int) -> jax.Array:
    """Returns [N], zeros after the n numbers of the leaf.

    >>> flatten(jnp.ones((1, 3)), 2).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    return jnp.pad(leaf.reshape(-1), (0, _padded(leaf.size, workers) - leaf.size))


def unflatten(flat: jax.Array, like: Any) -> jax.Array:
    """Returns the leaf of the shape of `like` out of [N].

    >>> unflatten(jnp.arange(4), jax.ShapeDtypeStruct((1, 3), jnp.int32)).tolist()
    [[0, 1, 2]]
    """
    return flat[: math.prod(like.shape)].reshape(like.shape)


def whole_params(state: ServerState, shapes: PyTree) -> PyTree:
    """Returns the parameters as a model takes them, for evaluation and checkpoints.

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> state = init_server(params, optax.sgd(0.1), workers=4)
    >>> whole_params(state, params)["kernel"].shape
    (2, 3)
    """
    return jax.tree.map(unflatten, state.params, shapes)


def redistribute(
    state: ServerState, optimizer: optax.GradientTransformation, shapes: PyTree, workers: int
) -> ServerState:
    """Returns the state for another number of workers: the same numbers, padded anew.

    Raises:
      ValueError: for less than one worker.

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> state = init_server(params, optax.sgd(0.1), workers=4)
    >>> redistribute(state, optax.sgd(0.1), params, 3).params["kernel"].shape
    (6,)
    """
    structs = jax.tree.map(lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype), shapes)
    target = jax.eval_shape(lambda params: _init(params, optimizer, workers), structs)

    # Both lengths hold all n numbers, so what the shorter one leaves out is padding.
    def fit(leaf: jax.Array, like: Any) -> jax.Array:
        if not leaf.ndim:
            return leaf
        kept = leaf[: min(leaf.size, like.size)]
        return jnp.pad(kept, (0, like.size - kept.size))

    return jax.tree.map(fit, state, target)


def bytes_sent(shapes: PyTree, workers: int) -> float:
    """Returns the bytes that one worker sends in a step, counted as rings.

    Pull and push send (W - 1) / W of the padded parameters each: together the 2 (W - 1) / W of
    an all-reduce. The loss, its metrics and the norm of `clip`, scalars all, are left out.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    >>> bytes_sent(shapes, 4)
    192
    """
    leaves = jax.tree.leaves(shapes)
    slices = sum(_padded(p.size, workers) // workers * p.dtype.itemsize for p in leaves)
    return 2 * all_gather_bytes(slices, workers)


def _init(params: PyTree, optimizer: optax.GradientTransformation, workers: int) -> ServerState:
    if workers < 1:
        raise ValueError(f"{workers} workers; there must be at least 1")
    flat = jax.tree.map(lambda p: flatten(p, workers), params)
    return ServerState(flat, optimizer.init(flat))


def _padded(size: int, workers: int) -> int:
    return -(-size // workers) * workers


def _clip(slices: PyTree, largest: float, axis: str) -> PyTree:
    """Scales all slices so that their common norm is at most `largest`."""
    squares = [jnp.square(s.astype(accumulator(s.dtype))).sum() for s in jax.tree.leaves(slices)]
    norm = jnp.sqrt(lax.psum(jnp.stack(squares).sum(), axis))
    scale = jnp.minimum(1, largest / norm)  # of a zero gradient 1, as the division is infinite
    return jax.tree.map(lambda s: s * scale.astype(s.dtype), slices)


def _check(state: ServerState, shapes: PyTree, batch: PyTree, context: Any, axis: str) -> None:
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"the servers lie along the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    workers = shape[axis]
    for flat, like in zip(jax.tree.leaves(state.params), jax.tree.leaves(shapes), strict=True):
        if flat.shape != (_padded(like.size, workers),):
            raise ValueError(
                f"the servers hold {flat.shape} of a leaf of {like.size} numbers, which is not "
                f"padded for {workers} workers; make the state with redistribute(..., {workers})"
            )
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
        if rows % workers:
            raise ValueError(
                f"a batch of {rows} rows does not divide over {workers} workers along {axis!r}; "
                f"make it a multiple of {workers}"
            )
    if context.rng is None:
        raise ValueError("the workers draw from context.rng, which is None; give the step's key")
