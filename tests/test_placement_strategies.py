"""Strategies: which axis of which parameter they divide, their products, what is refused."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.flops import abstract_params
from model.presets import gpt2, gpt2_tiny, llama_tiny, modern_tiny
from model.rules import leaf_paths
from model.transformer import Transformer
from parallel.mesh import make_mesh
from parallel.placement import (
    activation_axes,
    batch_shardings,
    constrain,
    optimizer_specs,
    param_shardings,
    param_specs,
    place_batch,
    state_shardings,
)
from parallel.placement_strategies import (
    STRATEGIES,
    Strategy,
    fsdp,
    pipeline,
    present,
    sequence,
    strategies_for,
    tensor,
    zero1,
)
from train.optimizers import OPTIMIZERS, build
from train.schedules import Constant
from train.step import init_state

MODERN = abstract_params(modern_tiny())
PRESETS = [gpt2_tiny, modern_tiny, llama_tiny]


def specs_by_path(params, specs):
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    return dict(zip(leaf_paths(params), leaves, strict=True))


def test_each_strategy_where_it_belongs():
    specs = specs_by_path(MODERN, param_specs(MODERN, [fsdp(MODERN), tensor(MODERN)]))
    assert specs["blocks/attention/q/kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks/attention/o/kernel"] == P(None, "tensor", "fsdp")
    assert specs["blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["token_embedding/embedding"] == P(("tensor", "fsdp"))
    assert specs["head/kernel"] == P("fsdp", "tensor")
    assert specs["final_norm/scale"] == P()
    assert specs["blocks/attention/q_norm/scale"] == P()


def test_biases_go_with_the_columns():
    params = abstract_params(gpt2_tiny())
    specs = specs_by_path(params, param_specs(params, [tensor(params)]))
    assert specs["blocks/mlp/up/bias"] == specs["blocks/attention/k/bias"] == P(None, "tensor")
    assert specs["blocks/mlp/down/bias"] == specs["blocks/attention/o/bias"] == P()
    assert "head/kernel" not in specs  # tied: the rule for it is left out, not refused


@pytest.mark.parametrize("preset", PRESETS)
def test_products_do_not_depend_on_the_order(preset):
    params = abstract_params(preset())
    all_of_them = [make(params) for make in STRATEGIES.values()]
    first, *others = [param_specs(params, order) for order in itertools.permutations(all_of_them)]
    assert all(other == first for other in others)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_matrix_is_divided(preset):
    """Of each strategy over its axis, whatever the block; only ZeRO-1 leaves parameters whole."""
    params = abstract_params(preset())
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    kernels = [path for path in leaves if path.endswith("kernel") or "token_embedding" in path]
    for make, axis in ((fsdp, "fsdp"), (tensor, "tensor")):
        specs = specs_by_path(params, param_specs(params, [make(params)]))
        assert all(axis in tuple(specs[path]) for path in kernels)
    assert set(specs_by_path(params, param_specs(params, [zero1(params)])).values()) == {P()}
    moments = specs_by_path(params, optimizer_specs(params, [zero1(params)]))
    assert all("data" in tuple(moments[path]) for path in kernels)
    stages = specs_by_path(params, param_specs(params, [pipeline(params)]))
    assert all((tuple(stages[p])[:1] == ("pipeline",)) == p.startswith("blocks") for p in leaves)


def test_own_rules_win():
    rules = [("head/kernel", P(None, ("fsdp", "tensor"))), ("attention/q/kernel", P())]
    specs = specs_by_path(MODERN, param_specs(MODERN, [fsdp(MODERN), tensor(MODERN)], rules))
    assert specs["head/kernel"] == P(None, ("fsdp", "tensor"))
    assert specs["blocks/attention/q/kernel"] == P()
    assert specs["blocks/attention/k/kernel"] == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("attention/query", P())], "no parameter matches 'attention/query'"),
        ([("kernel", P()), ("head/kernel", P("fsdp"))], "'head/kernel' has no effect: earlier"),
        ([("final_norm/scale", P(None, "fsdp"))], r"shape \(32,\) cannot be laid out by .* 2 axes"),
        ([("head/kernel", P("fsdp", "fsdp"))], "'fsdp' on two axes"),
        ([("head/kernel", P("model"))], "mesh axis 'model'; the axes are data, pipeline"),
        ([("blocks/0/.*", P("fsdp"))], r"layers \[0\] of the 2"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ValueError, match=message):
        param_specs(MODERN, [], rules)


def test_two_strategies_that_want_one_mesh_axis_twice():
    across = Strategy("across", [("head/kernel", P(None, "fsdp"))])
    with pytest.raises(ValueError, match=r"'head/kernel' of shape \(32, 64\) would have 'fsdp' on"):
        param_specs(MODERN, [fsdp(MODERN), across])


def test_an_axis_that_does_not_divide_names_the_next_size():
    params = abstract_params(gpt2())
    with pytest.raises(ValueError, match=r"50257 along axis 0, which tensor=8 .* is 50264"):
        param_shardings(make_mesh(tensor=8), params, [tensor(params)])


def test_present_keeps_the_order():
    rules = [("gate/kernel", 1), ("head", 2), ("kernel", 3)]
    assert present(rules, MODERN) == rules[1:]


def test_strategies_follow_the_axes():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert [s.name for s in strategies_for(mesh, MODERN)] == ["fsdp", "tensor"]
    names = [s.name for s in strategies_for(mesh, MODERN, ("sequence", "fsdp"))]
    assert names == ["fsdp", "tensor", "sequence"]
    with pytest.raises(ValueError, match="no strategy is called 'zero2'; there are fsdp, zero1"):
        strategies_for(mesh, MODERN, ("zero2",))


def state_of(params, optimizer, extra):
    tx = build(OPTIMIZERS[optimizer](), Constant(), 10, params)

    def first(params):
        state = init_state(jax.random.key(0), params, tx)
        return state.replace(extra={**state.extra, **extra(params)})

    return jax.eval_shape(first, params)


def shardings_by_path(state, shardings):
    leaves, others = jax.tree.leaves(state), jax.tree.leaves(shardings)
    return {
        path: (leaf.shape, sharding.spec)
        for path, leaf, sharding in zip(leaf_paths(state), leaves, others, strict=True)
    }


@pytest.mark.variants(6)
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_optimizer_state_follows_its_parameter(optimizer):
    mesh = make_mesh(fsdp=2, tensor=2)
    strategies = [fsdp(MODERN), tensor(MODERN)]
    state = state_of(MODERN, optimizer, lambda p: {"prune": {"mask": p}, "noise": jnp.zeros(3)})
    found = shardings_by_path(state, state_shardings(mesh, state, strategies))
    specs = specs_by_path(MODERN, param_specs(MODERN, strategies))
    shapes = dict(zip(leaf_paths(MODERN), (p.shape for p in jax.tree.leaves(MODERN)), strict=True))
    followed = dict.fromkeys(specs, 0)
    for path, (shape, spec) in found.items():
        owner = next((p for p in specs if path.endswith("/" + p)), None)
        if owner is not None and shape == shapes[owner]:
            assert spec == specs[owner], path
            followed[owner] += 1
        else:
            assert spec == P(), path
    # params, the mask of `extra`, and at least one moment (factored ones have another shape).
    moments = 0 if optimizer in ("fromage", "polyak_sgd") else 1
    assert min(followed.values()) >= 2 + moments


def test_zero1_divides_moments_alone():
    mesh = make_mesh(data=8)
    state = state_of(MODERN, "adamw", lambda p: {"mask": p})
    found = shardings_by_path(state, state_shardings(mesh, state, [zero1(MODERN)]))
    kernels = {p: spec for p, (_, spec) in found.items() if p.endswith("mlp/up/kernel")}
    assert len(kernels) == 4
    for path, spec in kernels.items():
        assert spec == (P(None, "data") if path.startswith("optimizer/") else P()), path


def test_factored_moments_stay_whole():
    params = {"head": {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}}
    tx = optax.scale_by_factored_rms()
    state = jax.eval_shape(lambda p: init_state(jax.random.key(0), p, tx), params)
    found = shardings_by_path(state, state_shardings(make_mesh(fsdp=8), state, [fsdp(params)]))
    factored = [p for p in found if "v_row" in p or "v_col" in p]
    assert factored
    assert all(found[path][1] == P() for path in factored)
    assert found["params/head/kernel"][1] == P("fsdp")


def test_batches_go_by_rows_and_time():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    batch = {
        "tokens": jnp.zeros((4, 6)),
        "values": jnp.zeros(4),
        "labels": jnp.zeros((4, 3)),
        "teacher": jnp.zeros((4, 6, 5)),
    }
    placed = place_batch(mesh, batch)
    shapes = {name: a.addressable_shards[0].data.shape for name, a in placed.items()}
    assert shapes == {"tokens": (1, 3), "values": (1,), "labels": (1, 3), "teacher": (1, 3, 5)}
    assert placed["tokens"].sharding == batch_shardings(mesh, batch)["tokens"]
    for name, array in batch.items():
        assert (placed[name] == array).all()


def test_activations_go_by_the_names_of_their_axes():
    mesh = make_mesh(data=2, tensor=2, context=2)
    x = jnp.zeros((4, 8, 16))

    def layout(strategies, axes):
        fn = constrain(mesh, strategies)
        return jax.jit(lambda x: fn(x, axes))(x).sharding.shard_shape(x.shape)

    stream = ("batch", "time", "width")
    assert layout([], stream) == (2, 4, 16)
    assert layout([sequence(MODERN)], stream) == (2, 2, 16)
    assert layout([tensor(MODERN), sequence(MODERN)], ("batch", "branch", "ffn")) == (2, 4, 8)
    assert activation_axes([tensor(MODERN)])["heads"] == ("tensor",)
    with pytest.raises(ValueError, match="no layout for the axis 'depth'"):
        constrain(mesh)(x, ("batch", "time", "depth"))


def test_constrain_inside_shard_map_leaves_its_axes_out():
    """What `per_worker` gradients do: `data` is taken over, `tensor` is still the compiler's."""
    mesh = make_mesh(data=4, tensor=2)
    fn = constrain(mesh, [sequence(MODERN)])

    def local(x):
        return fn(x * 2, ("batch", "time", "width"))

    x = jnp.arange(4.0 * 8 * 2).reshape(4, 8, 2)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    with jax.set_mesh(mesh):
        out = jax.jit(sharded)(jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert (out == 2 * x).all()
    assert out.sharding.shard_shape(x.shape) == (1, 4, 2)


def test_our_code_is_strict(strict):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    strategies = strategies_for(mesh, MODERN)
    model = Transformer(modern_tiny(), constrain=constrain(mesh, strategies))
    params = jax.jit(
        lambda key: Transformer(modern_tiny()).init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        out_shardings=param_shardings(mesh, MODERN, strategies),
    )(jax.random.key(0))
    tokens = place_batch(mesh, {"tokens": jnp.zeros((8, 8), jnp.int32)})["tokens"]
    assert jax.jit(model.apply)({"params": params}, tokens).shape == (8, 8, 64)
