"""Slips of who imports the modules: refused in a sentence, where they would change a result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.export.native import save_native
from compress.lora import attach, init_adapters, merged
from compress.pruning.mask_trees import block_kernels, targets_of
from compress.quantization.fake import fake_quantization
from model.build import build_model
from model.check import MODEL_PARTS, check_params
from model.flops import abstract_params
from model.generate import generate
from model.presets import PRESETS, encoder_decoder_tiny, gpt2_tiny, preset
from model.transformer import Transformer
from parallel.vocabulary import pad_vocabulary
from tests.compiled import initial
from train.checkpoints import Checkpoints
from train.losses import cross_entropy
from train.optimizers import AdamW, build
from train.plugs import LossTerm, WeightTransform, merge
from train.schedules import Cosine
from train.step import init_state, make_evaluation_step, make_train_step

CONFIG = gpt2_tiny(dropout=0.0)
MODEL = Transformer(CONFIG)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
PARAMS = initial(MODEL, jax.random.key(0), TOKENS)
BATCH = {"tokens": TOKENS, "targets": TOKENS + 1, "weights": jnp.ones((2, 8))}
TX = optax.sgd(0.1)


def changed(**fields):
    return Transformer(dataclasses.replace(CONFIG, **fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": 3}, r"blocks are not .*attention/k/bias \[2, 32\] instead of \[3, 32\]"),
        ({"layers": 1}, r"instead of \[1, 32\]"),
        ({"biases": False}, "hold what such a model does not have: attention/k/bias"),
        ({"ffn_width": 64}, r"mlp/down/kernel \[2, 128, 32\] instead of \[2, 64, 32\]"),
        ({"vocabulary_size": 65}, r"embedding of shape \[64, 32\] where this config has \[65, 32"),
        ({"max_length": 16}, "position_embedding/embedding of shape"),
        ({"tied_head": False}, "no head/kernel"),
        ({"qk_norm": True}, "lack .*q_norm"),
    ],
)
def test_parameters_of_another_config_do_not_run(fields, says):
    other = changed(**fields)
    with pytest.raises(ValueError, match=says):
        other.apply({"params": PARAMS}, TOKENS)
    with pytest.raises(ValueError, match=says):
        generate(other, PARAMS, [[1, 2]], key=jax.random.key(0), max_new_tokens=1)
    with pytest.raises(ValueError, match="not those of the config"):
        check_params(other.config, PARAMS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_all_models_are_known(name):
    config = preset(name)
    params = abstract_params(config)
    assert set(params) <= set(MODEL_PARTS)
    check_params(config, {**params, "prompt": {"vectors": jnp.ones((2, 4))}})


def test_a_head_beside_a_tied_one_is_refused():
    params = {**PARAMS, "head": {"kernel": jnp.ones((32, 64))}}
    with pytest.raises(ValueError, match="set tied_head=False"):
        MODEL.apply({"params": params}, TOKENS)
    changed(tied_head=False).apply({"params": params}, TOKENS)


def test_what_stands_for_no_token_may_follow():
    padded = pad_vocabulary(PARAMS, 80)
    logits = MODEL.apply({"params": padded}, TOKENS)
    np.testing.assert_array_equal(logits, MODEL.apply({"params": PARAMS}, TOKENS))


def test_both_stacks_of_an_encoder_decoder_are_looked_at():
    config = encoder_decoder_tiny()

    params = initial(build_model(config), jax.random.key(0), TOKENS)
    more = dataclasses.replace(config, encoder_layers=config.encoder_layers + 1)
    with pytest.raises(ValueError, match="under encoder/blocks"):
        build_model(more).apply({"params": params}, TOKENS)


@pytest.mark.parametrize(
    ("params", "prompts", "says"),
    [
        ({"params": PARAMS}, [[1]], r"give variables\['params'\]"),
        (PARAMS, [1, 2], "a row of token ids"),
        (PARAMS, [[1.0, 2.0]], "a row of token ids"),
    ],
)
def test_generate_says_what_it_takes(params, prompts, says):
    with pytest.raises(ValueError, match=says):
        generate(MODEL, params, prompts, key=jax.random.key(0), max_new_tokens=1)


def trained(terms=None, transforms=(), of_state=(), batch=BATCH, **fields):
    state = init_state(jax.random.key(0), PARAMS, TX, of_state)
    step = make_train_step(MODEL, terms or [cross_entropy()], TX, transforms=transforms, **fields)
    return step(state, {}, batch)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({**BATCH, "weights": jnp.ones(2)}, r"weights are float32\[2\]"),
        ({**BATCH, "targets": jnp.ones((2, 8, 64))}, r"targets are float32\[2, 8, 64\]"),
        ({**BATCH, "targets": jnp.ones((2, 8))}, "of an integer type"),
        ({"tokens": TOKENS, "targets": TOKENS}, "the batch has no weights, but tokens, targets"),
        ({"tokens": TOKENS, "labels": TOKENS, "weights": BATCH["weights"]}, "needs targets"),
    ],
)
def test_a_batch_that_is_laid_out_otherwise(batch, says):
    with pytest.raises(ValueError, match=says):
        trained(batch=batch)
    state = init_state(jax.random.key(0), PARAMS, TX)
    with pytest.raises(ValueError, match=says):
        make_evaluation_step(MODEL, [cross_entropy()])(state, {}, batch)


def test_a_target_outside_of_the_vocabulary_trains_nothing():
    outside = {**BATCH, "targets": BATCH["targets"].at[0].set(-100)}
    _, metrics = trained(batch=outside)
    assert bool(metrics["skipped"])
    weights = BATCH["weights"].at[0].set(0.0)
    there, said = trained(batch={**outside, "weights": weights})
    plain, _ = trained(batch={**BATCH, "weights": weights})
    assert not bool(said["skipped"])
    jax.tree.map(np.testing.assert_array_equal, there.params, plain.params)


TWICE = WeightTransform("twice", lambda weights, context: weights)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"transforms": [TWICE]}, "carries gradient, nonfinite, and the plugs .* twice"),
        ({"of_state": [TWICE]}, "carries gradient, nonfinite, twice, and the plugs"),
        ({"transforms": [lambda w, c: w]}, "no weight transform"),
        ({"terms": [cross_entropy]}, "terms, such as cross_entropy()"),
        ({"terms": [LossTerm("tokens", cross_entropy().total)]}, "a term is called 'tokens'"),
        ({"micro_batches": 0}, "at least one part"),
    ],
)
def test_plugs_of_a_step_and_of_its_state(fields, says):
    with pytest.raises(ValueError, match=says):
        trained(**fields)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "says"),
    [
        ("adamw", Cosine(), "give settings such as AdamW()"),
        (AdamW, Cosine(), "give settings such as AdamW()"),
        (AdamW(), "cosine", "give settings of train.schedules"),
        (AdamW(), Cosine, "give settings of train.schedules"),
    ],
)
def test_settings_and_what_is_built_of_them(optimizer, schedule, says):
    with pytest.raises(ValueError, match=says):
        build(optimizer, schedule, 10, PARAMS)


def test_settings_are_no_optimizer():
    with pytest.raises(ValueError, match=r"which train.optimizers.build\s+makes of settings"):
        make_train_step(MODEL, [cross_entropy()], AdamW())
    with pytest.raises(ValueError, match="an Optax transformation"):
        init_state(jax.random.key(0), PARAMS, AdamW())


def test_a_leaf_that_trains_and_is_frozen_is_named_in_full():
    with pytest.raises(ValueError, match="'head/kernel' is among"):
        merge({"head": {"kernel": 1}}, {"head": {"kernel": 2}})


def adapted():
    ranks = {"blocks/attention/q/kernel": 2}
    return init_adapters(jax.random.key(1), PARAMS, ranks)


def test_factors_that_belong_to_nothing_are_not_passed_over():
    loose = merge(PARAMS, adapted())
    with pytest.raises(ValueError, match="attach"):
        merged(loose)
    with pytest.raises(ValueError, match="does not have: attention/q/lora/kernel/a"):
        MODEL.apply({"params": loose}, TOKENS)
    whole = merged(attach(loose, lambda rank: 1.0))
    check_params(CONFIG, whole)


@pytest.mark.parametrize("attached", [False, True])
def test_factors_are_neither_rounded_nor_pruned(attached):
    weights = merge(PARAMS, adapted())
    if attached:
        weights = attach(weights, lambda rank: 1.0)
    rounded = fake_quantization([("blocks/.*/kernel", "int4")])
    with pytest.raises(ValueError, match="in the form 'merged'"):
        rounded(weights, None)
    rounded(attach(merge(PARAMS, adapted()), lambda rank: 1.0, "merged"), None)
    with pytest.raises(ValueError, match="a factor of an adapted matrix"):
        targets_of(block_kernels(0.5), weights)


def test_a_checkpoint_of_an_array_of_a_step(tmp_path):
    state = init_state(jax.random.key(0), PARAMS, TX)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state.step + 3, state, {}, wait=True)
        assert checkpoints.steps() == [3]
        with pytest.raises(ValueError, match="its entry 'loss' is not"):
            checkpoints.save(4, state, {"loss": jnp.float32(1)})


def test_a_folder_is_not_written_for_another_config(tmp_path):
    with pytest.raises(ValueError, match="not those of the config"):
        save_native(tmp_path / "model", changed(layers=3).config, PARAMS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["kv_heads", "head_width", "ffn_width"])
def test_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1, or None"):
        changed(**{name: 0})
