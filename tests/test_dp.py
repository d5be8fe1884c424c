"""Private gradients: those of single examples, clipped; the noise; and what a run says it spent."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods.lora import Lora
from experiments.methods.privacy import DpSgd
from experiments.runs.execute import Execution, execute
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.dp import per_example
from train.loop import LoopSettings
from train.losses import cross_entropy, loss_function, z_loss
from train.optimizers import AdamW
from train.plugs import Context
from train.privacy import spent
from train.schedules import Constant
from train.settings import Phase, Settings
from train.tasks.regression import Regression

CONFIG = gpt2_tiny(scan_layers=True, dropout=0.0, layers=1)
B, T = 4, 6
TERMS = (cross_entropy(), z_loss(weight=0.1))


@pytest.fixture(scope="module")
def case():
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
    tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, CONFIG.vocabulary_size)
    # Rows of several lengths, one of them empty.
    weights = jnp.where(jnp.arange(T)[None] < jnp.array([6, 3, 0, 1])[:, None], 1.0, 0.0)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return params, batch


def context(key=2):
    return Context(jnp.int32(0), jax.random.key(key), {}, {}, {})


def alone(params, batch):
    """Gradients of the rows one after the other, each a batch of its own."""
    loss = loss_function(Transformer(CONFIG), TERMS)

    @jax.jit
    def one(params, row):
        counts = {
            name: jnp.maximum(row["weights"].sum(), 1.0) for name in ("cross_entropy", "z_loss")
        }
        return jax.grad(lambda p: loss(p, row, context()._replace(counts=counts))[0])(params)

    return [one(params, {k: a[i : i + 1] for k, a in batch.items()}) for i in range(B)]


@pytest.mark.variants(1)
@pytest.mark.parametrize("micro_batches", [2, 1])
def test_gradients_are_those_of_single_examples(case, micro_batches, strict):
    params, batch = case
    clip = 0.7
    gradient = per_example(clip, 0.0, micro_batches)
    loss = loss_function(Transformer(CONFIG), TERMS)
    found, metrics = jax.jit(lambda p, b: gradient(loss, p, b, context()))(params, batch)
    each = alone(params, batch)
    norms = [float(optax.tree.norm(g)) for g in each]
    assert min(norms) == 0 < clip < max(norms)
    factors = [min(1.0, clip / norm) if norm else 1.0 for norm in norms]
    expected = jax.tree.map(
        lambda *g: sum(f * a for f, a in zip(factors, g, strict=True)) / B, *each
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
    assert float(metrics["clipped"]) == sum(norm > clip for norm in norms) / B


def test_no_row_moves_the_gradient_by_more_than_the_clip(case):
    params, batch = case
    clip = 0.01
    loss = loss_function(Transformer(CONFIG), TERMS)
    gradient = jax.jit(lambda b: per_example(clip, 0.0)(loss, params, b, context())[0])
    without = {**batch, "weights": batch["weights"].at[0].set(0.0)}
    moved = jax.tree.map(lambda a, b: a - b, gradient(batch), gradient(without))
    assert 0.99 * clip <= B * float(optax.tree.norm(moved)) <= 1.0001 * clip


def test_noise_has_the_stated_deviation_and_a_key_of_its_own(case):
    params, batch = case
    loss = loss_function(Transformer(CONFIG), TERMS)
    clip, sigma = 0.1, 5.0
    noisy = jax.jit(
        lambda k: per_example(clip, sigma)(loss, params, batch, context()._replace(rng=k))[0]
    )
    plain = jax.jit(lambda: per_example(clip, 0.0)(loss, params, batch, context())[0])()
    draws = [jax.tree.map(lambda a, b: a - b, noisy(jax.random.key(k)), plain) for k in (2, 2, 3)]
    flat = [np.concatenate([np.ravel(a) for a in jax.tree.leaves(d)]) for d in draws]
    assert np.array_equal(flat[0], flat[1])
    assert not np.array_equal(flat[0], flat[2])
    assert abs(flat[0].std() * B / (clip * sigma) - 1) < 0.05  # some 10^4 draws of a fixed key
    assert abs(flat[0].mean()) * B / (clip * sigma) < 0.05


def test_noise_is_no_draw_of_a_row():
    """What a row draws from its key is in its gradient, and must not be in the noise as well."""

    def loss(params, batch, context):
        # As the noise of one leaf is drawn.
        drawn = jax.random.normal(jax.random.split(context.rng, 1)[0], params.shape)
        value = (params * drawn * batch["tokens"]).sum()
        return value, {"loss": value}

    loss.counts = lambda batch: {}
    rows, params = 512, jnp.zeros(8)

    def gradient(noise, tokens):
        batch = {"tokens": tokens}
        return per_example(1e6, noise, 4)(loss, params, batch, context())[0] * rows

    noise = gradient(1e-6, jnp.zeros((rows, 1)))
    each = jax.lax.map(lambda n: gradient(0.0, jnp.eye(rows)[n][:, None]), jnp.arange(rows))
    assert float(jnp.abs(noise).min()) > 0
    assert float(jnp.abs(each - noise).max(axis=1).min()) > 1e-3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: per_example(0.0, 1.0), "above 0"),
        (lambda: per_example(1.0, -1.0), "at least 0"),
        (lambda: DpSgd(delta=2.0), "below 1"),
        (lambda: spent(1.0, [4], []), "no examples"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_privacy_is_that_of_the_gaussian_mechanism():
    """Against Balle & Wang 2018, theorem 8; k epochs are one with sigma / root k."""
    pytest.importorskip("dp_accounting")

    def delta_of(epsilon, sigma):
        def phi(x):
            return 0.5 * math.erfc(-x / 2**0.5)

        a, b = 0.5 / sigma, epsilon * sigma
        return phi(a - b) - math.exp(epsilon) * phi(-a - b)

    found = spent(2.0, [10] * 40, [(100, 1.0)], 1e-5)
    assert found.participations == 4
    assert delta_of(found.partition, 2.0 / 4**0.5) == pytest.approx(1e-5, rel=1e-3)
    assert found.poisson < found.partition
    # Twice in a batch at the end of an epoch, in two of them: as sigma / root 8.
    over = spent(2.0, [8] * 50, [(100, 1.0)], 1e-5)
    assert over.participations == 4
    # Not at the second end: 8 divides 200.
    assert delta_of(over.partition, 2.0 / 8**0.5) == pytest.approx(1e-5, rel=1e-3)
    two = spent(2.0, [8] * 50, [(100, 0.25), (1000, 0.75)], 1e-5)
    assert two.participations == 2  # 101 rows of the one, 301 of the other
    assert spent(0.0, [8], [(100, 1.0)]).partition == float("inf")


def test_a_run_says_what_it_spent_and_adapts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("dp_accounting")
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = Settings(
        phases=(Phase(3, CONFIG, batch_size=4, sequence_length=16),),
        data=(str(tmp_path / "text.txt"),),
        tokenizer="bytes",
        optimizer=AdamW(learning_rate=1e-3),
        schedule=Constant(),
        micro_batches=2,
        methods=(Lora(rank=2), DpSgd(noise=1.5)),
    )
    execute(settings, tmp_path / "run", Execution(LoopSettings(log_every=1), progress=False))
    said = json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]
    assert said["participations"] == 1
    assert 0 < said["partition"] < 10
    assert "privacy: epsilon" in capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 <= row["clipped"] <= 1 for row in rows if row["kind"] == "train")


def test_units_of_a_regression_are_given_not_read():
    """Mean and scale of the private numbers would stand in every target."""
    method = DpSgd()
    method.check_task(None)
    method.check_task(Regression(mean=3.0, scale=1.0))
    with pytest.raises(ValueError, match=r"--task\.mean and --task\.scale"):
        method.check_task(Regression(mean=3.0))
