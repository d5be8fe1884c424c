"""Factors through the command: written, opened, measured, recalibrated; better than without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import sequential, windows
from compress.export.stored import abstract_from, describe
from compress.lora import adapted_paths, merged
from compress.lowrank_params import factorize_params
from experiments.compress import Compress, run_command
from experiments.compression.compressors import Compensated, LowRankFactors, Magnitude
from experiments.runs.run import open_run
from model.presets import gpt2_tiny
from model.transformer import Transformer
from tests.test_convert import make_run
from train.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.getbasetemp() / "factors-cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors")
    draw = np.random.default_rng(0)
    letters = (chr(97 + c) for c in draw.integers(0, 26, 6000))
    (folder / "text.txt").write_text("".join(letters))
    make_run(folder / "run", gpt2_tiny(scan_layers=True), load_tokenizer("bytes"))
    return folder


def compressed(home, out, method):
    source = str(home / "text.txt")
    command = Compress(method, run=home / "run", calibration=source, windows=4, repeats=0, out=out)
    lines = run_command(command)
    return open_run(out), "\n".join(lines)


def output_error(home, run):
    dense = open_run(home / "run")
    tokens = jnp.arange(97, 121).reshape(2, 12)
    a, b = (r.model.apply({"params": r.params}, tokens) for r in (dense, run))
    return float(jnp.square(a - b).mean())


@pytest.mark.slow
def test_factors_make_up_for_zeros(home, tmp_path):
    bare, _ = compressed(home, tmp_path / "bare", Magnitude(0.5))
    run, text = compressed(home, tmp_path / "small", Compensated("magnitude", rank=16))
    assert len(adapted_paths(run.params)) == 6
    assert output_error(home, run) < 0.7 * output_error(home, bare)
    assert "| parameters |" in text


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["weights", "outputs"])
@pytest.mark.parametrize("base", ["rtn", "gptq", "magnitude", "wanda"])
def test_every_base_is_compensated(home, tmp_path, base, keep):
    method = Compensated(base, "q4_0", rank=8, keep=keep)
    run, _ = compressed(home, tmp_path / "small", method)
    assert len(adapted_paths(run.params)) == 6
    assert np.isfinite(output_error(home, run))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["weights", "outputs"])
def test_thin_factors_are_a_run(home, tmp_path, keep):
    run, text = compressed(home, tmp_path / "small", LowRankFactors(0.5, keep=keep))
    dense = open_run(home / "run")
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(run.params["blocks"]) < 0.6 * count(dense.params["blocks"])
    full, _ = compressed(home, tmp_path / "full", LowRankFactors(rank=32, keep=keep))
    assert output_error(home, full) < 1e-6 < output_error(home, run)
    assert "FLOPs" in text


def test_a_low_rank_model_is_calibrated_like_any_other():
    model = Transformer(gpt2_tiny(scan_layers=True))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    low = factorize_params(params, [("blocks/.*/kernel", 4)])
    batches = windows(range(64), length=16, batch=2)

    def seen_by(params):
        found = {}

        def note(number, layer, seen):
            found[number] = {path: s["absmax"] for path, s in seen.items()}
            return layer

        return sequential(model, params, batches, ("absmax",), note), found

    (again, ours), (_, plain) = seen_by(low), seen_by(merged(low))
    assert sorted(ours[1]) == sorted(plain[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, plain)
    assert adapted_paths(again.params) == adapted_paths(low)


def test_factors_survive_a_description():
    params = {"blocks": {"up": {"kernel": jnp.ones((2, 32, 8))}}}
    low = factorize_params(params, [("blocks/up/kernel", 2)])
    abstract = abstract_from(params, describe(low))
    assert jax.tree.structure(abstract) == jax.tree.structure(low)
    assert [leaf.shape for leaf in jax.tree.leaves(abstract)] == [(2, 32, 2), (2, 2, 8)]
    broken = describe(low)
    broken["factors"]["blocks/down/kernel"] = broken["factors"]["blocks/up/kernel"]
    with pytest.raises(ValueError, match="down/kernel shall have factors"):
        abstract_from(params, broken)
