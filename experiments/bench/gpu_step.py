"""A training step in one form, and what there is to know of it: compilation, time, kernels.

A form is a set of choices that leave the model and its loss what they are: how attention and the
gradients of the embeddings are computed, loop or scan over layers, what is computed again, how many
logits exist at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.alone import device_alone
from experiments.bench.child import Subject, peak_bytes
from experiments.bench.clock import REPEATS, seconds_of
from experiments.bench.kernels import float32_products, kernel_seconds, kernels
from experiments.bench.shapes import Shape, batches_of, settings_of, shape_from_json
from experiments.compilation import compiler_options, use_compilation_cache
from experiments.runs.assemble import initial_params
from model import lookup
from model.attention import Form, dot_product_attention
from model.flops import flops_per_token
from model.transformer import Transformer
from train.losses import cross_entropy
from train.optimizers import build
from train.step import init_state, make_train_step

BATCHES = 4  # that take turns


@dataclass(frozen=True)
class StepForm:
    """How a step is computed.

    Attributes:
      attention: form of attention, see `model.attention`; None for what suits the platform.
      lookup: of the gradients of the embeddings, see `model.lookup`; None likewise.
      scan: over layers instead of a Python loop.
      remat: as in the model's config.
      chunk: positions whose logits exist at a time.
      multiple: that the vocabulary is padded to in the state.
      vocabulary: tokens of the model instead of its own number.
      rows: of a batch, instead of the shape's.
      dispatched: steps in one program.
      flags: of XLA, for the process.
      cut: whether logits of the padding are cut off before the loss.
      options: whether the compiler has the options that a run gives it.
    """

    attention: Form | None = None
    lookup: lookup.Form | None = None
    scan: bool = False
    remat: Literal["none", "full", "dots"] = "none"
    chunk: int | None = None
    multiple: int = 128
    vocabulary: int | None = None
    rows: int | None = None
    dispatched: int = 1
    flags: str = ""
    cut: bool = True
    options: bool = False


class Built(NamedTuple):
    """A step that can be compiled.

    Attributes:
      step: `(state, batch) -> (state, metrics)`, jitted.
      make_state: the first state, jitted.
      shape: with the batch of the form.
    """

    step: Any
    make_state: Any
    shape: Shape


def built(shape: Shape, form: StepForm) -> Built:
    """Builds the step that a run of these settings would compile, in a form."""
    model_config = dataclasses.replace(
        shape.model,
        scan_layers=form.scan,
        remat=form.remat,
        vocabulary_size=form.vocabulary or shape.model.vocabulary_size,
    )
    shape = dataclasses.replace(shape, model=model_config, batch_size=form.rows or shape.batch_size)
    run = dataclasses.replace(settings_of(shape), vocabulary_multiple=form.multiple)
    attention = functools.partial(dot_product_attention, form=form.attention)
    model = Transformer(model_config, attention, lookup=form.lookup)
    shapes = jax.eval_shape(lambda: initial_params(run, model_config))
    tx = build(run.optimizer, run.schedule, run.steps, shapes)
    term = cross_entropy()
    term = dataclasses.replace(term, padded=term.padded and not form.cut)
    one = make_train_step(model, [term], tx, loss_chunk=form.chunk)

    def step(state: Any, batch: Any) -> Any:
        if form.dispatched == 1:
            return one(state, {}, batch)
        return jax.lax.scan(lambda state, batch: one(state, {}, batch), state, batch)

    def make_state() -> Any:
        return init_state(jax.random.key(1), initial_params(run, model_config), tx)

    options = compiler_options() if form.options else None
    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    return Built(jitted, jax.jit(make_state), shape)


def subject(settings: Mapping[str, Any]) -> Subject:
    """Answers "compile", "time" and "profile" for one form.

    Args:
      settings: "shape", as `shape_to_json` has it, and "form", fields of `StepForm`.
    """
    use_compilation_cache()
    shape = shape_from_json(settings["shape"])
    if shape.device == "cuda" and jax.default_backend() != "gpu":
        raise ValueError(f"JAX has no GPU here, only {jax.default_backend()}; leave this table out")
    form = StepForm(**settings["form"])
    step, make_state, shape = built(shape, form)
    batch = _abstract_batch(shape, form)
    begin = time.perf_counter()
    traced = step.lower(jax.eval_shape(make_state), batch)
    lowered_in = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled = traced.compile()
    facts = {"trace": lowered_in, "compile": time.perf_counter() - begin}
    first_state = make_state.lower().compile()

    def compile_() -> dict[str, Any]:
        return {
            **facts,
            "kernels": kernels(compiled.as_text()),
            "float32_products": float32_products(traced.as_text()),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }

    def running() -> Callable[[int], Any]:
        """Returns a function that makes the next step."""
        data = batches_of(shape)
        state, ready = first_state(), []
        for number in range(BATCHES):
            parts = [data[number * form.dispatched + part] for part in range(form.dispatched)]
            whole = jax.tree.map(lambda *each: np.stack(each), *parts) if parts[1:] else parts[0]
            ready.append(jax.device_put(whole))

        def run(number: int) -> Any:
            nonlocal state
            state, metrics = compiled(state, ready[number % BATCHES])
            return metrics["loss"]

        return run

    def timed(steps: int, repeats: int = REPEATS) -> dict[str, Any]:
        """Seconds of a step in each repeat of so many."""
        calls = max(1, steps // form.dispatched)
        with device_alone():
            run = running()
            found = seconds_of(run, calls=calls, repeats=repeats)
            loss = float(jnp.ravel(run(0))[-1])
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak_bytes())
        tokens = shape.batch_size * shape.sequence_length
        return {
            **compile_(),
            "seconds": [each / form.dispatched for each in found],
            "tokens": tokens,
            "flops": 3 * flops_per_token(shape.model, shape.sequence_length) * tokens,
            "loss": loss,
            "peak": peak,
        }

    def profile(steps: int) -> dict[str, Any]:
        """Seconds of each kernel of a step."""
        with device_alone():
            run = running()
            jax.block_until_ready([run(number) for number in range(3)])
            return {"kernels": kernel_seconds(lambda: [run(n) for n in range(steps)], steps)}

    return Subject(facts, {"compile": compile_, "time": timed, "profile": profile})


def _abstract_batch(shape: Shape, form: StepForm) -> Any:
    rows: tuple[int, ...] = (shape.batch_size, shape.sequence_length)
    if form.dispatched > 1:
        rows = (form.dispatched, *rows)
    types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in types.items()}
