"""Masks as an Optax transformation: exact zeros under any optimizer, RigL and SET, resuming."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.pruning.mask_trees import by_layer, flat, leaves_at, together
from compress.pruning.masks import n_of_m
from compress.pruning.schedules import Rewiring, cubic, one_shot
from compress.pruning.sparse_optimizer import (
    RewireState,
    at_random,
    by_gradient,
    mask_updates,
    prune,
    rewire,
    rigl,
    sparse_evolution,
)
from compress.pruning.sparse_step import Pruning
from experiments.methods.compression import Rewire
from experiments.methods.tuning import LayerDecay
from experiments.runs.assemble import assemble
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer
from train.losses import cross_entropy
from train.optimizers import SGD, AdamW, build
from train.optimizers.averaging import average_of
from train.optimizers.muon import Muon
from train.schedules import Constant
from train.settings import Phase, Settings
from train.step import init_state, make_train_step

KEY = jax.random.key(0)
RULES = [("mlp/down/kernel", 0.75), ("attention/q/kernel", 0.5)]
DOWN, Q = "blocks/mlp/down/kernel", "blocks/attention/q/kernel"
SHAPES = {
    "token_embedding": {"embedding": (7, 4)},
    "blocks": {
        "attention": {"q": {"kernel": (3, 4, 8), "bias": (3, 8)}},
        "mlp": {"down": {"kernel": (3, 8, 4)}},
    },
    "head": {"kernel": (4, 7)},
}


def tree(seed, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)
    normal = lambda shape: jnp.asarray(draw.normal(size=shape), dtype)
    return jax.tree.map(normal, SHAPES, is_leaf=is_shape)


PARAMS = tree(0)


def at(tree, path):
    return np.asarray(leaves_at(tree, {path: None})[path])


def copied(tree):
    """A trip through the host, as a checkpoint makes it."""

    def trip(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(np.array(jax.random.key_data(leaf))))
        return jnp.asarray(np.array(leaf))

    return jax.tree.map(trip, tree)


def bits(tree):
    leaves = jax.tree.leaves(tree)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def assert_same(one, other):
    for a, b in zip(bits(one), bits(other), strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def compiled(tx):
    return jax.jit(lambda g, s, p: tx.update(g, s, p, grads=g))


def train(tx, steps, params=PARAMS, state=None, first=0, see=None):
    """Updates with gradients that are a function of the step."""
    state = tx.init(params) if state is None else state
    update = compiled(tx)
    for step in range(first, steps):
        updates, state = update(tree(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        if see is not None:
            see(step, params, state)
    return params, state


INNER = {
    "adamw": lambda: build(AdamW(weight_decay=0.3, clip_norm=None), Constant(), 20, PARAMS),
    "muon": lambda: build(Muon(), Constant(), 20, PARAMS),
    "sgd": lambda: build(SGD(momentum=0.9, weight_decay=0.1), Constant(), 20, PARAMS),
}


@pytest.mark.variants(2)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("sparse", ["prune", "rigl"])
def test_masked_weights_are_zero_and_the_others_free(inner, sparse):
    """Exactly zero at every step; what was kept all along went as without masks, bit for bit."""
    settings = Pruning(RULES, one_shot(1))
    last = prune(KEY, settings) if sparse == "prune" else rigl(KEY, RULES, Rewiring(2, 6))
    always = {}

    def see(step, params, state):
        for path, mask in flat(state[-1].masks).items():
            assert not at(params, path)[~np.asarray(mask)].any(), (step, path)
            always[path] = np.asarray(mask) & always.get(path, True)

    params, _ = train(optax.chain(INNER[inner](), last), 7, see=see)
    # The gradients here do not depend on the weights, so neither do the moments; weight decay
    # looks at one weight at a time.
    free, _ = train(INNER[inner](), 7)
    for path, mask in always.items():
        assert 0 < mask.sum() < mask.size
        np.testing.assert_allclose(at(params, path)[mask], at(free, path)[mask], rtol=1e-6)
    for path in ("head/kernel", "token_embedding/embedding", "blocks/attention/q/bias"):
        np.testing.assert_array_equal(at(params, path), at(free, path))


SELECTIONS = {"by layer": by_layer(), "together": together, "2:4": by_layer(n_of_m(4))}


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", SELECTIONS)
def test_gradual_pruning_reaches_its_end(name):
    select = SELECTIONS[name]
    schedule = cubic(start=1, every=2, times=2)
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), prune(KEY, Pruning(RULES, schedule, select=select))
    )
    counts = []

    def see(step, params, state):
        counts.append([int((~m).sum()) for m in flat(state[-1].masks).values()])

    params, state = train(tx, 9, see=see)
    assert counts[0] == [0, 0]
    assert sum(counts[-1]) == 48 + 72
    if select is not together:
        assert counts[-1] == [48, 72]
    assert all(later >= earlier for earlier, later in itertools.pairwise(counts))
    if name == "by layer":
        steps = [0, *(min(t - 1, 4) // 2 for t in range(1, 9))]
        share = [1 - (1 - k / 2) ** 3 for k in steps]
        assert counts == [[int(96 // 3 * f * s + 0.5) * 3 for f in (0.5, 0.75)] for s in share]
    for path in (DOWN, Q):
        zeros = (at(params, path) == 0).sum()
        assert zeros == int((~flat(state[-1].masks)[path]).sum())
    half = train(tx, 4)
    assert_same(train(tx, 9, *copied(half), first=4), (params, state))


def reference_move(mask, weight, grad, moving):
    """One layer of RigL, by sorting."""
    kept = np.flatnonzero(mask)
    order = kept[np.argsort(-np.abs(weight.ravel()[kept]), kind="stable")]
    stay = order[: len(order) - moving]
    others = np.setdiff1d(np.arange(mask.size), stay)
    grown = others[np.argsort(-np.abs(grad.ravel()[others]), kind="stable")][:moving]
    new = np.zeros(mask.size, bool)
    new[np.concatenate([stay, grown])] = True
    return new.reshape(mask.shape)


def test_rigl_moves_as_the_paper_says(strict):
    rewiring = Rewiring(every=2, until=8, share=0.4)
    tx = rigl(KEY, RULES, rewiring)
    state, params = tx.init(PARAMS), PARAMS
    update = jax.jit(lambda u, s, p, g: tx.update(u, s, p, grads=g))
    moved = 0
    for step in range(9):
        updates, grads = tree(10 + step), tree(50 + step)
        before, old = flat(state.masks), params
        changes, state = update(updates, state, params, grads)
        params = jax.tree.map(jnp.add, params, changes)
        for path, mask in flat(state.masks).items():
            mask, was = np.asarray(mask), np.asarray(before[path])
            size = {DOWN: 8, Q: 16}[path]
            assert (mask.sum(axis=(1, 2)) == size).all()  # the density of every layer
            if step not in (2, 4, 6):
                np.testing.assert_array_equal(mask, was)
                continue
            share = 0.2 * (1 + np.cos(np.pi * step / 8))
            weight = at(old, path) + at(updates, path)
            for layer in range(3):
                expected = reference_move(
                    was[layer], weight[layer], at(grads, path)[layer], int(size * share + 0.5)
                )
                np.testing.assert_array_equal(mask[layer], expected)
            grown = mask & ~was
            moved += grown.sum()
            assert not at(params, path)[grown].any()  # starts at zero
            stays = mask & was
            np.testing.assert_allclose(at(params, path)[stays], weight[stays], rtol=1e-5)
    assert moved > 20


def test_set_grows_at_random_and_keeps_the_density(strict):
    rewiring = Rewiring(every=1, until=100)
    tx = sparse_evolution(KEY, RULES, rewiring)
    masks, keys = [], []

    def see(step, params, state):
        masks.append(np.asarray(flat(state.masks)[DOWN]))
        keys.append(tuple(bits(state.key)[0]))
        assert (masks[-1].sum(axis=(1, 2)) == 8).all()

    whole = train(tx, 6, see=see)
    changes = [(a != b).sum() for a, b in itertools.pairwise(masks)]
    assert min(changes) > 0
    grown = [np.flatnonzero(b & ~a) for a, b in itertools.pairwise(masks)]
    assert len({tuple(places) for places in grown}) == len(grown)
    assert len(set(keys)) == len(keys)  # a new draw each time
    assert (masks[0][0] != masks[0][1]).any()  # and each layer its own
    half = train(tx, 3)
    assert_same(train(tx, 6, *copied(half), first=3), whole)
    assert_same(train(tx, 6, *half, first=3), whole)


def test_masks_that_stay(strict):
    tx = rewire(KEY, RULES, Rewiring(until=0), by_gradient)
    first = tx.init(PARAMS)
    _, last = train(tx, 4)
    assert_same(first.masks, last.masks)
    assert (tx.init(PARAMS).masks["blocks"]["mlp"]["down"]["kernel"][0] != True).sum() == 24  # noqa: E712


def test_it_nests_in_other_transformations():
    """Masked, partitioned, accumulated: the state is found wherever it lies."""
    sparse = functools.partial(prune, KEY, Pruning([("kernel", 0.5)], one_shot(0)))
    chosen = jax.tree.map(lambda _: False, PARAMS)
    chosen["blocks"] = jax.tree.map(lambda _: True, PARAMS["blocks"])
    labels = jax.tree.map(lambda on: "sparse" if on else "dense", chosen)
    inner = optax.chain(optax.adam(0.1), sparse())
    for tx in (
        optax.chain(optax.adam(0.1), optax.masked(sparse(), chosen)),
        optax.partition({"sparse": inner, "dense": optax.sgd(0.1)}, labels),
        optax.MultiSteps(inner, every_k_schedule=2).gradient_transformation(),
    ):
        params, _ = train(tx, 4)
        assert (at(params, DOWN) == 0).sum() == 48
        assert (at(params, "head/kernel") == 0).sum() in (0, 14)


def test_low_precision_cancels_exactly():
    for p_dtype, u_dtype in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        params, updates = tree(1, p_dtype), tree(2, u_dtype)
        masks = {"head": {"kernel": jnp.asarray(np.arange(28).reshape(4, 7) % 2 == 0)}}
        got = optax.apply_updates(params, mask_updates(updates, params, masks))["head"]["kernel"]
        assert got.dtype == p_dtype
        assert int((got == 0).sum()) == 14


@pytest.mark.slow
def test_in_the_training_step():
    """The step passes the raw gradient; loss falls while the weights stay sparse."""
    model, terms = Transformer(llama_tiny(scan_layers=True)), [cross_entropy()]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 9)), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((4, 8))}
    params = jax.jit(model.init)(KEY, tokens)["params"]
    rules = [("mlp/down/kernel", 0.9)]
    tx = optax.chain(optax.adamw(1e-2), rigl(KEY, rules, Rewiring(every=3, until=12)))
    step = jax.jit(make_train_step(model, terms, tx))
    state = init_state(KEY, params, tx)
    losses = []
    for _ in range(15):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    sparse = state.optimizer[-1]
    assert isinstance(sparse, RewireState)
    for path, mask in flat(sparse.masks).items():
        w = at(state.params, path)
        assert ((w != 0).sum(axis=(1, 2)) <= 307).all()  # 32 * 96 * 0.1
        assert not w[~np.asarray(mask)].any()


def test_bad_input_is_explained():
    tx = rigl(KEY, RULES, Rewiring(every=1))
    with pytest.raises(ValueError, match="grads=raw gradient"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    tx = rewire(KEY, RULES, Rewiring(every=1), at_random)
    with pytest.raises(ValueError, match="rewire needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="leaves no weight"):
        rigl(KEY, [("mlp", 1.0)], Rewiring()).init(PARAMS)


def test_averages_of_a_run_are_as_sparse_as_its_weights():
    """The tail average sees what is left of an update."""
    config = gpt2_tiny(scan_layers=True, dropout=0.0)
    settings = Settings(
        phases=(Phase(6, config, 4, 8),),
        data=("x",),
        tokenizer="bytes",
        optimizer=AdamW(tail_fraction=1 / 3),
        methods=(Rewire(0.8, every=2, until=4),),
    )
    early = dataclasses.replace(settings, optimizer=AdamW(tail_fraction=1.0))
    with pytest.raises(ValueError, match=r"averages from update 0 .* give at most 0\.333"):
        assemble(early, config)
    parts = assemble(settings, config)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params, state = params["params"], None

    @jax.jit
    def step(params, state, number):
        grads = jax.tree.map(lambda w: jnp.cos(w * 100 + number), params)
        updates, state = parts.optimizer.update(grads, state, params, value=0.0, grads=grads)
        return optax.apply_updates(params, updates), state

    state = parts.optimizer.init(params)
    for number in range(6):
        params, state = step(params, state, number)
    _, average = average_of(state)
    kernels = [tree["blocks"]["mlp"]["up"]["kernel"] for tree in (params, average)]
    for kernel in kernels:
        assert float((kernel == 0).mean()) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("order", [1, -1])
def test_weights_are_sparse_whatever_else_a_run_does_to_updates(order):
    """Named first or last: rates by depth scale updates, and must not scale a masking."""
    config = gpt2_tiny(scan_layers=True, dropout=0.0)
    methods = (LayerDecay(0.5), Rewire(0.8, every=2, until=4))[::order]
    settings = Settings(
        phases=(Phase(6, config, 4, 8),), data=("x",), tokenizer="bytes", methods=methods
    )
    parts = assemble(settings, config)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    grads = jax.tree.map(lambda w: jnp.cos(w * 100), params)
    updates, _ = jax.jit(parts.optimizer.update)(
        grads, parts.optimizer.init(params), params, value=0.0, grads=grads
    )
    kernel = optax.apply_updates(params, updates)["blocks"]["mlp"]["up"]["kernel"]
    assert (kernel == 0).mean(axis=(1, 2)).tolist() == pytest.approx([0.8, 0.8], abs=0.01)
