"""Traffic: the parser against texts written by hand, and compiled steps against the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import modern_tiny
from model.transformer import Transformer
from parallel.mesh import make_mesh, parse_mesh
from parallel.placement import constrain, place_batch, state_shardings
from parallel.placement_strategies import strategies_for
from parallel.traffic import by_kind, collectives, table
from train.losses import cross_entropy
from train.step import init_state, make_train_step

PROGRAM = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[4,8]{1,0} all-gather(%part), channel_id=1, replica_groups=GROUPS, dimensions={0}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %g)
}

%cond (arg: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%init), condition=%cond, body=%body TRIPS
  %r = (f32[2,3]{1,0}, bf16[5]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
  ROOT %out = f32[4,8] get-tuple-element(%w), index=1
}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"12"}}'


def parsed(groups="{{0,1},{2,3},{4,5},{6,7}}", trips=TRIPS, **mesh):
    mesh = make_mesh(**(mesh or {"data": 4, "tensor": 2}))
    return collectives(PROGRAM.replace("GROUPS", groups).replace(" TRIPS", trips), mesh)


def test_loops_count_as_often_as_they_run():
    gather, reduce = parsed()
    assert (gather.kind, gather.times, gather.bytes, gather.exact) == ("all-gather", 12, 128, True)
    assert gather.total == 12 * 128
    assert gather.sent == 12 * 128 / 2
    assert (reduce.times, reduce.bytes, reduce.size) == (1, 24 + 10, 8)
    assert reduce.axes == ("data", "tensor")


def test_a_loop_of_unknown_length_is_said():
    gather = parsed(trips="")[0]
    assert (gather.times, gather.exact) == (1, False)
    assert "loop of unknown length" in table(parsed(trips=""))
    assert "loop of unknown length" not in table(parsed())


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{{0,2,4,6},{1,3,5,7}}", ("data",), 4),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data",), 4),
        ("[1,8]<=[8]", ("data", "tensor"), 8),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",), 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data",), 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",), 4),
        ("mesh['a'=4,'b'=2,'c'=1] {'a','b'}", ("data", "tensor"), 8),
    ],
)
def test_groups_in_every_form_name_the_axis(groups, axes, size):
    gather = parsed(groups)[0]
    assert (gather.axes, gather.size) == (axes, size)


def test_an_unknown_form_is_no_guess():
    with pytest.raises(ValueError, match=r"replica groups of an unknown form: quux\[8\]"):
        parsed("quux[8]")


def test_asynchronous_pairs_count_once():
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  %q = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p), source_target_pairs={{0,2},{2,0}}
  %e = f32[4]{0} collective-permute-done(%q)
  %x = f32[2]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}
"""
    gather, permute, scatter = collectives(text, make_mesh(data=4, tensor=2))
    assert (gather.bytes, gather.axes) == (32, ("tensor",))
    assert (permute.bytes, permute.axes, permute.sent) == (16, ("data",), 16)
    assert (scatter.bytes, scatter.sent) == (16, 8)


def compiled(mesh, more=(), layers=3):
    """The collectives of one step of SGD with momentum by kind and axes; bytes of parameters."""
    mesh = make_mesh(**parse_mesh(mesh))
    plain = Transformer(modern_tiny(scan_layers=True, layers=layers))
    tx = optax.sgd(0.1, momentum=0.9)

    def first(key):
        return init_state(key, plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"], tx)

    state = jax.eval_shape(first, jax.random.key(0))
    strategies = strategies_for(mesh, state.params, more)
    shardings = state_shardings(mesh, state, strategies)
    model = Transformer(plain.config, constrain=constrain(mesh, strategies))
    step = jax.jit(make_train_step(model, [cross_entropy()], tx), out_shardings=(shardings, None))
    state = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        state,
        shardings,
    )
    batch = {name: np.zeros((8, 32), np.int32) for name in ("tokens", "targets")}
    batch = place_batch(mesh, batch | {"weights": np.ones((8, 32), np.float32)})
    found = collectives(step.lower(state, {}, batch).compile().as_text(), mesh)
    assert all(each.exact for each in found)
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state.params)
    parts = {
        "all": params,
        "blocks": [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 3],
        "ends": [params["head"]["kernel"], params["token_embedding"]["embedding"]],
    }
    sizes = {n: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for n, tree in parts.items()}
    return by_kind(found), sizes


SCALARS = 200
"""Bytes of the sums of numbers (loss, counts, norms) that a formula leaves out."""


def test_data_parallelism_sums_the_gradient_once():
    found, sizes = compiled("data=8")
    assert set(found) == {("all-reduce", ("data",))}
    assert 0 <= found["all-reduce", ("data",)][1] - sizes["all"] <= SCALARS


@pytest.mark.slow
def test_fsdp_gathers_twice_and_sums_once():
    """Kernels are gathered forwards and backwards in each layer, embedding and head once.

    XLA:CPU has no reduce-scatter: the gradient is summed whole and each device takes its part.
    """
    found, sizes = compiled("data=1,fsdp=8")
    assert set(found) == {("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))}
    gathered = found["all-gather", ("fsdp",)][1]
    assert abs(gathered - 2 * sizes["blocks"] - sizes["ends"]) <= 4 * 8 * 32  # the token ids
    assert 0 <= found["all-reduce", ("fsdp",)][1] - sizes["all"] <= SCALARS


LOOP = """
HloModule step
%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = s32[] copy(%i), metadata={op_name="while/cond/lt"}
  %constant.1.clone = s32[] constant(7)
  %b = s32[] copy(%constant.1.clone), metadata={op_name="while/cond/lt"}
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
}
"""


def test_the_limit_of_a_loop_is_found_behind_copies():
    """As a pipeline's is in a program that was divided and not compiled further."""
    (found,) = collectives(LOOP, make_mesh(data=8))
    assert (found.times, found.exact, found.total) == (7, True, 7 * 16)
