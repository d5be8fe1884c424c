"""Loss terms, and the loss function that they make together.

Shapes: B batch, T time, N positions of one row of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.transformer import Model, features, head
from train.collective_order import after
from train.plugs import (
    Batch,
    Context,
    LossFunction,
    LossTerm,
    Metrics,
    PyTree,
    View,
    WeightTransform,
    merge,
)

MODEL_INPUTS = ("prefix", "source", "source_segments", "source_positions")
"""Arrays of a batch that a model takes by name besides tokens, positions and segments."""


OWN_METRICS = ("loss", "gradient_norm", "tokens", "skipped", "nonfinite_in_a_row", "norms")
"""What a step says besides its terms."""


def cross_entropy(label_smoothing: float = 0.0, *, weight: Any = 1.0) -> LossTerm:
    """-log p(target), summed over the positions with their `weights`.

    A position without a target has weight 0; a target outside of the vocabulary that has a weight
    makes the loss NaN.

    With label smoothing e (Szegedy et al. 2016, arXiv:1512.00567) the target distribution is
    `(1 - e) * onehot + e / V`.

    >>> term = cross_entropy()
    >>> batch = {"targets": jnp.array([1, 0]), "weights": jnp.array([1.0, 0.0])}
    >>> round(float(term.total(View(jnp.zeros((2, 4)), None, None), batch, None)), 4)  # log 4
    1.3863
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        logits_NV = _logits(view)
        if "targets" not in batch:
            raise ValueError(f"cross_entropy needs targets; the batch has {', '.join(batch)}")
        loss_N = jax.nn.logsumexp(logits_NV, axis=-1) - _pick(logits_NV, batch["targets"])
        if label_smoothing:
            uniform_N = jax.nn.logsumexp(logits_NV, axis=-1) - logits_NV.mean(axis=-1)
            loss_N = (1 - label_smoothing) * loss_N + label_smoothing * uniform_N
        return _weighted(loss_N, batch)

    return LossTerm("cross_entropy", total, weight=weight, padded=not label_smoothing)


def z_loss(*, weight: Any = 1e-4) -> LossTerm:
    """log(Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311; weight 1e-4 there)."""

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        return _weighted(jnp.square(jax.nn.logsumexp(_logits(view), axis=-1)), batch)

    return LossTerm("z_loss", total, weight=weight, padded=True)


def mean_squared_error(
    predict: Callable[[View], jax.Array], target: str = "values", *, weight: Any = 1.0
) -> LossTerm:
    """(prediction - target)^2, averaged over the examples.

    Args:
      predict: `view -> [B]`; sees the features of the batch and the weights.
      target: name of the batch field with what should have come out, float32 [B].
      weight: a number or a function of the step.

    >>> term = mean_squared_error(lambda view: view.features)
    >>> batch = {"values": jnp.array([1.0, 2.0])}
    >>> float(term.total(View(None, jnp.array([1.0, 4.0]), None), batch, None) / term.count(batch))
    2.0
    """

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        return jnp.square(predict(view) - batch[target]).sum()

    def count(batch: Batch) -> jax.Array:
        return jnp.float32(batch[target].size)

    return LossTerm("mean_squared_error", total, count, weight, over="features")


def loss_function(
    model: Model,
    terms: Sequence[LossTerm],
    transforms: Sequence[WeightTransform] = (),
    chunk: int | None = None,
) -> LossFunction:
    """Returns `(params, batch, context) -> (loss, metrics)`, the sum of all terms.

    Args:
      model: the Transformer, or an encoder-decoder; it is also given what the batch has of
        `MODEL_INPUTS`.
      terms: the parts of the loss; names must differ.
      transforms: applied to the parameters in order, after `context.frozen["params"]` was merged
        into them.
      chunk: positions whose logits exist at a time, at least one of every row; the backward pass
        computes them again, so that [B, T, V] is never held. None for all at once. The loss is the
        same. On a mesh, every device has those of its own rows and its own stretch of time.

    Raises:
      ValueError: without terms, for two of one name or one of the step's own metrics, or a chunk
        below 1.

    >>> from model.build import build_model
    >>> from model.presets import gpt2_tiny
    >>> model, tokens = build_model(gpt2_tiny(dropout=0.0)), jnp.arange(8).reshape(1, 8)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> batch = {"tokens": tokens, "targets": tokens + 1, "weights": jnp.ones((1, 8))}
    >>> terms = [cross_entropy(), z_loss()]
    >>> context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
    >>> value, metrics = loss_function(model, terms)(params, batch, context)
    >>> sorted(metrics), bool(value > metrics["cross_entropy"])
    (['cross_entropy', 'loss', 'z_loss'], True)
    """
    if wrong := [term for term in terms if not isinstance(term, LossTerm)]:
        raise ValueError(f"a loss is made of terms, such as cross_entropy(), not of {wrong[0]!r}")
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a loss needs terms of different names, not {names}")
    if taken := [name for name in names if name in OWN_METRICS]:
        raise ValueError(
            f"a term is called {taken[0]!r}, which the step's own metrics are; they are "
            f"{', '.join(OWN_METRICS)}: give it another name"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"the loss chunk is {chunk} positions; it must be at least 1")
    over_logits = [term for term in terms if term.over == "logits"]
    padded = all(term.padded for term in over_logits)
    capture = tuple(sorted({name for term in terms for name in term.capture}))

    def loss(params: PyTree, batch: Batch, context: Context) -> tuple[jax.Array, Metrics]:
        batch = after(batch, context.counts)
        weights = merge(params, context.frozen.get("params", {}))
        for transform in transforms:
            weights = transform.apply(weights, context)
        batch = _prepared(terms, batch, context)
        dropout_key = context.rng if model.config.random else None
        more: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        out = features(
            model,
            weights,
            batch["tokens"],
            batch.get("positions"),
            batch.get("segments"),
            capture=capture,
            dropout_key=dropout_key,
            **more,
        )
        totals = {
            term.name: term.total(View(None, out, weights), batch, context)
            for term in terms
            if term.over == "features"
        }

        def over_row(logits_NV: jax.Array, batch_N: Batch) -> dict[str, jax.Array]:
            view = View(logits_NV, None, weights)
            return {term.name: term.total(view, batch_N, context) for term in over_logits}

        # Rows stay apart: were they joined with time, each device of a mesh that divides both
        # would gather all positions and compute the whole head.
        def over_chunk(rows: Batch) -> dict[str, jax.Array]:
            logits_BNV = head(model, weights, rows["final"], padded=padded)
            batch_BN = {name: array for name, array in rows.items() if name != "final"}
            sums = jax.vmap(over_row)(logits_BNV, batch_BN)
            return jax.tree.map(lambda sums_B: sums_B.sum(), sums)

        if over_logits:
            rows = {"final": out.final, **_by_position(batch)}
            totals |= _sum_chunks(over_chunk, rows, chunk)
        means = {name: total / context.counts[name] for name, total in totals.items()}
        value = sum(_weight(term, context.step) * means[term.name] for term in terms)
        return jnp.asarray(value), {"loss": value, **means}

    # A gradient function that takes examples apart divides each by its own counts.
    loss.counts = lambda batch: counts_of(terms, batch)  # type: ignore[attr-defined]
    return loss


def counts_of(terms: Sequence[LossTerm], batch: Batch) -> dict[str, jax.Array]:
    """Returns what each term divides by: its count over the batch, at least 1."""
    return {term.name: jnp.maximum(term.count(batch), 1.0) for term in terms}


def _prepared(terms: Sequence[LossTerm], batch: Batch, context: Context) -> Batch:
    """Returns the batch with what the terms have prepared, each function called once."""
    prepared = dict(batch)
    for prepare in dict.fromkeys(term.prepare for term in terms if term.prepare is not None):
        arrays = jax.lax.stop_gradient(prepare(batch, context))
        if taken := sorted(set(arrays) & set(prepared)):
            raise ValueError(
                f"the batch has {taken} already, and a term prepares them; give them other names"
            )
        prepared |= arrays
    return prepared


def _by_position(batch: Batch) -> Batch:
    """Returns the arrays of the batch that have one row for each position."""
    shape = batch["tokens"].shape
    return {name: array for name, array in batch.items() if array.shape[:2] == shape}


def _sum_chunks(over_chunk, rows: Batch, chunk: int | None) -> dict[str, jax.Array]:
    B, T = rows["final"].shape[:2]
    if chunk is None or chunk >= B * T:
        return over_chunk(rows)
    chunks = -(-T // max(chunk // B, 1))
    length = -(-T // chunks)

    # Each chunk takes every chunks-th position: so a device that holds a stretch of time has its
    # part of every chunk. What is padded has weight 0.
    def split(a: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * length - T)] + [(0, 0)] * (a.ndim - 2)
        return jnp.moveaxis(jnp.pad(a, padding).reshape(B, length, chunks, *a.shape[2:]), 2, 0)

    @jax.checkpoint
    def body(sums, part):
        return jax.tree.map(jnp.add, sums, over_chunk(part)), None

    parts = {name: split(a) for name, a in rows.items()}
    shapes = jax.eval_shape(over_chunk, {name: a[0] for name, a in parts.items()})
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]


def _logits(view: View) -> jax.Array:
    assert view.logits is not None
    return view.logits


def _pick(logits_NV: jax.Array, ids_N: jax.Array) -> jax.Array:
    """logits[n, ids[n]], by comparison: its gradient fuses, that of a gather is a slow scatter.

    NaN where there is no such token, which would otherwise train as a target without a logit.
    """
    V = logits_NV.shape[-1]
    here_NV = jnp.arange(V)[None] == ids_N[:, None]
    picked_N = jnp.where(here_NV, logits_NV, 0).sum(axis=-1)
    return jnp.where((ids_N >= 0) & (ids_N < V), picked_N, jnp.nan)


def _weighted(loss_N: jax.Array, batch: Batch) -> jax.Array:
    """The weighted sum; positions without weight count nothing, whatever they hold."""
    weights_N = batch["weights"].astype(loss_N.dtype)
    return jnp.where(weights_N > 0, loss_N * weights_N, 0).sum()


def _weight(term: LossTerm, step: jax.Array) -> Any:
    return term.weight(step) if callable(term.weight) else term.weight
