"""The span loss and the best span, against sums and searches written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses_span import (
    best_spans,
    span_cross_entropy,
    span_log_probabilities,
    span_losses,
)

B, T = 5, 11
pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def batch():
    first = np.array([3, 2, 4, 1, 0], np.int32)
    lengths = np.array([11, 7, 5, 9, 0], np.int32)  # the last is padding
    starts = np.array([3, 1, 4, 5, 0], np.int32)  # the second: not in the window
    ends = np.array([6, 1, 4, 8, 0], np.int32)
    arrays = {"first": first, "lengths": lengths, "starts": starts, "ends": ends}
    return {name: jnp.asarray(a) for name, a in arrays.items()} | {
        "tokens": jnp.zeros((B, T), jnp.int32)
    }


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (B, T, 2))


def by_hand(logits, batch, smoothing=0.0):
    losses = []
    for row in range(B - 1):
        places = range(int(batch["first"][row]) - 1, int(batch["lengths"][row]))
        total = 0.0
        for which, name in enumerate(("starts", "ends")):
            scores = np.array([logits[row, place, which] for place in places], np.float64)
            log_p = scores - np.log(np.exp(scores).sum())
            right = list(places).index(int(batch[name][row]))
            total -= (1 - smoothing) * log_p[right] + smoothing * log_p.mean()
        losses.append(total / 2)
    return np.array([*losses, 0.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_the_sums_written_out(logits, batch, smoothing):
    found = span_losses(logits, batch, smoothing)
    np.testing.assert_allclose(found, by_hand(np.asarray(logits), batch, smoothing), rtol=1e-5)
    term = span_cross_entropy(lambda *_: logits, smoothing)
    np.testing.assert_allclose(term.total(None, batch, None), found.sum(), rtol=1e-6)
    assert float(term.count(batch)) == B - 1


def test_what_lies_off_the_passage_has_no_gradient(logits, batch):
    gradient = jax.grad(lambda x: span_losses(x, batch).sum())(logits)
    assert bool(jnp.isfinite(gradient).all())
    for row in range(B):
        first = max(int(batch["first"][row]) - 1, 0) if row < B - 1 else T
        here = np.zeros(T, bool)
        here[first : int(batch["lengths"][row])] = True
        np.testing.assert_array_equal(np.abs(gradient[row]).sum(-1) > 0, here)


def test_rows_in_another_order_lose_the_same(logits, batch):
    order = jax.random.permutation(jax.random.key(1), T)
    turned = {**batch, "positions": jnp.broadcast_to(order[None], (B, T)).astype(jnp.int32)}
    np.testing.assert_allclose(
        span_losses(logits[:, order], turned), span_losses(logits, batch), rtol=1e-6
    )


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_is_that_of_a_search(logits, batch, longest):
    start, end = span_log_probabilities(logits, batch)
    first, last, score = jax.jit(best_spans, static_argnums=3)(start, end, batch, longest)
    for row in range(B - 1):
        places = range(int(batch["first"][row]), int(batch["lengths"][row]))
        spans = [(i, j) for i in places for j in places if i <= j < i + longest]
        best = max(spans, key=lambda span: float(start[row, span[0]] + end[row, span[1]]))
        assert (int(first[row]), int(last[row])) == best
        np.testing.assert_allclose(score[row], start[row, best[0]] + end[row, best[1]], rtol=1e-6)


def test_the_best_span_lies_in_one_sentence(logits, batch):
    start, end = span_log_probabilities(logits, batch)
    sentences = jnp.broadcast_to(jnp.arange(T) // 3, (B, T))
    first, last, score = best_spans(start, end, {**batch, "sentences": sentences}, 30)
    for row in range(B - 1):
        places = range(int(batch["first"][row]), int(batch["lengths"][row]))
        spans = [(i, j) for i in places for j in places if i <= j and i // 3 == j // 3]
        best = max(spans, key=lambda span: float(start[row, span[0]] + end[row, span[1]]))
        assert (int(first[row]), int(last[row])) == best


def test_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        span_cross_entropy(lambda *_: None, 1.0)
