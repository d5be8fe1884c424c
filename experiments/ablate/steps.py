"""Training steps alone, timed in turn: what a method makes of the cost of a step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.distillation.teacher_targets import top_k_targets
from compress.quantization.probe import time_interleaved
from experiments.ablate.random_weights import like
from experiments.compilation import compiler_options
from experiments.methods.cached_answers import PREFIX
from experiments.methods.distill import Distil, Teacher
from experiments.methods.distill_cached import DistilCached, Resolved
from experiments.runs.assemble import (
    Parts,
    abstract_frozen,
    abstract_state,
    assemble,
    first_state,
    initial_params,
)
from experiments.tables.ratios import paired
from model.build import build_model
from model.config import TransformerConfig
from train.plugs import whole
from train.settings import Settings
from train.step import make_train_step


def known(settings: Settings, teacher: TransformerConfig) -> Settings:
    """Returns settings whose distillation needs no run to be built: any weights cost the same.

    Args:
      settings: of a run.
      teacher: config of its teacher, vocabulary size included.
    """
    methods = []
    for method in settings.methods:
        if isinstance(method, Distil):
            method = dataclasses.replace(method, resolved=Teacher(teacher, 0, ""))
        elif isinstance(method, DistilCached):
            method = dataclasses.replace(method, resolved=Resolved(teacher, 0, "", ""))
        methods.append(method)
    return dataclasses.replace(settings, methods=tuple(methods))


def batch_for(settings: Settings, vocabulary_size: int) -> dict[str, jax.Array]:
    """Returns a batch of random tokens of the first phase, with a cached teacher's answers."""
    phase = settings.phases[0]
    rng = np.random.default_rng(0)
    shape = (phase.batch_size, phase.sequence_length)
    tokens = rng.integers(0, vocabulary_size, (shape[0], shape[1] + 1))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones(shape, jnp.float32),
    }
    if settings.task is not None:  # whole rows, of the first class
        whole = jnp.full(shape[:1], shape[1], jnp.int32)
        batch |= {"lengths": whole, "labels": jnp.zeros(shape[:1], jnp.int32)}
    for method in settings.methods:
        if isinstance(method, DistilCached):
            logits = jnp.asarray(rng.standard_normal((*shape, vocabulary_size), np.float32))
            said = jax.vmap(lambda row, k=method.k: top_k_targets(row, k))(logits)
            batch |= {PREFIX + name: array for name, array in said.items()}
    return batch


def stepper(settings: Settings, config: TransformerConfig) -> Callable[[], Any]:
    """Returns a call that takes the next step of a run, from random weights on random tokens.

    Args:
      settings: of one phase, built without any folder (see `known`).
      config: of the model, vocabulary size included.
    """
    parts = assemble(settings, config)
    plugs = parts.plugs
    compiled = jax.jit(
        _step(settings, parts), donate_argnums=0, compiler_options=compiler_options()
    )
    frozen = like(abstract_frozen(settings, parts))
    params, _ = jax.jit(lambda: plugs.split(initial_params(settings, config)))()
    state = jax.jit(lambda p, f: first_state(settings, parts, p, f))(params, frozen)
    batch = batch_for(settings, config.vocabulary_size)

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics

    return call


def memory_of_step(settings: Settings, config: TransformerConfig) -> int:
    """Returns the bytes that a step holds at most, as its compiler has it: state and all between.

    Args:
      settings: see `stepper`.
      config: see there.
    """
    parts = assemble(settings, config)
    state, frozen = abstract_state(settings, parts), abstract_frozen(settings, parts)
    batch = batch_for(settings, config.vocabulary_size)
    step = jax.jit(_step(settings, parts), donate_argnums=0)
    memory: Any = step.lower(state, frozen, batch).compile().memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept)


def _step(settings: Settings, parts: Parts) -> Any:
    return make_train_step(
        build_model(parts.config),
        parts.terms,
        parts.optimizer,
        transforms=parts.plugs.transforms,
        gradient=parts.plugs.gradient or whole,
        micro_batches=settings.micro_batches,
        loss_chunk=settings.loss_chunk,
    )


def step_times(
    runs: Mapping[str, tuple[Settings, TransformerConfig]], repeats: int, first: str
) -> dict[str, dict[str, Any]]:
    """Times one step of each run in turn.

    Args:
      runs: name -> (settings, config).
      repeats: rounds.
      first: what the ratios are to.

    Returns:
      Name -> median seconds, and median and quartiles of the paired ratios to `first`.
    """
    times = time_interleaved({name: stepper(*run) for name, run in runs.items()}, repeats)
    return {
        name: {"seconds": statistics.median(seconds), **paired(seconds, times[first])}
        for name, seconds in times.items()
    }
