"""Beam search: against greedy decoding, exhaustive search and teacher forcing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.beam import Beam, beam_search
from model.build import build_model
from model.generate import Sampling, generate
from model.presets import encoder_decoder_tiny, modern_tiny
from model.transformer import features, head

END, T = 0, 4
PROMPTS, LENGTHS = jnp.array([[2, 3, 1], [1, 0, 0]]), jnp.array([3, 1])
SOURCE = jnp.array([[3, 1, 2, 3], [2, 2, 0, 0]])
INPUTS = {
    "source": {"source": SOURCE, "source_segments": (SOURCE > 0).astype(jnp.int32)},
    "prefix": {"prefix": jnp.array([2, 1])},
    "causal": {},
}


def built(kind, vocabulary=5):
    make = encoder_decoder_tiny if kind == "source" else modern_tiny
    config = make(vocabulary_size=vocabulary, dropout=0.0, zero_init_projections=False)
    model = build_model(config)
    params = jax.jit(model.init)(jax.random.key(1), PROMPTS)["params"]
    # Peaked distributions, so that orders are clear.
    return model, jax.tree.map(lambda a: 6 * a if a.ndim > 2 else a * 3, params)


def log_probability(model, params, kind, row, continuations):
    """Sum of log p of continuations of one prompt, by one pass over all of the text."""
    prompt, most = PROMPTS[row, : LENGTHS[row]].tolist(), max(map(len, continuations))
    texts = [[*prompt, *c, *[0] * (most - len(c))] for c in continuations]
    inputs = {
        name: jnp.repeat(array[row : row + 1], len(texts), axis=0)
        for name, array in INPUTS[kind].items()
    }
    picked = np.asarray(each_log_probability(model, params, jnp.array(texts), inputs))
    real = np.arange(most)[None] < np.array([[len(c)] for c in continuations])
    return np.where(real, picked[:, len(prompt) - 1 :], 0).sum(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def each_log_probability(model, params, batch, inputs):
    final = features(model, params, batch, **inputs).final
    logp = jax.nn.log_softmax(jax.vmap(lambda f: head(model, params, f))(final), axis=-1)
    return jnp.take_along_axis(logp[:, :-1], batch[:, 1:, None], axis=-1)[..., 0]


def every_continuation(vocabulary):
    """All that end with the end token, or go on to the greatest length, by length."""
    others = range(1, vocabulary)
    for length in range(1, T + 1):
        for body in itertools.product(others, repeat=length - 1):
            yield (*body, END)
            if length == T:
                yield from ((*body, token) for token in others)


def found_by(kind, beam, vocabulary=5):
    model, params = built(kind, vocabulary)
    found = beam_search(
        model, params, PROMPTS, LENGTHS, beam=beam, end_token=END, inputs=INPUTS[kind]
    )
    return model, params, jax.tree.map(np.asarray, found)


@pytest.mark.variants(1)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_with_enough_beams_it_finds_what_exhaustive_search_finds(kind, alpha, strict):
    vocabulary = 4
    ways = list(every_continuation(vocabulary))
    beam = Beam(len(ways), alpha, max_new_tokens=T)
    model, params, found = found_by(kind, beam, vocabulary)
    for row in range(2):
        logp = log_probability(model, params, kind, row, ways)
        penalties = ((5 + np.array([len(way) for way in ways])) / 6) ** alpha
        scores = dict(zip(ways, logp / penalties, strict=True))
        best = max(scores, key=scores.get)
        assert tuple(found.tokens[row, 0, : found.lengths[row, 0]]) == best
        np.testing.assert_allclose(found.scores[row, 0], scores[best], rtol=1e-4)


@pytest.mark.variants(1)
@pytest.mark.parametrize("kind", ["prefix", "source", "causal"])
def test_scores_are_sums_of_log_p_by_teacher_forcing(kind, strict):
    beam = Beam(3, 0.6, max_new_tokens=7)
    model, params, found = found_by(kind, beam)
    for row, k in itertools.product(range(2), range(3)):
        length = int(found.lengths[row, k])
        if not length:
            assert found.scores[row, k] == -np.inf
            continue
        tokens = found.tokens[row, k, :length].tolist()
        assert tokens[-1] == END or length == 7
        assert END not in tokens[:-1]
        assert not found.tokens[row, k, length:].any()
        # Padded to one length: one program for all of them.
        logp = log_probability(model, params, kind, row, [tokens, [1] * 7])[0]
        np.testing.assert_allclose(found.log_probabilities[row, k], logp, rtol=1e-4)
        penalty = ((5 + length) / 6) ** 0.6
        np.testing.assert_allclose(found.scores[row, k], logp / penalty, rtol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_one_beam_is_greedy_and_more_are_no_worse_under_no_penalty(strict):
    model, params, found = found_by("causal", Beam(1, 0.6, max_new_tokens=12), 17)
    prompts = [row[:n].tolist() for row, n in zip(PROMPTS, LENGTHS, strict=True)]
    greedy = generate(
        model,
        params,
        prompts,
        key=jax.random.key(0),
        max_new_tokens=12,
        sampling=Sampling(temperature=0),
        stop_tokens=[END],
    ).new_tokens()
    for row in range(2):
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == greedy[row]


def test_a_row_does_not_depend_on_its_companions_and_nothing_compiles_twice(strict, compilations):
    model, params = built("causal")
    beam = Beam(2, 2.0, max_new_tokens=12)  # so that going on for longer would pay
    prompts = jnp.arange(1, 5)[:, None]

    def search(prompts):
        lengths = jnp.ones(len(prompts), jnp.int32)
        return jax.tree.map(
            np.asarray, beam_search(model, params, prompts, lengths, beam=beam, end_token=END)
        )

    together = search(prompts)
    alone = [search(prompts[row : row + 1]) for row in range(4)]
    assert len({int(each.steps) for each in alone}) > 1
    for row, each in enumerate(alone):
        np.testing.assert_array_equal(together.tokens[row], each.tokens[0])
        np.testing.assert_allclose(together.scores[row], each.scores[0], rtol=1e-4)
    assert compilations["jit(beam_search)"] == 2  # for four rows, and for one


@pytest.mark.slow
def test_it_stops_early_where_every_row_is_done(strict):
    model, params = built("causal")
    table = params["head"]["kernel"]
    # The end token wins everywhere: its column is along the mean feature, far out.
    final = features(model, params, PROMPTS).final.reshape(-1, model.config.width)
    params = {**params, "head": {"kernel": table.at[:, END].set(50 * final.mean(0))}}
    found = beam_search(
        model, params, PROMPTS, LENGTHS, beam=Beam(2, max_new_tokens=20), end_token=END
    )
    assert int(found.steps) < 20


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="width is 0"):
        Beam(0)
    with pytest.raises(ValueError, match="alpha is -1"):
        Beam(2, -1)
