"""Classifiers of transformers: in and out, what is refused, the same scores, runs of them."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import huggingface
from model.heads import pool, scores
from model.huggingface_classifier import is_classifier, load_classifier, save_classifier
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer, features
from tests.huggingface_cases import NANOCHAT, assert_same, drawn, reconfigure, rewrite

LABELS = ("bad", "good", "odd")
CONFIGS = {
    "gpt2": gpt2_tiny(),
    "llama": llama_tiny(),
    "gpt2 untied": gpt2_tiny(tied_head=False),
    "qwen3": llama_tiny(qk_norm=True),
}


def with_score(config, classes=3):
    kernel = np.random.default_rng(5).normal(0, 0.3, (config.width, classes))
    return {**drawn(config), "score": {"kernel": jnp.asarray(kernel, jnp.float32)}}


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_goes_out_and_comes_back(tmp_path, name):
    config = CONFIGS[name]
    params = with_score(config)
    save_classifier(tmp_path / "out", config, params, LABELS, pad_token=7)
    found = load_classifier(tmp_path / "out")
    assert_same({k: v for k, v in params.items() if k != "head"}, found.params)
    assert (found.labels, found.pad_token, found.config.tied_head) == (LABELS, 7, True)
    assert is_classifier(tmp_path / "out")
    assert not is_classifier(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    config = gpt2_tiny()
    params = with_score(config)
    with pytest.raises(ValueError, match="of 3 classes was given the labels bad, good"):
        save_classifier(tmp_path / "a", config, params, LABELS[:2], pad_token=None)
    with pytest.raises(ValueError, match="of None classes"):
        save_classifier(tmp_path / "a", config, drawn(config), LABELS, pad_token=None)
    save_classifier(tmp_path / "out", config, params, LABELS, pad_token=None)
    with pytest.raises(ValueError, match="holds a classifier"):
        huggingface.load(tmp_path / "out")
    reconfigure(tmp_path / "out", id2label={"0": "bad", "1": "good"})
    with pytest.raises(ValueError, match=r"score.weight \[3, 32\] instead of \[2, 32\]"):
        load_classifier(tmp_path / "out")
    reconfigure(tmp_path / "out", id2label={"1": "bad", "2": "good"})
    with pytest.raises(ValueError, match="number the labels from 0"):
        load_classifier(tmp_path / "out")
    reconfigure(tmp_path / "out", id2label=None, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="exclude each other"):
        load_classifier(tmp_path / "out")
    reconfigure(tmp_path / "out", id2label=dict(enumerate(LABELS)), problem_type=None)
    rewrite(tmp_path / "out", lambda t: {k: v for k, v in t.items() if k != "score.weight"})
    with pytest.raises(ValueError, match=r"lacks score.weight"):
        load_classifier(tmp_path / "out")


def ours(config, params, rows):
    length = max(map(len, rows))
    tokens = jnp.asarray([row + [0] * (length - len(row)) for row in rows])
    out = features(Transformer(config), params, tokens)
    last_BD = pool(out.final, jnp.asarray([len(row) for row in rows]), "last")
    return np.asarray(scores(params, last_BD))


def test_a_kind_without_classifiers_in_transformers_is_refused(tmp_path):
    config = modern_tiny(**NANOCHAT)
    with pytest.raises(ValueError, match="no classifier of the kind nanochat"):
        save_classifier(tmp_path / "x", config, with_score(config), LABELS, pad_token=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.hf
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_scores_are_those_of_transformers(tmp_path, name):
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    transformers.utils.logging.set_verbosity_error()
    config = CONFIGS[name]
    params, pad = with_score(config), 7
    rows = [[1, 2, 3, 4, 5], [6, 5], [9, 7, 8]]  # padding inside a row is no end
    padded = torch.tensor([row + [pad] * (5 - len(row)) for row in rows])
    save_classifier(tmp_path / "ours", config, params, LABELS, pad_token=pad)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert model.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        theirs = model.eval()(padded).logits.numpy()
    np.testing.assert_allclose(ours(config, params, rows), theirs, atol=1e-5)
    assert np.abs(ours(config, params, [row[:-1] for row in rows]) - theirs).max() > 1e-2
    # And one that transformers made.
    model.save_pretrained(tmp_path / "theirs")
    found = load_classifier(tmp_path / "theirs")
    assert found.labels == LABELS
    np.testing.assert_allclose(ours(found.config, found.params, rows), theirs, atol=1e-5)


def test_a_folder_becomes_a_run_with_its_task_and_a_folder_again(tmp_path):
    from experiments.convert import from_huggingface, to_huggingface
    from experiments.runs.run import open_run

    config = gpt2_tiny(vocabulary_size=257)
    params = with_score(config)
    save_classifier(tmp_path / "hf", config, params, LABELS, pad_token=256)
    lines = from_huggingface(tmp_path / "hf", tmp_path / "run", "bytes")
    assert any("classification: bad, good, odd" in line for line in lines)
    run = open_run(tmp_path / "run")
    assert run.settings.task.labels == LABELS
    assert_same(params, run.params)
    to_huggingface(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pad_token_id"] == 256
    assert_same(load_classifier(tmp_path / "again").params, jax.tree.map(jnp.asarray, params))
