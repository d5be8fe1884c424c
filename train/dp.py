"""Differentially private gradients: each example's is clipped, noise is added to their sum.

    g = (sum_i g_i min(1, C / |g_i|) + C sigma z) / B,   z ~ N(0, 1)

DP-SGD, Abadi et al. 2016 (arXiv:1607.00133), algorithm 1. g_i is the gradient of the loss of row i
alone, divided by that row's own counts, so that no example has a say in what becomes of another. B
is the number of rows, those without weight included, whatever they hold. Everything that follows
(any optimizer, clipping of g, averages) is post-processing and costs no privacy; what is logged
(losses, `clipped`), what an evaluation picks, and a tokenizer trained on the rows are not private.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.optimizers.wide import widened
from train.plugs import Batch, Context, GradientFunction, LossFunction, Metrics, PyTree

# Folded into the step's key for the noise, so that its draws are not those of dropout: the number
# of no row.
_NOISE = 0x7FFF_FFD9


def per_example(clip: float, noise: float, micro_batches: int = 1) -> GradientFunction:
    """Returns the gradient function of DP-SGD.

    All gradients of a micro-batch are held at once, rows times what trains: private tuning wants
    little to train, or many micro-batches.

    Args:
      clip: C, the largest norm of an example's gradient over all parameters.
      noise: sigma, the noise's standard deviation in units of C; 0 is clipping alone.
      micro_batches: parts of the rows, one after the other; noise is added once.

    Raises:
      ValueError: a clip or noise that is none; when traced, rows that do not divide, or a loss that
        does not say what it counts (`train.losses.loss_function` does).

    >>> def loss(params, batch, context):
    ...     value = (params * batch["tokens"]).sum()
    ...     return value, {"loss": value}
    >>> loss.counts = lambda batch: {}
    >>> context = Context(jnp.int32(0), jax.random.key(0), {}, {}, {})
    >>> batch = {"tokens": jnp.array([[0.5], [8.0]])}
    >>> grads, metrics = per_example(1.0, 0.0)(loss, jnp.float32(1), batch, context)
    >>> float(grads), float(metrics["clipped"])  # (0.5 + 1) / 2
    (0.75, 0.5)
    """
    if not clip > 0 or not noise >= 0:
        raise ValueError(f"clip is {clip} and noise {noise}; they must be above 0 and at least 0")

    def apply(
        loss: LossFunction, params: PyTree, batch: Batch, context: Context
    ) -> tuple[PyTree, Metrics]:
        counts: Any = getattr(loss, "counts", None)
        rng = context.rng
        if counts is None or rng is None:
            raise ValueError(
                "private gradients need a loss that says what it counts in a batch, and a key; use "
                "those of the training step"
            )
        rows = batch["tokens"].shape[0]
        if rows % micro_batches:
            raise ValueError(
                f"a batch of {rows} rows does not divide into {micro_batches} micro-batches; make "
                f"the batch a multiple of {micro_batches}"
            )

        def one(row: Batch, number: jax.Array) -> tuple[PyTree, Metrics]:
            alone = {name: array[None] for name, array in row.items()}
            key = jax.random.fold_in(rng, number)
            own = context._replace(rng=key, counts=counts(alone))
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, alone, own)
            grads = jax.tree.map(_wide, grads)
            norm = optax.tree.norm(widened(grads))
            factor = jnp.minimum(jnp.ones_like(norm), clip / jnp.maximum(norm, 1e-30))
            clipped = (norm > clip).astype(jnp.float32)
            return jax.tree.map(lambda g: g * factor, grads), {**metrics, "clipped": clipped}

        def part(sums: PyTree, numbered: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
            made = jax.vmap(one)(*numbered)
            return jax.tree.map(lambda s, n: s + n.sum(axis=0).astype(s.dtype), sums, made), None

        parts = jax.tree.map(
            lambda a: a.reshape(micro_batches, rows // micro_batches, *a.shape[1:]),
            (batch, jnp.arange(rows)),
        )
        first = jax.tree.map(lambda a: a[0, 0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *first))
        (sums, metrics), _ = jax.lax.scan(part, zeros, parts)
        if noise:
            sums = _with_noise(jax.random.fold_in(rng, _NOISE), sums, clip * noise)
        grads = jax.tree.map(lambda s, p: (s / rows).astype(p.dtype), sums, params)
        return grads, jax.tree.map(lambda m: m / rows, metrics)

    return apply


def _wide(grad: jax.Array) -> jax.Array:
    return grad.astype(jnp.promote_types(grad.dtype, jnp.float32))


def _with_noise(key: jax.Array, sums: PyTree, deviation: float) -> PyTree:
    treedef: Any
    leaves, treedef = jax.tree.flatten(sums)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + deviation * jax.random.normal(one, leaf.shape, leaf.dtype)
        for leaf, one in zip(leaves, keys, strict=True)
    ]
    return treedef.unflatten(noisy)
