"""Pipeline parallelism under one jit: layers over a mesh axis, micro-batches passing through.

At every step each device runs its stage on what it holds and hands the result to the next one, a
ring. GPipe (Huang et al. 2019, arXiv:1811.06965) is the case of one round. With v rounds every
device holds v shorter stages and each micro-batch passes the ring v times (interleaved stages,
Narayanan et al. 2021, arXiv:2104.04473), which divides the idle time by v:

    device d at step t does piece u = t - d; a group of n micro-batches makes all of its rounds
    before the next group starts, so what leaves the last device is what the first needs next

    steps = M v + n - 1,   useful = M v,   bubble = (n - 1) / (M v + n - 1)

The backward pass is the derivative of this loop: the same steps in reverse. Where other axes divide
the rows, what a step adds to the gradients is a sum over their devices. XLA for TPUs and GPUs moves
that sum behind the loop; XLA:CPU leaves it there and sends gradients at every step.

Shapes: L layers, n devices, v rounds, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

PyTree = Any
Stage = Callable[[PyTree, PyTree], PyTree]


class Piece(NamedTuple):
    """What a device does at a step: which of its rounds, which micro-batch, and whether at all."""

    useful: jax.Array
    round: jax.Array
    micro_batch: jax.Array


def steps_of(devices: int, micro_batches: int, rounds: int = 1) -> int:
    """Returns the steps of the schedule: `M v + n - 1`.

    >>> steps_of(devices=4, micro_batches=8), steps_of(4, 8, rounds=2)
    (11, 19)
    """
    return micro_batches * rounds + devices - 1


def bubble(devices: int, micro_batches: int, rounds: int = 1) -> float:
    """Returns the part of all stage executions that is idle: `(n - 1) / (M v + n - 1)`.

    >>> round(bubble(devices=4, micro_batches=8), 3), round(bubble(4, 8, rounds=2), 3)
    (0.273, 0.158)
    """
    return (devices - 1) / steps_of(devices, micro_batches, rounds)


def piece_of(
    step: jax.Array, device: jax.Array, devices: int, micro_batches: int, rounds: int = 1
) -> Piece:
    """Returns what a device does at a step; where it is idle, indices of some real piece.

    >>> piece = piece_of(jnp.int32(6), jnp.int32(1), devices=2, micro_batches=4, rounds=2)
    >>> bool(piece.useful), int(piece.round), int(piece.micro_batch)  # u = 5 of 8
    (True, 0, 3)
    """
    total = micro_batches * rounds
    u = step - device
    useful = (u >= 0) & (u < total)
    u = jnp.clip(u, 0, total - 1)
    group, within = u // (devices * rounds), u % (devices * rounds)
    return Piece(useful, within // devices, group * devices + within % devices)


def pipeline(
    stage: Stage, micro_batches: int, *, rounds: int = 1, axis: str = "pipeline"
) -> Callable[[PyTree, PyTree], PyTree]:
    """Returns `(params, x) -> y`, equal to the stage applied to all layers and rows at once.

    Devices along `axis` of the mesh of `jax.set_mesh` hold layers; all other axes stay automatic,
    so that rows may be sharded over `data` and kernels over `tensor`. Device d holds, for round r,
    layers `(r n + d) L / (n v)` and on. With one round this is how `P("pipeline")` cuts the stack;
    with more, parameters that are kept so travel to their stages in every step.

    For less memory, give `jax.checkpoint(stage)`: a device then keeps the inputs of its stages.

    Args:
      stage: `(params of consecutive layers, x) -> y`, y like x in structure, shapes and types.
        Whatever the layers need of each row besides the stream (segments, positions) is a part of
        x and is returned as it came.
      micro_batches: M; must divide the rows, and be a multiple of n if there are several rounds.
      rounds: v.
      axis: the mesh axis n.

    The function takes parameters with leaves [L, ...] and x with leaves [B, ...].

    Raises:
      ValueError: for less than one round or micro-batch; when called, without that axis in the
        mesh, or if n v does not divide L, M not B, or n not M where it must.

    >>> mesh = jax.make_mesh((1,), ("pipeline",), (jax.sharding.AxisType.Auto,))
    >>> def stage(w_L, x_B):
    ...     return jax.lax.scan(lambda x, w: (x * w, None), x_B, w_L)[0]
    >>> with jax.set_mesh(mesh):
    ...     jax.jit(pipeline(stage, 2))(jnp.array([2.0, 3.0]), jnp.arange(4.0)).tolist()
    [0.0, 6.0, 12.0, 18.0]
    """
    if micro_batches < 1 or rounds < 1:
        raise ValueError(
            f"a pipeline needs at least 1 micro-batch and 1 round, not {micro_batches} and {rounds}"
        )

    def run(params: PyTree, x: PyTree) -> PyTree:
        """params [v, 1, L / (n v), ...] of this device, x [M, B / M, ...] of all."""
        n, me = lax.axis_size(axis), lax.axis_index(axis)
        hop = [(i, (i + 1) % n) for i in range(n)]
        params = jax.tree.map(lambda a: a.squeeze(1), params)

        def body(carry: tuple[PyTree, PyTree], step: jax.Array) -> tuple[tuple, None]:
            received, done = carry
            piece = piece_of(step, me, n, micro_batches, rounds)
            enters = (me == 0) & (piece.round == 0)
            leaves = piece.useful & (me == n - 1) & (piece.round == rounds - 1)
            held = _choose(enters, _at(x, piece.micro_batch), received)
            out = stage(_at(params, piece.round), held)
            kept = _choose(leaves, out, _at(done, piece.micro_batch))
            done = _put(done, piece.micro_batch, kept)
            return (jax.tree.map(lambda a: lax.ppermute(a, axis, hop), out), done), None

        # Idle steps run on rows of the batch, not on zeros: nothing there overflows that would
        # not anyway, and no NaN finds its way into a gradient.
        start = (_at(x, 0), jax.tree.map(jnp.zeros_like, x))
        steps = jnp.arange(steps_of(n, micro_batches, rounds), dtype=jnp.int32)
        (_, done), _ = lax.scan(body, start, steps)
        return jax.tree.map(lambda a: a[None], done)

    def apply(params: PyTree, x: PyTree) -> PyTree:
        n = _check(params, x, micro_batches, rounds, axis)
        staged = jax.tree.map(lambda a: a.reshape(rounds, n, -1, *a.shape[1:]), params)
        # Rows in turn, so that where they lie over devices every micro-batch has some of each.
        parts = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), x)
        # check_vma=False: it would refuse any scan in the stage that starts from plain zeros.
        # Derivatives are taken from outside, where they are right all the same.
        sharded = jax.shard_map(
            run,
            in_specs=(P(None, axis), P()),
            out_specs=P(axis),
            axis_names={axis},
            check_vma=False,
        )
        done = jax.tree.map(lambda a: a[-1], sharded(staged, parts))  # the last device's
        return jax.tree.map(lambda a, like: a.swapaxes(0, 1).reshape(like.shape), done, x)

    return apply


def _choose(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: lax.select_n(condition, b, a), a, b)


def _at(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def _put(tree: PyTree, index: jax.Array, new: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), tree, new)


def _check(params: PyTree, x: PyTree, micro_batches: int, rounds: int, axis: str) -> int:
    """Returns the devices of the axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"the pipeline runs over the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    n = shape[axis]
    for layers in {leaf.shape[0] for leaf in jax.tree.leaves(params)}:
        if layers % (n * rounds):
            raise ValueError(
                f"{layers} layers do not divide into {rounds} rounds of {n} stages; "
                f"make them a multiple of {n * rounds}"
            )
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(x)}:
        if rows % micro_batches:
            raise ValueError(
                f"a batch of {rows} rows does not divide into {micro_batches} micro-batches; "
                f"make it a multiple of {micro_batches}"
            )
    if rounds > 1 and micro_batches % n:
        raise ValueError(
            f"{micro_batches} micro-batches do not fill groups of {n}, one for each stage, as "
            f"{rounds} rounds need; make them a multiple of {n}"
        )
    return n
