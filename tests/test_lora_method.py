"""Adaptation as a method: what trains, in bytes; runs, adapters alone, and other bases."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lora import adapted_paths, merged
from compress.quantization.quantize import is_qtensor
from experiments.adapters import (
    Adapters,
    adapted_run,
    apply_adapters,
    load_adapter,
    run_command,
    save_adapter,
)
from experiments.convert import to_huggingface
from experiments.methods.compression import FakeQuantize
from experiments.methods.lora import Lora
from experiments.methods.prompts import Prefix
from experiments.methods.table import METHODS
from experiments.runs.assemble import abstract_whole, assemble, initial_params
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from model.huggingface import load as load_huggingface
from model.presets import gpt2_tiny
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.plugs import Context, merge, whole
from train.schedules import Linear
from train.settings import Phase, Settings, from_json, to_json
from train.step import init_state

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=10), progress=False)
RULES = (("attention/(q|v)/kernel", 2), ("token_embedding", 3))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Text, a base, and another base of the same shapes."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
        execute(settings_of(folder, steps=2), folder / "base", QUIET)
        yield folder


def settings_of(home, *methods, steps=3, parent=None, seed=0, **model):
    config = gpt2_tiny(scan_layers=True, dropout=0.0, **model)
    return Settings(
        phases=(Phase(steps, config, batch_size=4, sequence_length=16),),
        data=(str(home / "text.txt"),),
        tokenizer=str(home / "base" / "tokenizer") if parent else "bytes",
        optimizer=AdamW(learning_rate=3e-2),
        schedule=Linear(),
        methods=methods,
        seed=seed,
        parent=None if parent is None else str(parent),
    )


def run_of(home, name, *methods, **settings):
    out = home / name
    if not out.exists():
        parent = home / "base"
        config = open_run(parent).model.config
        plan = settings_of(home, *methods, parent=parent, **settings)
        phase = dataclasses.replace(plan.phases[0], model=config)
        execute(dataclasses.replace(plan, phases=(phase,)), out, QUIET)
    return out


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.variants(1)
@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rules=RULES, base="q4_0", also=(".*norm",))])
def test_gradients_and_optimizer_state_are_of_what_trains(tmp_path, method):
    """In bytes: Adam has two moments of every number that trains, and one count."""
    config = gpt2_tiny(scan_layers=True, dropout=0.0)
    settings = dataclasses.replace(settings_of(tmp_path, method), vocabulary_multiple=1)
    parts = assemble(settings, config)
    params = initial_params(settings, config)
    trained, fixed = parts.plugs.split(params)
    layers, width = config.layers, config.width
    if not method.rules:
        shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        expected = sum(layers * 2 * (i + o) for i, o in shapes)
    else:
        expected = 2 * layers * 2 * (width + width) + 3 * (config.vocabulary_size + width)
        expected += 2 * width * (2 * layers + 1)  # scales and biases of the norms
    assert size(trained) == 4 * expected
    state = init_state(jax.random.key(0), trained, parts.optimizer, parts.plugs.transforms, fixed)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert size(moments) == 2 * size(trained)

    def loss(trained, batch, context):
        weights = merge(trained, context.frozen["params"])
        for transform in parts.plugs.transforms:
            weights = transform.apply(weights, context)
        kernel = weights["blocks"]["attention"]["q"]["kernel"]
        return jnp.square(jax.vmap(lambda w: jnp.ones((1, width)) @ w)(kernel)).sum(), {}

    context = Context(jnp.int32(0), None, {"params": fixed}, {}, {})
    grads, _ = whole(loss, trained, {}, context)
    assert size(grads) == size(trained)
    if method.base:
        dense = size(params)
        assert size(fixed) < 0.25 * dense
        assert any(is_qtensor(w) for w in jax.tree.leaves(fixed, is_leaf=is_qtensor))


def test_a_run_begins_as_its_base_and_keeps_it(home):
    out = run_of(home, "adapted", Lora(rules=RULES))
    base, run = open_run(home / "base"), open_run(out)
    assert len(adapted_paths(run.params)) == 3
    for path in ("final_norm", "position_embedding"):
        jax.tree.map(np.testing.assert_array_equal, run.params[path], base.params[path])
    first, dense = losses(out), losses(run_of(home, "dense"))
    assert first[0] == pytest.approx(dense[0], rel=1e-6)
    assert first[-1] < first[0]


@pytest.mark.slow
def test_what_a_run_has_learned_is_merged_where_plain_weights_are_wanted(home, tmp_path):
    out = run_of(home, "adapted", Lora(rules=RULES))
    run = open_run(out)
    to_huggingface(out, tmp_path / "hf")
    _, params = load_huggingface(tmp_path / "hf")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, merged(run.params)
    )


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    "method",
    [
        Lora(rules=RULES, scaling="rslora", alpha=3.0),
        Lora(rank=2, base="q4_0", direction="dora", also=(".*norm",)),
    ],
)
def test_an_adapter_alone_is_the_run(home, tmp_path, method):
    out = run_of(home, f"adapted-{method.direction}", method)
    save_adapter(out, tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert dataclasses.replace(adapter.method, alpha=method.alpha) == method
    again, run = adapted_run(home / "base", None, [str(tmp_path / "adapter")]), open_run(out)
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    lines = run_command(Adapters(home / "base", tmp_path / "merged", (str(tmp_path / "adapter"),)))
    assert "merged" in lines[0]
    tokens = jnp.arange(10)[None]
    logits = [
        r.model.apply({"params": r.params}, tokens) for r in (run, open_run(tmp_path / "merged"))
    ]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_of_averaged_weights_is_the_run(home, tmp_path):
    plan = settings_of(home, Lora(rank=2), parent=home / "base", seed=5)
    optimizer = dataclasses.replace(plan.optimizer, tail_fraction=1.0)
    config = open_run(home / "base").model.config
    phases = (dataclasses.replace(plan.phases[0], model=config),)
    execute(dataclasses.replace(plan, optimizer=optimizer, phases=phases), tmp_path / "run", QUIET)
    save_adapter(tmp_path / "run", tmp_path / "adapter")
    again = adapted_run(home / "base", None, [str(tmp_path / "adapter")])
    run = open_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)


def test_a_base_may_have_a_head_that_the_adapter_never_saw(home, tmp_path):
    out = run_of(home, "beside-head", Lora(rank=2))
    save_adapter(out, tmp_path / "adapter")
    base = open_run(home / "base")
    score = {"kernel": jnp.ones((base.model.config.width, 2))}
    headed = dataclasses.replace(base, params={**base.params, "score": score})
    params = apply_adapters(headed, [(load_adapter(tmp_path / "adapter"), 1.0)])
    jax.tree.map(np.testing.assert_array_equal, params["score"], score)
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], open_run(out).params["blocks"])


@pytest.mark.slow
def test_adapters_add_up(home, tmp_path):
    names = []
    for seed in (1, 2):
        out = run_of(home, f"sum-{seed}", Lora(rank=2, seed=seed), seed=seed)
        save_adapter(out, tmp_path / str(seed))
        names.append(str(tmp_path / str(seed)))
    base = open_run(home / "base").params
    ones = [merged(adapted_run(home / "base", None, [name]).params) for name in names]
    both = merged(adapted_run(home / "base", None, [names[0], f"0.5*{names[1]}"]).params)
    expected = jax.tree.map(lambda w, a, b: w + (a - w) + 0.5 * (b - w), base, *ones)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, expected)
    run_command(Adapters(home / "sum-1", tmp_path / "saved"))  # the same by the command
    assert (tmp_path / "saved" / "adapter.safetensors").read_bytes() == (
        tmp_path / "1" / "adapter.safetensors"
    ).read_bytes()


def test_an_adapter_for_another_base_is_refused(home, tmp_path):
    out = run_of(home, "adapted", Lora(rules=RULES))
    save_adapter(out, tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained on other weights"):
        adapted_run(run_of(home, "dense"), None, [str(tmp_path / "adapter")])
    execute(settings_of(home, steps=1, layers=1), tmp_path / "small", QUIET)
    with pytest.raises(ValueError, match=r"another model.*layers"):
        adapted_run(tmp_path / "small", None, [str(tmp_path / "adapter")])
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(home / "base", tmp_path / "none")
    both = run_of(home, "rounded", Lora(rank=2, form="merged"), FakeQuantize("int8"))
    with pytest.raises(ValueError, match="trained with fake_quantize as well"):
        save_adapter(both, tmp_path / "none")
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"{")
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(home)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: Lora(rank=0), "at least 1"),
        (lambda: Lora(alpha=0.0), "above 0"),
        (lambda: Lora(base="int5x"), "int5x"),
        (lambda: Lora(rules=(("nothing", 2),)), "no parameter matches"),
        (lambda: Lora(rank=4096), "ranks from 1 to"),
        (lambda: Lora(rules=(("attention/q/bias", 2),)), "no matrix"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, method, words):
    with pytest.raises(ValueError, match=words):
        assemble(settings_of(tmp_path, method()), gpt2_tiny())


def test_lora_comes_before_what_freezes_the_model(tmp_path):
    with pytest.raises(ValueError, match="give lora first"):
        assemble(settings_of(tmp_path, Prefix(length=2), Lora(rank=2)), gpt2_tiny())
    both = settings_of(tmp_path, Prefix(length=2, also=(".*",)), Lora(rank=2))
    trained, _ = jax.eval_shape(
        assemble(both, gpt2_tiny()).plugs.split, abstract_whole(both, gpt2_tiny())
    )
    assert set(trained["blocks"]["attention"]["prefix"]) == {"k", "v"}
    assert set(trained["blocks"]["attention"]["q"]) == {"lora"}


def test_settings_survive_json(tmp_path):
    settings = settings_of(tmp_path, Lora(rules=RULES, also=("head",), base="q4_0"))
    assert from_json(json.loads(json.dumps(to_json(settings))), METHODS) == settings
