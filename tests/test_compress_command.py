"""`python -m experiments.compress`: every method on one tiny run, and what it refuses."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import windows
from compress.distillation.students import distilgpt2_style, minitron_style
from compress.pruning.structured_importance import by_activation
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import is_qtensor, weight_rules
from compress.quantization.w8a8 import W8A8
from experiments import compress, evaluate, generate, pretrain
from experiments.compress import Compress, calibration_windows, run_command
from experiments.compression.compressors import (
    AWQ,
    COMPRESSORS,
    GPTQ,
    DistilGPT2Style,
    Magnitude,
    MinitronStyle,
    RoundToNearest,
    SmoothQuant,
    SparseGPT,
    Structured,
    Wanda,
)
from experiments.convert import to_huggingface
from experiments.runs.run import open_run
from model.presets import gpt2_tiny
from tests.compiled import logits_of
from tests.huggingface_cases import assert_same
from tests.test_convert import call, make_run
from train.corpus import build_corpus
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer

EMPTY = {"before": {}, "after": {}, "timings": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.getbasetemp() / "compress-cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, 4)) for _ in range(20)]
    (folder / "text.txt").write_text(" ".join(words[i] for i in draw.integers(0, 20, 1200)))
    make_run(folder / "run", gpt2_tiny(), load_tokenizer("bytes"))
    return folder


@pytest.fixture(scope="module")
def dense(home):
    return open_run(home / "run")


def do(home, out, method, **changes):
    settings = {"run": home / "run", "calibration": str(home / "text.txt"), "windows": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "report", lambda *runs, **settings: EMPTY)  # has a test file
        run_command(Compress(method, out=out, **{**settings, **changes}))
    return open_run(out)


def share_of_zeros(run):
    kernels = jax.tree_util.tree_flatten_with_path(run.params["blocks"])[0]
    return [float((w == 0).mean()) for path, w in kernels if path[-1].key == "kernel"]


def test_gptq_is_gptq_on_the_train_split(tmp_path, home, dense):
    run = do(home, tmp_path / "out", GPTQ())
    corpus = build_corpus(open_source(str(home / "text.txt")), dense.tokenizer)
    batches = calibration_windows(corpus.split("train").tokens, length=16, count=4, batch=8)
    rules = weight_rules(dense.params, "q4_0")
    assert_same(run.params, gptq_params(dense.model, dense.params, batches, rules))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["method"], result["format"], result["from_step"]) == ("gptq", "q4_0", 5)
    assert result["calibration"]["windows"] == 4


@pytest.mark.variants(1)
@pytest.mark.parametrize("method", [RoundToNearest("q4_1", "q8_0"), AWQ(steps=2)], ids=str)
def test_quantizers(tmp_path, home, dense, method):
    run = do(home, tmp_path / "out", method)
    packed = [w for w in jax.tree.leaves(run.params, is_leaf=is_qtensor) if is_qtensor(w)]
    assert len(packed) == 7 + bool(method.positions)
    assert {w.format.bits for w in packed} == ({4, 8} if method.positions else {4})
    near(run, dense, 0.2)


def near(run, dense, tolerance):
    tokens = jnp.arange(16)[None] * 5
    ours, theirs = (logits_of(r.model, r.params, tokens) for r in (run, dense))
    assert float(jnp.linalg.norm(ours - theirs)) < tolerance * float(jnp.linalg.norm(theirs))


@pytest.mark.variants(1)
@pytest.mark.parametrize("product", ["integer", "float"])
def test_smoothquant(tmp_path, home, dense, product):
    method = SmoothQuant(range="static", share="tensor", offset="zero_point", products=product)
    run = do(home, tmp_path / "out", method)
    is_product = lambda node: isinstance(node, W8A8)
    products = [w for w in jax.tree.leaves(run.params, is_leaf=is_product) if is_product(w)]
    assert len(products) == (7 if product == "integer" else 0)
    near(run, dense, 0.1)


@pytest.mark.variants(1)
@pytest.mark.parametrize("kind", [Magnitude, Wanda])
def test_pruners(tmp_path, home, dense, kind):
    assert share_of_zeros(do(home, tmp_path / "a", kind(0.25))) == [0.25] * 6
    run = do(home, tmp_path / "b", kind(pattern="2:4"))
    kernel = np.asarray(run.params["blocks"]["mlp"]["down"]["kernel"])
    assert ((kernel.reshape(2, -1, 4, 32) == 0).sum(axis=2) == 2).all()
    kept = kernel != 0
    np.testing.assert_array_equal(
        kernel[kept], np.asarray(dense.params["blocks"]["mlp"]["down"]["kernel"])[kept]
    )
    with pytest.raises(ValueError, match=r"2:4 is a sparsity of 0.5, not 0.25"):
        do(home, tmp_path / "c", kind(0.25, "2:4"))
    with pytest.raises(ValueError, match=r"is 1.0, which leaves no weight"):
        do(home, tmp_path / "c", kind(1.0))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "importance",
    [
        "activation",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("magnitude", "taylor", "loss")),
    ],
)
def test_structured(tmp_path, home, importance):
    method = Structured(layers=1, width=24, groups=2, neurons=40, importance=importance)
    config = do(home, tmp_path / "out", method).model.config
    assert (config.layers, config.width, config.heads, config.ffn_width) == (1, 24, 2, 40)
    assert config.head_width == 8


@pytest.mark.slow
def test_the_two_presets_are_those_of_the_library(tmp_path, home, dense):
    config, params = distilgpt2_style(dense.model.config, dense.params)
    run = do(home, tmp_path / "distil", DistilGPT2Style())
    assert (run.model.config, run.model.config.layers) == (config, 1)
    assert_same(run.params, params)
    corpus = build_corpus(open_source(str(home / "text.txt")), dense.tokenizer)
    batches = calibration_windows(corpus.split("train").tokens, length=16, count=4, batch=8)
    keep = {"neurons": 64, "groups": 2, "layers": 1}
    importance = {p: by_activation(dense.model, dense.params, batches, p) for p in keep}
    config, params = minitron_style(dense.model.config, dense.params, importance, keep)
    run = do(home, tmp_path / "minitron", MinitronStyle(**keep))
    assert run.model.config == config
    assert_same(run.params, params)
    result = json.loads((tmp_path / "minitron" / "result.json").read_text())
    assert (result["method"], result["neurons"]) == ("minitron", 64)


def test_help_sends_to_where_models_train(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compress", "--help"])
    with pytest.raises(SystemExit):
        compress.main()
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "takes training (quantization-aware training, gradual and sparse training" in said
    assert "experiments.pretrain --from-run" in said
    monkeypatch.setattr(sys, "argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--from-run" in capsys.readouterr().out


def test_a_folder_is_compressed_and_the_commands_open_it(tmp_path, home, monkeypatch, capsys):
    to_huggingface(home / "run", tmp_path / "hf")
    words = ["--hf", tmp_path / "hf", "--tokenizer", "bytes", "--method", "rtn", "--windows", "4"]
    words += ["--method.format", "q4_0", "--calibration", home / "text.txt"]
    call(compress, monkeypatch, *words, "--length", "16", "--out", tmp_path / "out", "--repeats", 0)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}, from {tmp_path / 'hf'}" in printed
    assert "| KL to the dense model |" in printed
    call(generate, monkeypatch, "--run", tmp_path / "out", "--prompt", "a", "--max-new-tokens", "2")
    assert capsys.readouterr().out.startswith("a")
    words = ["--run", tmp_path / "out", "--data", home / "text.txt", "--protocol", "windows:16"]
    call(evaluate, monkeypatch, *words)
    assert "bits per byte" in capsys.readouterr().out


def test_windows_are_spread_over_the_text():
    rows = np.concatenate(calibration_windows(np.arange(1000), length=10, count=5, batch=2))
    assert rows[:, 0].tolist() == [0, 247, 495, 742, 990]
    all_of_it = np.concatenate(calibration_windows(np.arange(45), length=10, count=9, batch=2))
    assert all_of_it.shape == (4, 10)
    assert len(windows(np.arange(45), length=10, batch=9)[0]) == 4


def test_what_is_refused(tmp_path, home):
    do(home, tmp_path / "small", RoundToNearest())
    cases = [
        ({"run": None}, "neither of --run and --hf"),
        ({"hf": home}, "both of --run and --hf"),
        ({"tokenizer": "bytes"}, "a run has its own tokenizer"),
        ({"length": 10**6}, "windows of 1000000 tokens, but there are"),
        ({"out": tmp_path / "small"}, "exists already"),
        ({"run": tmp_path / "small"}, "is quantized already"),
        ({"method": Structured()}, "nothing is to be removed"),
        ({"method": Structured(groups=5)}, "5 groups cannot be kept: there are 4"),
        ({"method": RoundToNearest("int4_g128")}, "groups of 128 do not divide"),
    ]
    for changes, message in cases:
        settings = {"out": tmp_path / "out", "method": GPTQ(), **changes}
        with pytest.raises(ValueError, match=message):
            do(home, **settings)
        assert not (tmp_path / "out").exists()


def test_every_method_has_settings_that_tyro_reads(monkeypatch):
    for name in COMPRESSORS:
        monkeypatch.setattr(sys, "argv", ["compress", "--method", name, "--help"])
        with pytest.raises(SystemExit) as left:
            compress.main()
        assert left.value.code == 0


@pytest.mark.slow
def test_sparsegpt_prunes_and_quantizes_together(tmp_path, home, dense):
    assert share_of_zeros(do(home, tmp_path / "a", SparseGPT(0.25, block=8))) == [0.25] * 6
    run = do(home, tmp_path / "b", SparseGPT(pattern="2:4", format="q8_0", block=8))
    kernel = run.params["blocks"]["mlp"]["down"]["kernel"]
    assert is_qtensor(kernel)
    zeros = (np.asarray(kernel.dequantize()).reshape(2, -1, 4, 32) == 0).sum(axis=2)
    assert (zeros >= 2).all()
    near(run, dense, 0.9)
    with pytest.raises(ValueError, match=r"2:4 is a sparsity of 0.5, not 0.25"):
        do(home, tmp_path / "c", SparseGPT(0.25, "2:4"))
