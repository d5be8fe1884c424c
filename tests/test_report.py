"""The report of a mesh: bytes against what the devices really hold, and one eighth over fsdp=8."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.flops import abstract_params
from model.presets import gpt2, modern_mini, modern_tiny
from model.transformer import Transformer
from parallel.mesh import make_mesh
from parallel.placement import state_shardings
from parallel.placement_strategies import strategies_for
from parallel.report import (
    Share,
    bytes_of,
    bytes_per_device,
    memory_table,
    shares,
    temporary_bytes,
    whole_leaves,
)
from train.optimizers import OPTIMIZERS, build
from train.schedules import Constant
from train.step import init_state


def placed(config, mesh, optimizer="adamw", more=()):
    """Shapes of a state with its shardings, and the function that makes it."""
    params = abstract_params(config)
    tx = build(OPTIMIZERS[optimizer](), Constant(), 10, params)

    def first(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return init_state(key, Transformer(config).init(key, tokens)["params"], tx)

    state = jax.eval_shape(first, jax.random.key(0))
    strategies = strategies_for(mesh, params, more)
    return state, state_shardings(mesh, state, strategies), first


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("preset", [gpt2, modern_mini])
def test_fsdp_over_eight_holds_one_eighth(preset, optimizer):
    """Within 2 %: norms and biases are whole on every device. The vocabulary is padded."""
    config = preset(vocabulary_size=50264)
    state, shardings, _ = placed(config, make_mesh(data=1, fsdp=8), optimizer)
    for part in shares(state, shardings)[:2]:
        assert 1.0 <= part.per_device / (part.whole / 8) < 1.02, part


def test_bytes_are_those_that_the_devices_hold():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, shardings, first = placed(modern_tiny(), mesh, "muon")
    real = jax.jit(first, out_shardings=shardings)(jax.random.key(0))
    of_params = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(real.params):
        for shard in leaf.addressable_shards:
            of_params[shard.device] += shard.data.nbytes
    assert set(of_params.values()) == {shares(state, shardings)[0].per_device}
    assert bytes_per_device(real.params) == bytes_per_device(state.params, shardings.params)
    assert bytes_of(real.params) == sum(leaf.nbytes for leaf in jax.tree.leaves(real.params))


def test_zero1_divides_the_optimizer_alone():
    state, shardings, _ = placed(modern_tiny(), make_mesh(data=8), more=("zero1",))
    params, optimizer, _ = shares(state, shardings)
    assert params.whole == params.per_device
    assert optimizer.per_device < optimizer.whole / 7


def test_what_is_whole_is_named():
    state, shardings, _ = placed(modern_tiny(), make_mesh(data=1, fsdp=8))
    whole = whole_leaves(state.params, shardings.params)
    assert {path.split("/")[-1] for path, _ in whole} == {"scale"}
    text = memory_table(make_mesh(data=1, fsdp=8), shares(state, shardings), 2048, whole)
    assert text.splitlines()[0] == "mesh: fsdp=8: 8 devices"
    assert "2.0 KiB  (activations" in text
    assert f"parameters whole on every device: {len(whole)}" in text


def test_temporaries_shrink_with_the_batch_of_a_device():
    mesh = make_mesh(data=8)

    def f(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w.T).sum()

    def temporaries(spec):
        x = jax.ShapeDtypeStruct((512, 64), "float32", sharding=NamedSharding(mesh, spec))
        w = jax.ShapeDtypeStruct((64, 256), "float32", sharding=NamedSharding(mesh, P()))
        return temporary_bytes(jax.jit(f).lower(x, w).compile())

    assert temporaries(P("data")) < temporaries(P()) / 2


def test_nothing_to_divide_by():
    assert "-" in memory_table(make_mesh(), [Share("other", 0, 0)])
