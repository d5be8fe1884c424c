"""Masks as a weight transform, in the real training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.pruning.mask_trees import (
    block_kernels,
    by_layer,
    flat,
    leaves_at,
    masked,
    nested,
    together,
)
from compress.pruning.masks import n_of_m
from compress.pruning.schedules import cubic, iterative, one_shot
from compress.pruning.sparse_step import (
    Pruning,
    hard,
    init_masks,
    mask_weights,
    straight_through,
    update_masks,
)
from model.presets import llama_tiny
from model.transformer import Transformer
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context, WeightTransform
from train.step import init_state, make_train_step

MODEL = Transformer(llama_tiny(scan_layers=True))
TERMS = [cross_entropy()]
KEY = jax.random.key(0)


def batch_of(seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 64, (4, 9))
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones((4, 8)),
    }


def params_of(seed=0):
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(0, 0.2, s.shape), s.dtype), shapes)


PARAMS = params_of()


def copied(tree):
    """A trip through the host, as a checkpoint makes it."""

    def trip(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(np.array(jax.random.key_data(leaf))))
        return jnp.asarray(np.array(leaf))

    return jax.tree.map(trip, tree)


@pytest.mark.parametrize("apply_mask", [hard, straight_through])
def test_the_loss_is_that_of_masked_weights(strict, apply_mask):
    settings = Pruning(block_kernels(0.6), one_shot(0))
    transform = WeightTransform(*mask_weights(KEY, settings, apply_mask))
    draw = np.random.default_rng(3)
    masks = flat(transform.init(PARAMS, {})["masks"])
    masks = nested({path: jnp.asarray(draw.random(m.shape) < 0.4) for path, m in masks.items()})
    extra = {"masks": masks}
    batch = batch_of(0)
    context = Context(jnp.int32(1), None, {}, {"masks": extra}, counts_of(TERMS, batch))

    def value_and_grad(transforms, params):
        loss = loss_function(MODEL, TERMS, transforms)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, context)[0]))(params)

    value, grads = value_and_grad([transform], PARAMS)
    expected, dense = value_and_grad([], masked(PARAMS, extra["masks"]))
    np.testing.assert_array_equal(value, expected)
    wanted = dense if apply_mask is straight_through else masked(dense, extra["masks"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, wanted)


def run(step, state, steps):
    for number in range(int(state.step), steps):
        state, metrics = step(state, {}, batch_of(number))
        assert np.isfinite(metrics["loss"])
    return state


def trainer(settings, apply_mask=hard):
    transforms = [WeightTransform(*mask_weights(KEY, settings, apply_mask))]
    optimizer = optax.adamw(1e-2)
    step = jax.jit(make_train_step(MODEL, TERMS, optimizer, transforms=transforms))
    return step, init_state(jax.random.key(1), PARAMS, optimizer, transforms)


@pytest.mark.variants(1)
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_gradual_pruning_in_the_step(score):
    """Zeros by the formula after every step; nothing is lost by a trip through a checkpoint."""
    schedule = cubic(start=1, every=2, times=2)
    settings = Pruning([("blocks/1/mlp/up", 0.5), ("mlp/up", 0.9)], schedule, score)
    step, state = trainer(settings, straight_through)
    middle = None
    for number in range(7):
        before = state
        state = run(step, state, number + 1)
        at = np.clip((number - 1) // 2, 0, 2) / 2
        for layer, final in enumerate((0.9, 0.5)):
            sparsity = 0 if number < 1 else final * (1 - (1 - at) ** 3)
            mask = flat(state.extra["masks"]["masks"])["blocks/mlp/up/kernel"][layer]
            assert int((~mask).sum()) == int(mask.size * sparsity + 0.5), (number, layer)
        if number == 3 and score == "magnitude":  # the weights that the step began with
            w = np.abs(before.params["blocks"]["mlp"]["up"]["kernel"][1])
            mask = state.extra["masks"]["masks"]["blocks"]["mlp"]["up"]["kernel"][1]
            assert w[mask].min() > w[~mask].max()
        if number == 2:
            middle = copied(state)
    again = run(step, middle, 7)
    jax.tree.map(np.testing.assert_array_equal, copied(state.params), copied(again.params))
    jax.tree.map(
        np.testing.assert_array_equal,
        copied(state.extra["masks"]["masks"]),
        copied(again.extra["masks"]["masks"]),
    )


@pytest.mark.parametrize("schedule", [one_shot(2), cubic(0, 2, 1)], ids=["one_shot", "cubic"])
def test_masks_that_fall_on_a_step_that_is_not_finite_are_made_after_it(schedule):
    step, state = trainer(Pruning([("mlp/up", 0.5)], schedule))
    for number in range(5):
        batch = batch_of(number)
        if number == 2:
            batch["weights"] = batch["weights"] * jnp.inf
        state, metrics = step(state, {}, batch)
        assert bool(metrics["skipped"]) == (number == 2)
        mask = flat(state.extra["masks"]["masks"])["blocks/mlp/up/kernel"]
        assert float((~mask).mean()) == (0.5 if number >= 3 else 0.0)


@pytest.mark.variants(2)
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("score", ["saliency", "movement"])
def test_scores_accumulate_from_the_gradients_given(strict, score, decay):
    settings = Pruning([("mlp/down", 0.5)], one_shot(2), score, decay=decay)
    path = "blocks/mlp/down/kernel"
    extra = init_masks(KEY, settings, PARAMS)
    update = jax.jit(lambda *args: update_masks(settings, *args))
    total = 0.0
    for step in range(4):
        params, grads = params_of(10 + step), params_of(20 + step)
        extra = update(extra, params, grads, jnp.int32(step))
        w, g = (np.asarray(leaves_at(t, {path: None})[path]) for t in (params, grads))
        total = decay * total + (np.abs(w * g) if score == "saliency" else -w * g)
        np.testing.assert_allclose(flat(extra["scores"])[path], total, rtol=1e-5, atol=1e-6)
        mask = np.asarray(flat(extra["masks"])[path])
        if step < 2:
            assert mask.all()
        elif step == 2:
            held = mask
            for layer in range(2):
                assert total[layer][mask[layer]].min() > total[layer][~mask[layer]].max()
        else:
            np.testing.assert_array_equal(mask, held)


def test_random_masks_are_nested_and_of_the_key(strict):
    settings = Pruning([("mlp/down", 0.8)], iterative(0, 1, 3), "random")
    update = jax.jit(lambda e, step: update_masks(settings, e, PARAMS, None, step))

    def masks(key):
        extra, seen = init_masks(key, settings, PARAMS), []
        for step in range(3):
            extra = update(extra, jnp.int32(step))
            seen.append(np.asarray(flat(extra["masks"])["blocks/mlp/down/kernel"]))
        return seen

    first, second, third = masks(KEY)
    assert not (second & ~first).any()  # what went once does not come back
    assert not (third & ~second).any()
    assert 0.7 < (third[0] != third[1]).mean() / (2 * 0.8 * 0.2) < 1.3  # layers are independent
    assert (masks(jax.random.key(9))[2] != third).any()


def test_any_selection():
    for select in (together, by_layer(n_of_m(4))):
        settings = Pruning(block_kernels(0.5), one_shot(0), select=select)
        extra = init_masks(KEY, settings, PARAMS)
        masks = jax.jit(lambda e, s=settings: update_masks(s, e, PARAMS, None, jnp.int32(0)))(extra)
        kept = [int(m.sum()) for m in flat(masks["masks"]).values()]
        assert sum(kept) * 2 == sum(m.size for m in flat(masks["masks"]).values())


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="decay is 0"):
        Pruning(decay=0)
    with pytest.raises(ValueError, match="divide"):
        mask_weights(KEY, Pruning(select=by_layer(n_of_m(5)))).init(PARAMS, {})
    with pytest.raises(ValueError, match="leaves no weight"):
        mask_weights(KEY, Pruning(block_kernels(1.0))).init(PARAMS, {})
    settings = Pruning(block_kernels(0.5), score="saliency")
    with pytest.raises(ValueError, match="pass the raw gradient"):
        update_masks(settings, init_masks(KEY, settings, PARAMS), PARAMS, None, jnp.int32(0))
