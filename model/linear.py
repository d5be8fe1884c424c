"""Weights and the products with them: the only place where the model touches a kernel.

A weight is a plain array, or a pytree that knows `x @ w` (through `__rmatmul__`), `take(ids)`, `.T`
and its logical `shape`: quantized, low-rank and adapted weights fit without a change here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import lookup

Weight = Any
Initializer = Callable[..., jax.Array]


def weight(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: Sequence[int],
    dtype,
    *,
    vocabulary_axis: int | None = None,
) -> Weight:
    """Declares parameter `name` of `module` when initialising, and reads it otherwise.

    Logical shapes are compared, not those of what is stored: packed storage has another one. Along
    the axis of a vocabulary, rows that stand for no token may follow.

    Raises:
      ValueError: if the parameter is not among the variables that `apply` was given, or has another
        shape.
    """
    if module.is_initializing():
        return module.param(name, init, tuple(shape), dtype)
    value: Weight = module.get_variable("params", name)
    path = "/".join((*module.path, name))
    if value is None:
        raise ValueError(f"the parameters hold no {path}; were they made for another config?")
    fits = len(value.shape) == len(shape) and all(
        has == wanted or (axis == vocabulary_axis and has > wanted)
        for axis, (has, wanted) in enumerate(zip(value.shape, shape, strict=True))
    )
    # Inside a shard_map a device has its part alone.
    if not fits and not jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"the parameters hold {path} of shape {list(value.shape)} where this config has "
            f"{list(shape)}; were they made for another config?"
        )
    return value


def cpu_forms(platform: str | None = None) -> bool:
    """Whether to compute in the forms that XLA:CPU runs fastest; results differ by rounding alone.

    Args:
      platform: what the program is for ("cpu", "gpu", "tpu"); by default that of the mesh it is
        traced under (`jax.set_mesh`), which need not be here, or the backend. A CPU that plays
        several devices rehearses another platform's program, and is given that one's forms. So is
        the inside of a `shard_map`: where x differs by device and w does not, the gradient of w is
        summed by JAX, which a gradient of our own would have to do itself.

    >>> cpu_forms("cpu"), cpu_forms("gpu")
    (True, False)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return False
    if platform is not None:
        return platform == "cpu"
    here = jax.default_backend() == "cpu" and jax.device_count() == 1
    # A mesh that does not say where it is, is not known to be here.
    return here and (mesh.empty or getattr(mesh.abstract_device, "platform", None) == "cpu")


def gpu_forms(platform: str | None = None) -> bool:
    """Whether to compute in the forms that need a GPU of NVIDIA with its cuDNN.

    Whether cuDNN is there can only be known on the machine itself: a program that is made elsewhere
    to be carried to a GPU has the forms that run on any.

    Args:
      platform: what the program is for ("cpu", "gpu", "tpu"); by default that of the mesh it is
        traced under, or the backend.

    >>> gpu_forms("tpu")
    False
    """
    if platform not in (None, "gpu", "cuda") or jax.default_backend() != "gpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    there = mesh.empty or getattr(mesh.abstract_device, "platform", None) == "gpu"
    return there and _cuda_version() >= OLDEST_CUDA_DEVICE


def recomputed_on_gpu(
    function: Callable[[jax.Array], jax.Array], platform: str | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function in the form whose backward pass moves the fewest bytes.

    On a GPU it is computed again in the backward pass, so that nothing but its input is kept: then
    XLA makes GELU part of the product before it. In a step of GPT-2 124M on 32 x 1,024 tokens that
    is 0.8 GB less to read and write a layer, by the program compiled for an H100. Elsewhere it is
    the function as it is.

    Args:
      function: of single numbers, applied to an array.
      platform: what the program is for, see `gpu_forms`.

    >>> recomputed_on_gpu(jax.nn.gelu, "cpu") is jax.nn.gelu
    True
    """
    return jax.checkpoint(function) if gpu_forms(platform) else function


GPU_LOOKUP: lookup.Form = "blocks"
OLDEST_CUDA_DEVICE = (8, 0)  # compute capability from which cuDNN has a fused attention


@functools.cache
def _cuda_version() -> tuple[int, ...]:
    """The compute capability of the first device; (0,) where it is none of CUDA's."""
    device = jax.devices()[0]
    if "cuda" not in getattr(device.client, "platform_version", "").lower():
        return (0,)
    return tuple(int(part) for part in str(device.compute_capability).split("."))


def linear(x: jax.Array, w: Weight, platform: str | None = None) -> jax.Array:
    """Returns `x @ w` in the type of `x`; x is [..., in], w has logical shape [in, out].

    >>> linear(jnp.ones((2, 3)), jnp.eye(3)).shape
    (2, 3)
    """
    if not isinstance(w, jax.Array):
        return x @ w
    if cpu_forms(platform) and x.ndim > 1:
        return _linear_cpu(x, w)
    return x @ w.astype(x.dtype)


@jax.custom_vjp
def _linear_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` whose gradient makes dy real once, and whose dw is x' dy as it is to be stored.

    XLA:CPU otherwise recomputes dy, element by element with a stride, inside the transpose that
    feeds dw: for the residual stream that is every branch above, added up again for each layer.
    """
    return _linear_forward(x, w)[0]


def _linear_forward(x, w):
    y = product(x.reshape(-1, x.shape[-1]), w.astype(x.dtype), (1, 0), "cpu")
    return y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[-1]), (x, w)


def _linear_backward(saved, dy):
    x, w = saved
    dy = real(dy.reshape(-1, dy.shape[-1]))
    dx = product(dy, w.astype(x.dtype), (1, 1), "cpu")
    dw = product(x.reshape(-1, x.shape[-1]), dy, (0, 0), "cpu")
    return dx.astype(x.dtype).reshape(x.shape), dw.astype(w.dtype)


_linear_cpu.defvjp(_linear_forward, _linear_backward)


def product(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], platform: str | None = None
) -> jax.Array:
    """Returns the sum over an axis of each of two matrices of one type, in float32 at least.

    Of operands in bfloat16, XLA:CPU has a fast product for sums in float32 only (it uses the tiles
    of processors that have them, and is then five times as fast as that of float32), and for a left
    operand that is summed over its last axis. It makes another one of it element by element, unless
    that is made real here.

    Args:
      a: matrix.
      b: matrix.
      axes: of a and b, over which to sum.
      platform: what the program is for, see `cpu_forms`.

    >>> x = jnp.ones((4, 2), jnp.bfloat16)
    >>> product(x, x, (0, 0)).dtype.name, product(x, x, (0, 0)).tolist()
    ('float32', [[4.0, 4.0], [4.0, 4.0]])
    """
    if axes[0] == 0 and a.dtype == jnp.bfloat16 and cpu_forms(platform):
        a, axes = real(a.T), (1, axes[1])
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=at_least_float32(a.dtype))


def real(x: jax.Array) -> jax.Array:
    """Returns x, as an array that XLA:CPU computes once and fuses into nothing that reads it.

    A conditional on a run-time value does it (JAX itself removes one whose branches are the same);
    `optimization_barrier` is taken out before fusion.
    """
    return jax.lax.cond(x.reshape(-1)[0] > 0, lambda x: x, lambda x: x + 0, x)


def take(w: Weight, ids: jax.Array, dtype, gradient: lookup.Form | None = None) -> jax.Array:
    """Returns the rows `ids` of a table of logical shape [rows, width], in `dtype`.

    An id outside the table gives NaN, so that a wrong vocabulary shows at once.

    Args:
      w: the table.
      ids: int32, of any shape.
      dtype: of what is returned.
      gradient: how the gradient of the table is made, see `model.lookup`; by default as JAX makes
        it, and on one GPU by `GPU_LOOKUP`.

    >>> take(jnp.arange(6.0).reshape(3, 2), jnp.array([2]), jnp.float32).tolist()
    [[4.0, 5.0]]
    """
    if not isinstance(w, jax.Array):
        return w.take(ids).astype(dtype)
    if gradient is None and gpu_forms() and _on_one_device():
        gradient = GPU_LOOKUP
    if gradient is None:
        return jnp.take(w, ids, axis=0, mode="fill").astype(dtype)
    return lookup.lookup(w, ids, dtype, gradient)


def _on_one_device() -> bool:
    """Elsewhere, what sorts tokens would first gather them, or its gradient ask to be summed."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size <= 1 and not mesh.manual_axes


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
