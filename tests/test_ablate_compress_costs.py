"""Tables of sizes, runtimes and costs at tiny size: what is counted is what is there."""

import dataclasses
import json
import time

import jax
import pytest

from compress.quantization.probe import time_interleaved
from experiments.ablate import compress_costs, compress_gpt2, compress_runtimes, compress_sizes
from experiments.ablate.random_weights import random_weights
from experiments.methods.cached_answers import Kept
from experiments.tables.table import Request, Results
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.settings import Phase

CONFIG = gpt2_tiny(dropout=0.0, width=64, vocabulary_size=96)
REQUEST = Request()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (compress_sizes, compress_runtimes, compress_gpt2):
        monkeypatch.setattr(module, "model_shape", lambda: CONFIG)
    for module in (compress_runtimes, compress_gpt2):
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(compress_gpt2, "WINDOWS", 4)
    monkeypatch.setattr(compress_gpt2, "BATCH", 2)
    monkeypatch.setattr(compress_runtimes, "REPEATS", 2)
    monkeypatch.setattr(compress_runtimes, "PROBED", {"the prompt": 16, "one token": 1})


def results_of(items):
    return Results({item.name: {0: dict(item.function(item.settings))} for item in items})


def rows(lines, name):
    return [
        cell.strip() for line in lines if line.startswith(f"| {name} |") for cell in line.split("|")
    ]


def test_sizes_are_those_of_the_numbers():
    items = compress_sizes.cells(REQUEST)
    results = results_of(item for item in items if item.name in ("float32", "int8", "q4_0"))
    plain, int8, q4_0 = (results.by_name[name][0] for name in ("float32", "int8", "q4_0"))
    matrices = (96 + 32) * 64 + 2 * 12 * 64**2
    vectors = plain["parameters"] - matrices
    assert plain["memory"] == 4 * plain["parameters"]
    assert int8["quantized"] == matrices / plain["parameters"]
    channels = 96 + 32 + 2 * (4 * 64 + 256 + 64)
    assert int8["memory"] == matrices + 4 * (channels + vectors)
    assert q4_0["memory"] == matrices // 32 * 18 + 4 * vectors
    for values in (plain, int8, q4_0):
        assert values["native"] > values["memory"]  # and the text beside it
    assert q4_0["gguf"] < 1.2 * q4_0["native"]
    assert int8["gguf"] is None
    lines = compress_sizes.render(results)
    assert rows(lines, "float32")[4] == "1.000x"
    assert rows(lines, "q4_0")[9].startswith("0.145x: ")


def test_every_kernel_of_a_pass_is_counted():
    shapes = compress_runtimes.kernels_of(CONFIG)
    assert sum(rows * columns * n for (rows, columns), n in shapes.items()) == 2 * 12 * 64**2


def test_the_probe_is_added_up_over_the_kernels():
    (item,) = (item for item in compress_runtimes.cells(REQUEST) if item.name == "probe")
    found = item.function(item.settings)
    kernels = compress_runtimes.kernels_of(CONFIG)
    seconds = dict.fromkeys(found["table"]["rows"][0]["seconds"], 1.0) | {"int8": 0.5}
    for row in found["table"]["rows"]:
        row["seconds"] = dict(seconds)
        if tuple(row["shape"][1:]) == (64, 64):
            row["seconds"]["int8"] = 2.0
    lines = compress_runtimes.render(Results({"probe": {0: found}}))
    total = sum(kernels.values())
    ours = 2.0 * kernels[(64, 64)] + 0.5 * (total - kernels[(64, 64)])
    (line,) = (line for line in lines if line.startswith("| the prompt |"))
    assert f"| {total / ours:.2f}x | float32 |" in line


@pytest.mark.slow
def test_onnx_runtime_computes_our_logits():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    (item,) = (i for i in compress_runtimes.cells(REQUEST) if i.name == "ONNX Runtime")
    found = item.function(item.settings)
    assert found["logits"]["float32"] < 1e-4
    assert found["logits"]["int8"] < 0.02
    assert found["rows"]["float32"]["ratio"] == 1
    text = "\n".join(compress_runtimes.render(Results({"ONNX Runtime": {0: found}})))
    assert "| int8 |" in text


@pytest.mark.slow
def test_llama_cpp_computes_our_logits():
    pytest.importorskip("llama_cpp")
    (item,) = (i for i in compress_runtimes.cells(REQUEST) if i.name == "llama.cpp")
    found = item.function(item.settings)
    assert found["logits"]["float32"] < 2e-3  # keys and values are float16 there
    assert max(found["logits"].values()) < 0.1
    assert compress_runtimes.render(Results({"llama.cpp": {0: found}}))


def test_costs_are_of_the_method_asked_for():
    chosen = {"nearest q4_0", "half of layers and neurons"}
    methods = {"structured": {"layers": 1, "neurons": 32}}
    for item in compress_gpt2.cells(REQUEST):
        if item.name not in chosen:
            continue
        settings = {**item.settings}
        settings["fields"] = methods.get(settings["method"], settings["fields"])
        found = compress_gpt2.cost(settings)
        assert found["peak"] >= found["before"] > 0
        assert found["wall"] > 0
    values = {"wall": 60.0, "peak": 9 * 2**30, "before": 2**30}
    lines = compress_gpt2.render(Results({"GPTQ q4_0": {0: values}}))
    assert rows(lines, "GPTQ q4_0")[2:6] == [
        "1.0",
        "9.00",
        "1.00",
        "30 min, 8 GiB: no, GiB are 1.12x",
    ]


def test_a_cache_is_timed_without_compiling(monkeypatch, compilations):
    model, params = Transformer(CONFIG), random_weights(CONFIG)
    phase = Phase(1, CONFIG, batch_size=2, sequence_length=8)
    timed, clock = [], time.perf_counter

    def times(calls, repeats):
        (call,) = calls.values()
        call()
        before = dict(compilations)
        found = time_interleaved(calls, repeats)
        timed.append(before == dict(compilations))
        return found

    monkeypatch.setattr(compress_costs, "time_interleaved", times)
    look_up, write = compress_costs.cache_costs(model, params, Kept(k=4), phase, 2)
    assert timed == [True, True]
    assert 0 < look_up < clock()
    assert write > 0
    compilations.clear()
    assert compress_costs.shrink_costs(CONFIG, phase, 3) > 0
    assert timed == [True, True, True]


@pytest.mark.slow
def test_a_process_of_its_own_reports_and_fails_clearly():
    (item,) = (i for i in compress_gpt2.cells(REQUEST) if i.name == "nearest int8")
    assert item.function(item.settings)["peak"] > 1e7
    broken = {**json.loads(json.dumps(dict(item.settings))), "fields": {"format": "int9"}}
    with pytest.raises(RuntimeError, match="no format is called 'int9'"):
        compress_gpt2.in_a_process(broken)


def test_random_weights_are_visible():
    params = random_weights(CONFIG)
    assert all(float(abs(leaf).min()) > 0 for leaf in jax.tree.leaves(params))
    logits = Transformer(CONFIG).apply({"params": params}, jax.numpy.arange(8)[None])
    assert float(logits.std()) > 0.1
    assert dataclasses.asdict(CONFIG)["width"] == 64
