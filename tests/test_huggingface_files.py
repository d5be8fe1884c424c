"""Folders as the Hub has them, and as they should not be."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import huggingface
from model.huggingface_config import write_config
from model.presets import gpt2_tiny, llama_tiny
from tests.huggingface_cases import assert_same, reconfigure, rewrite, save_drawn


@pytest.fixture
def saved(tmp_path):
    return functools.partial(save_drawn, tmp_path / "saved")


@pytest.mark.parametrize("config", [gpt2_tiny(), llama_tiny()], ids=["gpt2", "llama"])
def test_keys_without_prefix_and_stray_buffers(config, saved):
    folder, params = saved(config)
    layout = write_config(config)[0]
    rewrite(folder, lambda t: {k.removeprefix(layout.prefix): v for k, v in t.items()})
    assert_same(huggingface.load(folder)[1], params)
    stray = {
        "gpt2": ("h.1.attn.bias", "transformer.h.0.attn.masked_bias"),
        "llama": ("layers.0.self_attn.rotary_emb.inv_freq",),
    }[layout.model_type]
    rewrite(folder, lambda t: t | {key: np.ones((1, 1, 4, 4), bool) for key in stray})
    assert_same(huggingface.load(folder)[1], params)
    # A key that merely ends alike is not taken for one of them.
    rewrite(folder, lambda t: t | {"h.x.attn.bias": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"no place for: h\.x\.attn\.bias"):
        huggingface.load(folder)


def test_both_keys_with_and_without_prefix_are_refused(saved):
    folder, _ = saved(gpt2_tiny())
    rewrite(folder, lambda t: t | {"ln_f.bias": t["transformer.ln_f.bias"]})
    with pytest.raises(ValueError, match=r"holds both .*ln_f\.bias and .*ln_f\.bias"):
        huggingface.load(folder)


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16])
def test_tied_head_that_is_stored_must_be_the_embedding(saved, stored, monkeypatch):
    monkeypatch.setattr(huggingface, "_COMPARED_ROWS", 24)  # of 64: whole parts and a rest
    folder, _ = saved(gpt2_tiny())
    wte = "transformer.wte.weight"
    rewrite(folder, lambda t: {k: v.astype(stored) for k, v in t.items()})
    expected = huggingface.load(folder)
    rewrite(folder, lambda t: t | {"lm_head.weight": t[wte]})
    assert_same(huggingface.load(folder)[1], expected[1])
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != wte})  # the head alone
    assert_same(huggingface.load(folder)[1], expected[1])
    last = np.arange(64)[:, None] == 63
    rewrite(folder, lambda t: t | {wte: np.where(last, stored(2), t["lm_head.weight"])})
    with pytest.raises(ValueError, match=r"lm_head\.weight and wte\.weight differ"):
        huggingface.load(folder)
    reconfigure(folder, tie_word_embeddings=False)
    config, params = huggingface.load(folder)
    assert not config.tied_head
    table = params["token_embedding"]["embedding"]
    np.testing.assert_array_equal(params["head"]["kernel"].T[:63], table[:63])
    np.testing.assert_array_equal(table[63], 2)


@pytest.fixture
def sharded(saved):
    folder, _ = saved(gpt2_tiny(), max_shard_bytes=30_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def change(**entries):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | entries}))
        return folder

    return change


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "pytorch_model.bin",
        "x.safetensors\n",
        3,
    ],
)
def test_index_may_only_name_files_beside_it(sharded, name):
    with pytest.raises(ValueError, match=f"places {WTE} in .*; only the plain name"):
        huggingface.load(sharded(**{WTE: name}))


def test_index_must_be_true(sharded):
    with pytest.raises(ValueError, match=r"lacks files that .* names: gone\.safetensors"):
        huggingface.load(sharded(**{WTE: "gone.safetensors"}))
    with pytest.raises(ValueError, match=r"00001.*lacks what .* says it holds: more"):
        huggingface.load(sharded(more=sharded().glob("*00001*").__next__().name))
    folder = sharded()
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=r"00002.*that another file holds too"):
        huggingface.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("config", "entries", "words"),
    [
        (gpt2_tiny(), {"n_layer": 3}, r"lacks h\.2\.ln_1\.weight, .* and 4 more"),
        (gpt2_tiny(), {"n_layer": 1}, r"no place for: h\.1\.attn\.c_attn\.bias, .* and 4 more"),
        (
            gpt2_tiny(),
            {"n_inner": 96},
            r"c_fc\.weight \[32, 128\] instead of \[32, 96\]",
        ),
        (gpt2_tiny(), {"vocab_size": 65}, r"wte\.weight \[64, 32\] instead of \[65, 32\]"),
        (gpt2_tiny(), {"tie_word_embeddings": False}, r"it lacks lm_head\.weight$"),
        (
            llama_tiny(),
            {"attention_bias": True, "mlp_bias": True},
            r"lacks layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            llama_tiny(),
            {"num_key_value_heads": None},
            r"k_proj\.weight \[16, 32\] instead of",
        ),
        (llama_tiny(), {"head_dim": 4}, r"q_proj\.weight \[32, 32\] instead of \[16, 32\]"),
    ],
)
def test_files_that_are_not_what_their_config_says(saved, config, entries, words):
    folder, _ = saved(config)
    reconfigure(folder, **entries)
    with pytest.raises(ValueError, match=words):
        huggingface.load(folder)


def test_what_is_wrong_with_a_config_is_said_with_its_place(saved):
    folder, _ = saved(gpt2_tiny())
    reconfigure(folder, model_type="bert")
    with pytest.raises(ValueError, match=r"saved.config\.json: model_type 'bert' is not supp"):
        huggingface.load(folder)


def test_whole_numbers_are_not_weights(saved):
    folder, _ = saved(gpt2_tiny())
    rewrite(folder, lambda t: t | {WTE: t[WTE].astype(np.int8)})
    with pytest.raises(ValueError, match=r"not floating point: wte\.weight \(I8\)"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"]
)
def test_pickles_are_refused_with_the_way_out(saved, name):
    folder, _ = saved(gpt2_tiny())
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=rf"pickled \({name}\).*never loaded.*save_pretrained"):
            huggingface.load(path)


def test_pickles_beside_safetensors_do_no_harm(saved):
    folder, params = saved(gpt2_tiny())
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same(huggingface.load(folder)[1], params)


def test_folders_that_are_no_models(saved, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        huggingface.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds neither .* there is nothing"):
        huggingface.load(tmp_path)
    folder, _ = saved(gpt2_tiny())
    weights = folder / "model.safetensors"
    with pytest.raises(ValueError, match="is not a folder; give the one that holds"):
        huggingface.load(weights)
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"x" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not an intact"):
            huggingface.load(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        huggingface.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        huggingface.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        huggingface.load(folder)
