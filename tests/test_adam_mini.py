"""Adam-mini: its blocks, its recurrence, and Adam as the case of blocks of one number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.test_matrix_optimizers import gradients
from train.optimizers import build
from train.optimizers.adam_mini import AdamMini
from train.schedules import Constant


def test_adam_mini():
    """Blocks of the paper: heads, neurons, tokens, whole vectors."""
    settings = AdamMini(learning_rate=1.0, weight_decay=0.0, head_width=3, eps=1e-12)
    draw = lambda *shape: jnp.asarray(gradients(1, shape, len(shape))[0], jnp.float32)
    grads = {
        "blocks": {
            "attention": {"q": {"kernel": draw(2, 4, 6)}},
            "mlp": {"up": {"kernel": draw(2, 4, 5), "bias": draw(2, 5)}},
        },
        "token_embedding": {"embedding": draw(7, 4)},
        "final_norm": {"scale": draw(4)},
    }
    tx = build(settings, Constant(), 10, grads)
    state = tx.init(grads)
    updates, state = tx.update(grads, state, grads)
    rms = lambda g, axis: np.sqrt((np.asarray(g) ** 2).mean(axis, keepdims=True))
    q = np.asarray(grads["blocks"]["attention"]["q"]["kernel"])
    heads = np.repeat(rms(q.reshape(2, 4, 2, 3), (1, 3))[..., 0], 3, axis=-1).reshape(2, 1, 6)
    expected = {
        "blocks": {
            "attention": {"q": {"kernel": -q / heads}},
            "mlp": {name: -g / rms(g, 1) for name, g in grads["blocks"]["mlp"]["up"].items()},
        },
        "token_embedding": {
            "embedding": -grads["token_embedding"]["embedding"]
            / rms(grads["token_embedding"]["embedding"], 1)
        },
        "final_norm": {
            "scale": -grads["final_norm"]["scale"] / rms(grads["final_norm"]["scale"], 0)
        },
    }
    expected["blocks"]["mlp"] = {"up": expected["blocks"]["mlp"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state)) - sum(
        leaf.size for leaf in jax.tree.leaves(grads)
    )
    assert numbers < 50  # the second moments and counts of 209 parameters


def test_adam_mini_over_several_updates():
    """Its recurrence in NumPy, by neuron; and Adam itself where a block is a single number."""
    grads = gradients(4, (5, 3), seed=7)
    settings = AdamMini(learning_rate=0.1, weight_decay=0.0, clip_norm=None)
    b1, b2 = settings.b1, settings.b2
    params = {"head": {"kernel": jnp.zeros((5, 3))}}
    tx = build(settings, Constant(), 10, params)
    state, update = tx.init(params), jax.jit(tx.update)
    m, v = np.zeros((5, 3)), np.zeros((1, 3))
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g**2).mean(0, keepdims=True)
        got, state = update({"head": {"kernel": jnp.asarray(g, jnp.float32)}}, state, params)
        expected = -0.1 * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + settings.eps)
        np.testing.assert_allclose(got["head"]["kernel"], expected, rtol=1e-5)

    single = {"head": {"kernel": jnp.zeros((1, 3))}}
    mini, adam = build(settings, Constant(), 10, single), optax.adam(0.1, b1, b2, settings.eps)
    states = [tx.init(single) for tx in (mini, adam)]
    for g in grads:
        row = {"head": {"kernel": jnp.asarray(g[:1], jnp.float32)}}
        one, states[0] = mini.update(row, states[0], single)
        other, states[1] = adam.update(row, states[1], single)
        np.testing.assert_allclose(one["head"]["kernel"], other["head"]["kernel"], rtol=1e-5)
