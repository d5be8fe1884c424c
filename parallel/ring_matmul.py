"""Matrix products that hide their collectives: one hop of a ring beside each partial product.

`all-gather, then multiply` and `multiply, then reduce-scatter` both split into n products, of which
each needs only what has arrived so far, or yields what can already leave (Wang et al. 2023,
"Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models").
The loops are unrolled, n being the few devices of a tensor axis, and the compiler is free to run a
hop and a product at once. Their derivatives are rings of the same kind, run the other way.

Shapes: B batch, T time, S = T / n of one device, D width, F what the kernel gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from model.linear import Weight, linear


def all_gather_matmul(
    x_BSD: jax.Array, kernels: Sequence[Weight], axis: str = "tensor"
) -> list[jax.Array]:
    """Returns `all_gather(x) @ kernel` [B, T, F] for each kernel, inside shard_map.

    Args:
      x_BSD: this device's part of the time axis.
      kernels: each [D, F], this device's columns.
      axis: the mesh axis.

    >>> mesh = jax.make_mesh((1,), ("tensor",), (jax.sharding.AxisType.Auto,))
    >>> product = jax.shard_map(
    ...     lambda x, w: all_gather_matmul(x, [w])[0],
    ...     mesh=mesh,
    ...     in_specs=(jax.P(None, "tensor"), jax.P(None, "tensor")),
    ...     out_specs=jax.P(None, None, "tensor"),
    ... )
    >>> product(jnp.ones((2, 4, 3)), jnp.ones((3, 5))).shape
    (2, 4, 5)
    """
    n, me = lax.axis_size(axis), lax.axis_index(axis)
    parts: list[list[jax.Array]] = [[] for _ in kernels]
    for step in range(n):
        following = _hop(x_BSD, axis) if step < n - 1 else x_BSD
        for part, kernel in zip(parts, kernels, strict=True):
            part.append(linear(x_BSD, kernel))  # of the device `step` places back
        x_BSD = following
    source = (me - jnp.arange(n, dtype=me.dtype)) % n
    return [_in_order(part, source) for part in parts]


def matmul_reduce_scatter(h_BTF: jax.Array, kernel: Weight, axis: str = "tensor") -> jax.Array:
    """Returns this device's part [B, S, D] of the sum of all `h @ kernel`, inside shard_map.

    Args:
      h_BTF: this device's columns of the left factor.
      kernel: [F, D], this device's rows.
      axis: the mesh axis.

    >>> mesh = jax.make_mesh((1,), ("tensor",), (jax.sharding.AxisType.Auto,))
    >>> product = jax.shard_map(
    ...     matmul_reduce_scatter,
    ...     mesh=mesh,
    ...     in_specs=(jax.P(None, None, "tensor"), jax.P("tensor")),
    ...     out_specs=jax.P(None, "tensor"),
    ... )
    >>> product(jnp.ones((2, 4, 3)), jnp.ones((3, 5))).shape
    (2, 4, 5)
    """
    n, me = lax.axis_size(axis), lax.axis_index(axis)
    S = h_BTF.shape[1] // n

    def partial_sum(step: int) -> jax.Array:
        # The part that reaches its owner with the last hop.
        owner = (me - 1 - step) % n
        return linear(lax.dynamic_slice_in_dim(h_BTF, owner * S, S, axis=1), kernel)

    total = partial_sum(0)
    for step in range(1, n):
        total = _hop(total, axis) + partial_sum(step)
    return total


def _hop(x: jax.Array, axis: str) -> jax.Array:
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _in_order(parts: list[jax.Array], source: jax.Array) -> jax.Array:
    """Lays parts [B, S, F], the i-th of device source[i], along the time axis."""
    n, (B, S, F) = len(parts), parts[0].shape
    stacked_nBSF = jnp.stack(parts)
    # source is its own inverse: source[source[i]] = me - (me - i) = i.
    return stacked_nBSF[source].transpose(1, 0, 2, 3).reshape(B, n * S, F)
