"""Ways to tune: what trains, in bytes; rates and freezing by depth; prompts against real tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.methods.lora import Lora
from experiments.methods.privacy import DpSgd
from experiments.methods.prompts import Prefix, Prompt
from experiments.methods.tuning import BitFit, LayerDecay, Unfreeze
from experiments.runs.assemble import assemble, initial_params
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from model.config import TransformerConfig
from model.generate import Sampling, generate
from model.presets import encoder_decoder_tiny, gpt2_tiny, modern_tiny
from model.transformer import Transformer
from train.loop import LoopSettings
from train.optimizers import SGD, AdamW
from train.plugs import Context, merge, whole
from train.prompts import keys_and_values, with_prefix
from train.schedules import Constant
from train.settings import Phase, Settings
from train.step import init_state
from train.tasks.classification import Classification
from train.tasks.task import TaskFiles

GPT2 = gpt2_tiny(scan_layers=True, dropout=0.0)
MODERN = modern_tiny(scan_layers=True, zero_init_projections=False)  # or nothing has a gradient
B, T, P = 2, 6, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
        yield folder


def settings_of(home, *methods, config: TransformerConfig = GPT2, optimizer=None, steps=3):
    return Settings(
        phases=(Phase(steps, config, batch_size=4, sequence_length=16),),
        data=(str(home / "text.txt"),),
        tokenizer="bytes",
        optimizer=optimizer or AdamW(learning_rate=1e-2),
        schedule=Constant(),
        methods=methods,
    )


def every_step(keep):
    return Execution(LoopSettings(checkpoint_every=1), keep_last=keep, progress=False)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def numbers(config, method):
    """What trains, counted by hand."""
    L, D, F = config.layers, config.width, config.ffn_width_
    biases = L * (4 * D + F + D + 2 * D) + D
    scales = L * 2 * D + D
    return {
        "bitfit": biases + (scales if getattr(method, "norms", False) else 0),
        "prompt": P * D,
        "prefix": 2 * L * P * config.kv_heads_ * config.head_width_,
    }[method.name]


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    "method", [BitFit(norms=True), Prefix(length=P), Prompt(length=P), BitFit()], ids=str
)
def test_gradients_and_optimizer_state_are_of_what_trains(home, method, strict):
    """In bytes: Adam has two moments of every number that trains."""
    parts = assemble(settings_of(home, method), GPT2)
    trained, fixed = parts.plugs.split(initial_params(settings_of(home, method), GPT2))
    assert size(trained) == 4 * numbers(GPT2, method)
    state = jax.eval_shape(
        lambda p: init_state(jax.random.key(0), p, parts.optimizer, parts.plugs.transforms), trained
    )
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert size(moments) == 2 * size(trained)

    def loss(trained, batch, context):
        weights = merge(trained, context.frozen["params"])
        for transform in parts.plugs.transforms:
            weights = transform.apply(weights, context)
        logits = Transformer(GPT2).apply({"params": weights}, jnp.zeros((B, T), jnp.int32))
        return jnp.square(logits).sum(), {}

    context = Context(jnp.int32(0), jax.random.key(0), {"params": fixed}, {}, {})
    grads, _ = jax.jit(lambda t, c: whole(loss, t, {}, c))(trained, context)
    assert size(grads) == size(trained)
    moves = {name: bool(jnp.abs(g).max() > 0) for name, g in _flat(grads).items()}
    # Bias of the keys: it shifts all scores of a query alike.
    assert all(moves[name] for name in moves if "['k']['bias']" not in name)


def _flat(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        (BitFit(), MODERN, "--bitfit.norms"),
        (BitFit(also=("nothing",)), GPT2, "no parameter matches"),
        (Prompt(length=0), GPT2, "at least 1 vector"),
        (Prefix(length=4096), GPT2, "positions of the model"),
        (Unfreeze(every=9), GPT2, "would begin to train at step 18"),
        (Unfreeze(every=1), encoder_decoder_tiny(encoder_layers=3), "to train at step 3"),
    ],
)
def test_what_does_not_fit_is_refused(home, method, config, words):
    with pytest.raises(ValueError, match=words):
        assemble(settings_of(home, method, config=config), config)
    with pytest.raises(ValueError, match="at most 1"):
        LayerDecay(1.5)


def test_rates_fall_with_depth(home):
    """Under plain descent with weight decay an update is minus its factor times what it was."""
    config = dataclasses.replace(GPT2, layers=3, tied_head=False)
    optimizer = SGD(learning_rate=1.0, momentum=0.0, weight_decay=0.5, decay_rules=((".*", True),))
    updates = []
    for methods in ((), (LayerDecay(0.5),)):
        settings = settings_of(home, *methods, config=config, optimizer=optimizer)
        tx, params = assemble(settings, config).optimizer, initial_params(settings, config)
        grads = jax.tree.map(jnp.ones_like, params)
        update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])  # noqa: B023
        updates.append(_flat(update(grads, params)))
    for name, plain in updates[0].items():
        depth = 4 if "_embedding" in name else 0
        factor = np.float32(0.5**depth)
        if "blocks" in name:
            factor = np.float32([0.125, 0.25, 0.5]).reshape(-1, *[1] * (plain.ndim - 1))
        np.testing.assert_allclose(updates[1][name], plain * factor, rtol=1e-6, err_msg=name)


def test_layers_begin_to_train_one_by_one(home, tmp_path):
    """Block 1 from step 1, block 0 from step 3, embeddings from step 5; weight decay waits too."""
    optimizer = AdamW(learning_rate=1e-2, weight_decay=0.1)
    settings = settings_of(home, Unfreeze(start=1, every=2), optimizer=optimizer, steps=6)
    execute(settings, tmp_path / "run", every_step(keep=9))
    runs = {step: _flat(open_run(tmp_path / "run", step).params) for step in range(1, 7)}

    def moved(name, step, layer=slice(None)):
        return not np.array_equal(runs[step][name][layer], runs[step + 1][name][layer])

    up = "['blocks']['mlp']['up']['kernel']"
    assert [moved(up, step, 1) for step in range(1, 6)] == [True] * 5
    assert [moved(up, step, 0) for step in range(1, 6)] == [False, False, True, True, True]
    table = "['token_embedding']['embedding']"
    assert [moved(table, step) for step in range(1, 6)] == [False] * 4 + [True]
    assert moved("['final_norm']['scale']", 1)


def test_a_prompt_of_tokens_is_those_tokens(strict):
    """Vectors that are embeddings of tokens do what these tokens would at the head of each row."""
    params = jax.jit(Transformer(MODERN).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
    params = jax.tree.map(lambda a: a + 0.05 * jnp.cos(a * 1e4), params)  # norms too
    ids = jnp.arange(P + T)[None] * 7 % MODERN.vocabulary_size
    vectors = params["token_embedding"]["embedding"][ids[0, :P]]
    prompted = with_prefix(params, keys_and_values(MODERN, params, vectors))
    model = Transformer(MODERN)
    whole_row = model.apply({"params": params}, ids)[:, P:]
    rest = model.apply({"params": prompted}, ids[:, P:])
    np.testing.assert_allclose(rest, whole_row, rtol=1e-4, atol=1e-5)
    without = model.apply({"params": params}, ids[:, P:])
    assert np.abs(without - rest).max() > 1e-3
    # And token by token, from the cache.
    greedy = Sampling(0.0)
    args = {"key": jax.random.key(1), "max_new_tokens": 4, "sampling": greedy}
    one = generate(model, params, [ids[0].tolist()], **args).new_tokens()
    two = generate(model, prompted, [ids[0, P:].tolist()], **args).new_tokens()
    assert [list(row) for row in one] == [list(row) for row in two]


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    "methods",
    [(Prompt(length=P),), (Prefix(length=P),), (Lora(rank=2), Prompt(length=P, init="random"))],
    ids=str,
)
def test_a_run_with_a_prompt_opens_like_any_other(home, tmp_path, methods):
    settings = settings_of(home, *methods, config=MODERN, optimizer=AdamW(learning_rate=0.1))
    outcome = execute(settings, tmp_path / "run", every_step(keep=9))
    one, last = (open_run(tmp_path / "run", step).params for step in (1, 3))
    for name, leaf in _flat(one).items():
        trains = "prefix" in name or ("Sum" in name or ".low" in name)
        assert np.array_equal(leaf, _flat(last)[name]) != trains, name
    assert outcome.evaluation["loss"] > 0
    run = open_run(tmp_path / "run")
    out = generate(run.model, run.params, [[1, 2]], key=jax.random.key(0), max_new_tokens=2)
    assert len(out.new_tokens()[0]) == 2
    child = dataclasses.replace(
        settings_of(home, config=run.model.config),
        parent=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "run" / "tokenizer"),
    )
    with pytest.raises(ValueError, match="with a prompt or a prefix"):
        execute(child, tmp_path / "child", every_step(keep=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [(Prompt(length=P), DpSgd(noise=0.5)), (BitFit(), LayerDecay(0.5)), (Unfreeze(every=1),)],
    ids=str,
)
def test_a_task_is_tuned_in_every_way(home, tmp_path, methods):
    """What the task has put beside the model trains with each of them."""
    pytest.importorskip("sklearn")
    rows = "".join(f"{'abcd'[n % 4] * 5}\t{'good' if n % 4 < 2 else 'bad'}\n" for n in range(24))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows)
    files = TaskFiles(tuple((name, str(tmp_path / "rows.tsv")) for name in ("train", "valid")))
    settings = dataclasses.replace(
        settings_of(home, *methods, steps=12), data=(), task=Classification(files)
    )
    outcome = execute(settings, tmp_path / "run", every_step(keep=13))
    first, last = (open_run(tmp_path / "run", step).params["score"] for step in (1, 12))
    assert np.abs(first["kernel"] - last["kernel"]).max() > 0
    assert np.isfinite(outcome.evaluation["loss"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if methods[0].name == "prompt":  # 12 batches of 4 are two epochs of 24 rows, cut evenly
        assert result["privacy"]["participations"] == 2
