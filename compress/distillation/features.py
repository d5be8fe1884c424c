"""Distillation inside the model: hidden states, and which layers are compared.

Each loss compares one layer of the student with one of the teacher and returns a sum over
positions, `sum_bt w_bt * loss_bt`; `over_pairs` takes the mean over the layers of a map.
(Attention maps and relations between tokens are in `compress.distillation.maps`.)

Shapes: B batch, T time, D and E widths of student and teacher, P pairs of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.linear import at_least_float32

Pairs = Sequence[tuple[int, int]]


def every_layer(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pairs each student layer with a teacher layer, evenly spread, last with last.

    Layers count from 1; as an index into `Features.hidden` that is the stream after the layer.

    >>> every_layer(2, 6)
    ((1, 3), (2, 6))
    """
    return tuple((s, -(-s * teacher // student)) for s in range(1, student + 1))


def last_layer(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pairs the last layers alone.

    >>> last_layer(2, 6)
    ((2, 6),)
    """
    return ((student, teacher),)


LAYER_MAPS: dict[str, Callable[[int, int], tuple[tuple[int, int], ...]]] = {
    "every": every_layer,
    "last": last_layer,
}


def over_pairs(
    loss: Callable[[Any, Any], jax.Array], student: Any, teacher: Any, pairs: Pairs
) -> jax.Array:
    """Returns the mean of `loss(student layer, teacher layer)` over the pairs, one after the other.

    Args:
      loss: of one layer of each.
      student: a tree of arrays with a leading layer axis.
      teacher: another.
      pairs: indices into the two.

    >>> difference = lambda s, t: (s - t).sum()
    >>> float(over_pairs(difference, jnp.arange(2.0), jnp.arange(4.0), [(0, 1), (1, 3)]))
    -1.5
    """
    first, second = (jnp.array(index) for index in zip(*pairs, strict=True))
    picked = (
        jax.tree.map(lambda a: a[first], student),
        jax.tree.map(lambda a: a[second], teacher),
    )
    return jax.lax.map(lambda pair: loss(*pair), picked).mean()


def semi_orthogonal(key: jax.Array, student: int, teacher: int) -> jax.Array:
    """Draws a fixed projection [D, E] with orthonormal rows, or columns where D > E.

    >>> p = semi_orthogonal(jax.random.key(0), 2, 3)
    >>> bool(jnp.allclose(p @ p.T, jnp.eye(2), atol=1e-6))
    True
    """
    long, short = max(student, teacher), min(student, teacher)
    q = jnp.linalg.qr(jax.random.normal(key, (long, short)))[0]
    return q.T if student < teacher else q


def hidden_cosine(
    student_BTD: jax.Array,
    teacher_BTE: jax.Array,
    weights_BT: jax.Array,
    projection_DE: jax.Array | None = None,
) -> jax.Array:
    """`sum w (1 - cos(student, teacher))` (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).

    Args:
      student_BTD: hidden states.
      teacher_BTE: hidden states; E = D without a projection.
      weights_BT: 0 where nothing counts, whatever the states hold there.
      projection_DE: learned or fixed; the student is multiplied by it.

    Raises:
      ValueError: widths that differ without a projection between them.

    >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> y = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
    >>> float(hidden_cosine(x, y, jnp.ones((1, 2))))
    1.0
    """
    s, t = _projected(student_BTD, teacher_BTE, weights_BT, projection_DE)
    return _weighted(1 - (_direction(s) * _direction(t)).sum(axis=-1), weights_BT)


def hidden_mse(
    student_BTD: jax.Array,
    teacher_BTE: jax.Array,
    weights_BT: jax.Array,
    projection_DE: jax.Array | None = None,
) -> jax.Array:
    """`sum w mean_E (student - teacher)^2` (TinyBERT, Jiao et al. 2019, arXiv:1909.10351).

    Args:
      student_BTD: as in `hidden_cosine`.
      teacher_BTE: as in `hidden_cosine`.
      weights_BT: as in `hidden_cosine`.
      projection_DE: as in `hidden_cosine`.

    Raises:
      ValueError: as `hidden_cosine`.

    >>> x, y = jnp.zeros((1, 1, 2)), jnp.array([[[2.0, 0.0]]])
    >>> float(hidden_mse(x, y, jnp.ones((1, 1))))
    2.0
    """
    s, t = _projected(student_BTD, teacher_BTE, weights_BT, projection_DE)
    return _weighted(jnp.square(s - t).mean(axis=-1), weights_BT)


HIDDEN_LOSSES = {"cosine": hidden_cosine, "mse": hidden_mse}


def _projected(
    student_BTD: jax.Array,
    teacher_BTE: jax.Array,
    weights_BT: jax.Array,
    projection_DE: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Both at least float32 and of one width, 0 where the weight is 0."""
    dtype = at_least_float32(student_BTD.dtype)
    live = weights_BT[:, :, None] > 0
    s, t = (jnp.where(live, x.astype(dtype), 0) for x in (student_BTD, teacher_BTE))
    if projection_DE is not None:
        s = s @ projection_DE.astype(dtype)
    if s.shape[-1] != t.shape[-1]:
        raise ValueError(
            f"hidden states of width {s.shape[-1]} and {t.shape[-1]} cannot be compared; give a "
            f"projection [{student_BTD.shape[-1]}, {teacher_BTE.shape[-1]}]"
        )
    return s, t


def _direction(x: jax.Array) -> jax.Array:
    """x / |x|; 0 where x is 0, with a gradient of 0."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    there = square > 0
    return jnp.where(there, x * jax.lax.rsqrt(jnp.where(there, square, 1)), 0)


def _weighted(loss_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    return (loss_BT * weights_BT.astype(loss_BT.dtype)).sum()
