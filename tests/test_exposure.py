"""Canaries: planted as often as asked for, and exposed as far as the model prefers them."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.canary import Canaries, run_command
from model.presets import modern_tiny
from model.transformer import Transformer
from train.exposure import Canary, draw_canaries, exposure, plant
from train.tokenizers.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def test_canaries_are_planted_as_often_as_asked_for():
    key = jax.random.key(0)
    text = "".join(f"line {n}\n" for n in range(50))
    canaries = draw_canaries(key, ["the {} of a", "the {} of b"], [3, 0], 4)
    planted = plant(key, text, canaries)
    assert [planted.count(c.text) for c in canaries] == [3, 0]
    assert [len(c.secret) for c in canaries] == [4, 4]
    rest = [line for line in planted.splitlines() if not line.startswith("the ")]
    assert rest == text.splitlines()
    assert plant(key, text, canaries) == planted
    assert plant(jax.random.key(1), text, canaries) != planted


def test_exposure_is_the_rank_in_bits():
    """Of a model whose head prefers digit d by d + 1: the likeliest secret is 9, the last one 0."""
    size = BYTES.vocabulary_size
    config = modern_tiny(vocabulary_size=size, layers=1, tied_head=False, scan_layers=True)
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    # Projections start at zero, so that the features are the embeddings: ones, for every token.
    ones = jax.tree.map(jnp.ones_like, params["token_embedding"])
    ids = [int(BYTES.encode(str(d))[0]) for d in range(10)]
    kernel = jnp.zeros((config.width, size)).at[:, jnp.array(ids)].set(jnp.arange(1.0, 11.0) / 32)
    params = {**params, "token_embedding": ones, "head": {"kernel": kernel}}
    found = [exposure(model, params, BYTES, Canary("x {}.", str(d), 1)) for d in (9, 8, 0)]
    assert found == pytest.approx([math.log2(10), math.log2(5), 0.0], abs=1e-6)
    flat = {**params, "head": {"kernel": jnp.zeros_like(kernel)}}
    assert exposure(model, flat, BYTES, Canary("x {}.", "5", 1)) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw_canaries(jax.random.key(0), ["a"], [1], 4), "where the secret goes"),
        (lambda: draw_canaries(jax.random.key(0), ["a {}"], [1, 2], 4), "one number of copies"),
        (lambda: exposure(None, None, BYTES, Canary("{}", "1234567", 1)), "6 digits at most"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.slow
def test_the_command_trains_and_measures(tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    command = Canaries(
        tmp_path / "text.txt", tmp_path / "out", (0, 40), 2, 60, 8, 32, 1, 32, progress=False
    )
    lines = run_command(command)
    facts = json.loads((tmp_path / "out" / "canary.json").read_text())
    assert len(lines) == 5
    plain, private = (facts["runs"][name]["exposures"] for name in ("plain", "private"))
    assert all(0 <= bits <= 6.65 for bits in plain + private)
    assert facts["runs"]["private"]["privacy"]["partition"] > 0
