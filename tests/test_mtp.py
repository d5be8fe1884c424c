"""Heads that look further ahead: their loss, and that nothing of them is left after training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.methods.multi_token import MultiToken
from experiments.runs.execute import execute
from experiments.runs.run import open_run
from model.flops import abstract_params
from model.presets import modern_tiny
from model.transformer import Transformer
from tests.test_run import QUIET, own_cache, rows_of, text  # noqa: F401 (fixtures)
from train.losses import counts_of, cross_entropy, loss_function
from train.methods import Setup
from train.mtp import ahead
from train.plugs import Context
from train.schedules import Linear
from train.settings import Phase, Settings

CONFIG = modern_tiny()


def test_the_loss_against_its_formula(strict):
    """Two heads, with kernels drawn, by a softmax written out over every position."""
    plugs = MultiToken(heads=2, weight=0.5, decay=0.5).build(Setup(CONFIG, None, 10))
    model = Transformer(CONFIG)
    params, _ = plugs.split(_drawn())
    keys = jax.random.split(jax.random.key(3), 2)
    params["mtp"] = {
        str(k + 1): {"kernel": 0.3 * jax.random.normal(keys[k], (32, 32))} for k in range(2)
    }
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": jnp.ones((2, 8)).at[0, 5].set(0.0),
        "segments": jnp.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2]]),
        "positions": jnp.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]]),
    }
    terms = plugs.terms((cross_entropy(),))
    loss = loss_function(model, terms, plugs.transforms)
    context = Context(jnp.int32(0), jax.random.key(0), {}, {"mtp": {}}, counts_of(terms, batch))
    value, metrics = jax.jit(loss)(params, batch, context)

    bare = {name: tree for name, tree in params.items() if name != "mtp"}
    final = jax.jit(
        lambda p: (
            model.apply(
                {"params": p},
                batch["tokens"],
                batch["positions"],
                batch["segments"],
                method="features",
            ).final
        )
    )(bare)
    expected = float(metrics["cross_entropy"])
    for k, weight in ((1, 0.5), (2, 0.25)):
        z = final + final @ params["mtp"][str(k)]["kernel"]
        logits = model.apply({"params": bare}, z.reshape(16, 32), method="head").reshape(2, 8, 64)
        log_p = np.asarray(jax.nn.log_softmax(logits))
        terms_k = [
            -log_p[b, t, batch["targets"][b, t + k]]
            for b in range(2)
            for t in range(8 - k)
            if batch["weights"][b, t + k] and batch["segments"][b, t] == batch["segments"][b, t + k]
        ]
        np.testing.assert_allclose(metrics[f"mtp_{k}"], np.mean(terms_k), rtol=1e-5)
        expected += weight * float(np.mean(terms_k))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def _drawn():
    leaves, structure = jax.tree.flatten(abstract_params(CONFIG))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def test_nothing_is_predicted_past_the_row():
    batch = {"targets": jnp.ones((1, 3), jnp.int32), "weights": jnp.ones((1, 3))}
    assert [float(ahead(batch, k)[1].sum()) for k in (1, 2, 3, 9)] == [2, 1, 0, 0]


def test_a_run_trains_the_heads_and_leaves_them_out(text, tmp_path):  # noqa: F811
    phase = Phase(6, CONFIG, batch_size=4, sequence_length=16)
    wider = dataclasses.replace(CONFIG, layers=3)
    settings = Settings(
        phases=(phase, dataclasses.replace(phase, steps=4, model=wider)),
        data=(str(text),),
        tokenizer="bytes",
        schedule=Linear(),
        methods=(MultiToken(heads=2, until=0.8),),
        micro_batches=2,
    )
    outcome = execute(settings, tmp_path / "run", QUIET)
    heads = outcome.state.params["mtp"]
    assert all(float(jnp.abs(heads[k]["kernel"]).max()) > 0 for k in "12")
    rows = [row for row in rows_of(tmp_path / "run") if row["kind"] == "train"]
    first, last = rows[0], rows[-1]
    weighted = first["cross_entropy"] + 0.3 * first["mtp_1"] + 0.15 * first["mtp_2"]
    assert abs(first["loss"] - weighted) < 1e-4
    assert last["loss"] == last["cross_entropy"]  # step 9 of 10, and they end at step 8
    assert set(outcome.evaluation) & {"mtp_1", "mtp_2"} == set()
    run = open_run(tmp_path / "run")
    assert "mtp" not in run.params
    assert jax.tree.structure(run.params) == jax.tree.structure(abstract_params(run.model.config))


def test_settings_that_mean_nothing_are_refused():
    for change in ({"heads": 0}, {"weight": 0.0}, {"until": 0.0}, {"decay": 2.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            MultiToken(**change)
