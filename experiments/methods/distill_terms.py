"""The losses of `compress.distillation` as terms of the step, with a teacher that does not train.

The teacher reads each micro-batch once, before the loss is cut into chunks of positions; its head
is applied a chunk at a time, like the student's, so that its [B, T, V] is never held.

Shapes: B batch, T time, D width, N positions of a chunk, V vocabulary, P pairs of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress.distillation.features import HIDDEN_LOSSES, over_pairs
from compress.distillation.logits import Divergence
from compress.distillation.maps import attention_kl, relation_kl
from model.transformer import Transformer, features, head
from train.losses import MODEL_INPUTS
from train.plugs import Batch, Context, LossTerm, View

TEACHER = "teacher"
"""Where the teacher's parameters lie in `frozen`."""

PROJECTION = "distil_projection"
"""Where the projection of the student's hidden states lies in `frozen`, or, if it trains, in the
parameters."""

FROM_DATA = ("cross_entropy", "classification", "regression", "span")
"""Names of the terms that compare with the data: of text, and of the heads of tasks."""

Knots = Sequence[float]
Prepare = Callable[[Batch, Context], Batch]


def over_run(knots: Knots, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the function of the step that goes through the knots, evenly spaced, in lines.

    The first step has the first knot, the last step the last one.

    >>> weight = over_run((1.0, 0.0), steps=5)
    >>> [float(weight(jnp.int32(t))) for t in (0, 1, 4)]
    [1.0, 0.75, 0.0]
    """
    values = jnp.array(knots, jnp.float32)

    def at(step: jax.Array) -> jax.Array:
        share = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
        places = jnp.linspace(0, 1, len(knots), dtype=jnp.float32)
        return jnp.interp(share, places, values)

    return at


def scaled(term: LossTerm, factor: Any) -> LossTerm:
    """Returns what is learned from the data itself, its weight times a function of the step; other
    terms as they are."""
    if term.name not in FROM_DATA:
        return term
    own = term.weight

    def weight(step: jax.Array) -> jax.Array:
        return factor(step) * (own(step) if callable(own) else own)

    return dataclasses.replace(term, weight=weight)


def reads(teacher: Transformer, capture: Sequence[str] = ()) -> Prepare:
    """Returns the `prepare` of all terms of one teacher: what it computes for the micro-batch.

    Args:
      teacher: the model of the parameters in `frozen`.
      capture: what the terms need besides its last features, as in `model.transformer.features`.
    """

    def prepare(batch: Batch, context: Context) -> Batch:
        if TEACHER not in context.frozen:
            raise ValueError(
                f"the teacher's parameters are to lie in frozen[{TEACHER!r}]; frozen holds "
                f"{', '.join(context.frozen) or 'nothing'}"
            )
        more: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        out = features(
            teacher,
            context.frozen[TEACHER],
            batch["tokens"],
            batch.get("positions"),
            batch.get("segments"),
            capture=capture,
            **more,
        )
        arrays = {"teacher_final": out.final}
        if out.hidden is not None:
            arrays["teacher_hidden"] = out.hidden
        if out.attention is not None:
            arrays |= {f"teacher_{name}": a for name, a in out.attention.items()}
        return arrays

    return prepare


def logits_term(
    teacher: Transformer,
    prepare: Prepare,
    divergence: Divergence,
    *,
    temperature: Callable[[jax.Array], Any] = lambda step: 1.0,
    weight: Any = 1.0,
) -> LossTerm:
    """The divergence of the next-token distributions, averaged over the positions with loss.

    Args:
      teacher: the model of the parameters in `frozen`.
      prepare: from `reads`.
      divergence: from `compress.distillation.logits`.
      temperature: function of the step.
      weight: a number or a function of the step.

    >>> import optax
    >>> from compress.distillation.logits import forward_kl
    >>> from model.presets import gpt2_tiny
    >>> from train.losses import cross_entropy
    >>> from train.step import init_state, make_train_step
    >>> tokens = jnp.arange(8).reshape(1, 8)
    >>> student, teacher = Transformer(gpt2_tiny(dropout=0.0)), Transformer(gpt2_tiny(layers=3))
    >>> key, tx = jax.random.key(0), optax.sgd(0.1)
    >>> params = student.init(key, tokens)["params"]
    >>> frozen = {TEACHER: teacher.init(key, tokens)["params"]}
    >>> terms = [cross_entropy(weight=0.5), logits_term(teacher, reads(teacher), forward_kl)]
    >>> batch = {"tokens": tokens, "targets": tokens + 1, "weights": jnp.ones((1, 8))}
    >>> state = init_state(key, params, tx, frozen=frozen)
    >>> _, metrics = jax.jit(make_train_step(student, terms, tx))(state, frozen, batch)
    >>> bool(metrics["distil_logits"] > 0), bool(metrics["skipped"])
    (True, False)
    """

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.logits is not None
        logits_NV = head(teacher, context.frozen[TEACHER], batch["teacher_final"])
        logits_NV = jax.lax.stop_gradient(logits_NV)
        T = temperature(context.step)
        return divergence(view.logits, logits_NV, batch["weights"], T)

    return LossTerm("distil_logits", total, weight=weight, prepare=prepare)


def hidden_term(
    prepare: Prepare, loss: str, pairs: Sequence[tuple[int, int]], *, weight: Any = 1.0
) -> LossTerm:
    """The mean loss of hidden states over the pairs of layers.

    Args:
      prepare: from `reads`, with "hidden" captured.
      loss: key of `compress.distillation.features.HIDDEN_LOSSES`.
      pairs: (student layer, teacher layer), from 1.
      weight: a number or a function of the step.
    """

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.features is not None
        projection = context.frozen.get(PROJECTION, {}).get("kernel")
        if PROJECTION in view.weights:  # it trains
            projection = view.weights[PROJECTION]["projection"]

        def one(student_BTD: jax.Array, teacher_BTE: jax.Array) -> jax.Array:
            return HIDDEN_LOSSES[loss](student_BTD, teacher_BTE, batch["weights"], projection)

        return over_pairs(one, view.features.hidden, batch["teacher_hidden"], pairs)

    return LossTerm(
        "distil_hidden",
        total,
        weight=weight,
        over="features",
        capture=("hidden",),
        prepare=prepare,
    )


def attention_term(
    prepare: Prepare, pairs: Sequence[tuple[int, int]], *, weight: Any = 1.0
) -> LossTerm:
    """The mean divergence of attention maps over the pairs of layers.

    Args:
      prepare: from `reads`, with "attention" captured.
      pairs: (student layer, teacher layer), from 1.
      weight: a number or a function of the step.
    """
    return _maps_term("distil_attention", prepare, pairs, attention_kl, weight)


def relation_term(
    prepare: Prepare, pairs: Sequence[tuple[int, int]], heads: int, *, weight: Any = 1.0
) -> LossTerm:
    """The mean divergence of q-q, k-k and v-v relations over the pairs of layers.

    Args:
      prepare: from `reads`, with "attention" captured.
      pairs: (student layer, teacher layer), from 1.
      heads: relation heads.
      weight: a number or a function of the step.
    """

    def loss(student, teacher, weights_BT, segments_BT):
        return relation_kl(student, teacher, weights_BT, segments_BT, heads=heads)

    return _maps_term("distil_relation", prepare, pairs, loss, weight)


def _maps_term(name: str, prepare: Prepare, pairs, loss: Callable[..., jax.Array], weight: Any):
    places = [(student - 1, teacher - 1) for student, teacher in pairs]

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.features is not None
        if name == "distil_attention" and "prefix" in batch:
            raise ValueError(
                "attention is compared as causal maps, and rows of this task begin with a prefix "
                "that sees all of itself; match relations instead"
            )
        teacher = {part: batch[f"teacher_{part}"] for part in ("q", "k", "v")}

        def one(student: dict[str, jax.Array], teacher: dict[str, jax.Array]) -> jax.Array:
            return loss(student, teacher, batch["weights"], batch.get("segments"))

        return over_pairs(one, view.features.attention, teacher, places)

    return LossTerm(
        name, total, weight=weight, over="features", capture=("attention",), prepare=prepare
    )
