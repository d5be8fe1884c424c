"""Causal ring attention over a mesh axis, forward and backward.

Every device keeps its queries; keys and values travel around the ring, one hop a step, and each
device adds what it sees of them to an online softmax (Liu et al. 2023, arXiv:2310.01889). The
backward pass goes around once more and the gradients of keys and values travel with them. No
device ever holds more than its share of the row and one tile of scores, so memory is
O(time / devices).

With the layout of `parallel.ring_layout` a device i holds an early chunk and a late one, and
exactly two of the four chunk products with another device j are visible, whoever it is: the late
queries see the early keys; besides, where j < i the early queries see the early keys, and
otherwise the late queries see the late keys.

Shapes: B batch, T time, S keys, H query heads, G key/value heads, R = H / G, K head width,
Z = 2 chunks of a device, C = T / 2n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from model.attention import Attention, Visibility
from model.dropout import Dropout
from parallel.ring_blocks import (
    Keys,
    Marks,
    Queries,
    Saved,
    Sums,
    accumulator,
    attend,
    attend_backward,
    tile_of,
)
from parallel.ring_layout import check_time

PyTree = Any
Pairs = Sequence[tuple[Any, Any]]
EARLY, LATE = 0, 1


def ring_attention(axis: str = "context", *, tile: int = 512) -> Attention:
    """Returns an attention function for `Transformer(config, attention=...)`.

    Equal to `model.attention.dot_product_attention` on rows that `parallel.ring_layout.zigzag`
    laid out, the time axis sharded over `axis` of the mesh of `jax.set_mesh`. All other axes stay
    automatic, so that batch and heads may be sharded at the same time.

    A layer sends its keys and values n - 1 times forward and, with their gradients, twice as much
    backward. A window does not make it cheaper: what it hides is computed and masked. Only first
    derivatives are defined.

    Args:
      axis: the mesh axis of the ring.
      tile: keys whose scores exist at a time, at most; the largest divisor of C below it is taken.

    Raises:
      ValueError: for a tile below 1; when called, without that axis in the mesh, on a row that 2n
        does not divide, with a cache, or with dropout on the probabilities.

    >>> from parallel.ring_layout import natural_order, zigzag_order
    >>> mesh = jax.make_mesh((1,), ("context",), (jax.sharding.AxisType.Auto,))
    >>> x_BTHK = jnp.ones((1, 4, 2, 4))[:, zigzag_order(4, 1)]
    >>> with jax.set_mesh(mesh):
    ...     y_BTHK = jax.jit(ring_attention())(x_BTHK, x_BTHK, x_BTHK)
    >>> y_BTHK[:, natural_order(4, 1)].shape
    (1, 4, 2, 4)
    """
    if tile < 1:
        raise ValueError(f"the tile is {tile} keys; it must be at least 1")

    def attention(
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        visibility: Visibility = Visibility(),  # noqa: B008 (an immutable tuple)
        dropout: Dropout | None = None,
    ) -> jax.Array:
        if dropout is not None:
            raise ValueError(
                "ring attention has no dropout on its probabilities; train with dropout=0.0"
            )
        if visibility.first is not None:
            raise ValueError("ring attention has no cache; decode with dot_product_attention")
        if visibility.prefix is not None:
            raise ValueError(
                "ring attention is causal, without a prefix that all queries see; use a mesh "
                "without the axis context"
            )
        T, S = q_BTHK.shape[1], k_BSGK.shape[1]
        if T != S:
            raise ValueError(f"ring attention needs a key for each of the {T} queries, not {S}")
        check_time(T, _devices(axis))
        window = None if visibility.window is None else jnp.asarray(visibility.window, jnp.int32)
        # Made anew by each call: a shard_map keeps the mesh that it first saw.
        return _make_ring(axis, tile)(q_BTHK, k_BSGK, v_BSGK, visibility.segments, window)

    return attention


def ring_bytes(
    keys: jax.ShapeDtypeStruct, devices: int, *, segments: bool = False
) -> dict[str, int]:
    """Returns the bytes that one device sends for one layer, by pass.

    n - 1 hops of its part of the keys and values (and segments), and in the backward pass as many
    of their gradients, which are kept in at least float32.

    Args:
      keys: shape [B, S, G, K] and type of all keys.
      devices: n.
      segments: whether rows are packed.

    >>> ring_bytes(jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.bfloat16), devices=2)
    {'forward': 128, 'backward': 384}
    """
    B, S, G, K = keys.shape
    share = B * S // devices
    cargo = share * (2 * G * K * keys.dtype.itemsize + 4 * segments)
    gradients = share * 2 * G * K * accumulator(keys.dtype).itemsize
    hops = devices - 1
    return {"forward": hops * cargo, "backward": hops * (cargo + gradients)}


def _make_ring(axis: str, tile: int) -> Callable[..., jax.Array]:
    """Both passes, each a shard_map of its own.

    The derivative rule stands outside of shard_map, so that it does not depend on how that
    transposes replicated values.
    """
    row = P(None, axis)
    inputs = (row, row, row, row, P())

    def forward(q_BTHK, k_BSGK, v_BSGK, segments_BT, window):
        queries, keys = _split(axis, q_BTHK, k_BSGK, v_BSGK, segments_BT)
        q_ZBGRCK = queries.q
        dtype = accumulator(q_ZBGRCK.dtype)
        size = tile_of(q_ZBGRCK.shape[-2], tile)
        # Zeros like the queries vary over the same mesh axes, as a scan asks of its carry.
        zeros = jnp.zeros_like(q_ZBGRCK, dtype)
        minimum = jnp.full_like(zeros[..., 0], jnp.finfo(dtype).min)
        sums = Sums(zeros, minimum, zeros[..., 0])

        def visit(sums: Sums, nothing: None, keys: Keys, pairs: Pairs):
            for mine, theirs in pairs:
                seen = (_at(queries, mine), _at(keys, theirs), window, size)
                sums = _put(sums, mine, attend(_at(sums, mine), *seen))
            return sums, nothing

        sums, _ = _around(axis, visit, sums, None, keys)
        out = (sums.value / sums.total[..., None]).astype(q_BTHK.dtype)
        return _join_queries(out), sums.maximum + jnp.log(sums.total)

    def backward(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, out_BTHK, log_sum_ZBGRC, d_BTHK):
        queries, keys = _split(axis, q_BTHK, k_BSGK, v_BSGK, segments_BT)
        dtype = log_sum_ZBGRC.dtype
        size = tile_of(queries.q.shape[-2], tile)
        G = k_BSGK.shape[2]
        d_ZBGRCK, out_ZBGRCK = (_split_queries(a, G) for a in (d_BTHK, out_BTHK))
        delta_ZBGRC = (d_ZBGRCK.astype(dtype) * out_ZBGRCK.astype(dtype)).sum(axis=-1)
        saved = Saved(d_ZBGRCK, delta_ZBGRC, log_sum_ZBGRC)

        def visit(d_q, d_keys, keys: Keys, pairs: Pairs):
            for mine, theirs in pairs:
                seen = (_at(queries, mine), _at(saved, mine), _at(keys, theirs), window, size)
                new, new_keys = attend_backward(_at(d_q, mine), *seen)
                d_q = _put(d_q, mine, new)
                old_keys = _at(d_keys, theirs)
                d_keys = _put(d_keys, theirs, jax.tree.map(jnp.add, old_keys, new_keys))
            return d_q, d_keys

        d_q = jnp.zeros_like(queries.q, dtype)
        d_keys = (jnp.zeros_like(keys.k, dtype), jnp.zeros_like(keys.v, dtype))
        d_q, d_keys = _around(axis, visit, d_q, d_keys, keys)
        d_k, d_v = (_join_keys(a).astype(k_BSGK.dtype) for a in d_keys)
        return _join_queries(_scale(d_q)).astype(q_BTHK.dtype), d_k, d_v

    run_forward = jax.shard_map(
        forward, in_specs=inputs, out_specs=(row, P(axis)), axis_names={axis}
    )
    run_backward = jax.shard_map(
        backward,
        in_specs=(*inputs, row, P(axis), row),
        out_specs=(row, row, row),
        axis_names={axis},
    )

    @jax.custom_vjp
    def ring(*arguments):
        return run_forward(*arguments)[0]

    def ring_forward(*arguments):
        out, log_sum = run_forward(*arguments)
        return out, (*arguments, out, log_sum)

    def ring_backward(saved, d_BTHK):
        return (
            *run_backward(*(*saved, d_BTHK)),
            None,
            None,
        )  # segments and window have no gradient

    ring.defvjp(ring_forward, ring_backward)
    return ring


def _around(axis: str, visit, state: PyTree, carried: PyTree, keys: Keys) -> tuple[PyTree, PyTree]:
    """Lets the keys of every device visit every device.

    Args:
      axis: the mesh axis.
      visit: `(state, carried, keys, pairs) -> (state, carried)`; the state stays here, what is
        carried goes on with the keys, back to where these came from.
      state: its first value.
      carried: zeros.
      keys: those of this device.
    """
    n, me = lax.axis_size(axis), lax.axis_index(axis)
    C = keys.marks.place.shape[-1]
    hop = [(i, (i + 1) % n) for i in range(n)]

    def send(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: lax.ppermute(a, axis, hop), tree)

    def meet(state, carried, cargo, step):
        source = (me - step) % n
        k, v, segment = cargo
        guests = Keys(k, v, Marks(_places(source, n, C), segment))
        both = jnp.where(source < me, EARLY, LATE)
        state, carried = visit(state, carried, guests, [(LATE, EARLY), (both, both)])
        return state, send(carried)

    def body(carry, step):
        state, carried, cargo = carry
        following = send(cargo)  # on its way while these are looked at
        return (*meet(state, carried, cargo, step), following), None

    first = [(EARLY, EARLY), (LATE, EARLY), (LATE, LATE)]
    state, home = visit(state, carried, keys, first)
    if n == 1:
        return state, home
    cargo = send((keys.k, keys.v, keys.marks.segment))
    steps = jnp.arange(1, n - 1, dtype=jnp.int32)
    (state, carried, cargo), _ = lax.scan(body, (state, carried, cargo), steps)
    state, carried = meet(state, carried, cargo, n - 1)
    return state, jax.tree.map(jnp.add, home, carried)


def _places(device: jax.Array, n: int, C: int) -> jax.Array:
    """True places [Z, C] of the tokens of a device."""
    chunk_Z = jnp.stack([device, 2 * n - 1 - device])
    return chunk_Z[:, None] * C + jnp.arange(C, dtype=chunk_Z.dtype)[None]


def _devices(axis: str) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"ring attention runs over the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    return shape[axis]


def _split(axis: str, q_BTHK, k_BSGK, v_BSGK, segments_BT) -> tuple[Queries, Keys]:
    """Cuts this device's share into its two chunks, a leading axis Z of everything."""
    n, me = lax.axis_size(axis), lax.axis_index(axis)
    C = q_BTHK.shape[1] // 2
    segment_ZBC = None
    if segments_BT is not None:
        segment_ZBC = segments_BT.reshape(-1, 2, C).transpose(1, 0, 2)
    marks = Marks(_places(me, n, C), segment_ZBC)
    q_ZBGRCK = _scale(_split_queries(q_BTHK, k_BSGK.shape[2]))
    k_ZBGCK, v_ZBGCK = (
        a.reshape(a.shape[0], 2, C, *a.shape[2:]).transpose(1, 0, 3, 2, 4) for a in (k_BSGK, v_BSGK)
    )
    return Queries(q_ZBGRCK, marks), Keys(k_ZBGCK, v_ZBGCK, marks)


def _split_queries(q_BTHK: jax.Array, G: int) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    return q_BTHK.reshape(B, 2, T // 2, G, H // G, K).transpose(1, 0, 3, 4, 2, 5)


def _join_queries(q_ZBGRCK: jax.Array) -> jax.Array:
    Z, B, G, R, C, K = q_ZBGRCK.shape
    return q_ZBGRCK.transpose(1, 0, 4, 2, 3, 5).reshape(B, Z * C, G * R, K)


def _join_keys(k_ZBGCK: jax.Array) -> jax.Array:
    Z, B, G, C, K = k_ZBGCK.shape
    return k_ZBGCK.transpose(1, 0, 3, 2, 4).reshape(B, Z * C, G, K)


def _scale(q: jax.Array) -> jax.Array:
    return q * q.shape[-1] ** -0.5


def _at(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def _put(tree: PyTree, index: Any, new: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), tree, new)
