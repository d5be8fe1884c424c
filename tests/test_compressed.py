"""Quantized and pruned parameters as runs: opened again bit for bit, in one piece or not at all."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.structured import keep_layers
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.w8a8 import Activation, activation_ranges, integer_products
from experiments.compression.runs import write_run
from experiments.runs.run import open_run
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from tests.huggingface_cases import assert_same, drawn
from train.settings import Phase, Settings
from train.tokenizers.tokenizer import load_tokenizer

TOKENS = jnp.arange(16)[None] * 7 % 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    load_tokenizer("bytes").save(folder)
    return folder


def config_of(preset):
    return dataclasses.replace(preset(), vocabulary_size=257)


def written(out, config, params, tokenizer):
    source = Settings(phases=(Phase(7, config, 4, 16),), data=("stdlib",), tokenizer="bytes")
    write_run(out, config, params, tokenizer, source, {"method": "test"})
    return open_run(out)


def same_run(run, config, params):
    assert run.model.config == config
    assert_same(run.params, params)
    model = Transformer(config)
    expected = logits_of(model, params, TOKENS)
    np.testing.assert_array_equal(logits_of(run.model, run.params, TOKENS), expected)


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "int16", "e4m3"])
def test_quantized_parameters_open_bitwise(tmp_path, tokenizer, format):
    config = config_of(gpt2_tiny)
    params = drawn(config, std=0.1)
    params = quantize_params(params, weight_rules(params, format, positions=format))
    same_run(written(tmp_path / "run", config, params, tokenizer), config, params)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == "test"


@pytest.mark.parametrize(
    "activation", [Activation("static", "tensor", "zero_point"), Activation()], ids=str
)
def test_integer_products_open_bitwise(tmp_path, tokenizer, activation):
    config = config_of(modern_tiny)
    plain = drawn(config, std=0.1)
    params = quantize_params(plain, weight_rules(plain, "int8"))
    ranges = activation_ranges(Transformer(config), plain, [TOKENS])
    params = integer_products(params, activation, rules=[("kernel", True)], ranges=ranges)
    same_run(written(tmp_path / "run", config, params, tokenizer), config, params)


def test_smaller_models_and_plain_parameters(tmp_path, tokenizer):
    config, params = keep_layers(config_of(gpt2_tiny), drawn(config_of(gpt2_tiny)), [1])
    same_run(written(tmp_path / "run", config, params, tokenizer), config, params)
    assert not (tmp_path / "run" / "weights.json").exists()


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, tokenizer):
    config = config_of(gpt2_tiny)
    params = drawn(config)
    with pytest.raises(FileNotFoundError):
        written(tmp_path / "run", config, params, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="exists already and nothing is overwritten"):
        written(tmp_path / "run", config, params, tokenizer)


def test_descriptions_that_do_not_fit(tmp_path, tokenizer):
    config = config_of(gpt2_tiny)
    params = drawn(config)
    params = quantize_params(params, weight_rules(params, "int8"))
    written(tmp_path / "run", config, params, tokenizer)
    path = tmp_path / "run" / "weights.json"
    description = json.loads(path.read_text())
    entry = description["quantized"]["token_embedding/embedding"]
    cases = [
        ({"quantized": {"nowhere": entry}, "products": {}}, "quantizes nowhere"),
        ({**description, "products": {"nowhere": {}}}, "nowhere shall have integer products"),
        ({**description, "products": {"final_norm/scale": {}}}, "nothing says how"),
    ]
    for value, message in cases:
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            open_run(tmp_path / "run")
