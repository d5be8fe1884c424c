"""Recipes of the tables of quantization and pruning: their keys, their steps, what is made once."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.formats import FORMATS
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import dequantize_params, quantize_params
from experiments.ablate import (
    compress_gpt2,
    compress_outliers,
    compress_prune,
    compress_quantize,
    compress_recipes,
    compress_sizes,
    compress_training,
    subjects,
)
from experiments.ablate.compress_recipes import (
    ALL,
    BLOCKS,
    measurement,
    rounded,
    rules_for,
    step_to_json,
)
from experiments.ablate.subjects import Subject
from experiments.compression.compressors import SparseGPT, Wanda
from experiments.compression.quality import before_head
from experiments.tables.table import Request
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer

REQUEST = Request(seeds=2)


def items(module):
    return [item for table in module.TABLES for item in table.cells(REQUEST)]


def keys(module):
    return {(item.name, item.settings.get("seed")): item.key for item in items(module)}


@pytest.fixture
def subject(monkeypatch):
    model = Transformer(gpt2_tiny(dropout=0.0))
    tokens = jnp.arange(128).reshape(4, 32) % model.config.vocabulary_size
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    drawn = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)
    params = jax.tree.map(drawn, params)
    weights = np.ones((4, 32), np.float32)
    held_out = ({"tokens": tokens, "targets": jnp.roll(tokens, 1), "weights": weights},)
    finals = before_head((model, params), held_out)
    found = Subject(model, params, (tokens,), held_out, 128, finals)
    monkeypatch.setattr(compress_recipes, "open_subject", lambda request, settings: found)
    compress_recipes._pruned.cache_clear()
    yield found
    compress_recipes._pruned.cache_clear()


def test_tables_share_what_they_both_ask_for():
    tables = {t.name: t for t in (*compress_quantize.TABLES, *compress_prune.TABLES)}
    found = {
        name: {item.name: item.key for item in table.cells(Request(seeds=1))}
        for name, table in tables.items()
    }
    dense = [found["quantize"]["float32"], found["quantize-blocks"]["float32"]]
    assert set(dense) == {found["prune"]["dense"]}
    assert found["prune-quantize"]["GPTQ4 g32"] == found["quantize-blocks"]["GPTQ4 g32"]
    assert found["quantize"]["RTN4"] != found["quantize-blocks"]["RTN4"]
    for rows in found.values():
        assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize(
    ("module", "target", "changed"),
    [
        (compress_quantize, "compress.quantization.formats.FORMATS", "q4_0"),
        (compress_prune, "compress.quantization.formats.FORMATS", "q4_0"),
        (compress_outliers, "compress.quantization.formats.FORMATS", "int8_tensor"),
        (compress_sizes, "compress.quantization.formats.FORMATS", "q4_0"),
    ],
)
def test_a_grid_of_another_content_is_measured_again(monkeypatch, module, target, changed):
    before = keys(module)
    table = {**FORMATS, changed: dataclasses.replace(FORMATS[changed], scale_dtype="float32")}
    if table[changed] == FORMATS[changed]:
        table[changed] = dataclasses.replace(FORMATS[changed], bits=7)
    monkeypatch.setattr(target, table)
    if module is compress_prune:  # its recipes were made when it was imported
        four = rounded("rtn", "q4_0", BLOCKS)
        monkeypatch.setitem(compress_prune.JOINT, "Wanda 50 %, then RTN4 g32", (Wanda(), four))
    after = keys(module)
    assert after.keys() == before.keys()
    assert any(after[row] != key for row, key in before.items())
    assert any(after[row] == key for row, key in before.items())


def test_a_default_of_another_value_is_measured_again(monkeypatch):
    step = step_to_json(SparseGPT(format="q4_0"))
    assert {"sparsity": 0.5, "block": 128, "damping": 0.01}.items() <= step.items()
    assert step["format"]["group"] == 32
    assert step_to_json(rounded("gptq", "int3", BLOCKS))["order"] == "activation"

    @dataclasses.dataclass(frozen=True)
    class Other:
        sparsity: float = 0.5
        pattern: str = "unstructured"
        margin: float = 0.1

        def __call__(self, model, params, batches):
            raise AssertionError

    before = keys(compress_gpt2)
    monkeypatch.setitem(compress_gpt2.COMPRESSORS, "wanda", Other)
    after = keys(compress_gpt2)
    assert {name for name, key in before.items() if after[name] != key} == {("Wanda 50 %", None)}

    made = compress_training.TABLES[0].cells(REQUEST)[-1]
    run = dataclasses.replace(compress_training.SIZE, width=2 * compress_training.SIZE.width)
    monkeypatch.setattr(compress_training, "SIZE", run)
    again = compress_training.TABLES[0].cells(REQUEST)[-1]
    assert made.name == again.name == compress_training.COSTS
    rank = made.settings["rows"]["low rank from the start, half of the weights"]["methods"]
    assert rank[0]["share"] == 0.5
    assert made.key != again.key
    json.dumps(dict(made.settings))


def test_steps_follow_each_other_and_zeros_stay_on_the_grid(subject):
    ask = lambda recipe: measurement(REQUEST, "row", subjects.base_settings(0), recipe)
    item = ask((Wanda(), rounded("rtn", "q4_0", BLOCKS)))
    found = item.function(item.settings)
    pruned = Wanda()(subject.model, subject.params, subject.calibration)[1]
    expected = quantize_params(pruned, [(BLOCKS, "q4_0")])
    ours = compress_recipes._after(
        REQUEST,
        compress_recipes._hashable(item.settings),
        (Wanda(), rounded("rtn", "q4_0", BLOCKS)),
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0.5 <= found["zeros"] < 1
    assert found["bytes"] < found["dense bytes"]
    plain = ask(())
    values = plain.function(plain.settings)
    assert values["rise in %"] == values["KL to the dense model"] == 0
    assert values["bytes"] == values["dense bytes"]
    assert values.keys() == found.keys()


def test_gptq_steps_are_gptq(subject):
    step = rounded("gptq", "q4_0", ALL)
    _, found = step(subject.model, subject.params, subject.calibration)
    rules = [(ALL, "q4_0")]
    expected = gptq_params(subject.model, subject.params, subject.calibration, rules)
    for a, b in zip(
        *(jax.tree.leaves(dequantize_params(p)) for p in (found, expected)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_what_two_tables_prune_is_pruned_once(subject, monkeypatch):
    made = []
    plain = Wanda.__call__
    monkeypatch.setattr(Wanda, "__call__", lambda self, *a: made.append(self) or plain(self, *a))
    for recipe in ((Wanda(),), (Wanda(), rounded("rtn", "q4_0", BLOCKS)), (Wanda(pattern="2:4"),)):
        item = measurement(REQUEST, "row", subjects.base_settings(0), recipe)
        item.function(item.settings)
    assert made == [Wanda(), Wanda(pattern="2:4")]
    item = measurement(REQUEST, "row", subjects.base_settings(1), (Wanda(),))
    item.function(item.settings)  # of another seed
    assert len(made) == 3


def test_a_group_that_does_not_divide_a_kernel_becomes_a_channel():
    model = Transformer(llama_tiny(ffn_width=44))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rules = rules_for(params, ALL, FORMATS["q4_0"])
    assert [regex for regex, _ in rules] == ["^blocks/mlp/down/kernel$", ALL]
    assert rules[0][1].group == "channel"
    assert rules_for(params, ALL, FORMATS["int4"]) == [(ALL, FORMATS["int4"])]
    only = rules_for(params, "attention/.*/kernel", FORMATS["q4_0"])
    assert [regex for regex, _ in only] == ["attention/.*/kernel"]  # `down` is not asked for


def test_a_model_of_each_of_three_seeds_is_kept(monkeypatch, tmp_path):
    opened = []
    phase = SimpleNamespace(sequence_length=4)
    settings = SimpleNamespace(phases=(phase,), data=("text",))

    def open_base(cells, seed):
        opened.append(seed)
        return SimpleNamespace(settings=settings, tokenizer=None, model=None, params=seed)

    split = SimpleNamespace(tokens=np.arange(8), bytes=8)
    corpus = SimpleNamespace(split=lambda name: split)
    monkeypatch.setattr(subjects, "open_base", open_base)
    monkeypatch.setattr(subjects, "open_source", lambda source: source)
    monkeypatch.setattr(subjects, "build_corpus", lambda source, tokenizer: corpus)
    monkeypatch.setattr(subjects, "evaluation_batches", lambda split, **shape: [])
    monkeypatch.setattr(subjects, "before_head", lambda model, batches: ())
    request = Request(tmp_path)
    for _ in range(2):
        for seed in range(3):
            found = subjects.open_subject(request, subjects.base_settings(seed))
            assert found.params == seed
    assert opened == [0, 1, 2]
