"""The probe on a run's own shapes: what is timed, and what the choice makes of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.export.stored import is_product
from compress.quantization.formats import FORMATS
from compress.quantization.probe import Row, Table
from compress.quantization.quantize import is_qtensor, quantize_params, weight_rules
from experiments.audit import audit
from experiments.compression.probe import by_probe, choices, probe_run, products_of
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer


def quantized(config, format):
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, new)
    return quantize_params(params, weight_rules(params, format))


def table(params, rows, fastest):
    """As if `fastest` had won at every shape."""
    shapes = {(rows, i, o) for i, o, _ in products_of(params).values()}
    times = dict.fromkeys(("float32", "bfloat16", "dequantize", "int8"), 2.0) | {fastest: 1.0}
    formats = {format for _, _, format in products_of(params).values()}
    found = Table(tuple(Row(s, times, times) for s in sorted(shapes)), "cpu", "0", 1)
    return dict.fromkeys(formats, found)


@pytest.mark.parametrize("fastest", ["float32", "bfloat16", "dequantize", "int8"])
def test_the_choice_is_what_runs(fastest):
    config = gpt2_tiny(scan_layers=True)
    params, model = quantized(config, "int8"), Transformer(config)
    tables = table(params, 4, fastest)
    assert set(choices(params, tables, 4).values()) == {fastest}
    new = by_probe(params, tables, 4)
    kernel = new["blocks"]["mlp"]["up"]["kernel"]
    assert is_product(kernel) == (fastest == "int8")
    assert is_qtensor(kernel) == (fastest == "dequantize")
    if fastest == "bfloat16":
        assert kernel.dtype == jnp.bfloat16
    found = audit(model, new)
    assert (found.integer_dots > 0) == (fastest == "int8")
    tokens = jnp.arange(8)[None]
    logits = [model.apply({"params": p}, tokens) for p in (params, new)]
    error = np.abs(np.asarray(logits[0] - logits[1])).max() / np.asarray(logits[0]).std()
    assert error < (1e-4 if fastest in ("float32", "dequantize") else 0.2)
    again = by_probe(new, tables, 4)  # integer products are looked through
    assert jax.tree.structure(again) == jax.tree.structure(new)


def test_all_products_are_probed_and_nothing_else():
    tied, own = (quantized(c, "q4_0") for c in (gpt2_tiny(), llama_tiny(tied_head=False)))
    assert "token_embedding/embedding" in products_of(tied)
    assert "token_embedding/embedding" not in products_of(own)
    assert "head/kernel" in products_of(own)
    assert not any("position" in path for path in products_of(tied))
    assert products_of({"head": {"kernel": jnp.ones((2, 2))}}) == {}
    assert probe_run({"head": {"kernel": jnp.ones((2, 2))}}, 4) == {}


def test_integers_are_no_way_for_what_holds_none():
    params = {"head": {"kernel": jnp.ones((32, 8))}}
    for format, ways in (("q4_0", 3), ("int8", 4)):
        small = quantize_params(params, [("kernel", format)])
        ((found, rows),) = probe_run(small, 2, repeats=1).items()
        assert found == FORMATS[format]
        assert len(rows.rows[0].seconds) == ways
        assert rows.rows[0].shape == (2, 32, 8)
