"""Weights in and out: what is written is read back bitwise, and what cannot be held is refused."""

import functools
import json
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from model import huggingface
from model.flops import abstract_params
from model.huggingface_config import write_config
from model.presets import gpt2_tiny, llama_tiny
from tests.huggingface_cases import CONFIGS, assert_same, drawn, reconfigure, save_drawn


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.fixture
def saved(tmp_path):
    return functools.partial(save_drawn, tmp_path / "saved")


def test_what_is_saved_is_loaded_bitwise(config, saved):
    folder, params = saved(config)
    again, loaded = huggingface.load(folder)
    assert again == config
    assert_same(loaded, params)


def test_tables_cover_every_parameter_once(config):
    layout, _ = write_config(config)
    paths = [path for tensor in layout.tensors for path in tensor.paths]
    assert len(paths) == len(set(paths))
    assert set(flax.traverse_util.flatten_dict(abstract_params(config), sep="/")) <= set(paths)


def test_gpt2_file_is_as_the_format_says(saved):
    folder, params = saved(gpt2_tiny())
    tensors = load_file(folder / "model.safetensors")
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    for i, name in enumerate("qkv"):  # [in, q | k | v]
        np.testing.assert_array_equal(fused[:, 32 * i :][:, :32], attention[name]["kernel"][1])
    np.testing.assert_array_equal(
        tensors["transformer.h.1.mlp.c_proj.weight"], mlp["down"]["kernel"][1]
    )
    np.testing.assert_array_equal(
        tensors["transformer.wpe.weight"], params["position_embedding"]["embedding"]
    )
    assert len(tensors) == 4 + 12 * 2  # two tables, the last norm, twelve a layer, no head
    fields = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_inner": 128,
        "n_positions": 32,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "eos_token_id": None,
        "dtype": "float32",
    }
    assert {name: fields[name] for name in expected} == expected


def test_llama_file_is_as_the_format_says(saved):
    folder, params = saved(llama_tiny(rotary_base=500.0), extra={"eos_token_id": 7})
    tensors = load_file(folder / "model.safetensors")
    blocks = params["blocks"]
    for theirs, ours in {
        "self_attn.k_proj": blocks["attention"]["k"],
        "self_attn.o_proj": blocks["attention"]["o"],
        "mlp.gate_proj": blocks["mlp"]["gate"],
        "mlp.down_proj": blocks["mlp"]["down"],
    }.items():  # [out, in]
        np.testing.assert_array_equal(
            tensors[f"model.layers.1.{theirs}.weight"], ours["kernel"][1].T
        )
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)
    fields = json.loads((folder / "config.json").read_text())
    expected = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 500.0,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "eos_token_id": 7,
    }
    assert {name: fields[name] for name in expected} == expected


def test_qwen3_file_is_as_the_format_says(saved):
    config = llama_tiny(qk_norm=True, tied_head=True)
    folder, params = saved(config)
    tensors = load_file(folder / "model.safetensors")
    for name in ("q_norm", "k_norm"):
        np.testing.assert_array_equal(
            tensors[f"model.layers.1.self_attn.{name}.weight"],
            params["blocks"]["attention"][name]["scale"][1],
        )
    assert len(tensors) == 2 + 11 * 2
    fields = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_out_and_in(dtype, saved):
    folder, params = saved(gpt2_tiny(), dtype=dtype)
    assert {t.dtype.name for t in load_file(folder / "model.safetensors").values()} == {dtype}
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    config, loaded = huggingface.load(folder)
    assert config.parameter_dtype == "float32"
    assert_same(loaded, jax.tree.map(lambda x: x.astype("float32"), rounded))
    config, loaded = huggingface.load(folder, dtype=dtype)
    assert config.parameter_dtype == dtype
    assert_same(loaded, rounded)


def test_type_of_the_parameters_is_the_default(saved):
    config = llama_tiny(parameter_dtype="bfloat16")
    folder, params = saved(config)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert huggingface.load(folder, dtype="bfloat16")[0] == config
    assert_same(huggingface.load(folder, dtype="bfloat16")[1], params)


def test_values_beyond_float16_are_refused(saved, tmp_path):
    params = drawn(gpt2_tiny())
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(7e4)
    with pytest.raises(ValueError, match=r"ln_f\.weight holds values beyond float16 \(65504\)"):
        huggingface.save(tmp_path / "f16", gpt2_tiny(), params, dtype="float16")
    assert not list(tmp_path.iterdir())
    huggingface.save(tmp_path / "f32", gpt2_tiny(), params)
    with pytest.raises(ValueError, match=r"beyond float16"):
        huggingface.load(tmp_path / "f32", dtype="float16")


def test_shards_hold_at_most_what_was_asked_for(saved):
    config = gpt2_tiny(tied_head=False)
    folder, params = saved(config, max_shard_bytes=30_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in shards]
    assert len(sizes) > 3
    assert max(sizes) <= 30_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {key: path.name for path in shards for key in load_file(path)}
    assert huggingface.load(folder)[0] == config
    assert_same(huggingface.load(folder)[1], params)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(saved):
    folder, params = saved(gpt2_tiny(), max_shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == 4 + 12 * 2
    assert_same(huggingface.load(folder)[1], params)


def test_nothing_is_overwritten_and_nothing_is_left_half(saved, tmp_path, monkeypatch):
    folder, params = saved(gpt2_tiny())
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists already and nothing is overwritten"):
        huggingface.save(folder, gpt2_tiny(), params)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        for name in ("empty", "other"):
            with pytest.raises(OSError, match="No space left"):
                huggingface.save(tmp_path / name, gpt2_tiny(), params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "saved"]
    huggingface.save(tmp_path / "empty", gpt2_tiny(), params)  # an empty folder is free
    huggingface.save(tmp_path / "new" / "deep", gpt2_tiny(), params)
    assert_same(huggingface.load(tmp_path / "new" / "deep")[1], params)
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_dropouts_that_cannot_be_held_are_warned_about(saved, tmp_path):
    folder, params = saved(gpt2_tiny())
    reconfigure(folder, attn_pdrop=0.0)
    with pytest.warns(UserWarning, match=r"resid_pdrop is 0.1 and attn_pdrop is 0.0") as record:
        config, loaded = huggingface.load(folder)
    assert [w.filename for w in record] == [__file__]
    assert config.dropout == 0.1
    assert_same(loaded, params)

    with pytest.warns(UserWarning, match=r"llama cannot hold dropout=0.2.*gets 0.0"):
        huggingface.save(tmp_path / "llama", llama_tiny(dropout=0.2), drawn(llama_tiny()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huggingface.load(tmp_path / "llama")
    reconfigure(tmp_path / "llama", attention_dropout=0.3)
    with pytest.warns(UserWarning, match=r"attention_dropout is 0.3.*0.0 is used"):
        assert huggingface.load(tmp_path / "llama")[0].dropout == 0


def test_types_to_load_as(saved):
    folder, _ = saved(gpt2_tiny())
    with pytest.raises(ValueError, match="'int8' is unknown; choose one of float32, bfloat16"):
        huggingface.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        huggingface.load(folder, dtype="float64")


def test_parameters_must_be_those_of_the_config(tmp_path):
    config = gpt2_tiny()

    def refuse(words, change):
        flat = flax.traverse_util.flatten_dict(drawn(config), sep="/")
        params = flax.traverse_util.unflatten_dict(change(flat), sep="/")
        with pytest.raises(ValueError, match=words):
            huggingface.save(tmp_path / "x", config, params)

    path = "blocks/attention/q/kernel"
    refuse(f"they lack {path}$", lambda p: {k: v for k, v in p.items() if k != path})
    refuse("does not have: head/kernel$", lambda p: p | {"head/kernel": jnp.zeros((32, 64))})
    refuse(
        rf"wrong shapes: {path} \[2, 32, 16\] instead of \[2, 32, 32\]",
        lambda p: p | {path: p[path][..., :16]},
    )
    refuse(rf"{path} \(int8\)", lambda p: p | {path: p[path].astype(jnp.int8)})
    refuse(f"{path} is a tuple: neither", lambda p: p | {path: (p[path], p[path])})
    assert not list(tmp_path.iterdir())


def test_quantized_weights_are_written_as_what_they_stand_for(tmp_path):
    class Halves:
        """Stands for `whole / 2`."""

        def __init__(self, whole):
            self.whole, self.shape = whole, whole.shape

        def dequantize(self):
            return self.whole / 2

    config = llama_tiny()
    params = drawn(config)
    kernel = params["blocks"]["attention"]["k"]["kernel"]
    params["blocks"]["attention"]["k"]["kernel"] = Halves(kernel)
    huggingface.save(tmp_path / "x", config, params, max_shard_bytes=5000)
    params["blocks"]["attention"]["k"]["kernel"] = kernel / 2
    assert_same(huggingface.load(tmp_path / "x")[1], params)


def test_other_arguments(tmp_path):
    config, params = gpt2_tiny(), drawn(gpt2_tiny())
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        huggingface.save(tmp_path / "x", config, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match="'int4' is unknown"):
        huggingface.save(tmp_path / "x", config, params, dtype="int4")
    with pytest.raises(ValueError, match="the config decides dtype, n_layer"):
        huggingface.save(tmp_path / "x", config, params, extra={"n_layer": 3, "dtype": "x"})


def test_our_code_runs_under_strict_promotion(strict, saved):
    folder, params = saved(llama_tiny())
    assert_same(huggingface.load(folder)[1], params)
