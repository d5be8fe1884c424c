"""Runs of several phases: models grow, resume is bitwise, no token is lost or repeated."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods.compression import EightBitState, Rewire
from experiments.methods.multi_token import MultiToken
from experiments.runs.execute import execute
from experiments.runs.feeds import text_dataset
from experiments.runs.phases import check_phases, grown_config, parse_phases
from experiments.runs.prepare import open_data
from experiments.runs.run import open_run, phase_at
from model.flops import abstract_params
from model.grow import sources
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.test_run import QUIET, bits, own_cache, text  # noqa: F401 (fixtures)
from tests.test_run import rows_of as all_of
from train.loop import LoopSettings
from train.optimizers import OPTIMIZERS, AdamW, Muon, build
from train.phases import carried, grown_params, grown_state
from train.plugs import NONFINITE
from train.schedules import Constant, Linear
from train.settings import Phase, Settings
from train.step import init_state
from train.tokenizers.tokenizer import load_tokenizer

EVERY = dataclasses.replace(
    QUIET, loop=LoopSettings(log_every=1, evaluate_every=4, checkpoint_every=4), keep_last=9
)
SMALL = modern_tiny(layers=1, tied_head=True, zero_init_projections=False)


def rows_of(folder):
    return [{k: v for k, v in row.items() if k != "clock"} for row in all_of(folder)]


def settings_for(path, phases, **changes):
    defaults = {"data": (str(path),), "tokenizer": "bytes", "schedule": Linear()}
    return Settings(phases=tuple(phases), **defaults | changes)


def state_of(config, settings, params=None):
    """A state whose moments all differ."""
    params = abstract_params(config) if params is None else params
    tx = build(settings, Constant(), 10, params)
    state = jax.eval_shape(lambda p: init_state(jax.random.key(0), p, tx), params)

    def numbers(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype) if leaf.dtype != state.rng.dtype else None
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(numbers, state)
    return dataclasses.replace(filled, rng=jax.random.key(5)), tx


def test_a_run_grows_and_resumes_bitwise_across_the_boundary(
    text,  # noqa: F811
    tmp_path,
    capsys,
    compilations,
):
    grown = dataclasses.replace(SMALL, layers=3, tied_head=False)
    phases = (Phase(4, SMALL, 8, 8), Phase(6, grown, 4, 16))
    rates = (("head/kernel", 0.5), ("token_embedding", 2.0))  # there is no head of its own at first
    optimizer = Muon(momentum_warmup_steps=6, learning_rate_rules=rates)
    settings = settings_for(text, phases, optimizer=optimizer)
    misspelt = dataclasses.replace(optimizer, learning_rate_rules=(("heads", 0.5),))
    with pytest.raises(ValueError, match="no parameter matches 'heads'"):
        execute(dataclasses.replace(settings, optimizer=misspelt), tmp_path / "misspelt", EVERY)
    whole = execute(settings, tmp_path / "whole", EVERY)
    assert compilations["jit(step)"] == 2  # one a phase
    said = capsys.readouterr().out
    assert "phase 2 from step 4: layers 1 -> 3, tied_head True -> False" in said
    assert "function kept (identity)" in said
    assert ", 0 reset" in said
    rows = rows_of(tmp_path / "whole")
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["tokens"] for row in train] == [64] * 10
    losses = [row["loss"] for row in rows if row["kind"] == "evaluation"]
    assert losses[-1] < losses[0]
    resumed = tmp_path / "resumed"  # from the end of the first phase
    shutil.copytree(tmp_path / "whole", resumed)
    for step in (8, 10):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    (resumed / "result.json").unlink()
    assert bits(execute(settings, resumed, EVERY).state) == bits(whole.state)
    assert rows_of(resumed) == rows
    run = open_run(tmp_path / "whole", 4)
    assert (run.model.config.layers, "head" in run.params) == (1, False)
    assert open_run(tmp_path / "whole").model.config.layers == 3


def test_the_loss_does_not_jump_where_the_function_is_kept(text, tmp_path):  # noqa: F811
    """Evaluated at the boundary by the small model, and by the large one before its first step."""
    tiny = AdamW(learning_rate=1e-12)
    wide = dataclasses.replace(SMALL, width=64, heads=8, ffn_width=200, tied_head=False)
    phases = (Phase(2, SMALL, 4, 16), Phase(1, wide, 4, 16))
    settings = settings_for(text, phases, optimizer=tiny)
    execute(settings, tmp_path / "run", EVERY)
    before, after = (r["loss"] for r in rows_of(tmp_path / "run") if r["kind"] == "evaluation")
    assert abs(before - after) < 1e-5


def test_every_token_once_through_warmups(text, tmp_path):  # noqa: F811
    """Length and batch change; the tokens are those of a run without, in its order."""
    warm = settings_for(
        text, [Phase(2, SMALL, 4, 8), Phase(2, SMALL, 4, 16), Phase(2, SMALL, 8, 16)]
    )
    plain = settings_for(text, [Phase(7, SMALL, 4, 16)])
    _, corpora = open_data(warm.data, warm.tokenizer, tmp_path)

    def tokens(settings):
        found = [
            text_dataset(settings, corpora, settings.phases[phase_at(settings, step)[0]])[step]
            for step in range(settings.steps)
        ]
        return [np.concatenate([b[name].ravel() for b in found]) for name in ("tokens", "targets")]

    for ours, theirs in zip(tokens(warm), tokens(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_moments_go_with_their_parameters():
    """A copied layer has the moments of what it is a copy of; a head those of the embedding."""
    to = dataclasses.replace(SMALL, layers=3, tied_head=False, width=64, heads=8, ffn_width=128)
    made_of = sources(SMALL, to, "stack", key=jax.random.key(0))
    old, _ = state_of(SMALL, AdamW(tail_fraction=0.5))
    params = grown_params(old.params, abstract_params(to), made_of)
    fresh, _ = state_of(to, AdamW(tail_fraction=0.5), params)
    new = grown_state(old, dataclasses.replace(fresh, params=params), made_of)
    adam, before = (
        next(s for s in jax.tree.leaves(t, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        for t in (new.optimizer, old.optimizer)
    )
    q = before.nu["blocks"]["attention"]["q"]["kernel"]
    np.testing.assert_array_equal(
        adam.nu["blocks"]["attention"]["q"]["kernel"], jnp.tile(q, (3, 2, 2))
    )
    np.testing.assert_array_equal(
        adam.mu["head"]["kernel"], jnp.tile(before.mu["token_embedding"]["embedding"].T, (2, 1))
    )
    assert int(adam.count) == int(before.count)
    average, mean = (
        next(
            s.average
            for s in jax.tree.leaves(t, is_leaf=lambda s: hasattr(s, "average"))
            if hasattr(s, "average")
        )
        for t in (new.optimizer, old.optimizer)
    )  # weights, so they grow as weights do
    expected = grown_params(mean, abstract_params(to), made_of)
    jax.tree.map(np.testing.assert_array_equal, average, expected)
    assert int(new.extra[NONFINITE]["total"]) == int(old.extra[NONFINITE]["total"])


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", ["soap", "muon", *sorted(OPTIMIZERS)])
def test_every_optimizer_goes_on_after_growth(name):
    """What cannot be taken along is reset as a whole, and the next update is finite."""
    to = dataclasses.replace(SMALL, layers=2, width=64, heads=8, ffn_width=128)
    made_of = sources(SMALL, to, key=jax.random.key(0))
    settings = OPTIMIZERS[name]()

    def drawn(config):
        leaves, structure = jax.tree.flatten(abstract_params(config))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        new = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, new)

    def go_on():
        def update(state, tx):
            grads = jax.tree.map(lambda w: w + 0.01, state.params)
            updates, optimizer = tx.update(
                grads, state.optimizer, state.params, value=jnp.float32(1), grads=grads
            )
            params = jax.tree.map(lambda w, u: w + u, state.params, updates)
            return dataclasses.replace(state, params=params, optimizer=optimizer)

        params = drawn(SMALL)
        tx = build(settings, Constant(), 10, params)
        state = update(update(init_state(jax.random.key(0), params, tx), tx), tx)
        params = grown_params(state.params, drawn(to), made_of)
        tx = build(settings, Constant(), 10, params)
        fresh = init_state(jax.random.key(0), params, tx)
        return update(grown_state(state, fresh, made_of), tx)

    state = jax.jit(go_on)()
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
    fresh, _ = state_of(to, settings)
    _, report = carried(state_of(SMALL, settings)[0], fresh, made_of)
    if name in ("muon", "adam", "adamw"):
        assert not report.reset


@pytest.mark.parametrize("name", ["muonh", "adamh", "cocob"])
def test_state_that_follows_from_the_weights_does_so_after_growth(name):
    """A radius is that of the grown matrix, first weights grow as weights do: a step that is all
    but none leaves the model where it is."""
    to = dataclasses.replace(SMALL, layers=2, ffn_width=2 * SMALL.ffn_width_)
    made_of = sources(SMALL, to, key=jax.random.key(0))
    settings = OPTIMIZERS[name]()
    if name != "cocob":
        settings = dataclasses.replace(settings, learning_rate=1e-6, adam_learning_rate=1e-9)
    params = jax.jit(Transformer(SMALL).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params = params["params"]

    def state_for(params):
        tx = build(settings, Constant(), 10, params)
        return init_state(jax.random.key(0), params, tx), tx

    state, tx = state_for(params)
    grads = jax.tree.map(lambda w: jnp.cos(100 * w), params)
    updates, moved = jax.jit(tx.update)(
        grads, state.optimizer, params, value=jnp.float32(5), grads=grads
    )
    params = optax.apply_updates(params, updates)
    larger = grown_params(params, params, made_of)
    fresh, tx = state_for(larger)
    after = grown_state(dataclasses.replace(state, optimizer=moved), fresh, made_of)
    still = jax.tree.map(jnp.zeros_like, larger)
    updates, _ = jax.jit(tx.update)(
        still, after.optimizer, larger, value=jnp.float32(5), grads=still
    )
    for path, update in jax.tree_util.tree_leaves_with_path(updates["blocks"]):
        size = float(jnp.linalg.norm(update.ravel()))
        assert size < 1e-3, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["soap", "kron", "shampoo"])
def test_what_belongs_to_the_sides_of_square_matrices_starts_anew(name):
    small = dataclasses.replace(SMALL, ffn_width=SMALL.width)
    to = dataclasses.replace(small, width=2 * small.width, ffn_width=2 * small.width, heads=8)
    made_of = sources(small, to, key=jax.random.key(0))
    fresh, _ = state_of(to, OPTIMIZERS[name]())
    _, report = carried(state_of(small, OPTIMIZERS[name]())[0], fresh, made_of)
    assert {"left", "right"} <= set(report.reset)


def test_phases_on_a_command_line():
    last = Phase(100, gpt2_tiny(), 16, 32)
    one, two, three = parse_phases(
        ["10: layers=1, sequence-length=16", "20:window=8,tied_head=false,growth=stack"], last
    )
    assert (one.steps, one.sequence_length, one.model.layers) == (10, 16, 1)
    assert (two.steps, two.model.window, two.model.tied_head, two.growth) == (20, 8, False, "stack")
    assert three == dataclasses.replace(last, steps=70)
    for text_, words in (
        ("layers=1", "is not STEPS:FIELD=VALUE"),
        ("100:layers=1", "leave at least one to the last phase"),
        ("10:depth=1", "changes 'depth'.*layers"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_phases([text_], last)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "data=2,pipeline=2"])
def test_a_run_on_a_mesh_grows_as_one_on_a_device(text, tmp_path, mesh):  # noqa: F811
    small = modern_tiny(
        layers=2,
        embedding_norm=True,
        embedding_shortcut=0.1,
        value_embeddings=True,
        bigram_rows=64,
    )
    large = dataclasses.replace(small, layers=4, width=64, heads=8, ffn_width=192)
    phases = [Phase(3, small, 8, 16), Phase(3, large, 8, 16)]
    settings = settings_for(text, phases, optimizer=Muon(), vocabulary_multiple=8)
    execute(settings, tmp_path / "one", EVERY)
    execute(settings, tmp_path / "mesh", dataclasses.replace(EVERY, mesh=mesh))
    one, two = (
        [row["loss"] for row in rows_of(tmp_path / name) if "loss" in row]
        for name in ("one", "mesh")
    )
    np.testing.assert_allclose(one, two, rtol=1e-4)
    assert open_run(tmp_path / "mesh").params["value_embedding"]["embedding"].shape == (257, 128)


@pytest.mark.slow
def test_a_run_starts_from_a_smaller_one(text, tmp_path, capsys):  # noqa: F811
    parent = execute(
        settings_for(text, [Phase(4, SMALL, 4, 16)], optimizer=AdamW()), tmp_path / "small", EVERY
    )
    config = open_run(tmp_path / "small").model.config
    large = grown_config(config, "layers=2,width=64,tied_head=false")
    still = AdamW(learning_rate=1e-12)
    phases = [Phase(1, large, 4, 16)]
    settings = settings_for(text, phases, optimizer=still, parent=str(tmp_path / "small"))
    child = execute(settings, tmp_path / "large", EVERY)
    assert "The model grows (identity, function kept)" in capsys.readouterr().out
    assert abs(child.evaluation["loss"] - parent.evaluation["loss"]) < 1e-5
    with pytest.raises(ValueError, match="--grow changes 'depth'"):
        grown_config(config, "depth=3")


def test_the_average_of_the_tail_is_what_is_measured_and_opened(text, tmp_path):  # noqa: F811
    settings = settings_for(
        text, [Phase(8, SMALL, 4, 16)], optimizer=AdamW(learning_rate=0.03, tail_fraction=0.5),
        schedule=Constant(),
    )  # fmt: skip
    each = dataclasses.replace(
        EVERY, loop=LoopSettings(log_every=1, evaluate_every=1, checkpoint_every=1)
    )
    whole = execute(settings, tmp_path / "run", each)
    plain = dataclasses.replace(settings, optimizer=AdamW(learning_rate=0.03))
    execute(plain, tmp_path / "plain", each)
    steps = [open_run(tmp_path / "plain", step).params for step in (5, 6, 7, 8)]
    mean = jax.tree.map(lambda *w: sum(w) / 4, *steps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        open_run(tmp_path / "run").params,
        mean,
    )
    for a, b, m in zip(
        *(jax.tree.leaves(t) for t in (whole.state.params, steps[-1], mean)), strict=True
    ):  # the weights that train are the last ones
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert not np.allclose(a, m, atol=1e-4)
    ours, theirs = (
        {r["step"]: r["loss"] for r in rows_of(tmp_path / name) if r["kind"] == "evaluation"}
        for name in ("run", "plain")
    )
    assert [abs(ours[s] - theirs[s]) < 1e-4 for s in range(1, 9)] == [True] * 5 + [False] * 3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "7")
    (tmp_path / "run" / "result.json").unlink()
    assert bits(execute(settings, tmp_path / "run", each).state) == bits(whole.state)


def test_codes_of_moments_grow_in_depth_alone(text, tmp_path):  # noqa: F811
    wide, deep = ({"width": 2 * SMALL.width, "heads": 2 * SMALL.heads}, {"layers": 2})
    method = EightBitState(smallest=256)
    for changes, fits in ((wide, False), (deep, True)):
        phases = [Phase(2, SMALL, 4, 16), Phase(2, dataclasses.replace(SMALL, **changes), 4, 16)]
        settings = settings_for(text, phases, optimizer=AdamW(), methods=(method,))
        if fits:
            check_phases(settings, load_tokenizer("bytes"))
        else:
            with pytest.raises(ValueError, match="grows in depth alone"):
                check_phases(settings, load_tokenizer("bytes"))


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (Rewire(rules=(("kernel", 0.5),), every=1, until=3), {"tied_head": False}, "pruned"),
        (EightBitState(smallest=256), {"tied_head": False}, "the scales of moments in 8 bits"),
        (MultiToken(), {"width": 2 * SMALL.width, "heads": 2 * SMALL.heads}, "last weights"),
    ],
    ids=["masks", "scales", "average"],
)
def test_what_cannot_be_made_again_is_not_lost_on_the_way(text, tmp_path, method, changes, words):  # noqa: F811
    tied = dataclasses.replace(SMALL, tied_head=True)
    phases = [Phase(2, tied, 4, 16), Phase(2, dataclasses.replace(tied, **changes), 4, 16)]
    optimizer = AdamW(tail_fraction=0.5 if words == "last weights" else None)
    settings = settings_for(text, phases, optimizer=optimizer, methods=(method,))
    with pytest.raises(ValueError, match=f"phase 2 cannot follow phase 1: .*{words}"):
        check_phases(settings, load_tokenizer("bytes"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"layers": 2, "activation": "gelu", "biases": True}, "biases False cannot become True"),
        ({"width": 48, "heads": 6}, "make it a multiple"),
    ],
)
def test_phases_that_do_not_follow_are_refused_before_any_work(text, tmp_path, second, words):  # noqa: F811
    phases = [Phase(2, SMALL, 4, 16), Phase(2, dataclasses.replace(SMALL, **second), 4, 16)]
    with pytest.raises(ValueError, match=f"phase 2 cannot follow phase 1: .*{words}"):
        execute(settings_for(text, phases, optimizer=AdamW()), tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "settings.json").exists()
