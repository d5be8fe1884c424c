"""Terms of distillation: what they weigh, and what of a prefix they compare."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.methods.distill import Distil
from experiments.methods.distill_terms import over_run, reads, scaled
from experiments.methods.teacher import Teacher
from model.presets import gpt2_tiny
from model.transformer import Transformer
from tests.test_distill_method import (
    EVERYTHING,
    STUDENT,
    batch_of,
    context_of,
    params_of,
    terms_and_frozen,
)
from train.losses import loss_function
from train.plugs import Context, LossTerm


def test_the_teacher_reads_a_prefix_as_the_student_does():
    """A student with its teacher's weights has nothing to learn, whatever sees what."""
    method = Distil(soft=(1.0,), hard=(0.0,), teacher="x", resolved=Teacher(STUDENT, 1, ""))
    terms, frozen = terms_and_frozen(method)
    batch = batch_of() | {"prefix": jnp.array([5, 4, 3, 2], jnp.int32)}
    loss = loss_function(Transformer(STUDENT), terms)
    found = jax.jit(lambda p: loss(p, batch, context_of(terms, batch, frozen, 0))[0])
    assert float(found(frozen["teacher"])) == pytest.approx(0.0, abs=1e-6)
    assert float(found(params_of(STUDENT, 2))) > 0.01


def test_maps_of_a_prefix_are_not_compared_as_causal_ones():
    method = Distil(soft=(0.0,), attention=(1.0,), teacher="x", resolved=Teacher(STUDENT, 1, ""))
    terms, frozen = terms_and_frozen(method)
    batch = batch_of() | {"prefix": jnp.array([5, 4, 3, 2], jnp.int32)}
    loss = loss_function(Transformer(STUDENT), terms)
    with pytest.raises(ValueError, match="match relations instead"):
        loss(params_of(STUDENT, 2), batch, context_of(terms, batch, frozen, 0))


@pytest.mark.parametrize("name", ["cross_entropy", "classification", "regression", "span"])
def test_what_is_learned_from_the_data_has_the_weight_that_is_asked_for(name):
    term = LossTerm(name, lambda view, batch, context: jnp.float32(0), weight=2.0)
    assert float(scaled(term, lambda step: 0.25).weight(jnp.int32(0))) == 0.5
    other = dataclasses.replace(term, name="z_loss")
    assert scaled(other, lambda step: 0.25) is other


def test_weights_go_through_their_knots():
    weight = over_run((1.0, 0.5, 0.0), 9)
    assert [float(weight(jnp.int32(t))) for t in (0, 2, 4, 8, 20)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert float(over_run((2.0,), 1)(jnp.int32(0))) == 2.0
    # The ramp is over the steps of the run, and a schedule of the term itself is kept.
    terms, _ = terms_and_frozen(dataclasses.replace(EVERYTHING, hard=(1.0, 0.0)), steps=11)
    assert float(terms[0].weight(jnp.int32(5))) == 0.5
    assert [t.name for t in terms][1:] == [
        "distil_logits",
        "distil_hidden",
        "distil_attention",
        "distil_relation",
    ]
    assert len(terms_and_frozen(Distil(teacher="x", resolved=EVERYTHING.resolved))[0]) == 2


def test_a_teacher_that_is_not_there_is_asked_for():
    context = Context(jnp.int32(0), None, {"params": {}}, {}, {})
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32)}
    with pytest.raises(ValueError, match=r"frozen\['teacher'\]; frozen holds params"):
        reads(Transformer(gpt2_tiny()))(batch, context)
