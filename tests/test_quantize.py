"""Quantized parameters: the same model as the dequantized ones, and honest counts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.formats import FORMATS, Format
from compress.quantization.quantize import (
    dequantize_params,
    formats_by_path,
    is_qtensor,
    quantize_params,
    report,
    weight_rules,
)
from compress.quantization.spec import abstract_from_spec, spec_of
from model.cache import init_cache
from model.flops import abstract_params
from model.generate import Sampling, generate
from model.presets import gpt2, gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer, features, head

PRESETS = {"gpt2": gpt2_tiny, "llama": llama_tiny, "modern": modern_tiny}
TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, 64)


@functools.cache
def params_of(preset):
    return jax.jit(redrawn, static_argnums=0)(preset)


def redrawn(preset):
    shapes = abstract_params(PRESETS[preset]())
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        0.5 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def quantized(preset, name):
    params = params_of(preset)
    positions = name if preset == "gpt2" else None
    return quantize_params(params, weight_rules(params, name, positions=positions))


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("preset", "name", "scan"),
    [
        ("gpt2", "q4_0", False),
        ("llama", "q8_0", True),
        pytest.param("gpt2", "int8", True, marks=pytest.mark.slow),
        pytest.param("modern", "int8_zero_point", False, marks=pytest.mark.slow),
    ],
)
def test_the_model_runs_unchanged(strict, preset, name, scan):
    model = Transformer(PRESETS[preset](scan_layers=scan))
    q = quantized(preset, name)
    plain = dequantize_params(q)
    logits = jax.jit(lambda p: model.apply({"params": p}, TOKENS))
    close(logits(q), logits(plain))
    assert float(jnp.abs(logits(q) - logits(params_of(preset))).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int16", "e4m3", "q4_1"])
def test_other_formats_runs_in_the_model(name):
    model = Transformer(gpt2_tiny(scan_layers=True))
    q = quantized("gpt2", name)
    close(
        jax.jit(model.apply)({"params": q}, TOKENS),
        jax.jit(model.apply)({"params": dequantize_params(q)}, TOKENS),
    )


def test_decoding_with_a_cache(strict):
    model, q = Transformer(llama_tiny(scan_layers=True)), quantized("llama", "q4_1")

    @jax.jit
    def both(q):
        whole = head(model, q, features(model, q, TOKENS).final[:, -1])
        out = features(model, q, TOKENS[:, :5], cache=init_cache(model.config, 2, 16))
        out = features(model, q, TOKENS[:, 5:], cache=out.cache)
        return head(model, q, out.final[:, -1]), whole

    close(*both(q))


def test_generating(strict):
    model, q = Transformer(gpt2_tiny(scan_layers=True)), quantized("gpt2", "int8")
    settings = {"key": jax.random.key(0), "max_new_tokens": 6, "sampling": Sampling(temperature=0)}
    got, expected = (
        generate(model, p, [[1, 2], [3, 4, 5]], **settings).new_tokens()
        for p in (q, dequantize_params(q))
    )
    assert got == expected


@pytest.mark.slow
def test_bfloat16_models_take_quantized_weights():
    model = Transformer(gpt2_tiny(dtype="bfloat16", scan_layers=True))
    logits = jax.jit(model.apply)({"params": quantized("gpt2", "q8_0")}, TOKENS)
    plain = jax.jit(model.apply)({"params": params_of("gpt2")}, TOKENS)
    assert float(jnp.abs(logits - plain).max()) < 0.1 * float(jnp.abs(plain).max())


def test_default_rules_take_all_matrices_and_nothing_else():
    for preset in PRESETS:
        shapes = abstract_params(PRESETS[preset]())
        rules = weight_rules(shapes, "int8")
        q = jax.eval_shape(lambda p, rules=rules: quantize_params(p, rules), shapes)
        for row in report(q).rows:
            last = row.path.split("/")[-1]
            matrix = last in ("kernel", "embedding") and "position" not in row.path
            assert (row.format is not None) == matrix, row.path
    q = quantized("gpt2", "int8")
    assert is_qtensor(q["position_embedding"]["embedding"])
    # A table has its scales by row: its transpose is the kernel of the tied head.
    assert q["token_embedding"]["embedding"].scales.shape == (64, 1)
    assert q["blocks"]["mlp"]["up"]["kernel"].scales.shape == (2, 1, 128)


def test_rules_choose_formats_in_order():
    params = params_of("llama")
    q = quantize_params(
        params, [("head", None), ("mlp/down", "int8"), ("kernel", Format(bits=4, group=16))]
    )
    assert not is_qtensor(q["head"]["kernel"])
    assert q["blocks"]["mlp"]["down"]["kernel"].format == FORMATS["int8"]
    assert q["blocks"]["mlp"]["up"]["kernel"].scales.shape == (2, 2, 96)
    assert q["token_embedding"]["embedding"] is params["token_embedding"]["embedding"]


def test_the_search_reaches_the_matrices():
    params, rules = params_of("llama"), [("attention/q/kernel|head", "int3")]

    def errors(candidates):
        q = quantize_params(params, rules, candidates=candidates)
        q, plain = ((p["blocks"]["attention"]["q"], p["head"]) for p in (q, params))
        return [
            float(jnp.square(a["kernel"].dequantize() - b["kernel"]).sum())
            for a, b in zip(q, plain, strict=True)
        ]

    assert all(found < plain for found, plain in zip(errors(10), errors(1), strict=True))


def leaves_of(tree):
    return jax.tree.leaves(tree, is_leaf=is_qtensor)


def test_report_counts_what_is_there():
    q = quantized("gpt2", "q4_0")
    found = report(q)
    assert found.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    assert found.weights == sum(leaf.size for leaf in jax.tree.leaves(params_of("gpt2")))
    assert found.plain_bytes == 4 * found.weights
    plain = sum(leaf.size for leaf in leaves_of(q) if not is_qtensor(leaf))
    assert found.quantized == found.weights - plain
    assert f"{found.share:.1%}" in str(found)
    assert report(params_of("gpt2")).quantized == 0


@pytest.mark.parametrize(("name", "most"), [("int8", 0.272), ("q4_0", 0.145), ("q4_1", 0.163)])
def test_sizes_at_the_shape_of_gpt2(name, most):
    shapes = abstract_params(gpt2())
    rules = weight_rules(shapes, name, positions=name)
    q = jax.eval_shape(lambda p: quantize_params(p, rules), shapes)
    found = report(q)
    assert found.bytes / found.plain_bytes <= most
    assert found.share > 0.99


@pytest.mark.parametrize("name", ["q4_1", "int8_zero_point"])
def test_a_spec_gives_the_shapes_of_the_quantized_tree(name):
    q = quantized("gpt2", name)
    spec = json.loads(json.dumps(spec_of(q)))
    abstract = abstract_from_spec(abstract_params(gpt2_tiny()), spec)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(q), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_a_spec_keeps_transposes_and_types():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of("llama"))
    q = quantize_params(params, [("head", "q8_0")])
    flipped = {"head": {"kernel": q["head"]["kernel"].T}}
    abstract = abstract_from_spec({"head": {"kernel": jnp.ones((64, 32))}}, spec_of(flipped))
    assert jax.tree.structure(abstract) == jax.tree.structure(flipped)
    assert abstract["head"]["kernel"].shape == flipped["head"]["kernel"].shape == (64, 32)


def test_bad_input(strict):
    params = params_of("gpt2")
    nan = jax.tree.map(lambda a: a, params)
    nan["blocks"]["mlp"]["up"]["kernel"] = (
        nan["blocks"]["mlp"]["up"]["kernel"].at[1, 3, 2].set(jnp.nan)
    )
    cases = [
        (params, [("kernels", "int8")], "'kernels'"),
        (params, [("blocks/0/mlp/up/kernel", "int8")], "holds for layers"),
        (params, [("blocks", "int8")], "no matrix"),
        (params, [("kernel", "int7b")], "no format is called"),
        (params, [("kernel", "int4_g128")], "blocks/.*groups of 128 do not divide"),
        (params, [("kernel", None)], "leave every weight as it is"),
        (quantized("gpt2", "int8"), [("kernel", "int8")], "quantized already"),
        (nan, [("kernel", "int8")], "blocks/mlp/up/kernel.*NaN or infinity"),
    ]
    for tree, rules, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize_params(tree, rules)
    with pytest.raises(ValueError, match="this model has none"):
        weight_rules(params_of("llama"), "int8", positions="int8")
    with pytest.raises(ValueError, match="do not hold"):
        abstract_from_spec(abstract_params(llama_tiny()), spec_of(quantized("gpt2", "int8")))
    assert len(formats_by_path(params, [("kernel", "int8")])) == 6
