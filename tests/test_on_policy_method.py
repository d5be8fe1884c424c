"""On-policy distillation inside the step: what the student wrote, with its transforms; resume."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lora import attach, init_adapters
from compress.lowrank_params import ranks_by_path
from experiments.methods.on_policy import OnPolicyDistil, writing
from experiments.methods.on_policy_batch import OnPolicy
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from model.flops import abstract_params
from model.generate import Sampling, generate
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.plugs import State, WeightTransform
from train.schedules import Linear
from train.settings import Phase, Settings

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=2), progress=False)
MODEL = Transformer(gpt2_tiny(dropout=0.0, scan_layers=True))


def drawn(seed):
    leaves, structure = jax.tree.flatten(abstract_params(MODEL.config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


@pytest.mark.variants(1)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_step_sees_what_generation_gives(share):
    """Greedy text of the adapted model, not of its frozen base; or the data's own batch."""
    base = drawn(0)
    ranks = ranks_by_path(base, [("mlp/up/kernel", 2)])
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, init_adapters(jax.random.key(1), base, ranks))
    up = {**base["blocks"]["mlp"]["up"], **adapters["blocks"]["mlp"]["up"]}
    blocks = {**base["blocks"], "mlp": {**base["blocks"]["mlp"], "up": up}}
    whole = attach({**base, "blocks": blocks}, lambda rank: 1.0)
    lora = WeightTransform("lora", lambda weights, context: attach(weights, lambda rank: 1.0))
    settings = OnPolicy(share, 3, Sampling(temperature=0))
    around = jax.jit(writing(lambda s, f, batch: (s, batch), MODEL, (lora,), settings))
    tokens = jax.random.randint(jax.random.key(2), (4, 8), 0, 64)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": jnp.ones((4, 8))}
    said = generate(
        MODEL,
        whole,
        tokens[:, :3].tolist(),
        key=jax.random.key(0),
        max_new_tokens=5,
        sampling=Sampling(0.0),
        slots=8,
    ).tokens
    kinds = set()
    for step in range(6):
        state = State(jnp.int32(step), adapters, (), jax.random.key(0), {})
        _, seen = around(state, {"params": base}, batch)
        own = not np.array_equal(seen["tokens"], tokens)
        kinds.add(own)
        expected = said if own else tokens
        np.testing.assert_array_equal(seen["tokens"], expected)
        counted = [0, 0, 1, 1, 1, 1, 1, 0] if own else [1] * 8
        assert seen["weights"].tolist() == [counted] * 4
        np.testing.assert_array_equal(seen["targets"][:, :-1], expected[:, 1:])
    assert kinds == ({True} if share == 1 else {True, False})


def settings_of(folder, *methods, steps=4):
    return Settings(
        phases=(Phase(steps, MODEL.config, batch_size=4, sequence_length=16),),
        data=(str(folder / "text.txt"),),
        tokenizer="bytes",
        optimizer=AdamW(learning_rate=1e-2),
        schedule=Linear(),
        methods=methods,
    )


def test_a_run_learns_resumes_and_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    execute(settings_of(tmp_path), tmp_path / "teacher", QUIET)
    method = OnPolicyDistil(str(tmp_path / "teacher"), share=0.6, prompt_length=4)
    settings = settings_of(tmp_path, method)
    whole = execute(settings, tmp_path / "run", QUIET)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "result.json").unlink()
    halves = execute(settings, tmp_path / "run", QUIET)
    jax.tree.map(np.testing.assert_array_equal, halves.state.params, whole.state.params)
    assert open_run(tmp_path / "run").step == 4
    long = settings_of(tmp_path, OnPolicyDistil(str(tmp_path / "teacher"), prompt_length=16))
    with pytest.raises(ValueError, match="leaves nothing of the 16"):
        execute(long, tmp_path / "long", QUIET)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="share is 2"):
        OnPolicyDistil(share=2.0)
    with pytest.raises(ValueError, match="choose one of"):
        OnPolicyDistil(divergence="sideways")
