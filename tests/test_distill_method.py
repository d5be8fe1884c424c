"""Distillation in the step and as a method: one pass of the teacher, chunks, resume, errors."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from compress.distillation.features import hidden_cosine
from compress.distillation.logits import forward_kl, jensen_shannon
from compress.distillation.maps import attention_kl, relation_kl
from experiments.cli import parse_with_methods
from experiments.methods.distill import Distil
from experiments.methods.table import METHODS, resolve
from experiments.methods.teacher import Teacher
from experiments.pretrain import Pretrain
from experiments.runs.execute import Execution, execute
from experiments.runs.run import open_run
from model.flops import abstract_params
from model.presets import PRESETS, gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer
from train.loop import LoopSettings
from train.losses import counts_of, cross_entropy, loss_function
from train.manifest import read_manifest
from train.methods import Setup
from train.optimizers import OPTIMIZERS, AdamW
from train.plugs import Context, LossTerm, WeightTransform
from train.schedules import SCHEDULES, Linear
from train.settings import Phase, Settings, from_json, to_json

QUIET = Execution(LoopSettings(log_every=1, checkpoint_every=2), progress=False)
# Scanned blocks compile once.
STUDENT = gpt2_tiny(dropout=0.0, scan_layers=True)
TEACHER = llama_tiny(layers=4, width=48, scan_layers=True)
EVERYTHING = Distil(
    teacher="somewhere",
    hard=(0.25,),
    soft=(0.75,),
    hidden=(0.5, 1.5),
    attention=(2.0,),
    relation=(3.0,),
    temperature=(1.0, 3.0),
    divergence="jensen_shannon",
    beta=0.3,
    relation_heads=2,
    resolved=Teacher(TEACHER, 4, "fingerprint"),
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERANDO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def params_of(config, seed):
    """Parameters at a visible scale."""
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def batch_of(segments=False):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 64, (4, 9))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.asarray(draw.random((4, 8)) < 0.7, jnp.float32),
    }
    if segments:
        batch["segments"] = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2]] * 4, jnp.int32)
        batch["positions"] = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4]] * 4, jnp.int32)
    return batch


def terms_and_frozen(method, student=STUDENT, steps=5):
    plugs = method.build(Setup(student, abstract_params(student), steps))
    frozen = {"teacher": params_of(method.resolved.model, 1)}
    if "distil_projection" in plugs.frozen:
        frozen["distil_projection"] = plugs.frozen["distil_projection"].load(None)
    return plugs.terms((cross_entropy(),)), frozen


def context_of(terms, batch, frozen, step):
    return Context(jnp.int32(step), None, frozen, {}, counts_of(terms, batch))


def values(f):
    """(f, nothing more), compiled."""
    return jax.jit(lambda p: (f(p), ()))


def values_and_grads(f):
    return jax.jit(jax.value_and_grad(f))


@pytest.mark.parametrize(
    ("of", "segments", "chunk"),
    [
        (values, False, 5),
        pytest.param(values_and_grads, True, 5, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_sum_of_its_parts(strict, of, segments, chunk):
    """Against the pure functions, called on whole logits of both models."""
    terms, frozen = terms_and_frozen(EVERYTHING)
    params, batch = params_of(STUDENT, 0), batch_of(segments)
    student, teacher = Transformer(STUDENT), Transformer(TEACHER)
    places = [batch.get(name) for name in ("positions", "segments")]

    def read(model, params):
        arguments = (batch["tokens"], *places, None, ("hidden", "attention"))
        out = model.apply({"params": params}, *arguments, method="features")
        logits = model.apply({"params": params}, batch["tokens"], *places)
        return out, logits.reshape(-1, 64)

    def by_hand(params):
        (s, s_NV), (t, t_NV) = read(student, params), read(teacher, frozen["teacher"])
        w, w_N = batch["weights"], batch["weights"].reshape(-1)
        picked = s_NV[jnp.arange(len(w_N)), batch["targets"].reshape(-1)]
        hard = ((jax.nn.logsumexp(s_NV, axis=-1) - picked) * w_N).sum()
        soft = jensen_shannon(0.3)(s_NV, t_NV, w_N, 2.0)
        projection = frozen["distil_projection"]["kernel"]
        hidden, attention, relation = 0, 0, 0
        for one, other in ((1, 2), (2, 4)):
            hidden += hidden_cosine(s.hidden[one], t.hidden[other], w, projection) / 2
            a = jax.tree.map(lambda x, i=one: x[i - 1], s.attention)
            b = jax.tree.map(lambda x, i=other: x[i - 1], t.attention)
            attention += attention_kl(a, b, w, batch.get("segments")) / 2
            relation += relation_kl(a, b, w, batch.get("segments"), heads=2) / 2
        total = 0.25 * hard + 0.75 * soft + 1.0 * hidden + 2 * attention + 3 * relation
        return total / w.sum()

    middle = context_of(terms, batch, frozen, 2)  # of steps 0 to 4: half-way up the ramps
    loss = loss_function(student, terms, chunk=chunk)
    value, grad = of(lambda p: loss(p, batch, middle)[0])(params)
    expected, expected_grad = of(by_hand)(params)
    assert value == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(expected_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def counted(term, calls):
    def prepare(batch, context):
        calls.append(batch["tokens"].shape)
        return term.prepare(batch, context)

    return prepare


def test_the_teacher_reads_a_micro_batch_once_whatever_the_terms_and_chunks():
    terms, frozen = terms_and_frozen(EVERYTHING)
    calls = []
    shared = counted(terms[1], calls)
    assert len({term.prepare for term in terms[1:]}) == 1
    terms = [t if t.prepare is None else dataclasses.replace(t, prepare=shared) for t in terms]
    batch = batch_of()
    loss = loss_function(Transformer(STUDENT), terms, chunk=3)
    params, context = params_of(STUDENT, 0), context_of(terms, batch, frozen, 0)
    program = jax.make_jaxpr(jax.grad(lambda p: loss(p, batch, context)[0]))(params)
    assert calls == [(4, 8)]
    # The [64, 48] embedding of the teacher is looked up once in the whole program.
    lookups = [e for e in every_equation(program.jaxpr) if e.primitive.name == "gather"]
    assert len([e for e in lookups if e.outvars[0].aval.shape == (4, 8, 48)]) == 1


def every_equation(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)


def test_what_is_prepared_must_have_a_name_of_its_own_and_no_gradient():
    def total(view, batch, context):
        return (view.logits.sum(axis=-1) * batch["more"]).sum()

    def term(name):
        prepare = lambda batch, context: {name: context.frozen["scale"] * batch["weights"]}
        return LossTerm("t", total, prepare=prepare)

    model, params, batch = Transformer(STUDENT), params_of(STUDENT, 0), batch_of()

    def value(scale, name="more"):
        loss = loss_function(model, [term(name)], chunk=3)
        context = context_of([term(name)], batch, {"scale": scale}, 0)
        return loss(params, batch, context)[0]

    assert jax.grad(value)(1.0) == 0
    assert value(2.0) == pytest.approx(2 * float(value(1.0)), rel=1e-5)
    with pytest.raises(ValueError, match=r"the batch has \['tokens'\] already"):
        value(1.0, "tokens")


def test_a_student_that_is_its_teacher_is_at_rest(strict):
    same = Distil(
        hard=(0.0,), hidden=(1.0,), attention=(1.0,), relation=(1.0,), teacher="x",
        layers="last", resolved=Teacher(STUDENT, 1, ""),
    )  # fmt: skip
    terms, _ = terms_and_frozen(same)
    params, batch = params_of(STUDENT, 1), batch_of()
    loss = loss_function(Transformer(STUDENT), terms, chunk=7)
    context = context_of(terms, batch, {"teacher": params}, 0)
    of_params = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, context), has_aux=True))
    (value, metrics), grad = of_params(params)
    assert abs(value) < 1e-5
    assert metrics["cross_entropy"] > 1  # counted still, with weight 0
    assert all(jnp.abs(g).max() < 1e-4 for g in jax.tree.leaves(grad))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a trained run, and its settings."""
    folder = tmp_path_factory.mktemp("teacher")
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = modern_tiny(width=48, scan_layers=True)
    settings = Settings(
        phases=(Phase(2, config, batch_size=4, sequence_length=16),),
        data=(str(path),),
        tokenizer="bytes",
        optimizer=AdamW(),
        schedule=Linear(),
    )
    execute(settings, folder / "run", QUIET)
    return folder / "run", settings


@pytest.fixture
def runs(tmp_path, teacher):
    run, settings = teacher
    shutil.copytree(run, tmp_path / "teacher")
    method = Distil(
        teacher=str(tmp_path / "teacher"), hidden=(1.0,), relation=(0.1,), temperature=(1.0, 2.0)
    )
    phase = Phase(4, STUDENT, batch_size=4, sequence_length=16)
    student = dataclasses.replace(
        settings, phases=(phase,), methods=(method,), micro_batches=2, loss_chunk=10
    )
    return tmp_path, student


def test_a_run_learns_from_another_and_resumes_bitwise_without_it(runs):
    folder, settings = runs
    whole = execute(settings, folder / "whole", QUIET)
    rows = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    assert any("distil_logits" in row for row in rows)
    frozen = read_manifest(folder / "whole/frozen")["leaves"]
    assert "teacher/head/kernel" in frozen
    assert "distil_projection/kernel" in frozen
    teacher = open_run(folder / "teacher")
    saved = open_run(folder / "whole").settings.methods[0].resolved
    assert (saved.model, saved.step) == (teacher.model.config, 2)

    shutil.copytree(folder / "whole", folder / "halves")
    shutil.rmtree(folder / "halves/checkpoints/4")
    (folder / "halves/result.json").unlink()
    shutil.rmtree(folder / "teacher")
    halves = execute(settings, folder / "halves", QUIET)  # of unresolved settings
    for a, b in zip(
        jax.tree.leaves(whole.state.params), jax.tree.leaves(halves.state.params), strict=True
    ):
        assert np.array_equal(a, b)
    with pytest.raises(FileNotFoundError, match="is no run"):
        execute(settings, folder / "new", QUIET)


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_trained(runs):
    folder, settings = runs
    other = dataclasses.replace(settings, tokenizer="sentencepiece:300")
    with pytest.raises(ValueError, match="vocabulary of 257 tokens and the student one of 300"):
        execute(other, folder / "other", QUIET)
    assert not (folder / "other/settings.json").exists()
    known = resolve(settings, None, open_run)
    renamed = dataclasses.replace(known.methods[0].resolved, tokenizer="another")
    method = dataclasses.replace(known.methods[0], resolved=renamed)
    with pytest.raises(ValueError, match=r"another tokenizer of the same size.*teacher/tokenizer"):
        execute(dataclasses.replace(settings, methods=(method,)), folder / "other", QUIET)
    setup = Setup(gpt2_tiny(vocabulary_size=100), abstract_params(gpt2_tiny()), 5)
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and the student one of 100"):
        EVERYTHING.build(setup)


def test_settings_are_checked_and_survive_json():
    settings = Settings(methods=(EVERYTHING,))
    assert from_json(json.loads(json.dumps(to_json(settings))), METHODS) == settings
    bad = {
        "soft is": {"soft": (-1.0,)},
        "hidden is": {"hidden": ()},
        "temperature is": {"temperature": (1.0, 0.0)},
        "all weights but that": {"soft": (0.0,)},
        "divergence is 'sideways'": {"divergence": "sideways"},
        "beta is 1": {"divergence": "jensen_shannon", "beta": 1},
        "layers is 'none'": {"layers": "none"},
    }
    for message, fields in bad.items():
        with pytest.raises(ValueError, match=message):
            Distil(**fields)
    with pytest.raises(ValueError, match="needs a teacher"):
        Distil().resolve(None, open_run)
    setup = Setup(STUDENT, abstract_params(STUDENT), 5)
    with pytest.raises(ValueError, match="call `resolve` first"):
        Distil(teacher="x").build(setup)
    eight = Teacher(gpt2_tiny(heads=8), 1, "")
    with pytest.raises(ValueError, match="student has 4 heads and the teacher 8"):
        Distil(teacher="x", attention=(1.0,), resolved=eight).build(setup)
    windowed = Teacher(gpt2_tiny(window=3), 1, "")
    with pytest.raises(ValueError, match="attention under a window"):
        Distil(teacher="x", attention=(1.0,), resolved=windowed).build(setup)
    with pytest.raises(ValueError, match="relation_heads is 5, which does not divide the 32"):
        Distil(teacher="x", relation=(1.0,), relation_heads=5, resolved=eight).build(setup)


def test_a_command_names_a_teacher():
    groups = {
        "model": ("gpt2_tiny", PRESETS),
        "optimizer": ("adam", OPTIMIZERS),
        "schedule": ("linear", SCHEDULES),
    }
    words = ["--method", "distil", "--distil.teacher", "runs/a@7", "--distil.soft", "1", "0.5"]
    words += ["--distil.divergence", "reverse", "--distil.relation-heads", "2", "--steps", "7"]
    _, methods = parse_with_methods(Pretrain, groups, METHODS, words)
    expected = Distil(teacher="runs/a@7", soft=(1.0, 0.5), divergence="reverse", relation_heads=2)
    assert methods == (expected,)


def test_forward_divergence_is_the_default():
    teacher = Distil(teacher="x", resolved=Teacher(STUDENT, 1, ""))
    terms, _ = terms_and_frozen(teacher)
    params, batch = params_of(STUDENT, 0), batch_of()
    frozen = {"teacher": params_of(STUDENT, 1)}
    loss = loss_function(Transformer(STUDENT), terms)
    metrics = loss(params, batch, context_of(terms, batch, frozen, 0))[1]
    s, t = (
        Transformer(STUDENT).apply({"params": p}, batch["tokens"]).reshape(-1, 64)
        for p in (params, frozen["teacher"])
    )
    weights = batch["weights"].reshape(-1)
    expected = forward_kl(s, t, weights, 2.0) / weights.sum()
    assert metrics["distil_logits"] == pytest.approx(float(expected), rel=1e-5)


def test_weight_transforms_change_the_student_alone():
    terms, frozen = terms_and_frozen(Distil(teacher="x", resolved=Teacher(STUDENT, 1, "")))
    silence = WeightTransform(
        "silence", lambda weights, context: jax.tree.map(jnp.zeros_like, weights)
    )
    params, batch = params_of(STUDENT, 0), batch_of()
    loss = loss_function(Transformer(STUDENT), terms, [silence], chunk=7)
    metrics = loss(params, batch, context_of(terms, batch, frozen, 0))[1]
    logits = Transformer(STUDENT).apply({"params": frozen["teacher"]}, batch["tokens"]) / 2.0
    p = jax.nn.softmax(logits, axis=-1)
    from_uniform = jnp.log(64.0) + (p * jnp.log(p)).sum(axis=-1)
    expected = 4 * (from_uniform * batch["weights"]).sum() / batch["weights"].sum()  # T^2 = 4
    assert metrics["distil_logits"] == pytest.approx(float(expected), rel=1e-5)


def test_a_learned_projection_trains_and_stays_out_of_what_is_opened(tmp_path):
    """Its gradient is that of the loss by hand; a run with it opens as a plain model."""
    method = dataclasses.replace(EVERYTHING, hidden_loss="mse", projection="learned")
    plugs = method.build(Setup(STUDENT, abstract_params(STUDENT), 5))
    assert "distil_projection" not in plugs.frozen
    params, fixed = plugs.split(params_of(STUDENT, 0))
    assert fixed == {}
    assert params["distil_projection"]["projection"].shape == (STUDENT.width, TEACHER.width)
    terms = [t for t in plugs.terms((cross_entropy(),)) if t.name == "distil_hidden"]
    frozen, batch = {"teacher": params_of(TEACHER, 1)}, batch_of()
    context = context_of(terms, batch, frozen, 2)._replace(rng=jax.random.key(0))
    loss = loss_function(Transformer(STUDENT), terms, plugs.transforms, chunk=None)
    compiled = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, context)[0]))
    _, grad = compiled(params)
    apart = grad["distil_projection"]["projection"]
    size = float(jnp.linalg.norm(apart))

    def at(length):
        kernel = params["distil_projection"]["projection"] + length * apart / size
        return float(compiled({**params, "distil_projection": {"projection": kernel}})[0])

    # Exact for a square, whatever the length of the step.
    assert (at(0.1) - at(-0.1)) / 0.2 == pytest.approx(size, rel=1e-2)
    (transform,) = plugs.transforms
    opened = transform.apply(params, context._replace(rng=None))
    assert "distil_projection" not in opened
    with pytest.raises(ValueError, match="hidden term alone"):
        dataclasses.replace(EVERYTHING, hidden=(0.0,), projection="learned")
