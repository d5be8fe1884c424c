"""Products in the form of XLA:CPU, and which programs are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.linear import cpu_forms, linear, real
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context

X = jax.random.normal(jax.random.key(0), (2, 6, 8))
W = jax.random.normal(jax.random.key(1), (8, 5))


def gradients(platform, around=lambda f: f):
    product = around(lambda x, w: linear(x, w, platform))
    return jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1)))(X, W)


@pytest.mark.parametrize("around", ["nothing", "vmap", "remat"])
def test_the_form_for_cpu_has_the_values_and_gradients_of_the_plain_one(strict, around):
    wrap = {
        "nothing": lambda f: f,
        "vmap": lambda f: jax.vmap(f, (0, None)),
        "remat": jax.checkpoint,
    }[around]
    ours, plain = gradients("cpu", wrap), gradients("gpu")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_types_of_16_bits_are_rounded_once(strict, platform, dtype):
    """Outputs and gradients of either form: rounded sums of the operands as they are."""
    x, w, g = (a.astype(dtype) for a in (X, W, jnp.cos(X @ W)))
    y, back = jax.vjp(lambda x, w: linear(x, w, platform), x, w)
    dx, dw = back(g)
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    want = (x @ w, g @ w.T, np.einsum("bti,bto->io", x, g))
    for got, exact in zip((y, dx, dw), want, strict=True):
        assert got.dtype == dtype
        rtol = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=rtol, atol=1e-5)


def test_a_kernel_in_another_type_gets_its_gradient_in_that_type(strict):
    grad = jax.grad(lambda w: linear(X, w, "cpu").sum())(W.astype(jnp.bfloat16))
    assert grad.dtype == jnp.bfloat16
    grad = jax.grad(lambda w: linear(X.astype(jnp.bfloat16), w, "cpu").sum())(W)
    assert grad.dtype == jnp.float32


def test_real_is_the_identity_and_stays_in_the_compiled_program():
    function = jax.jit(lambda x: real(jnp.sin(x)))
    np.testing.assert_array_equal(function(X), jax.jit(jnp.sin)(X))
    assert " conditional(" in str(function.lower(X).compile().as_text())


def step_text(platform):
    """The gradient of a model's loss, lowered for a platform."""
    model, terms = Transformer(gpt2_tiny()), [cross_entropy()]
    tokens = jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 8))}
    context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(terms, batch))
    gradient = jax.grad(loss_function(model, terms), has_aux=True)
    return jax.jit(gradient).trace(params, batch, context).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_are_those_without_forms_for_cpu(monkeypatch, platform):
    backend = {"cuda": "gpu", "tpu": "tpu"}[platform]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    theirs = step_text(platform).as_text()
    for name in ("model.linear.cpu_forms", "model.attention.cpu_forms"):
        monkeypatch.setattr(name, lambda platform=None: False)
    assert theirs == step_text(platform).as_text()
    assert "stablehlo.case" not in theirs


def test_a_cpu_takes_them_unless_it_plays_several_devices(monkeypatch):
    assert not cpu_forms()  # eight devices here
    assert "stablehlo.case" not in step_text("cpu").as_text()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert cpu_forms()
    assert "stablehlo.case" in step_text("cpu").as_text()


def test_a_mesh_that_is_elsewhere_is_given_its_own_forms(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(one):
        assert cpu_forms()
    elsewhere = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(elsewhere):
        assert not cpu_forms()
