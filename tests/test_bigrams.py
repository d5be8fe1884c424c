"""Embeddings of pairs of tokens: their formula, what they see, and that decoding sees the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.export.gguf_layouts import architecture_of
from compress.pruning.structured_width import keep_width
from compress.quantization.kv_cache import int8_cache
from model.beam import Beam, beam_search
from model.bigrams import NONE, rows_of, tokens_before
from model.config import EncoderDecoderConfig
from model.flops import flops_per_token, parameter_count
from model.generate import Sampling, generate
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.stack import apart
from model.stream import begin, draw, read
from model.transformer import Transformer, features, head
from parallel.mesh import make_mesh
from parallel.placement_checks import check_placement
from tests.huggingface_cases import drawn
from train.prompts import check_promptable

CONFIG = llama_tiny(bigram_rows=32, bigram_width=8)
TOKENS = jax.random.randint(jax.random.key(1), (4, 8), 0, 64)


def logits_of(config, params, tokens=TOKENS, **inputs):
    model = Transformer(config)
    out = jax.jit(lambda p, t, i: features(model, p, t, **i).final)(params, tokens, inputs)
    return np.asarray(head(model, params, out.reshape(-1, 32)).reshape(*tokens.shape, -1))


def row_of(before, token, rows):
    """The hash, in whole numbers of Python."""
    hashed = 0
    for number in (before, token, 0):
        product = (hashed ^ (number + 1)) * 0x9E3779B1 % 2**32
        hashed = product ^ product >> 15
    return hashed % rows


def test_the_formula(strict):
    """The model without, its token embedding holding at two ids what the two pairs add up to."""
    config, params = CONFIG, drawn(CONFIG)
    table, kernel = (np.asarray(params["bigram_embedding"][n]) for n in ("embedding", "kernel"))
    bare = {name: part for name, part in params.items() if name != "bigram_embedding"}
    plain = dataclasses.replace(config, bigram_rows=None)
    for pair in ([3, 5], [5, 3], [7, 7]):
        tokens = jnp.array([pair])
        moved = np.array(params["token_embedding"]["embedding"])
        rows = [row_of(-1, pair[0], 32), row_of(pair[0], pair[1], 32)]
        place = moved[np.array(pair)] + table[np.array(rows)] @ kernel
        # Ids of their own for what the two places read.
        moved[10], moved[11] = place
        other = {**bare, "token_embedding": {"embedding": jnp.asarray(moved)}}
        given = logits_of(plain, other, jnp.array([[10, 11]]))
        np.testing.assert_allclose(logits_of(config, params, tokens), given, rtol=1e-4, atol=1e-5)


def test_pairs_are_spread_over_the_rows_and_told_apart_by_their_order():
    first, second = (jnp.asarray(a.ravel()) for a in np.meshgrid(np.arange(64), np.arange(64)))
    assert len(np.unique(rows_of(second, first, 2**30))) > 4090
    counts = np.bincount(rows_of(second, first, 64), minlength=64)
    assert 0.5 * 64 < counts.min() <= counts.max() < 1.5 * 64


def test_it_starts_as_the_model_without(strict):
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
    assert not np.asarray(params["bigram_embedding"]["embedding"]).any()
    bare = {name: part for name, part in params.items() if name != "bigram_embedding"}
    plain = dataclasses.replace(CONFIG, bigram_rows=None)
    np.testing.assert_array_equal(logits_of(CONFIG, params), logits_of(plain, bare))


def test_a_token_is_seen_by_itself_and_by_what_follows_alone(strict):
    params = drawn(CONFIG)
    before, changed = logits_of(CONFIG, params), TOKENS.at[:, 4].add(1)
    after = logits_of(CONFIG, params, changed % 64)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


def test_documents_of_a_row_do_not_see_each_other(strict):
    params, segments = drawn(CONFIG), jnp.array([[1] * 3 + [2] * 5] * 4)
    positions = jnp.array([[*range(3), *range(5)]] * 4)
    packed = logits_of(CONFIG, params, segments_BT=segments, positions_BT=positions)
    apart = [logits_of(CONFIG, params, part) for part in (TOKENS[:, :3], TOKENS[:, 3:])]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=1e-4, atol=1e-4)


def test_of_tokens_in_another_order_only_neighbours_are_pairs():
    positions = jnp.array([[0, 1, 6, 7, 2, 3]])
    found = tokens_before(jnp.array([[5, 6, 7, 8, 9, 10]]), positions)
    assert found.tolist() == [[NONE, 5, NONE, 7, NONE, 9]]


PROMPTS = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14]]


def greedy(params, ids, steps):
    for _ in range(steps):
        ids = [*ids, int(logits_of(CONFIG, params, jnp.array([ids]))[0, -1].argmax())]
    return ids


def test_decoding_sees_the_pairs_that_training_sees():
    """Rows of unlike lengths, one text at a time, and beams, against rows computed whole."""
    params = drawn(CONFIG, std=0.5)
    model, wanted = Transformer(CONFIG), [greedy(params, ids, 6) for ids in PROMPTS]
    cold = Sampling(temperature=0.0)
    given = {"key": jax.random.key(0), "max_new_tokens": 6, "sampling": cold, "slots": 16}
    found = generate(model, params, PROMPTS, **given)
    texts = zip(PROMPTS, found.new_tokens(), strict=True)
    assert [[*ids, *map(int, new)] for ids, new in texts] == wanted
    rounded = generate(model, params, PROMPTS, cache=int8_cache, **given)
    assert [list(map(int, new)) for new in rounded.new_tokens()] == [w[-6:] for w in wanted]
    weights = apart(params)
    for ids, whole in zip(PROMPTS, wanted, strict=True):
        decoding = read(model, weights, begin(model, 16), ids)
        for token in whole[len(ids) :]:
            assert draw(decoding, jax.random.key(0), cold) == token
            decoding = read(model, weights, decoding, [token])
    padded = jnp.array([[*ids, *[0] * (6 - len(ids))] for ids in PROMPTS])
    lengths = jnp.array(list(map(len, PROMPTS)))
    beams = beam_search(model, params, padded, lengths, beam=Beam(1, 0.0, 6), end_token=NONE)
    assert beams.tokens[:, 0].tolist() == [whole[-6:] for whole in wanted]


def test_counts_name_what_is_there():
    plain = dataclasses.replace(CONFIG, bigram_rows=None)
    assert parameter_count(CONFIG) == parameter_count(plain) + 32 * 8 + 8 * 32
    assert flops_per_token(CONFIG, 8) == flops_per_token(plain, 8) + 2 * 8 * 32


def test_what_it_does_not_go_with_is_refused_by_name():
    with pytest.raises(ValueError, match="bigram_rows is 0; it must be at least 1"):
        llama_tiny(bigram_rows=0)
    with pytest.raises(ValueError, match="has no bigram_rows"):
        EncoderDecoderConfig(bigram_rows=8)
    with pytest.raises(ValueError, match="bigram_rows, or tune it with lora"):
        check_promptable(CONFIG, 3)
    with pytest.raises(ValueError, match="bigram_rows is 32 and must be None"):
        architecture_of(CONFIG)
    with pytest.raises(ValueError, match="bigram_rows is not cut with the blocks"):
        keep_width(modern_tiny(bigram_rows=8), {}, range(16))
    mesh = make_mesh(data=4, context=2)
    with pytest.raises(ValueError, match="context=2 divides rows between devices"):
        check_placement(mesh, gpt2_tiny(bigram_rows=8), [], rows=8, time=16)
