"""Rules over parameter paths: what a regex means, which rule wins, and what is an error."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from model.rules import is_stacked, leaf_paths, match, match_per_layer, path_of, shadowed

LAYERS = 12  # two digits, so that layer 1 could be mistaken for layers 10 and 11


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.fixture
def params():
    n, d, f = LAYERS, 4, 8
    return {
        "token_embedding": {"embedding": shape(16, d)},
        "blocks": {
            "attention_norm": {"scale": shape(n, d), "bias": shape(n, d)},
            "attention": {name: {"kernel": shape(n, d, d), "bias": shape(n, d)} for name in "qkvo"},
            "mlp": {"up": {"kernel": shape(n, d, f)}, "down": {"kernel": shape(n, f, d)}},
        },
        "final_norm": {"scale": shape(d)},
        "head": {"kernel": shape(d, 16)},
    }


def matched(regex, params):
    """Stacked paths that the rule holds for, by the values that `match` gives."""
    values = jax.tree.leaves(match([(regex, True)], params, default=False))
    return [path for path, value in zip(leaf_paths(params), values, strict=True) if value]


ATTENTION_KERNELS = [f"blocks/attention/{name}/kernel" for name in "koqv"]
BLOCK_KERNELS = [*ATTENTION_KERNELS, "blocks/mlp/down/kernel", "blocks/mlp/up/kernel"]


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("kernel", [*BLOCK_KERNELS, "head/kernel"]),
        ("kernel$", [*BLOCK_KERNELS, "head/kernel"]),
        ("blocks/.*/kernel", BLOCK_KERNELS),
        (r"blocks/\d+/.*/kernel", BLOCK_KERNELS),
        (r"blocks/[^/]+/attention/q/kernel", ["blocks/attention/q/kernel"]),
        ("blocks/attention/q/kernel", ["blocks/attention/q/kernel"]),
        ("^blocks/attention/q/kernel$", ["blocks/attention/q/kernel"]),
        ("attention/q/kernel", ["blocks/attention/q/kernel"]),
        ("attention/q", ["blocks/attention/q/bias", "blocks/attention/q/kernel"]),
        ("q/", ["blocks/attention/q/bias", "blocks/attention/q/kernel"]),
        ("attention/(q|k)/kernel", ["blocks/attention/k/kernel", "blocks/attention/q/kernel"]),
        ("head|embedding", ["head/kernel", "token_embedding/embedding"]),
        ("^head", ["head/kernel"]),
        (".*norm/scale", ["blocks/attention_norm/scale", "final_norm/scale"]),
        ("blocks/attention_norm", ["blocks/attention_norm/bias", "blocks/attention_norm/scale"]),
        ("^(?!blocks).*kernel", ["head/kernel"]),
    ],
)
def test_a_regex_matches_whole_components_and_all_layers(params, regex, expected):
    assert matched(regex, params) == expected


@pytest.mark.parametrize("regex", ["norm", "kern", "ernel", "lock", "attention/q/ker", "qkernel"])
def test_parts_of_a_component_do_not_match(params, regex):
    with pytest.raises(ValueError, match="no parameter matches"):
        match([(regex, True)], params, default=False)


@pytest.mark.parametrize(
    ("regex", "layers"),
    [
        ("blocks/1", {1}),
        ("blocks/1/.*", {1}),
        ("blocks/1/attention/q/kernel", {1}),
        ("^blocks/11/attention", {11}),
        ("blocks/(0|11)/.*kernel", {0, 11}),
        (r"blocks/\d/.*", set(range(10))),
        ("blocks/(?!0/).*/kernel", set(range(1, LAYERS))),
        ("blocks/(?!(0|11)/).*", set(range(1, LAYERS - 1))),
        ("blocks/.*", set(range(LAYERS))),
        ("attention/q/kernel", set(range(LAYERS))),
    ],
)
def test_layer_numbers(params, regex, layers):
    values = match_per_layer([(regex, True)], params, default=False)
    held = values["blocks"]["attention"]["q"]["kernel"]
    assert {layer for layer, value in enumerate(held) if value} == layers
    assert len(held) == LAYERS
    assert values["head"]["kernel"] is False


def test_all_but_a_layer_is_not_that_layer_even_when_it_is_the_only_one():
    one_layer = {"blocks": {"up": {"kernel": shape(1, 2, 2)}}}
    with pytest.raises(ValueError, match="no parameter matches"):
        match_per_layer([("blocks/(?!0/).*", True)], one_layer, default=False)
    assert match([("blocks/up", 7)], one_layer) == {"blocks": {"up": {"kernel": 7}}}


def test_first_match_wins_and_the_default_takes_the_rest(params):
    rules = [("attention/q/kernel", "a"), ("blocks/.*/kernel", "b"), ("kernel", "c")]
    values = match(rules, params, default=None)
    assert values["blocks"]["attention"]["q"] == {"kernel": "a", "bias": None}
    assert values["blocks"]["attention"]["k"]["kernel"] == "b"
    assert values["head"]["kernel"] == "c"
    assert values["token_embedding"]["embedding"] is None
    turned = match(rules[::-1], params, default=None)
    assert turned["blocks"]["attention"]["q"]["kernel"] == "c"


def test_first_match_wins_within_a_layer(params):
    rules = [("blocks/2/.*", 1), ("blocks/(2|3)/attention", 2), ("kernel", 3)]
    values = match_per_layer(rules, params, default=0)
    q = values["blocks"]["attention"]["q"]
    assert q["kernel"] == (3, 3, 1, 2, *[3] * 8)
    assert q["bias"] == (0, 0, 1, 2, *[0] * 8)
    assert values["head"]["kernel"] == 3


def test_match_is_match_per_layer_where_layers_agree(params):
    rules = [("attention/.*kernel", 1.0), ("blocks/.*", 2.0), (".*", 3.0)]
    once = match(rules, params)
    by_layer = match_per_layer(rules, params)
    expected = jax.tree_util.tree_map_with_path(
        lambda key, value: (value,) * LAYERS if is_stacked(path_of(key)) else value, once
    )
    assert by_layer == expected


def test_layers_that_must_differ_are_an_error_that_names_rule_and_leaf(params):
    with pytest.raises(ValueError, match="layer number") as error:
        match([("blocks/3/attention/q/kernel", 2.0), ("kernel", 1.0)], params, default=0.0)
    assert "'blocks/3/attention/q/kernel'" in str(error.value)
    assert "layers [3] of the 12 of 'blocks/attention/q/kernel'" in str(error.value)
    with pytest.raises(ValueError, match="layer number"):  # differs from the default
        match([("blocks/0/.*", True)], params, default=False)
    # another rule, but no other value
    same = match([("blocks/3/.*", 1.0), (".*", 1.0)], params)
    assert set(jax.tree.leaves(same)) == {1.0}


def test_a_rule_that_matches_nothing_is_an_error_that_lists_the_paths(params):
    for rule in ("attention/query/kernel", "blocks/12/.*", "blocks/012/.*"):
        with pytest.raises(ValueError, match="no parameter matches") as error:
            match_per_layer([("kernel", 1), (rule, 2)], params, default=0)
        assert repr(rule) in str(error.value)
        assert repr("kernel") not in str(error.value)
        assert all(path in str(error.value) for path in leaf_paths(params))


def test_a_shadowed_rule_is_no_error_until_the_caller_asks(params):
    rules = [("kernel", 1), ("attention/q/kernel", 2), (".*", 3)]
    match(rules, params)
    assert shadowed(rules, params) == ["attention/q/kernel"]
    assert shadowed(rules[1:], params) == []
    # layers 0 to 11 one by one leave nothing to the last rule
    by_layer = [(f"blocks/{layer}", layer) for layer in range(LAYERS)]
    assert shadowed([*by_layer, ("attention/q", 0)], params) == ["attention/q"]
    assert shadowed([*by_layer[1:], ("attention/q", 0)], params) == []


def test_a_leaf_without_a_rule_is_an_error_without_a_default(params):
    with pytest.raises(ValueError, match="no rule matches") as error:
        match([("kernel", 1), ("scale|bias", 2)], params)
    assert "token_embedding/embedding" in str(error.value)
    assert "head/kernel" not in str(error.value)
    with pytest.raises(ValueError, match="no rule matches"):  # some layers have one
        match_per_layer([(r"blocks/\d/.*", 1), ("^(head|final_norm|token)", 1)], params)


def test_a_malformed_regex_is_named(params):
    with pytest.raises(ValueError, match="'kernel\\(' is not a regular expression"):
        match([("kernel(", 1)], params, default=0)


def test_arrays_and_shapes_give_the_same(params):
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    rules = [("blocks/(1|2)/.*kernel", 1), (".*", 0)]
    assert match_per_layer(rules, arrays) == match_per_layer(rules, params)


def test_a_stacked_leaf_needs_its_layer_axis():
    with pytest.raises(ValueError, match="layer axis"):
        match([(".*", 1)], {"blocks": {"temperature": shape()}})
    with pytest.raises(ValueError, match="layer axis"):
        match([(".*", 1)], {"blocks": {"temperature": 1.0}})


def test_a_stack_of_no_layers():
    empty = {"blocks": {"up": {"kernel": shape(0, 2, 2)}}, "head": {"kernel": shape(2, 3)}}
    rules = [("blocks/.*/kernel", 1), ("kernel", 2)]
    assert match(rules, empty)["blocks"]["up"]["kernel"] == 1
    assert match_per_layer(rules, empty)["blocks"]["up"]["kernel"] == ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    """A weight that is no plain array: logical shape [layer, 2 * rows, columns]."""

    nibbles: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        layers, rows, columns = self.nibbles.shape
        return layers, 2 * rows, columns


def test_a_custom_node_is_one_weight_with_is_leaf_and_several_without():
    packed = Packed(jnp.zeros((3, 2, 4), jnp.uint8), jnp.zeros((3, 4)))
    tree = {"blocks": {"up": {"kernel": packed}}}
    whole = lambda node: isinstance(node, Packed)
    assert leaf_paths(tree, is_leaf=whole) == ["blocks/up/kernel"]
    assert leaf_paths(tree) == ["blocks/up/kernel/nibbles", "blocks/up/kernel/scale"]
    assert match([("kernel", 8)], tree, is_leaf=whole) == {"blocks": {"up": {"kernel": 8}}}
    by_layer = match_per_layer([("blocks/0", 8), ("kernel", 4)], tree, is_leaf=whole)
    assert by_layer == {"blocks": {"up": {"kernel": (8, 4, 4)}}}
    inside = match([("up/kernel/scale", 1), ("kernel", 2)], tree)
    assert (inside["blocks"]["up"]["kernel"].nibbles, inside["blocks"]["up"]["kernel"].scale) == (
        2,
        1,
    )
    assert shadowed([("kernel", 1), ("up", 2)], tree, is_leaf=whole) == ["up"]


def test_paths_of_other_containers():
    tree = {"layers": [{"kernel": 1.0}, (2.0, 3.0)]}
    assert leaf_paths(tree) == ["layers/0/kernel", "layers/1/0", "layers/1/1"]
    assert not any(map(is_stacked, leaf_paths(tree)))
    assert match([("layers/1", "b"), ("kernel", "a")], tree) == {
        "layers": [{"kernel": "a"}, ("b", "b")]
    }
