"""The rows of a table by their ids, with a gradient for GPUs on which plain additions are slow.

The gradient of a lookup adds a row of dy to the table for each token. On a GPU that is a scatter
whose additions are atomic, and some compilers (jaxlib 0.10.2 to 0.11.0 in float32, most in
bfloat16) make each of them a loop that compares and swaps: where many tokens are the same, as in
any text, it was seen to take hundreds of times as long. The forms here are equal but for rounding.

Shapes: N tokens, V rows of the table, D width, C tokens of a block.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

Form = Literal["scatter", "sorted", "blocks", "one_hot"]
BLOCK = 128  # tokens, sorted by id, whose equal ones are summed by one product


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike, form: Form):
    """Returns the rows `ids` of a table in `dtype`; an id outside of it gives NaN.

    The gradient of the table is in its own type; that of its rows comes in `dtype`.

    Args:
      table_VD: the table.
      ids: int32, of any shape.
      dtype: of what is returned.
      form: of the gradient: "scatter" adds row after row, "sorted" the same in the order of the
        ids, "blocks" sums equal ids of each block of sorted ones first, so that a token that comes
        n times is added n / 128 times, and "one_hot" is a product with no scatter at all, at the
        cost of the head's.

    >>> table = jnp.arange(6.0).reshape(3, 2)
    >>> lookup(table, jnp.array([2]), jnp.float32, "blocks").tolist()
    [[4.0, 5.0]]
    """
    return jnp.take(table_VD, ids, axis=0, mode="fill").astype(dtype)


def _forward(table_VD, ids, dtype, form):
    empty_0D = jnp.zeros((0, *table_VD.shape[1:]), table_VD.dtype)
    return lookup(table_VD, ids, dtype, form), (ids, empty_0D, table_VD.shape[0])


def _backward(dtype, form, saved, dy):
    ids, like, rows = saved
    gradient = GRADIENTS[form](ids.reshape(-1), dy.reshape(-1, dy.shape[-1]), rows)
    return gradient.astype(like.dtype), None


lookup.defvjp(_forward, _backward)


def scatter(ids_N: jax.Array, dy_ND: jax.Array, rows: int) -> jax.Array:
    """Adds dy row after row, in float32."""
    zeros_VD = jnp.zeros((rows, dy_ND.shape[1]), jnp.float32)
    return zeros_VD.at[ids_N].add(dy_ND.astype(jnp.float32), mode="drop")


def in_order(ids_N: jax.Array, dy_ND: jax.Array, rows: int) -> jax.Array:
    """The same in the order of the ids: equal ones lie together."""
    ids_N, order_N = _sorted(ids_N)
    zeros_VD = jnp.zeros((rows, dy_ND.shape[1]), jnp.float32)
    added = dy_ND[order_N].astype(jnp.float32)
    return zeros_VD.at[ids_N].add(added, mode="drop", indices_are_sorted=True)


def in_blocks(ids_N: jax.Array, dy_ND: jax.Array, rows: int) -> jax.Array:
    """Sums equal ids within blocks of C sorted ones by a product, then adds what is left.

    In block b let r_i be the number of ids below that of token i: tokens of one id share it. The
    product [r_i = r] dy_i gives row r of the block the sum of its id; rows r that no token has are
    sent past the end of the table and dropped.
    """
    N, D = dy_ND.shape
    missing = -N % BLOCK
    ids_N = jnp.pad(ids_N, (0, missing), constant_values=rows)
    ids_N, order_N = _sorted(ids_N)
    sorted_ND = jnp.take(dy_ND, order_N, axis=0, mode="fill", fill_value=0)  # what pads is zero
    ids_BC, dy_BCD = ids_N.reshape(-1, BLOCK), sorted_ND.reshape(-1, BLOCK, D)
    begins_BC = jnp.pad(ids_BC[:, 1:] != ids_BC[:, :-1], ((0, 0), (1, 0)))
    rank_BC = jnp.cumsum(begins_BC.astype(jnp.int32), axis=1)
    is_BRC = jnp.arange(BLOCK)[None, :, None] == rank_BC[:, None, :]
    sums_BRD = jnp.einsum(
        "brc,bcd->brd",
        is_BRC.astype(dy_ND.dtype),
        dy_BCD,
        precision=_precision(dy_ND.dtype),
        preferred_element_type=jnp.float32,
    )
    ids_BR = jnp.where(is_BRC, ids_BC[:, None, :], -1).max(axis=2)
    ids_BR = jnp.where(ids_BR < 0, rows, ids_BR)
    zeros_VD = jnp.zeros((rows, D), jnp.float32)
    return zeros_VD.at[ids_BR.reshape(-1)].add(sums_BRD.reshape(-1, D), mode="drop")


def one_hot(ids_N: jax.Array, dy_ND: jax.Array, rows: int) -> jax.Array:
    """The product of [id_n = v] with dy: no scatter."""
    is_NV = (ids_N[:, None] == jnp.arange(rows)[None]).astype(dy_ND.dtype)
    return jax.lax.dot_general(
        is_NV,
        dy_ND,
        (((0,), (0,)), ((), ())),
        precision=_precision(dy_ND.dtype),
        preferred_element_type=jnp.float32,
    )


GRADIENTS = {"scatter": scatter, "sorted": in_order, "blocks": in_blocks, "one_hot": one_hot}


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Sums of float32 stay such; a GPU would else round what it multiplies."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _sorted(ids_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the ids in order, and which place each came from."""
    places_N = jnp.arange(ids_N.shape[0], dtype=jnp.int32)
    ids, order = jax.lax.sort((ids_N.astype(jnp.int32), places_N), num_keys=1)
    return ids, order
