"""Distillation from what a teacher said before: its answers are read from disk, it does not run.

    cache = write_cache(folder, model, params, batches, kind, identity)     once
    term = cached_term(kind)                                                in the loss
    batch = with_targets(cache, batch)                                      before each step

Shapes: B batch, T time, N positions of a chunk, V vocabulary, k kept tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from compress.distillation.teacher_cache import TeacherCache, look_up, write_teacher_cache
from compress.distillation.teacher_targets import (
    sampled_cross_entropy,
    sampled_targets,
    top_k_kl,
    top_k_targets,
)
from model.transformer import Transformer, features, head
from train.plugs import Batch, Context, LossTerm, View
from train.tree_store import tree_hash

PREFIX = "teacher_"


@dataclass(frozen=True)
class Kept:
    """What is kept of the teacher's distribution.

    Attributes:
      kind: "top_k" with the mass of the others, or "sampled", which is unbiased.
      k: tokens kept of each position.
      temperature: of teacher and student.
      proposal: exponent of what is drawn from, for "sampled".
      seed: of the draws.
    """

    kind: Literal["top_k", "sampled"] = "top_k"
    k: int = 32
    temperature: float = 1.0
    proposal: float = 1.0
    seed: int = 0


def identity_of(kept: Kept, teacher: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a cache is written for and opened with.

    Args:
      kept: what is kept.
      teacher: parameters of the teacher.
      data: JSON values that say what it reads: fingerprints, length of the windows, boundaries.
    """
    return {"teacher": tree_hash(teacher), **asdict(kept), **data}


def write_cache(
    folder: str | os.PathLike[str],
    teacher: Transformer,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    kept: Kept,
    data: Mapping[str, Any],
) -> TeacherCache:
    """Lets the teacher read the batches, and keeps what it says.

    Args:
      folder: must not exist.
      teacher: the model.
      params: its parameters.
      batches: as for training, all of one shape.
      kept: what is kept.
      data: see `identity_of`.

    Raises:
      ValueError: as `compress.distillation.teacher_cache.write_teacher_cache`.
    """

    targets, identity = answers(teacher, params, kept), identity_of(kept, params, data)
    return write_teacher_cache(folder, batches, targets, identity, teacher.config.vocabulary_size)


def answers(teacher: Transformer, params: Any, kept: Kept) -> Callable[[Mapping[str, Any]], Batch]:
    """Returns what says of one batch after the other what is kept of it; compiled once a shape.

    Args:
      teacher: the model.
      params: its parameters.
      kept: what is kept; the draws of a batch depend on how many came before.
    """

    @jax.jit
    def answer(params: Any, key: jax.Array, batch: Batch) -> Batch:
        places = (batch.get("positions"), batch.get("segments"))
        final_BTD = features(teacher, params, batch["tokens"], *places).final
        B, T, D = final_BTD.shape

        def row(
            key_and_final: tuple[jax.Array, jax.Array],
        ) -> Batch:  # [T, V] is held, not [B, T, V]
            key, final_TD = key_and_final
            return TARGETS[kept.kind](key, head(teacher, params, final_TD), kept)

        return jax.lax.map(row, (jax.random.split(key, B), final_BTD))

    numbers = iter(range(2**31))
    key = jax.random.key(kept.seed)

    def targets(batch: Mapping[str, Any]) -> Batch:
        seen = {name: batch[name] for name in ("tokens", "positions", "segments") if name in batch}
        return answer(params, jax.random.fold_in(key, next(numbers)), seen)

    return targets


def with_targets(cache: TeacherCache, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the batch with the teacher's answers beside it.

    Raises:
      ValueError: the teacher has not read a row of it.
    """
    return {**batch, **{PREFIX + name: a for name, a in look_up(cache, batch).items()}}


def cached_term(kept: Kept, *, weight: Any = 1.0) -> LossTerm:
    """The soft loss from kept answers, averaged over the positions with loss.

    Args:
      kept: what is kept.
      weight: a number or a function of the step.

    Raises:
      ValueError: a kind of another name.
    """
    if kept.kind not in LOSSES:
        raise ValueError(f"kind is {kept.kind!r}; choose one of {', '.join(LOSSES)}")

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.logits is not None
        targets = {
            name.removeprefix(PREFIX): array
            for name, array in batch.items()
            if name.startswith(PREFIX)
        }
        return LOSSES[kept.kind](view.logits, targets, batch["weights"], kept.temperature)

    return LossTerm("distil_cached", total, weight=weight)


def _top_k(key: jax.Array, logits_NV: jax.Array, kept: Kept) -> Batch:
    return top_k_targets(logits_NV, kept.k, kept.temperature)


def _sampled(key: jax.Array, logits_NV: jax.Array, kept: Kept) -> Batch:
    return sampled_targets(
        key, logits_NV, kept.k, temperature=kept.temperature, proposal=kept.proposal
    )


TARGETS: dict[str, Callable[[jax.Array, jax.Array, Kept], Batch]] = {
    "top_k": _top_k,
    "sampled": _sampled,
}
LOSSES: dict[str, Callable[..., jax.Array]] = {"top_k": top_k_kl, "sampled": sampled_cross_entropy}
