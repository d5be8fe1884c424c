"""Factors on a run that was quantized after training: its numbers stay, the factors alone train."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import windows
from compress.lowrank import Sum
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import is_qtensor, quantize_params, weight_rules
from compress.quantization.w8a8 import integer_products
from experiments.adapters import adapted_run, save_adapter
from experiments.compression.runs import write_run
from experiments.methods.lora import Lora
from experiments.methods.table import METHODS, resolve
from experiments.runs.assemble import abstract_frozen, abstract_state, assemble
from experiments.runs.execute import execute
from experiments.runs.run import open_run
from tests.compiled import logits_of
from tests.huggingface_cases import assert_same
from tests.test_lora_method import QUIET, losses, settings_of, size
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.settings import from_json, to_json
from train.tokenizers.tokenizer import train_sentencepiece

ROUNDS = {
    "gptq": lambda run: gptq_params(
        run.model,
        run.params,
        windows(np.arange(128) % 100, length=16, batch=4),
        weight_rules(run.params, "q4_0"),
    ),
    "int8": lambda run: quantize_params(run.params, weight_rules(run.params, "int8")),
    "products": lambda run: integer_products(
        quantize_params(run.params, weight_rules(run.params, "int8")), rules=[("kernel", True)]
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Text, a plain run, and what it was compressed to."""
    folder = tmp_path_factory.mktemp("lora-base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
        execute(settings_of(folder, steps=2), folder / "base", QUIET)
        run = open_run(folder / "base")
        for name, round_ in ROUNDS.items():
            tokenizer = run.folder / "tokenizer"
            write_run(folder / name, run.model.config, round_(run), tokenizer, run.settings, {})
        yield folder


def settings_on(home, name, steps=3, **fields):
    """Settings of a run on a compressed one; its own seed would draw other weights."""
    plan = settings_of(home, Lora(base_run=str(home / name), **fields), steps=steps, seed=7)
    tokenizer = str(home / "base" / "tokenizer")
    return dataclasses.replace(plan, tokenizer=tokenizer, optimizer=AdamW(learning_rate=1e-2))


@pytest.mark.slow
def test_only_the_factors_train_and_resume_bitwise_without_the_base(home, tmp_path):
    shutil.copytree(home / "gptq", tmp_path / "gptq")
    settings = settings_on(home, "gptq", steps=8)
    settings = dataclasses.replace(settings, methods=(Lora(base_run=str(tmp_path / "gptq")),))
    often = dataclasses.replace(QUIET, loop=LoopSettings(log_every=1, checkpoint_every=4))
    execute(settings, tmp_path / "whole", often)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/8")
    (tmp_path / "parts/result.json").unlink()
    shutil.rmtree(tmp_path / "gptq")
    execute(settings, tmp_path / "parts", often)
    whole, parts, base = (
        open_run(folder) for folder in (tmp_path / "whole", tmp_path / "parts", home / "gptq")
    )
    assert_same(parts.params, whole.params)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    kernels = [w for w in jax.tree.leaves(whole.params, is_leaf=is_sum) if is_sum(w)]
    assert len(kernels) == 6
    assert all(is_qtensor(w.base) for w in kernels)
    stripped = jax.tree.map(lambda w: w.base if is_sum(w) else w, whole.params, is_leaf=is_sum)
    assert_same(stripped, base.params)
    assert all(bool(jnp.any(w.low.b != 0)) for w in kernels)
    save_adapter(tmp_path / "whole", tmp_path / "adapter")
    again = adapted_run(home / "gptq", None, [str(tmp_path / "adapter")])
    assert_same(again.params, whole.params)
    with pytest.raises(ValueError, match="was trained on other weights"):
        adapted_run(home / "int8", None, [str(tmp_path / "adapter")])


def test_it_begins_as_the_compressed_model(home):
    settings = resolve(settings_on(home, "gptq"), None, open_run)
    run = open_run(home / "gptq")
    parts = assemble(settings, run.model.config)
    trained, fixed = parts.plugs.split(run.params)  # whatever is given: its shapes are the base's
    assert fixed == {}
    (tree,) = parts.plugs.frozen.values()
    (transform,) = parts.plugs.transforms
    frozen = {name: tree.load(open_run) for name, tree in parts.plugs.frozen.items()}
    context = type("Context", (), {"frozen": frozen})
    weights = transform.apply(trained, context)
    tokens = np.arange(16)[None]
    expected = logits_of(run.model, run.params, tokens)
    np.testing.assert_array_equal(logits_of(run.model, weights, tokens), expected)


def test_state_has_nothing_of_the_base(home):
    settings = resolve(settings_on(home, "gptq"), None, open_run)
    config = open_run(home / "gptq").model.config
    parts = assemble(settings, config)
    state, frozen = abstract_state(settings, parts), abstract_frozen(settings, parts)
    layers, width = config.layers, config.width
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    factors = sum(layers * 8 * (i + o) for i, o in shapes)
    assert size(state.params) == 4 * factors
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert size(moments) == 2 * size(state.params)
    assert size(frozen) < 0.25 * size(open_run(home / "base").params)


def test_what_does_not_fit_is_refused(home):
    with pytest.raises(ValueError, match=r"takes integer products \(blocks/attention/k/kernel\)"):
        resolve(settings_on(home, "products"), None, open_run)
    with pytest.raises(FileNotFoundError, match="is no run"):
        resolve(settings_on(home, "nothing"), None, open_run)
    for fields in ({"base": "q4_0"}, {"also": ("norm",)}, {"direction": "dora"}):
        with pytest.raises(ValueError, match="would need the plain weights of"):
            settings_on(home, "gptq", **fields)
    settings = settings_on(home, "int8")
    config = open_run(home / "int8").model.config
    with pytest.raises(ValueError, match="call `resolve` first"):
        assemble(settings, config)
    settings = resolve(settings, None, open_run)
    with pytest.raises(ValueError, match=r"has another model: .*layers"):
        assemble(settings, dataclasses.replace(config, layers=3))
    (method,) = settings.methods
    method.check_tokenizer(open_run(home / "int8").tokenizer)
    with pytest.raises(ValueError, match=r"another tokenizer.*--tokenizer .*int8/tokenizer"):
        method.check_tokenizer(train_sentencepiece(["one two three"] * 9, 280))


def test_settings_survive_json(home):
    settings = resolve(settings_on(home, "gptq"), None, open_run)
    again = from_json(json.loads(json.dumps(to_json(settings))), METHODS)
    assert again == settings
    assert resolve(dataclasses.replace(settings_on(home, "gptq")), again, open_run) == again


def is_sum(node):
    return isinstance(node, Sum)
