"""The step of a rung or baseline behind a question, for a process of its own.

Started through `experiments.bench.sides.Side`, so that several take turns on a machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.ablate.steps import batch_for, stepper
from experiments.baselines.cells import BaselineCell
from experiments.baselines.learner import make_learner
from experiments.bench.child import Subject
from experiments.ladder.child import job_from_json
from train.settings import Settings


def subject(settings: Mapping[str, Any]) -> Subject:
    """Answers "time" (steps) with the seconds of so many steps on random tokens.

    Its facts are the tokens of a step, and the seconds that the first one took, of which nearly all
    are compilation.

    Args:
      settings: "job", as `job_to_json` has it; "phase", whose step it is; "vocabulary", its size.
    """
    job, size = job_from_json(settings["job"]), settings["vocabulary"]
    whole = job.baseline.settings if isinstance(job, BaselineCell) else job.settings
    step = whole.phases[settings["phase"]]
    # The steps of the run, so that its schedule still fits.
    only = dataclasses.replace(whole, phases=(dataclasses.replace(step, steps=whole.steps),))
    config = dataclasses.replace(step.model, vocabulary_size=size)
    call = _torch(job, only, size) if isinstance(job, BaselineCell) else stepper(only, config)
    wait: Callable[[Any], Any] = jax.block_until_ready
    start = time.perf_counter()
    wait(call())
    first = time.perf_counter() - start
    wait(call())  # the first of equals

    def timed(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = call()
        wait(metrics)
        return time.perf_counter() - start

    tokens = step.batch_size * step.sequence_length
    return Subject({"tokens": tokens, "compiling": first}, {"time": timed})


def _torch(job: BaselineCell, settings: Settings, size: int) -> Callable[[], Any]:
    (phase,) = settings.phases
    config = dataclasses.replace(phase.model, vocabulary_size=size)
    learner = make_learner(job.baseline, config)
    state = learner.state
    # Copies: torch wants arrays that it could write to.
    batch = learner.place({n: np.array(a) for n, a in batch_for(settings, size).items()})

    def call() -> dict[str, float]:
        nonlocal state
        state, metrics = learner.step(state, {}, batch)
        return {"loss": float(np.asarray(metrics["loss"]))}  # waits for a GPU

    return call
