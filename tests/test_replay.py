"""Replay: a model's own samples as a source, and old text beside the rows of a task."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods.replay import Replay
from experiments.replay import ROWS, main, samples, write_tokens
from experiments.runs.assemble import abstract_state, assemble
from experiments.runs.execute import Execution, execute
from experiments.runs.prepare import open_data
from experiments.runs.run import open_run, read_settings
from model.presets import encoder_decoder_tiny, gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.test_finetune import QUIET, T, files, parent, settings_for  # noqa: F401 (fixtures)
from tests.test_run import bits, own_cache, rows_of  # noqa: F401 (fixture)
from train.corpus import Split, build_corpus
from train.losses import mean_squared_error
from train.methods import Setup
from train.replay import replay, with_old_text
from train.settings import Phase, Settings
from train.step import init_state, make_train_step
from train.tasks.task import task_batches
from train.text.sources import open_source


def test_samples_are_texts_that_read_like_any_source(parent, tmp_path):  # noqa: F811
    run = open_run(parent)
    written = samples(run, ROWS + 3, 20, key=jax.random.key(0))
    assert written.shape == (ROWS + 3, 21)
    assert (written[:, 0] == run.tokenizer.end_of_document).all()
    assert len({row.tobytes() for row in written}) == len(written)
    again, other = (samples(run, 2, 20, key=jax.random.key(0), separator=s) for s in (None, 7))
    assert not np.array_equal(again, other)
    assert (other[:, 0] == 7).all()
    write_tokens(tmp_path / "old" / "old.bin", written)
    corpus = build_corpus(open_source(str(tmp_path / "old")), run.tokenizer)
    tokens = np.concatenate([split.tokens for split in corpus.splits.values()])
    assert sorted(tokens.tolist()) == sorted(written.ravel().tolist())
    data = ("9*" + str(parent.parent / "text.txt"), str(tmp_path / "old" / "old.bin"))
    _, mixed = open_data(data, "bytes", tmp_path / "run")
    assert [weight for _, weight in mixed] == [0.9, 0.1]
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"separator is 257; the ids end at 256"):
        samples(run, 2, 4, key=key, separator=257)
    most = run.model.config.max_length
    with pytest.raises(ValueError, match=f"1 to {most - 1} tokens"):
        samples(run, 2, most, key=key)
    with pytest.raises(ValueError, match=r"0 rows"):
        samples(run, 0, 4, key=key)
    translator = dataclasses.replace(run, model=Transformer(encoder_decoder_tiny()))
    with pytest.raises(ValueError, match="continues no text"):
        samples(translator, 2, 4, key=key)
    with pytest.raises(ValueError, match=r"ends in \.bin"):
        write_tokens(tmp_path / "old.txt", np.zeros(3))
    with pytest.raises(ValueError, match="ids up to 65536 do not fit"):
        write_tokens(tmp_path / "old.bin", np.array([65536]))
    write_tokens(tmp_path / "old.bin", np.array([65535]))
    with pytest.raises(ValueError, match="exists already"):
        write_tokens(tmp_path / "old.bin", np.array([1]))


def test_the_command_writes_rows_as_long_as_those_of_training(
    parent,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # it then leaves JAX's own as it is

    def call(**flags):
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["replay", "--run", str(parent), *words])
        main()

    out = tmp_path / "texts" / "old.bin"
    call(out=out, tokens=30, separator=3)
    tokens = np.fromfile(out, "<u2").reshape(-1, T + 1)
    assert len(tokens) == 3  # of 12 and the separator
    assert (tokens[:, 0] == 3).all()
    assert f"39 in {out}" in capsys.readouterr().out
    for flags, says in (
        ({"out": out}, "exists already"),
        ({"out": tmp_path / "a.txt"}, r"ends in \.bin"),
        ({"out": tmp_path / "a.bin", "tokens": 0}, "tokens is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            call(**flags)


@pytest.mark.variants(1)
@pytest.mark.parametrize("parts", [2, 1])
def test_the_gradient_is_that_of_the_task_and_of_the_language_model(strict, parts):
    """By an independent formula: optax's cross-entropy of the model's own logits."""
    model = Transformer(modern_tiny())
    keys = jax.random.split(jax.random.key(0), 4)
    V = model.config.vocabulary_size
    tokens = jax.random.randint(keys[0], (4, 8), 0, V)
    old = jax.random.randint(keys[1], (4, 6), 0, V)
    values = jax.random.normal(keys[2], (4,))
    params = jax.jit(model.init)(keys[3], tokens)["params"]
    leaves, structure = jax.tree.flatten(params)
    params = jax.tree.unflatten(structure, [leaf + jnp.float32(0.05) for leaf in leaves])
    batch = {
        "tokens": tokens,
        "weights": jnp.ones((4, 8)),
        "values": values,
        "replay_tokens": old[:, :-1],
        "replay_targets": old[:, 1:],
        "replay_weights": jnp.array([1.0, 1.0, 1.0, 0.0, 1.0])[None] * jnp.ones((4, 1)),
    }

    def predict(view):
        return view.features.final.mean(axis=(1, 2))

    def expected(params):
        final = model.apply({"params": params}, tokens, method="features").final
        task = jnp.square(final.mean(axis=(1, 2)) - values).mean()
        logits = model.apply({"params": params}, old[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, old[:, 1:])
        return task + jnp.float32(0.3) * losses[:, [0, 1, 2, 4]].mean()

    terms = [mean_squared_error(predict, "values"), replay(model, 0.3)]
    loss, gradient = jax.jit(jax.value_and_grad(expected))(params)
    step = make_train_step(model, terms, optax.sgd(1.0), micro_batches=parts)
    state = init_state(jax.random.key(0), params, optax.sgd(1.0))
    with jax.numpy_dtype_promotion("standard"):  # Optax
        state, metrics = jax.jit(step)(state, {}, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    found = jax.tree.map(jnp.subtract, params, state.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_old_text_lies_beside_each_batch():
    tokens = np.arange(200, dtype=np.uint16)
    made = task_batches({"tokens": np.arange(10)[:, None]}, seed=0, batch_size=4)
    split = Split(tokens, np.array([0]), 200)
    args = {"seed": 3, "length": 5, "batch_size": 4}
    both = with_old_text(made, split, **args)
    assert np.array_equal(both[2]["tokens"], made[2]["tokens"])
    assert both[2]["replay_tokens"].shape == (4, 5)
    assert np.array_equal(both[2]["replay_targets"], both[2]["replay_tokens"] + 1)
    seen = np.concatenate([both[n]["replay_tokens"] for n in range(9)])
    assert len({row.tobytes() for row in seen}) == len(seen)  # none again before all were
    half = with_old_text(made, split, rows=slice(2, 4), **args)
    assert np.array_equal(half[2]["replay_tokens"], both[2]["replay_tokens"][2:])


@pytest.fixture
def replayed(files, parent):  # noqa: F811
    """A fine-tuning that goes over the text of its start again."""
    text = str(parent.parent / "text.txt")
    return settings_for(files, parent=str(parent), methods=(Replay(text, length=8),))


def test_old_text_comes_in_an_order_of_its_own():
    """With as many windows as rows, a row does not meet the same window in every epoch."""
    rows = 24
    made = task_batches({"tokens": np.arange(rows)[:, None]}, seed=0, batch_size=1)
    old = Split(np.arange(4 * rows + 1, dtype=np.int32), np.zeros(1, np.int64), 4 * rows)
    both = with_old_text(made, old, seed=0, length=4, batch_size=1)
    met = [
        [(int(b["tokens"][0, 0]), int(b["replay_tokens"][0, 0])) for b in epoch]
        for epoch in ([both[step] for step in range(n * rows, (n + 1) * rows)] for n in (0, 1))
    ]
    assert len(set(met[0]) & set(met[1])) < rows // 3


def test_a_run_resumes_bitwise(replayed, tmp_path):
    whole = execute(replayed, tmp_path / "whole", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "8")
    (tmp_path / "halves" / "result.json").unlink()
    halves = execute(replayed, tmp_path / "halves", QUIET)
    assert bits(whole.state) == bits(halves.state)
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "halves")
    assert all(row["replay"] > 0 for row in rows if row["kind"] == "step")
    facts = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert [fact["name"] for fact in facts] == ["train.tsv", "valid.tsv", "test.tsv", "text.txt"]
    assert read_settings(tmp_path / "whole").methods == replayed.methods
    # Another text is another run.
    with open(replayed.methods[0].data, "a") as file:
        file.write("more of it")
    with pytest.raises(ValueError, match=r"the data has changed"):
        execute(replayed, tmp_path / "whole", QUIET)


def test_the_head_of_the_language_model_trains_on(files, parent, tmp_path):  # noqa: F811
    """An untied head has a part in the loss of old text, and none without it."""
    config = gpt2_tiny(tied_head=False)
    settings = settings_for(files, phases=(Phase(1, config, 4, T),))
    for methods, trains in (((Replay("x", length=8),), True), ((), False)):
        made = dataclasses.replace(settings, methods=methods, task=settings.task.resolve())
        parts = assemble(made, dataclasses.replace(config, vocabulary_size=257))
        assert ("head" in abstract_state(made, parts).params) == trains


@pytest.mark.slow
def test_a_mesh_of_two_gives_the_same_numbers(replayed, tmp_path):
    phases = (Phase(4, gpt2_tiny(dropout=0.0), 4, T),)
    replayed = dataclasses.replace(
        replayed, phases=phases, task=dataclasses.replace(replayed.task, dropout=0.0)
    )
    execute(replayed, tmp_path / "one", QUIET)
    execute(replayed, tmp_path / "two", dataclasses.replace(QUIET, mesh="data=2"))
    for a, b in zip(*(rows_of(tmp_path / name) for name in ("one", "two")), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="axis context"):
        execute(replayed, tmp_path / "ring", dataclasses.replace(QUIET, mesh="context=2"))


def test_old_text_that_does_not_fit_is_refused(files, tmp_path):  # noqa: F811
    (tmp_path / "old.txt").write_text("what was there before, " * 20)

    def with_method(**changes):
        method = dataclasses.replace(Replay(str(tmp_path / "old.txt"), length=8), **changes)
        return settings_for(files, methods=(method,))

    for changes, says in (
        ({"data": ""}, r"--replay\.data SOURCE"),
        ({"data": str(tmp_path / "none.txt")}, "no such file"),
        ({"length": 5000}, "learned positions"),
    ):
        with pytest.raises(ValueError, match=says):
            execute(with_method(**changes), tmp_path / "run", QUIET)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="fewer than a row of 8"):
        execute(with_method(data=str(tmp_path / "short.txt")), tmp_path / "run", QUIET)
    for changes, says in (({"length": 0}, "length is 0"), ({"weight": 0.0}, "weight is 0.0")):
        with pytest.raises(ValueError, match=says):
            with_method(**changes)
    with pytest.raises(ValueError, match="no language model"):
        Replay("a.txt").build(Setup(encoder_decoder_tiny(), {}, 1))
    text = Settings(
        phases=(Phase(1, gpt2_tiny(), batch_size=2, sequence_length=T),),
        data=(str(tmp_path / "old.txt"),),
        tokenizer="bytes",
        methods=(Replay("old.bin"),),
    )
    with pytest.raises(ValueError, match=r"--data '9\*NEW' 'old\.bin'"):
        execute(text, tmp_path / "text", Execution(progress=False))
