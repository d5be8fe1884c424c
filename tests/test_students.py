"""Students from teachers: which layers, what they compute, and that they share no buffer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.distillation.students import (
    distilgpt2_style,
    minitron_style,
    spread_layers,
    student_from_layers,
    without_late_layers,
)
from compress.pruning.structured_importance import by_magnitude
from model.flops import abstract_params
from model.presets import distilgpt2, gpt2, gpt2_tiny, llama_tiny
from model.transformer import Transformer
from tests.compiled import logits_of

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


def params_of(config):
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def test_it_computes_what_the_teacher_would_without_the_other_layers(strict):
    config = llama_tiny(layers=4, window=(2, 3, 4, 5), scan_layers=True)
    params = params_of(config)
    small, student = student_from_layers(config, params, (1, 2))
    assert small == dataclasses.replace(config, layers=2, window=(3, 4))
    # A block whose output projections are zero adds nothing to the stream.
    silent = jax.tree.map(jnp.copy, params)
    for part, name in (("attention", "o"), ("mlp", "down")):
        kernel = silent["blocks"][part][name]["kernel"]
        silent["blocks"][part][name]["kernel"] = kernel.at[jnp.array([0, 3])].set(0)
    np.testing.assert_allclose(
        logits_of(Transformer(small), student, TOKENS),
        logits_of(Transformer(config), silent, TOKENS),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_teacher_outlives_a_student_whose_buffers_are_given_away(strict):
    config = gpt2_tiny()
    params = params_of(config)
    for student in (
        student_from_layers(config, params, (0, 1))[1],
        distilgpt2_style(config, params)[1],
    ):
        before = jax.device_get(params)
        theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
        assert not theirs & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(student)}
        jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(student)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)
        )


def test_which_layers():
    assert spread_layers(12, 6) == (0, 2, 4, 7, 9, 11)
    assert spread_layers(5, 5) == (0, 1, 2, 3, 4)
    assert spread_layers(7, 2) == (0, 6)
    assert spread_layers(7, 1) == (0,)
    assert without_late_layers(32, 16) == (*range(15), 31)
    assert without_late_layers(4, 4) == (0, 1, 2, 3)
    assert without_late_layers(4, 1) == (3,)
    for choose in (spread_layers, without_late_layers):
        for layers in (0, 5):
            with pytest.raises(ValueError, match=f"4 layers cannot give {layers}"):
                choose(4, layers)


def test_distilgpt2_style_has_the_shape_of_distilgpt2():
    abstract = jax.eval_shape(lambda p: distilgpt2_style(gpt2(), p)[1], abstract_params(gpt2()))
    assert abstract == abstract_params(distilgpt2())
    with pytest.raises(ValueError, match="one layer has no half"):
        distilgpt2_style(gpt2_tiny(layers=1), params_of(gpt2_tiny(layers=1)))


@pytest.mark.slow
def test_minitron_style_cuts_every_part(strict):
    config = gpt2_tiny(layers=4)
    params = params_of(config)
    importance = {
        part: by_magnitude(config, params, part) for part in ("neurons", "groups", "width")
    }
    keep = {"neurons": 40, "groups": 2, "width": 24, "layers": 2}
    small, student = minitron_style(config, params, importance, keep)
    assert (small.ffn_width, small.heads, small.width, small.layers) == (40, 2, 24, 2)
    assert jax.eval_shape(lambda: student) == abstract_params(small)
    assert jnp.isfinite(logits_of(Transformer(small), student, TOKENS)).all()
    # The layers that stay are the first and the last, with their own most important neurons.
    narrow = minitron_style(config, params, importance, {"neurons": 40})[1]
    shallow = minitron_style(config, params, importance, {"neurons": 40, "layers": 2})[1]
    for a, b in zip(
        jax.tree.leaves(narrow["blocks"]), jax.tree.leaves(shallow["blocks"]), strict=True
    ):
        assert np.array_equal(a[jnp.array([0, 3])], b)


def test_bad_input():
    config = gpt2_tiny(layers=4)
    params = params_of(config)
    with pytest.raises(ValueError, match="layers keep their order"):
        student_from_layers(config, params, (2, 0))
    with pytest.raises(ValueError, match=r"cannot keep some of .'heads'"):
        minitron_style(config, params, {}, {"heads": 2})
    with pytest.raises(ValueError, match="no importance is given of neurons"):
        minitron_style(config, params, {}, {"neurons": 2, "layers": 2})
