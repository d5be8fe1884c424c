"""8-bit products and 8-bit optimizer state together, in the real training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.quantization.int8_training import Products, low_precision_products
from compress.quantization.optimizer_state import eight_bit
from model.presets import gpt2_tiny
from model.transformer import Transformer
from parallel.mesh import make_mesh
from parallel.placement import state_shardings
from parallel.placement_strategies import strategies_for
from train.losses import cross_entropy
from train.plugs import WeightTransform
from train.step import init_state, make_train_step
from train.tree_store import load_tree, save_tree

MODEL = Transformer(gpt2_tiny(scan_layers=True))
RULES = [("blocks/.*/kernel", Products(rounding="stochastic"))]
OPTIMIZER = eight_bit(optax.adamw(3e-3), smallest=256, key=jax.random.key(2))
TRANSFORMS = [WeightTransform("int8", low_precision_products(RULES))]


def batch_of(seed):
    tokens = np.random.default_rng(seed).integers(0, 64, (4, 9))
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones((4, 8)),
    }


def start():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return init_state(jax.random.key(1), params, OPTIMIZER, TRANSFORMS)


STEP = jax.jit(
    make_train_step(MODEL, [cross_entropy()], OPTIMIZER, transforms=TRANSFORMS, micro_batches=2),
    donate_argnums=0,
)


def run(state, steps):
    losses = []
    for number in steps:
        state, metrics = STEP(state, {}, batch_of(number % 2))
        losses.append(float(metrics["loss"]))
    return state, losses


def data(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


@pytest.mark.slow
def test_it_learns_and_resumes_bitwise(tmp_path):
    whole, losses = run(start(), range(12))
    assert losses[-1] < losses[0] - 0.1
    half, _ = run(start(), range(5))
    save_tree(tmp_path / "state", half)
    abstract = jax.eval_shape(lambda: half)
    resumed, _ = run(load_tree(tmp_path / "state", abstract), range(5, 12))
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(data(one), data(two))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_numbers_are_laid_out_like_their_parameter(axis):
    state = jax.eval_shape(start)
    mesh = make_mesh(devices=jax.devices()[:2], **{axis: 2})
    shardings = state_shardings(mesh, state, strategies_for(mesh, state.params))
    up = shardings.params["blocks"]["mlp"]["up"]["kernel"]
    assert axis in up.spec
    assert shardings.optimizer.inner[0].mu["blocks"]["mlp"]["up"]["kernel"] == up
    assert shardings.optimizer.inner[0].nu["blocks"]["mlp"]["up"]["kernel"] == up
