"""Weights and the products with them: the only place where the model touches a kernel.

A weight is a plain array, or a pytree that knows `x @ w` (through `__rmatmul__`), `take(ids)`, `.T`
and its logical `shape`: quantized, low-rank and adapted weights fit without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Weight = Any
Initializer = Callable[..., jax.Array]


def weight(module: nn.Module, name: str, init: Initializer, shape: Sequence[int], dtype) -> Weight:
    """Declares parameter `name` of `module` when initialising, and reads it otherwise.

    Reading does not compare shapes, as `module.param` would: packed storage has another one.

    Raises:
      ValueError: if the parameter is not among the variables that `apply` was given.
    """
    if module.is_initializing():
        return module.param(name, init, tuple(shape), dtype)
    value: Weight = module.get_variable("params", name)
    if value is None:
        path = "/".join((*module.path, name))
        raise ValueError(f"the parameters hold no {path}; were they made for another config?")
    return value


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """Returns `x @ w` in the type of `x`; x is [..., in], w has logical shape [in, out].

    >>> linear(jnp.ones((2, 3)), jnp.eye(3)).shape
    (2, 3)
    """
    return x @ (w.astype(x.dtype) if isinstance(w, jax.Array) else w)


def take(w: Weight, ids: jax.Array, dtype) -> jax.Array:
    """Returns the rows `ids` of a table of logical shape [rows, width], in `dtype`.

    An id outside the table gives NaN, so that a wrong vocabulary shows at once.

    >>> take(jnp.arange(6.0).reshape(3, 2), jnp.array([2]), jnp.float32).tolist()
    [[4.0, 5.0]]
    """
    rows = jnp.take(w, ids, axis=0, mode="fill") if isinstance(w, jax.Array) else w.take(ids)
    return rows.astype(dtype)


class Linear(nn.Module):
    """A kernel [in, out] and, if asked for, a bias [out], applied to x [..., in]."""

    width: int
    init_kernel: Initializer
    biases: bool
    parameter_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.width)
        y = linear(x, weight(self, "kernel", self.init_kernel, shape, self.parameter_dtype))
        if not self.biases:
            return y
        zeros = nn.initializers.zeros_init()
        bias = weight(self, "bias", zeros, shape[1:], self.parameter_dtype)
        return y + along_last(bias, y)


def at_least_float32(dtype: Any) -> Any:
    """Returns float64 for float64, float32 otherwise; strict promotion has no answer of its own.

    >>> at_least_float32(jnp.bfloat16).__name__
    'float32'
    """
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def along_last(v: jax.Array, x: jax.Array) -> jax.Array:
    """Returns vector v [D], in the type of x [..., D], with the rank of x.

    Said aloud so that our code runs under strict rank promotion.
    """
    return v.astype(x.dtype).reshape((1,) * (x.ndim - 1) + v.shape)
