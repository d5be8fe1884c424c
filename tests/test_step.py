"""The step and its plugs: accumulation, chunked loss, counters, and what `extra` carries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.compiled import initial
from train.losses import counts_of, cross_entropy, loss_function, mean_squared_error, z_loss
from train.plugs import NONFINITE, Context, Gradient, LossTerm, View, WeightTransform, whole
from train.step import init_state, layer_norms, make_evaluation_step, make_train_step

MODEL = Transformer(modern_tiny(zero_init_projections=False))


def batch_of(rows=4, time=8, seed=0, vocabulary=64):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, vocabulary, (rows, time + 1))
    weights = (draw.random((rows, time)) < 0.7).astype(np.float32)
    weights[0] = 0  # one row is all padding
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.asarray(weights),
    }


def params_of(model, seed=0):
    params = initial(model, jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    redrawn = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, redrawn)


def context_of(terms, batch, **fields):
    values = {"step": jnp.int32(0), "rng": None, "frozen": {}, "extra": {}}
    return Context(**values | fields, counts=counts_of(terms, batch))


def relative_distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / (optax.tree.norm(b) + 1e-30))


@pytest.mark.variants(3)
@pytest.mark.parametrize("chunk", [5, 1, 100, 16, 31])
def test_chunked_loss_equals_the_plain_one(strict, chunk):
    terms = [cross_entropy(0.1), z_loss(weight=0.01)]
    params, batch = params_of(MODEL), batch_of()

    def value_and_grad(chunk):
        loss = loss_function(MODEL, terms, chunk=chunk)
        context = context_of(terms, batch)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, context)[0]))(params)

    plain, chunked = value_and_grad(None), value_and_grad(chunk)
    np.testing.assert_allclose(chunked[0], plain[0], rtol=1e-6)
    assert relative_distance(chunked[1], plain[1]) < 1e-5


def test_chunked_loss_never_holds_all_logits():
    config = gpt2_tiny(vocabulary_size=5003, dropout=0.0)
    model, terms = Transformer(config), [cross_entropy()]
    batch, params = batch_of(rows=2, time=20), params_of(Transformer(config))

    def shapes(chunk):
        loss = loss_function(model, terms, chunk=chunk)
        context = context_of(terms, batch)
        text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, batch, context)[0]))(params))
        return "[40,5003]" in text or "[2,20,5003]" in text

    assert shapes(None)
    assert not shapes(8)


def test_cross_entropy_against_an_independent_formula():
    logits = jax.random.normal(jax.random.key(0), (6, 11)) * 3
    batch = {"targets": jnp.arange(6), "weights": jnp.array([1.0, 0, 2, 1, 0, 1])}
    for smoothing in (0.0, 0.2):
        got = cross_entropy(smoothing).total(View(logits, None, None), batch, None)
        one_hot = optax.smooth_labels(jax.nn.one_hot(batch["targets"], 11), smoothing)
        expected = (optax.softmax_cross_entropy(logits, one_hot) * batch["weights"]).sum()
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_padding_may_hold_anything():
    batch = {"targets": jnp.array([1, 2]), "weights": jnp.array([1.0, 0.0])}
    logits = jnp.array([[0.0, 1.0, 0.0], [jnp.nan, jnp.inf, 0.0]])
    assert jnp.isfinite(cross_entropy().total(View(logits, None, None), batch, None))


def test_accumulation_equals_the_large_batch():
    """In float64, as the design asks, with rows that carry no loss at all."""
    with jax.enable_x64(True):
        config = dataclasses.replace(MODEL.config, dtype="float64", parameter_dtype="float64")
        model = Transformer(config)
        terms = [cross_entropy(), z_loss()]
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params_of(MODEL))
        results = []
        for parts in (1, 2, 4):
            step = make_train_step(model, terms, optax.sgd(1.0), micro_batches=parts)
            state = init_state(jax.random.key(0), params, optax.sgd(1.0))
            results.append(jax.jit(step)(state, {}, batch_of()))
        for state, metrics in results[1:]:
            assert relative_distance(state.params, results[0][0].params) < 1e-10
            np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-12)


def test_accumulation_refuses_what_does_not_divide():
    step = make_train_step(MODEL, [cross_entropy()], optax.sgd(1.0), micro_batches=3)
    state = init_state(jax.random.key(0), params_of(MODEL), optax.sgd(1.0))
    with pytest.raises(ValueError, match="4 rows does not divide into 3"):
        step(state, {}, batch_of())


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        config = dataclasses.replace(MODEL.config, dtype="float64", parameter_dtype="float64")
        terms = [cross_entropy(0.1), z_loss()]
        loss = loss_function(Transformer(config), terms, chunk=7)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params_of(MODEL))
        batch = batch_of()
        context = context_of(terms, batch)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(5), len(leaves))
        way = jax.tree.unflatten(
            structure,
            [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)],
        )

        @jax.jit
        def along(t):
            return loss(jax.tree.map(lambda p, d: p + t * d, params, way), batch, context)[0]

        slope = jax.grad(along)(0.0)
        np.testing.assert_allclose((along(1e-6) - along(-1e-6)) / 2e-6, slope, rtol=1e-6)


def test_nonfinite_steps_change_nothing_and_the_kth_stops():
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(MODEL, [cross_entropy()], optimizer, max_nonfinite=2))
    state = init_state(jax.random.key(0), params_of(MODEL), optimizer)
    good = batch_of()
    bad = {**good, "weights": good["weights"].at[1, 0].set(jnp.inf)}

    def same(a, b):
        return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))

    before, _ = step(state, {}, good)
    after, metrics = step(before, {}, bad)
    assert metrics["skipped"]
    assert same((after.params, after.optimizer), (before.params, before.optimizer))
    assert (int(after.step), int(after.extra[NONFINITE]["total"])) == (2, 1)
    recovered, metrics = step(after, {}, good)
    assert not metrics["skipped"]
    assert not same(recovered.params, after.params)
    assert int(recovered.extra[NONFINITE]["in_a_row"]) == 0

    stopped, _ = step(step(recovered, {}, bad)[0], {}, bad)
    for batch in (good, bad):  # from now on every step is a no-op, good batches too
        after, metrics = step(stopped, {}, batch)
        assert metrics["skipped"]
        assert int(metrics["nonfinite_in_a_row"]) == 2
        assert same(after.replace(rng=None), stopped.replace(rng=None))


def test_an_update_that_is_not_finite_is_not_made():
    """An optimizer may overflow where loss and gradient are fine."""
    overflowing = optax.stateless_with_tree_map(lambda g, p: -0.1 * g)
    at_second = optax.scale_by_schedule(lambda n: jnp.where(n == 1, jnp.inf, 1.0))
    optimizer = optax.chain(overflowing, at_second)
    step = jax.jit(make_train_step(MODEL, [cross_entropy()], optimizer, max_nonfinite=2))
    state = init_state(jax.random.key(0), params_of(MODEL), optimizer)
    state, metrics = step(state, {}, batch_of())
    assert not metrics["skipped"]
    after, metrics = step(state, {}, batch_of())
    assert metrics["skipped"]
    assert jnp.isfinite(metrics["loss"])
    assert jnp.isfinite(metrics["gradient_norm"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, after.params)
    assert all(jax.tree.leaves(same))
    assert int(after.extra[NONFINITE]["total"]) == 1


def test_plugs_meet(strict):
    """A transform with extra, frozen weights, a term over features and one over logits, at once."""
    params = params_of(MODEL)
    frozen = {"params": {"final_norm": params["final_norm"]}}
    params = {name: leaf for name, leaf in params.items() if name != "final_norm"}

    def halve(weights, context):
        scale = context.extra["halve"]["scale"]
        return {**weights, "head": jax.tree.map(lambda w: w * scale, weights["head"])}

    def update(extra, params, grads, context):
        return {"scale": extra["scale"] * 0.5, "seen": extra["seen"] + optax.tree.norm(grads)}

    transform = WeightTransform(
        "halve",
        halve,
        lambda params, frozen: {"scale": jnp.float32(1), "seen": jnp.float32(0)},
        update,
    )
    regression = mean_squared_error(lambda view: view.features.final[:, -1, 0], weight=0.5)
    hidden = LossTerm(
        "hidden",
        lambda view, batch, context: jnp.square(view.features.hidden).sum(),
        lambda batch: jnp.float32(batch["tokens"].size),
        weight=lambda step: 1e-3 * step.astype(jnp.float32),
        over="features",
        capture=("hidden",),
    )
    optimizer = optax.sgd(0.1)
    step = jax.jit(
        make_train_step(
            MODEL, [cross_entropy(), regression, hidden], optimizer, transforms=[transform]
        )
    )
    state = init_state(jax.random.key(0), params, optimizer, [transform], frozen)
    batch = batch_of() | {"values": jnp.ones(4)}
    with jax.numpy_dtype_promotion("standard"):
        state, first = step(state, frozen, batch)
        state, second = step(state, frozen, batch)
    assert set(first) >= {"loss", "cross_entropy", "mean_squared_error", "hidden"}
    np.testing.assert_allclose(
        second["loss"],
        second["cross_entropy"] + 0.5 * second["mean_squared_error"] + 1e-3 * second["hidden"],
        rtol=1e-5,
    )
    assert float(state.extra["halve"]["scale"]) == 0.25
    assert float(state.extra["halve"]["seen"]) > 0
    assert "final_norm" not in state.params


def test_step_compiles_once_and_dropout_differs_by_step(compilations):
    model = Transformer(gpt2_tiny(dropout=0.3))
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(model, [cross_entropy()], optimizer), donate_argnums=0)
    state = init_state(jax.random.key(0), params_of(model), optimizer)
    losses = []
    for _ in range(4):
        state, metrics = step(state, {}, batch_of())
        losses.append(float(metrics["loss"]))
    assert compilations["jit(step)"] == 1
    assert len(set(losses)) == 4
    evaluate = jax.jit(make_evaluation_step(model, [cross_entropy()]))
    sums = evaluate(state, {}, batch_of())["cross_entropy"]
    again = evaluate(state, {}, batch_of())["cross_entropy"]
    assert float(sums["total"]) == float(again["total"])
    assert float(sums["count"]) == float(batch_of()["weights"].sum())


def test_layer_norms_are_by_layer():
    norms = layer_norms(params_of(MODEL))
    kernel = params_of(MODEL)["blocks"]["attention"]["q"]["kernel"]
    expected = [np.linalg.norm(np.asarray(layer)) for layer in kernel]
    np.testing.assert_allclose(norms["blocks/attention/q/kernel"], expected, rtol=1e-6)
    assert norms["head/kernel"].shape == ()


def test_terms_need_names_of_their_own():
    with pytest.raises(ValueError, match="different names"):
        loss_function(MODEL, [cross_entropy(), cross_entropy()])
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(1.0)


def test_a_gradient_function_may_remember():
    """What it carries lies in `extra`, goes through micro-batches, and stays at a bad step."""

    def init(params, frozen):
        return {"sum": jax.tree.map(jnp.zeros_like, params), "calls": jnp.int32(0)}

    def apply(loss, params, batch, context, carry):
        grads, metrics = whole(loss, params, batch, context)
        return (
            grads,
            metrics,
            {"sum": optax.tree.add(carry["sum"], grads), "calls": carry["calls"] + 1},
        )

    gradient = Gradient("memory", init, apply)
    terms, optimizer, params = [cross_entropy()], optax.sgd(0.1), params_of(MODEL)
    state = init_state(jax.random.key(0), params, optimizer, gradient=gradient)
    step = jax.jit(make_train_step(MODEL, terms, optimizer, gradient=gradient, micro_batches=2))
    after, _ = step(state, {}, batch_of())
    assert int(after.extra["memory"]["calls"]) == 2
    moved = jax.tree.map(lambda old, g: old - 0.1 * g, params, after.extra["memory"]["sum"])
    assert relative_distance(moved, after.params) < 1e-6
    broken = {**batch_of(), "weights": jnp.full((4, 8), jnp.nan)}
    bad, metrics = step(after, {}, broken)
    assert bool(metrics["skipped"])
    assert int(bad.extra["memory"]["calls"]) == 2
    with pytest.raises(ValueError, match="names of their own"):
        init_state(jax.random.key(0), params, optimizer, gradient=gradient._replace(name=NONFINITE))
