"""What `experiments.compress` and `experiments.export` refuse, in one sentence, before any work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress import calibrate
from experiments import compress, export
from experiments.compression.compressors import COMPRESSORS
from experiments.runs.run import open_run
from model.presets import gpt2_tiny, llama_tiny
from tests.test_convert import call, make_run
from train.checkpoints import Checkpoints
from train.step import init_state
from train.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.getbasetemp() / "refused-cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the command leaves the tests' alone


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of which each has something wrong, and text of 1,200 and of 5 letters."""
    folder = tmp_path_factory.mktemp("refused")
    draw = np.random.default_rng(0)
    text = "".join(chr(97 + c) for c in draw.integers(0, 26, 1200))
    (folder / "text.txt").write_text(text)
    (folder / "short.txt").write_text(text[:5])
    (folder / "hf").mkdir()
    tokenizer = load_tokenizer("bytes")
    make_run(folder / "run", gpt2_tiny(), tokenizer)
    make_run(folder / "llama", llama_tiny(), tokenizer)
    make_run(folder / "odd", gpt2_tiny(width=36, heads=4), tokenizer)
    make_run(folder / "one", gpt2_tiny(layers=1), tokenizer)
    make_run(folder / "narrow", gpt2_tiny(width=34, heads=2), tokenizer)
    make_run(folder / "capped", gpt2_tiny(logit_softcap=15.0), tokenizer)
    make_run(folder / "nan", gpt2_tiny(), tokenizer)
    run = open_run(folder / "nan")
    norm = {**run.params["final_norm"], "scale": jnp.full(32, jnp.nan)}
    state = init_state(jax.random.key(0), {**run.params, "final_norm": norm}, optax.sgd(0.1))
    with Checkpoints(folder / "nan" / "checkpoints") as checkpoints:
        checkpoints.save(6, state, {"phase": 0})
    return folder


SETTINGS = {
    "a format that there is not": (
        ["--method", "rtn", "--method.format", "int5"],
        r"no format is called 'int5'; there are int3, int4, int8",
    ),
    "of GPTQ": (["--method", "gptq", "--method.format", "q9"], "no format is called 'q9'"),
    "of AWQ": (["--method", "awq", "--method.positions", "q9"], "no format is called 'q9'"),
    "of SparseGPT": (["--method", "sparsegpt", "--method.format", "q9"], "no format is called"),
    "of what is compensated": (["--method", "compensated", "--method.format", "q9"], "no format"),
    "every weight": (
        ["--method", "magnitude", "--method.sparsity", "1.0"],
        "sparsity of the kernels is 1.0, which leaves no weight",
    ),
    "every weight, Wanda": (["--method", "wanda", "--method.sparsity", "1.0"], "leaves no weight"),
    "every weight, SparseGPT": (["--method", "sparsegpt", "--method.sparsity", "1.0"], "leaves no"),
    "more than every weight": (["--method", "wanda", "--method.sparsity", "50"], "sparsity of the"),
    "two of four": (
        ["--method", "wanda", "--method.pattern", "2:4", "--method.sparsity", "0.6"],
        "2:4 is a sparsity of 0.5, not 0.6",
    ),
    "no rows": (["--method", "sparsegpt", "--method.block", "0"], "block of 0 rows holds no"),
    "no method": (["--method", "gptp"], "no method is called 'gptp'; there are rtn, gptq"),
    "static by token": (
        ["--method", "smoothquant", "--method.range", "static", "--method.share", "token"],
        "static",
    ),
}
"""Wrong whatever the run is: nothing of it is opened."""


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused_before_the_run_is_opened(case, home, monkeypatch, capsys):
    words, message = SETTINGS[case]
    monkeypatch.setattr(compress, "open_run", _never)
    with pytest.raises((ValueError, SystemExit)) as refused:
        call(compress, monkeypatch, *words, "--run", home / "run", "--out", home / "out")
    # The parser of the command line draws a box around what settings raise.
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert re.search(message, said or str(refused.value))


RUNS = {
    "nothing": ("run", [], "neither of --run and --hf"),
    "NaN": ("nan", ["--run"], r"final_norm/scale of .*nan holds NaN or infinity; .* --step"),
    "no such run": ("none", ["--run"], "is no run"),
    "no such step": ("run", ["--run", "--step", 7], "7"),
}
"""Wrong whatever the text is: none is read."""


@pytest.mark.parametrize("case", RUNS)
def test_runs_are_refused_before_text_is_read(case, home, monkeypatch):
    name, (flag, *words), message = RUNS[case][0], RUNS[case][1] or [None], RUNS[case][2]
    monkeypatch.setattr(compress, "build_corpus", _never)
    given = [] if flag is None else [flag, home / name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(compress, monkeypatch, "--method", "rtn", *given, *words, "--out", home / "out")


GROUPS = "groups of 32 do not divide a contraction axis of 36 weights; .* by channel, as int8"
FOURS = "blocks/.*/kernel': groups along the contraction axis of 4 do not divide the 34"
FITS = {
    "groups": ("odd", ["rtn", "--method.format", "q4_0"], f"blocks/.*: {GROUPS}"),
    "groups, GPTQ": ("odd", ["gptq"], GROUPS),
    "groups, AWQ": ("odd", ["awq"], GROUPS),
    "groups, SparseGPT": ("odd", ["sparsegpt", "--method.format", "q4_0"], GROUPS),
    "groups, compensated": ("odd", ["compensated", "--method.rank", "2"], GROUPS),
    "two of four": ("narrow", ["magnitude", "--method.pattern", "2:4"], FOURS),
    "two of four, Wanda": ("narrow", ["wanda", "--method.pattern", "2:4"], FOURS),
    "two of four, SparseGPT": ("narrow", ["sparsegpt", "--method.pattern", "2:4"], FOURS),
    "no positions": (
        "llama",
        ["rtn", "--method.positions", "int8"],
        "the position table shall be 'int8', but this model has none",
    ),
    "all parts": ("run", ["structured"], "nothing is to be removed; say how many layers, width"),
    "no part": ("run", ["structured", "--method.neurons", "0"], "0 neurons cannot be kept"),
    "all parts, Minitron": ("run", ["minitron"], "nothing is to be removed; say how many layers"),
    "too many": (
        "run",
        ["minitron", "--method.layers", "3"],
        "3 layers cannot be kept: there are 2",
    ),
    "no half": ("one", ["distilgpt2"], "a teacher of one layer has no half"),
    "rank": ("run", ["lowrank", "--method.rank", "33"], "rank"),
    "rank, compensated": ("run", ["compensated", "--method.rank", "33"], "rank"),
    "alpha": ("run", ["smoothquant", "--method.alpha", "1.5"], "alpha is 1.5"),
    "exponents": ("run", ["awq", "--method.steps", "0"], "0 steps are too few"),
}
"""Wrong for the shape of the model: no text goes through it."""


@pytest.mark.parametrize("case", FITS)
def test_shapes_are_refused_before_anything_is_computed(case, home, monkeypatch):
    name, words, message = FITS[case]
    for step in ("_embed", "_observe", "_look", "_run"):
        monkeypatch.setattr(calibrate, step, _never)
    source = ["--calibration", home / "text.txt", "--windows", 4]
    with pytest.raises(ValueError, match=message):
        call(
            compress,
            monkeypatch,
            "--method",
            *words,
            "--run",
            home / name,
            *source,
            "--out",
            home / "out",
        )
    assert not (home / "out").exists()


def test_text_that_is_too_short_is_refused_with_both_lengths(home, monkeypatch):
    words = ["--method", "gptq", "--run", home / "run", "--out", home / "out"]
    with pytest.raises(ValueError, match=r"windows of 16 tokens, but there are [0-9] in all"):
        call(compress, monkeypatch, *words, "--calibration", home / "short.txt")
    with pytest.raises(ValueError, match="windows of 9999 tokens, but there are"):
        call(compress, monkeypatch, *words, "--calibration", home / "text.txt", "--length", 9999)
    assert not (home / "out").exists()


EXPORTS = {
    "llama": (
        "llama",
        ["onnx"],
        r"ONNX is written for GPT-2's kind of block alone, and positions is 'rotary' and must be "
        r"'learned'; .*\. The native and the StableHLO format hold any model$",
    ),
    "capped": (
        "capped",
        ["huggingface"],
        r"no Hugging Face format holds this config: .*logit_softcap=15.0.*"
        r"\. The native and the StableHLO format hold any model$",
    ),
    **{
        f"NaN, {format}": ("nan", [format], r"final_norm/scale of .*nan holds NaN .* --step")
        for format in ("native", "gguf", "stablehlo", "onnx", "huggingface")
    },
    "36 wide": ("odd", ["native", "--dtype", "float16"], "the format native has no dtype"),
    "length": ("run", ["gguf", "--length", "4"], "the format gguf has no length"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_say_what_does_hold_the_model(case, home, monkeypatch):
    name, words, message = EXPORTS[case]
    with pytest.raises(ValueError, match=message):
        call(export, monkeypatch, "--run", home / name, "--format", *words, "--out", home / "out")
    assert not (home / "out").exists()


def test_every_method_is_refused_something():
    words = [case[0] for case in SETTINGS.values()]
    named = {case[case.index("--method") + 1] for case in words}
    named |= {words[0] for _, words, _ in FITS.values()}
    assert named >= set(COMPRESSORS)


def _never(*args, **settings):
    raise AssertionError("this is too late")
