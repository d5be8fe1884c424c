"""Whether an optimizer may run on slices of the parameters: tried out rather than listed.

A server holds a slice of each leaf, laid flat. An optimizer that looks at each number by itself
(SGD, momentum, Adam, AdamW, Lion, RMSProp, AdaGrad, with any schedule) then does exactly what it
does on whole leaves. One that looks at a matrix (Muon, Shampoo, Adafactor) or at a norm (LAMB,
LARS, clipping by the global norm) does not, and would go wrong silently.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any

# The first gradient is huge, so that whatever clips by a norm does; the next are not, so that an
# optimizer which forgives a common factor (Adam on its first step) is found out.
_SCALES = (1e6, 1.0, 0.1)


def check_elementwise(optimizer: optax.GradientTransformation, shapes: PyTree) -> None:
    """Refuses an optimizer that does something else on flat slices than on whole leaves.

    Its state for the given shapes must keep one number for each, or scalars; and three updates of
    small leaves with the same tree are compared with those of their halves.

    Args:
      optimizer: any Optax transformation.
      shapes: the parameters, or their shapes; the tree is what masks and labels go by.

    Raises:
      ValueError: it looks at more than one number at a time, and what to do instead.

    >>> check_elementwise(optax.adamw(1e-3), {"kernel": jnp.ones((4, 4))})
    >>> check_elementwise(optax.lamb(1e-3), {"kernel": jnp.ones((4, 4))})
    Traceback (most recent call last):
    ...
    ValueError: the optimizer does not treat each number by itself (its updates of a slice differ \
from those of the whole), so it cannot run on slices of the parameters; use one that does, such as \
adamw, and clip by the norm with clip=
    """
    if not _same_state(optimizer, shapes):
        raise ValueError(_sentence("its state is not one number for each of theirs"))
    if not _same_updates(optimizer, shapes):
        raise ValueError(_sentence("its updates of a slice differ from those of the whole"))


def _sentence(reason: str) -> str:
    return (
        f"the optimizer does not treat each number by itself ({reason}), so it cannot run on "
        "slices of the parameters; use one that does, such as adamw, and clip by the norm with "
        "clip="
    )


def _same_state(optimizer: optax.GradientTransformation, shapes: PyTree) -> bool:
    """Factored moments are smaller than their leaf, and only for leaves that are large enough."""
    struct = jax.ShapeDtypeStruct
    whole = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), shapes)
    flat = jax.tree.map(lambda leaf: struct((leaf.size,), leaf.dtype), whole)
    of_whole, of_flat = (jax.eval_shape(optimizer.init, tree) for tree in (whole, flat))
    structures: list[Any] = [jax.tree.structure(of_whole), jax.tree.structure(of_flat)]
    if structures[0] != structures[1]:
        return False
    pairs = zip(jax.tree.leaves(of_whole), jax.tree.leaves(of_flat), strict=True)
    return all(a.size == b.size and b.ndim <= 1 for a, b in pairs)


def _same_updates(optimizer: optax.GradientTransformation, shapes: PyTree) -> bool:
    draw = np.random.default_rng(0)
    optimizer = optax.with_extra_args_support(optimizer)

    def small(leaf: Any) -> jax.Array:
        """As many axes as the leaf has, none of them long."""
        shape = tuple(min(size, 3) for size in leaf.shape[:-1]) + (4,) * bool(leaf.shape)
        return jnp.asarray(draw.normal(size=shape))

    def halves(tree: PyTree) -> list[PyTree]:
        cut = jax.tree.map(lambda a: jnp.pad(a.reshape(-1), (0, a.size % 2)).reshape(2, -1), tree)
        return [jax.tree.map(lambda a: a[0], cut), jax.tree.map(lambda a: a[1], cut)]

    def run(params: PyTree, gradients: list[PyTree]) -> list[PyTree]:
        state, found = optimizer.init(params), []
        for grads in gradients:
            updates, state = optimizer.update(
                grads, state, params, value=jnp.float64(1), grads=grads
            )
            params = optax.apply_updates(params, updates)
            found.append(updates)
        return found

    # In float64, so that even a small weight decay stands out from rounding.
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        params = jax.tree.map(small, shapes)
        gradients = [
            jax.tree.map(lambda leaf, s=scale: s * small(leaf), shapes) for scale in _SCALES
        ]
        parts = zip(halves(params), zip(*map(halves, gradients), strict=True), strict=True)
        try:
            compiled = jax.jit(run)
            want = compiled(params, gradients)
            got = [compiled(half, list(grads)) for half, grads in parts]
        except (TypeError, ValueError):
            return False  # it cannot even be run on flat leaves
        want, got = jax.device_get((want, got))
    joined = jax.tree.map(lambda w, a, b: np.concatenate([a, b])[: w.size], want, *got)
    return all(
        np.allclose(j, w.reshape(-1), rtol=1e-9, atol=1e-12 * np.abs(w).max(initial=0.0))
        for w, j in zip(jax.tree.leaves(want), jax.tree.leaves(joined), strict=True)
    )
