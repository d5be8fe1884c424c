"""N-grams beside a head: their formula, what padding and order do to them, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.flops import abstract_params
from model.huggingface_classifier import save_classifier
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.huggingface_cases import drawn
from train.losses import counts_of, loss_function
from train.plugs import Context
from train.tasks.classification import Classification
from train.tasks.grams import gram_scores, grams_of
from train.tasks.task import TaskFiles
from train.tokenizers.tokenizer import load_tokenizer

T, ORDER, BUCKETS = 8, 3, 50_000


@pytest.fixture
def task(tmp_path):
    """Two words, and which comes first is what is asked for."""
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "abc\tyes\ncba\tno\n" * 8)
    files = TaskFiles((("train", str(path)), ("valid", str(path))))
    return Classification(files, pool="mean", grams=ORDER, buckets=BUCKETS).resolve()


def rows():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 5, (6, T))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray([8, 5, 1, 3, 0, 2], jnp.int32)


def params_of(buckets, classes=2):
    table = np.random.default_rng(1).normal(size=(buckets, classes))
    return {"score": {"grams": {"embedding": jnp.asarray(table, jnp.float32)}}}


def test_equal_stretches_and_no_others_share_a_bucket():
    tokens, lengths = rows()
    buckets, real = map(np.asarray, grams_of(tokens, lengths, ORDER, 2**31 - 1))
    seen = {}
    for row in range(len(tokens)):
        for n in range(ORDER):
            for first in range(T):
                at = n * T + first
                assert real[row, at] == (first + n < lengths[row])
                if real[row, at]:
                    gram = tuple(np.asarray(tokens)[row, first : first + n + 1])
                    assert seen.setdefault(gram, buckets[row, at]) == buckets[row, at]
    assert len(set(seen.values())) == len(seen) > 20
    few, _ = grams_of(tokens, lengths, ORDER, 7)
    assert set(np.unique(few)) == set(range(7))


def test_scores_are_their_formula(strict):
    """The sum over the n-grams of a row, over the root of how many there are."""
    tokens, lengths = rows()
    params = params_of(BUCKETS)
    found = jax.jit(lambda p, b: gram_scores(p, b, ORDER))(
        params, {"tokens": tokens, "lengths": lengths}
    )
    buckets, _ = map(np.asarray, grams_of(tokens, lengths, ORDER, BUCKETS))
    table = np.asarray(params["score"]["grams"]["embedding"])
    for row, length in enumerate(np.asarray(lengths)):
        own = [
            buckets[row, n * T + at] for n in range(ORDER) for at in range(length - n) if length > n
        ]
        expected = table[own].sum(axis=0) / np.sqrt(max(len(own), 1))
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


def test_neither_padding_nor_the_order_of_time_changes_anything():
    tokens, lengths = rows()
    params = params_of(BUCKETS)
    plain = gram_scores(params, {"tokens": tokens, "lengths": lengths}, ORDER)
    wider = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=4)
    padded = gram_scores(params, {"tokens": wider, "lengths": lengths}, ORDER)
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    order = np.random.default_rng(2).permutation(T)
    turned = {"tokens": tokens[:, order], "lengths": lengths}
    assert not np.allclose(gram_scores(params, turned, ORDER), plain)
    turned["positions"] = jnp.broadcast_to(jnp.asarray(order, jnp.int32), tokens.shape)
    np.testing.assert_allclose(gram_scores(params, turned, ORDER), plain, rtol=1e-6)


def test_a_head_with_n_grams_tells_orders_apart(task):
    """Two rows of the same pieces, from which features say nothing."""
    config = modern_tiny(vocabulary_size=257)
    model = Transformer(config)
    arrays = task.examples("train", load_tokenizer("bytes"), T).arrays
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    base = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config)
    )  # features of zeros: what is learned, n-grams have learned
    head = task.head(jax.random.key(0), config)
    assert head["score"]["grams"]["embedding"].shape == (BUCKETS, 2)
    assert not head["score"]["grams"]["embedding"].any()
    terms = task.terms(model, 0.0)
    loss = loss_function(model, terms)
    context = Context(0, None, {}, {}, counts_of(terms, batch))

    @jax.jit
    def step(head):
        value, grads = jax.value_and_grad(lambda h: loss({**base, **h}, batch, context)[0])(head)
        return jax.tree.map(lambda w, g: w - g, head, grads), value

    values = []
    for _ in range(30):
        head, value = step(head)
        values.append(float(value))
    np.testing.assert_allclose(values[0], np.log(2), rtol=1e-3)
    assert values[-1] < 0.1
    logits = task.outputs(model)({**base, **head}, batch)["logits"]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), arrays["labels"])
    only_words = dataclasses.replace(task, grams=1)
    head = only_words.head(jax.random.key(0), config)
    same = only_words.outputs(model)({**base, **params_of(BUCKETS), **head}, batch)["logits"]
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)  # one piece alone says nothing here


def test_what_does_not_fit_is_refused(task, tmp_path):
    for change, why in (
        ({"grams": -1}, "grams is -1"),
        ({"grams": 9}, "1 to 8"),
        ({"buckets": 0}, "buckets is 0"),
        ({"by": "words", "pool": "last"}, "grams are for a head"),
    ):
        with pytest.raises(ValueError, match=why):
            dataclasses.replace(task, **change)
    config = gpt2_tiny()
    params = {**drawn(config), **task.head(jax.random.key(0), config)}
    with pytest.raises(ValueError, match="grams"):
        save_classifier(tmp_path / "out", config, params, ("no", "yes"), pad_token=None)
