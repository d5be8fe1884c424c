"""Programs for a GPU, seen in what is lowered for CUDA on a machine without one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import linear
from model.attention import Visibility, dot_product_attention, form_for, keeps_from
from model.dropout import Dropout
from model.linear import gpu_forms, take
from model.lookup import GRADIENTS, lookup
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context

CUDNN = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
ROWS = jnp.zeros((2,), jnp.int32)


@pytest.fixture
def gpu(monkeypatch):
    """JAX believes that it has an H100; what it lowers for one cannot be run here."""
    known = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(linear, "_cuda_version", lambda: (9, 0))
    monkeypatch.setattr(known + "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(known + "check_compute_capability", lambda least: True)
    monkeypatch.setattr(known + "is_cuda_compute_capability_equal", lambda one: one == "9.0")


def arrays(T=64, K=16, dtype=jnp.bfloat16, kv_heads=2):
    shapes = ((2, T, 4, K), (2, T, kv_heads, K), (2, T, kv_heads, K))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def attention_text(operands, visibility=None, dropout=None, platform="cuda", **given):
    visibility = Visibility() if visibility is None else visibility

    def total(q, k, v):
        out = dot_product_attention(q, k, v, visibility, dropout, **given)
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    return gradient.trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    return [name for name in re.findall(r'custom_call @"?([\w$]+)', text) if "cudnn" in name]


@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=7)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_gpu_attends_by_cudnn(gpu, visibility, kv_heads):
    text = attention_text(arrays(kv_heads=kv_heads), visibility)
    assert calls(text) == CUDNN
    assert "dot_general" not in text
    window = re.search(r'"?sliding_window_length"?\s*:\s*(\d+)', text.replace("\\22", '"'))
    assert (0 if window is None else int(window[1])) == (visibility.window or 0)


CANNOT = {
    "documents": ({}, {"visibility": Visibility(segments=jnp.zeros((2, 64), jnp.int32))}),
    "a cache": ({}, {"visibility": Visibility(first=ROWS)}),
    "a prefix": ({}, {"visibility": Visibility(prefix=ROWS)}),
    "dropout": ({}, {"dropout": Dropout(0.5, jax.random.key(0))}),
    "float32": ({"dtype": jnp.float32}, {}),
    "heads of width": ({"K": 136}, {}),
    "no multiple of 8": ({"K": 12}, {}),
    "odd": ({"T": 63}, {}),
    "by layer": ({}, {"visibility": Visibility(window=jnp.int32(5))}),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cudnn_cannot_do_is_done_plainly_and_asking_for_it_is_an_error(gpu, what):
    shape, given = CANNOT[what]
    assert calls(attention_text(arrays(**shape), **given)) == []
    with pytest.raises(ValueError, match=what):
        attention_text(arrays(**shape), **given, form="cudnn")


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_programs_for_others_are_plain(platform):
    text = attention_text(arrays(), platform=platform)
    assert text == attention_text(arrays(), platform=platform, form="plain")
    assert not gpu_forms()
    assert not gpu_forms("gpu")  # from elsewhere nobody knows what cuDNN is there
    q = jnp.zeros((1, 2, 1, 8), jnp.bfloat16)
    assert form_for(q, q, Visibility(), None, "tpu") == "plain"
    assert keeps_from("plain", q, q, Visibility(first=ROWS), None) is None


def test_a_mesh_that_is_elsewhere_has_no_cudnn(gpu):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):  # of a CPU
        assert not gpu_forms()
    assert gpu_forms()
    assert gpu_forms("cuda")
    assert not gpu_forms("cpu")


def gradient_text(**changes):
    """The gradient of a model's loss in bfloat16, lowered for CUDA."""
    config = gpt2_tiny(dtype="bfloat16", dropout=0.0, width=64, **changes)
    model, terms = Transformer(config), [cross_entropy()]
    tokens = jnp.zeros((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 16))}
    context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(terms, batch))
    gradient = jax.grad(loss_function(model, terms), has_aux=True)
    traced = jax.jit(gradient).trace(params, batch, context)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("scan", [False, True])
def test_no_product_of_a_step_in_bfloat16_has_float32_operands(gpu, scan):
    from experiments.bench.kernels import float32_products

    text = gradient_text(scan_layers=scan)
    assert set(calls(text)) == set(CUDNN)
    assert text.count("dot_general") > 10
    assert float32_products(text) == []


def test_the_gradient_of_the_embedding_is_guarded_on_one_gpu(gpu):
    """Equal tokens are summed by a product before any is added to the table."""
    assert "stablehlo.sort" in gradient_text()
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "stablehlo.sort" not in gradient_text()


def test_elsewhere_it_is_that_of_jax():
    assert "stablehlo.sort" not in gradient_text()


@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("tokens", [1, 128, 500])
def test_every_gradient_of_a_lookup_sums_the_rows_of_equal_tokens(strict, form, tokens):
    draw = np.random.default_rng(tokens)
    ids = jnp.asarray(np.minimum(draw.zipf(1.3, (tokens,)) - 1, 59), jnp.int32)
    dy = jax.random.normal(jax.random.key(0), (tokens, 8))
    want = np.zeros((60, 8))
    np.add.at(want, np.asarray(ids), np.asarray(dy, np.float64))
    table = jax.random.normal(jax.random.key(1), (60, 8))

    def total(table):
        return (lookup(table, ids, jnp.float32, form) * dy).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(table), want, atol=1e-5)
    np.testing.assert_array_equal(lookup(table, ids, jnp.float32, form), table[ids])


@pytest.mark.parametrize("form", GRADIENTS)
def test_it_has_the_type_of_the_table_and_leaves_out_what_is_not_in_it(form):
    ids = jnp.array([[1, 1], [7, 2]])

    def total(table):
        return jnp.nan_to_num(take(table, ids, jnp.bfloat16, form)).astype(jnp.float32).sum()

    found = jax.grad(total)(jnp.ones((4, 8), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert found[:, 0].tolist() == [0, 2, 1, 0]


def test_the_form_of_a_model_can_be_given(gpu):
    plain = functools.partial(dot_product_attention, form="plain")
    tokens = jnp.zeros((2, 16), jnp.int32)

    def text(**parts):
        model = Transformer(gpt2_tiny(dtype="bfloat16", dropout=0.0), **parts)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        lowered = jax.jit(model.apply).trace(params, tokens).lower(lowering_platforms=("cuda",))
        return calls(lowered.as_text())

    assert len(text()) == 2
    assert text(attention=plain) == []


def test_a_gpu_keeps_the_input_of_an_activation_alone(gpu, monkeypatch):
    """Its tanh is there twice, once in either pass; elsewhere the first one is kept."""
    assert gradient_text().count("stablehlo.tanh") == 2 * 2  # of two layers
    monkeypatch.setattr(linear, "_cuda_version", lambda: (0,))
    assert gradient_text().count("stablehlo.tanh") == 2
