"""The report: its figures against other ways to find them, its audit against known programs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lowrank_params import compensate_params, factorize_params
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.w8a8 import integer_products
from experiments import compression_report
from experiments.audit import audit, read_program
from experiments.compress import Compress, run_command
from experiments.compression import quality as compression_quality
from experiments.compression.compressors import LowRankFactors, Magnitude, RoundToNearest
from experiments.compression.quality import before_head, quality
from experiments.compression.timings import timings
from experiments.compression_report import report, sizes, table
from experiments.runs.run import open_run
from model.flops import flops_per_token
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from tests.huggingface_cases import drawn
from tests.test_convert import call, make_run
from train.corpus import build_corpus
from train.data import evaluation_batches
from train.evaluate import evaluate
from train.losses import cross_entropy
from train.plugs import State
from train.step import make_evaluation_step
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.getbasetemp() / "report-cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    draw = np.random.default_rng(0)
    letters = (chr(97 + c) for c in draw.integers(0, 26, 6000))
    (folder / "text.txt").write_text("".join(letters))
    make_run(folder / "run", gpt2_tiny(), load_tokenizer("bytes"))
    return folder


@pytest.fixture
def split(home):
    tokenizer = load_tokenizer("bytes")
    return build_corpus(open_source(str(home / "text.txt")), tokenizer).split("validation")


@pytest.fixture
def small(home, own_cache):
    if not (home / "small").exists():
        source = str(home / "text.txt")
        settings = {"run": home / "run", "calibration": source, "windows": 2, "repeats": 0}
        run_command(Compress(RoundToNearest("q4_0"), out=home / "small", **settings))
    return open_run(home / "small")


def test_what_is_known_of_the_dense_model_changes_no_figure(home, small, split, compilations):
    dense = open_run(home / "run")
    pair, other = (dense.model, dense.params), (small.model, small.params)
    batches = list(evaluation_batches(split, sequence_length=16, batch_size=8))
    finals = before_head(pair, batches)
    found = quality(pair, other, batches, split.bytes, finals)
    assert found == quality(pair, other, iter(batches), split.bytes)
    assert found[1]["KL to the dense model"] > 0
    again = jax.tree.map(lambda leaf: leaf + 0, small.params)
    compilations.clear()
    assert quality(pair, (small.model.clone(), again), batches, split.bytes, finals) == found
    assert not compilations  # other weights of the same kind need no other program


def test_the_largest_is_the_first_of_them():
    logs = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 1.0], [-1.0, -2.0, 0.5]])
    assert compression_quality._largest(logs).tolist() == jnp.argmax(logs, axis=-1).tolist()


def test_quality_is_that_of_the_evaluation_and_of_numpy(home, small, split):
    dense = open_run(home / "run")
    found = json.loads((home / "small" / "report.json").read_text())
    batches = lambda: evaluation_batches(split, sequence_length=16, batch_size=8)
    for side, run in (("before", dense), ("after", small)):
        state = State(jnp.int32(0), run.params, (), jax.random.key(0), {})
        step = jax.jit(make_evaluation_step(run.model, [cross_entropy()]))
        means = evaluate(step, state, {}, batches(), split.bytes)
        assert found[side]["loss"] == pytest.approx(means["loss"], rel=1e-5)
        assert found[side]["perplexity"] == pytest.approx(math.exp(means["loss"]), rel=1e-5)
        assert found[side]["bits per byte"] == pytest.approx(means["bits_per_byte"], rel=1e-5)
    kl, same, count = 0.0, 0, 0
    for batch in batches():
        p, q = (
            np.asarray(logits_of(run.model, run.params, batch["tokens"]), np.float64)
            for run in (dense, small)
        )
        p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
        seen = batch["weights"] > 0
        kl += (np.exp(p) * (p - q)).sum(axis=-1)[seen].sum()
        same += (p.argmax(axis=-1) == q.argmax(axis=-1))[seen].sum()
        count += seen.sum()
    assert found["after"]["KL to the dense model"] == pytest.approx(kl / count, rel=1e-3)
    assert found["after"]["top-1 agreement"] == pytest.approx(same / count)
    assert 0 < found["after"]["top-1 agreement"] < 1


def test_a_model_does_not_differ_from_itself(home, split):
    run = open_run(home / "run")
    pair = (run.model, run.params)
    batches = evaluation_batches(split, sequence_length=16, batch_size=8)
    before, after = quality(pair, pair, batches, split.bytes)
    assert before == after


def test_sizes_are_those_of_the_arrays_and_files(home, small):
    dense, after = sizes(open_run(home / "run")), sizes(small)
    assert dense["parameters"] == after["parameters"] == dense["non-zeros"]
    assert dense["bytes on the device"] == 4 * dense["parameters"]
    assert after["bytes on the device"] == sum(x.nbytes for x in jax.tree.leaves(small.params))
    assert after["bytes on the device"] < 0.35 * dense["bytes on the device"]
    assert after["bytes on disk"] < dense["bytes on disk"]
    _, params = Magnitude(0.5)(small.model, open_run(home / "run").params, [])
    zeros = sum(int((x == 0).sum()) for x in jax.tree.leaves(params))
    assert zeros == 12_288  # half of two layers of 4 * 32 * 32 + 2 * 32 * 128


def test_the_audit_tells_integer_products_from_float_ones():
    config = llama_tiny()
    model, plain = Transformer(config), drawn(config, std=0.1)
    q = quantize_params(plain, weight_rules(plain, "int8"))
    products = audit(model, integer_products(q, rules=[("kernel", True)]))
    kernels = 2 * 7 + 1
    assert products.integer_dots == kernels
    dense, floats = audit(model, plain), audit(model, q)
    assert dense.integer_dots == floats.integer_dots == 0
    assert dense.float_dots == floats.float_dots == products.float_dots + kernels
    assert dense.float_copies == products.float_copies == 0
    packed = quantize_params(plain, weight_rules(plain, "q4_0"))
    found = audit(model, packed)
    assert found.integer_dots == 0
    if jax.default_backend() == "cpu":  # XLA:CPU has no product of packed numbers
        assert found.float_copies >= kernels
        assert found.float_copy_bytes >= 4 * 2 * 32 * (32 + 16 + 16 + 32 + 3 * 96)


def test_flops_are_those_of_the_factors():
    """Against a count of every product that one token takes."""
    config = gpt2_tiny()
    params = drawn(config, 0, 0.1)
    plain = compression_report.flops_of(config, params, 16)
    assert plain == flops_per_token(config, 16)
    rank, kernels = 4, [(32, 32)] * 4 + [(32, 128), (128, 32)]
    full = sum(2 * i * o for i, o in kernels)
    thin = sum(2 * rank * (i + o) for i, o in kernels)
    low = factorize_params(params, [("blocks/.*/kernel", rank)])
    assert compression_report.flops_of(config, low, 16) == plain + 2 * (thin - full)
    small = quantize_params(params, [("blocks/.*/kernel", "int8")])
    both = compensate_params(params, small, [("blocks/.*/kernel", rank)])
    assert compression_report.flops_of(config, both, 16) == plain + 2 * thin
    head = factorize_params(params, [("embedding", rank)])  # read by row, and multiplied with once
    table = 2 * rank * (64 + 32) - 2 * 64 * 32
    assert compression_report.flops_of(config, head, 16) == plain + table


@pytest.mark.slow
def test_a_report_of_factors_counts_them(home, split):
    source = str(home / "text.txt")
    settings = {"run": home / "run", "calibration": source, "windows": 2, "repeats": 0}
    run_command(Compress(LowRankFactors(rank=2), out=home / "low", **settings))
    found = json.loads((home / "low" / "report.json").read_text())
    assert found["after"]["FLOPs per token"] < 0.9 * found["before"]["FLOPs per token"]


def test_the_audit_reads_programs():
    text = """
%fused (a: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} convert(%a)
}

ENTRY %main (p: s8[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %w = f32[1,8,4]{2,1,0} fusion(%p), kind=kLoop, calls=%fused
  %v = bf16[4,8]{1,0} transpose(%w)
  %d = s32[2,4]{1,0} custom-call(%x, %p), custom_call_target="__cublas$gemm"
  %e = f32[2,4]{1,0} custom-call(%x, %p), custom_call_target="topk"
  ROOT %f = f32[2,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}
}
"""
    assert read_program(text, {(4, 8)}) == (1, 1, 2, 8 * 4 * 4 + 8 * 4 * 2)


@pytest.mark.slow
def test_timings_have_a_row_for_each_work_and_model(home, small):
    dense = open_run(home / "run")
    rows = timings((dense.model, dense.params), (small.model, small.params), repeats=1)
    assert [row.work for row in rows[::3]] == [
        "prefill 32 tokens",
        "decode batch 1",
        "decode batch 8",
    ]
    assert [row.model for row in rows[:3]] == ["dense float32", "dense bfloat16", "compressed"]
    assert [row.ratio for row in rows[::3]] == [1, 1, 1]
    assert all(row.tokens_per_second > 0 and row.spread == 0 for row in rows)
    slow = {"work": "prefill", "model": "compressed", "tokens_per_second": 1200.0, "spread": 0.5}
    printed = table({"before": {}, "after": {}, "timings": [{**slow, "ratio": 0.4}]})
    assert "| prefill | compressed | 1,200 | 50% | 0.40 |" in printed


def test_the_command_writes_what_it_prints(home, small, monkeypatch, capsys):
    words = ["--run", home / "small", "--dense", home / "run", "--data", home / "text.txt"]
    call(compression_report, monkeypatch, *words, "--repeats", "0")
    printed = capsys.readouterr().out
    assert (home / "small" / "report.md").read_text() == printed
    found = json.loads((home / "small" / "report.json").read_text())
    assert table(found) + "\n" == printed
    assert printed.count("\n") == 2 + len(found["before"])


def test_a_run_of_another_vocabulary_is_refused(home, small, split, tmp_path):
    config = gpt2_tiny()
    other = dataclasses.replace(small, model=Transformer(config))
    with pytest.raises(ValueError, match=r"a vocabulary of 64 and .* one of 257"):
        report(open_run(home / "run"), other, split)
    with pytest.raises(ValueError, match="repeats is 0"):
        timings((small.model, {}), (small.model, {}), repeats=0)
