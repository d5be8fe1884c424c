"""A teacher's answers on disk: unbiased samples, top-k with a tail, and a cache that is found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.distillation.logits import forward_kl
from compress.distillation.teacher_cache import (
    look_up,
    open_teacher_cache,
    row_keys,
    write_teacher_cache,
)
from compress.distillation.teacher_targets import (
    draws,
    sampled_cross_entropy,
    sampled_targets,
    top_k_kl,
    top_k_targets,
)
from experiments.methods.cached_answers import (
    Kept,
    cached_term,
    identity_of,
    with_targets,
    write_cache,
)
from model.presets import gpt2_tiny
from model.transformer import Transformer
from tests.compiled import initial
from train.losses import counts_of, loss_function
from train.plugs import Context

N, V = 4, 9
MODEL = Transformer(gpt2_tiny(dropout=0.0, layers=1))
WEIGHTS = jnp.array([1.0, 0.0, 2.0, 1.0])


@pytest.fixture
def logits():
    return tuple(jax.random.normal(jax.random.key(0), (2, N, V)) * 2)


def kl_gradient(student, teacher, T):
    """T (Q - P), in closed form."""
    p, q = (np.asarray(jax.nn.softmax(x / T, axis=-1)) for x in (teacher, student))
    return T * np.asarray(WEIGHTS)[:, None] * (q - p)


@pytest.mark.parametrize(("proposal", "T"), [(1.0, 1.0), (0.7, 2.0), (1.3, 1.0)])
def test_the_expected_gradient_of_the_sample_is_that_of_the_full_divergence(
    strict, logits, proposal, T
):
    """Exactly: one draw of each token in turn, weighted by how likely it is drawn."""
    student, teacher = logits
    log_p = jax.nn.log_softmax(teacher / T, axis=-1)
    log_q = jax.nn.log_softmax(proposal * log_p, axis=-1)
    expected = np.zeros((N, V))
    for token in range(V):
        targets = {
            "ids": jnp.full((N, 1), token, jnp.int32),
            "log_ratios": (log_p - log_q)[:, token][:, None],
        }
        grad = jax.grad(sampled_cross_entropy)(student, targets, WEIGHTS, T)
        expected += np.exp(np.asarray(log_q)[:, token])[:, None] * np.asarray(grad)
    np.testing.assert_allclose(expected, kl_gradient(student, teacher, T), rtol=1e-4, atol=1e-6)


def test_draws_divide_the_unit_square_as_the_distribution_says(strict):
    """Exactly: over a grid of uniform numbers each token comes as often as its share."""
    count = 200
    grid = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count
    first, second = (a.reshape(1, -1) for a in jnp.meshgrid(grid, grid))
    for size in (1, 2, 10, 13):
        q = jax.random.uniform(jax.random.key(size), (size,)).at[size // 2].set(1e-3)
        q = q.at[0].set(0.0) if size > 2 else q
        ids = draws(q[None], jnp.stack([first, second]))
        drawn = np.bincount(np.asarray(ids[0]), minlength=size) / count**2
        np.testing.assert_allclose(drawn, q / q.sum(), atol=3 / count)
        assert size == 1 or drawn[np.asarray(q) == 0].sum() == 0


def test_rare_tokens_are_drawn_as_often_as_they_are(strict):
    """One running sum of all in float32 would stay at the first token's 1."""
    q = jnp.full(2**14, 2.0**-27).at[0].set(1.0)
    first = 1 - jnp.arange(1.0, 15.0, dtype=jnp.float32) * 2.0**-17
    ids = draws(q[None], jnp.stack([first, jnp.full(14, 0.5)])[:, None])[0]
    sums = np.cumsum(np.asarray(q, np.float64).reshape(128, 128).sum(axis=1))
    expected = np.searchsorted(sums, np.asarray(first, np.float64) * sums[-1], side="right")
    assert expected.min() > 1
    assert np.abs(np.asarray(ids) // 128 - expected).max() <= 1
    assert set((np.asarray(ids) % 128).tolist()) == {64}


def test_drawing_holds_a_few_copies_of_the_logits_and_not_one_for_each_draw():
    shape = (16, 50257)
    draw = jax.jit(lambda key, logits: sampled_targets(key, logits, 32, proposal=0.7))
    compiled = draw.lower(jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize("proposal", [1.0, 0.6])
def test_what_is_drawn_follows_the_proposal_and_averages_to_the_full_gradient(
    strict, logits, proposal
):
    student, teacher = logits
    k = 40_000
    targets = sampled_targets(jax.random.key(1), teacher, k, proposal=proposal)
    q = jax.nn.softmax(proposal * teacher, axis=-1)
    drawn = np.stack([np.bincount(row, minlength=V) for row in np.asarray(targets["ids"])]) / k
    # Five standard errors of a share, and of the sum of two of them under the weights (at most 2).
    assert np.abs(drawn - q).max() < 5 * 0.5 / np.sqrt(k)
    grad = jax.grad(sampled_cross_entropy)(student, targets, WEIGHTS, 1.0)
    error = np.abs(np.asarray(grad) - kl_gradient(student, teacher, 1.0)).max()
    assert error < 5 * 2 * float(jnp.exp(targets["log_ratios"]).max()) / np.sqrt(k)
    # The most probable tokens renormalised, which is what this replaces, are further off by far.
    top = jax.nn.softmax(jnp.where(jax.nn.softmax(teacher, axis=-1) > 0.15, teacher, -1e9), axis=-1)
    biased = jax.grad(forward_kl)(student, jnp.log(top + 1e-30), WEIGHTS, 1.0)
    assert np.abs(np.asarray(biased) - kl_gradient(student, teacher, 1.0)).max() > 3 * error


def test_top_k_with_the_tail_bounds_the_divergence_and_reaches_it(strict, logits):
    student, teacher = logits
    T = 1.5
    values = [
        float(top_k_kl(student, top_k_targets(teacher, k, T), WEIGHTS, T)) for k in range(1, V)
    ]
    full = float(forward_kl(student, teacher, WEIGHTS, T))
    assert values == sorted(values)
    assert values[-1] == pytest.approx(full, rel=1e-5)
    assert values[0] < 0.9 * full
    grad = jax.grad(top_k_kl)(student, top_k_targets(teacher, V - 1, T), WEIGHTS, T)
    np.testing.assert_allclose(grad, kl_gradient(student, teacher, T), rtol=1e-4, atol=1e-5)
    # By hand, k = 2: three outcomes.
    p, q = (np.asarray(jax.nn.softmax(x / T, axis=-1), np.float64) for x in (teacher, student))
    by_hand = 0
    for n in range(N):
        top = np.argsort(-p[n])[:2]
        a, b = (np.append(x[n, top], 1 - x[n, top].sum()) for x in (p, q))
        by_hand += T**2 * float(WEIGHTS[n]) * (a * np.log(a / b)).sum()
    assert values[1] == pytest.approx(by_hand, rel=1e-5)


def test_masked_positions_and_lone_outcomes_are_finite(strict, logits):
    student, teacher = logits
    certain = teacher.at[0, 3].set(1e4)  # nothing is left for the tail
    targets = top_k_targets(certain, 2)
    value, grad = jax.value_and_grad(top_k_kl)(student.at[1].set(jnp.nan), targets, WEIGHTS)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()
    assert not grad[1].any()
    for bad in (0, V):
        with pytest.raises(ValueError, match=f"k is {bad}; it must be at least 1"):
            top_k_targets(teacher, bad)
    with pytest.raises(ValueError, match="draw at least 1"):
        sampled_targets(jax.random.key(0), teacher, 0)
    with pytest.raises(ValueError, match="exponent is 0"):
        sampled_targets(jax.random.key(0), teacher, 1, proposal=0)


def batches(count=3, rows=2, time=6, seed=0, segments=False):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        tokens = draw.integers(0, 64, (rows, time + 1)).astype(np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        if segments:
            batch["segments"] = np.ones((rows, time), np.int32)
        yield batch | {"weights": np.ones((rows, time), np.float32)}


def params_of(seed):
    params = initial(MODEL, jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(9), p.shape), params)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_the_loss_from_disk_is_the_loss_of_the_teacher(tmp_path, kind):
    teacher, student = params_of(0), params_of(1)
    kept = Kept(kind, k=63 if kind == "top_k" else 2000)
    data = {"data": "text", "window": 6}
    cache = write_cache(tmp_path / "cache", MODEL, teacher, batches(), kept, data)
    opened = open_teacher_cache(tmp_path / "cache", identity_of(kept, teacher, data))
    assert opened.arrays["ids"].dtype == np.uint16
    first, second, _ = batches()
    mixed = {name: np.stack([second[name][1], first[name][0]]) for name in first}
    for one in (cache, opened):
        batch = jax.tree.map(jnp.asarray, with_targets(one, mixed))
        term = cached_term(kept)
        values = []
        for chunk in (None, 5):
            loss = loss_function(MODEL, [term], chunk=chunk)
            context = Context(jnp.int32(0), None, {}, {}, counts_of([term], batch))
            values.append(float(jax.jit(loss)(student, batch, context)[0]))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        s, t = (
            MODEL.apply({"params": p}, batch["tokens"]).reshape(-1, 64) for p in (student, teacher)
        )
        p = jax.nn.softmax(t, axis=-1)
        full = float((p * (jnp.log(p) - jax.nn.log_softmax(s, axis=-1))).sum(axis=-1).mean())
        if kind == "sampled":  # which leaves the teacher's entropy in
            full -= float((p * jnp.log(p)).sum(axis=-1).mean())
        # float16 keeps eleven bits of each logarithm; 2,000 draws a position leave their noise.
        assert values[0] == pytest.approx(full, rel=2e-2)


def test_rows_are_found_whatever_the_order_and_kept_once(tmp_path):
    answers = []

    def say(batch):
        answers.append(len(batch["tokens"]))
        return {"ids": batch["tokens"][..., None], "score": batch["tokens"] / 64}

    twice = [*batches(), *batches()]
    cache = write_teacher_cache(tmp_path / "cache", twice, say, {"a": 1}, 64)
    assert len(answers) == 3
    assert {name: array.shape for name, array in cache.arrays.items()} == {
        "ids": (6, 6, 1),
        "score": (6, 6),
    }
    all_rows = np.concatenate([batch["tokens"] for batch in batches()])[::-1]
    found = look_up(cache, {"tokens": all_rows})
    assert np.array_equal(found["ids"][..., 0], all_rows)
    assert found["score"].dtype == np.float32
    np.testing.assert_allclose(found["score"], all_rows / 64, rtol=1e-3)
    wide = write_teacher_cache(tmp_path / "wide", batches(), say, {"a": 1}, 70_000)
    assert wide.arrays["ids"].dtype == np.int32


def test_other_text_other_boundaries_and_another_teacher_are_refused(tmp_path):
    say = lambda batch: {"ids": batch["tokens"][..., None]}
    identity = {"teacher": "one", "data": ["a", "b"], "window": 6}
    cache = write_teacher_cache(tmp_path / "cache", batches(), say, identity, 64)
    other = next(batches(seed=1))
    with pytest.raises(ValueError, match=r"does not hold row 0 of the batch .and 1 more"):
        look_up(cache, other)
    masked = next(batches(segments=True))
    assert row_keys(masked) != row_keys(next(batches()))
    with pytest.raises(ValueError, match="other document boundaries"):
        look_up(cache, masked)
    with pytest.raises(ValueError, match=r"(?s)something else.*data: .*'b'.*teacher: one, not two"):
        open_teacher_cache(tmp_path / "cache", {"teacher": "two", "data": ["a", "c"], "window": 6})
    with pytest.raises(ValueError, match="is there already"):
        write_teacher_cache(tmp_path / "cache", batches(), say, identity, 64)


def test_it_is_written_in_one_piece_and_damage_is_found(tmp_path):
    say = lambda batch: {"ids": batch["tokens"][..., None]}

    def breaking():
        yield next(batches())
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_teacher_cache(tmp_path / "cache", breaking(), say, {}, 64)
    with pytest.raises(ValueError, match="no batch"):
        write_teacher_cache(tmp_path / "cache", [], say, {}, 64)
    mixed = [*batches(1), *batches(1, time=4, seed=2)]
    with pytest.raises(ValueError, match="give batches of one length"):
        write_teacher_cache(tmp_path / "cache", mixed, say, {}, 64)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        open_teacher_cache(tmp_path / "cache", {})
    write_teacher_cache(tmp_path / "cache", batches(), say, {}, 64)
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert sorted(manifest["files"]) == ["ids.bin", "keys.npy"]
    with open(tmp_path / "cache/ids.bin", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"ids.bin is damaged"):
        open_teacher_cache(tmp_path / "cache", {})


def test_a_kind_of_another_name():
    with pytest.raises(ValueError, match="kind is 'all'; choose one of top_k, sampled"):
        cached_term(Kept(kind="all"))
