"""Our side: the training step as a run compiles it, and generation, each behind questions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.child import Subject, peak_bytes
from experiments.bench.shapes import batches_of, prompts_of, settings_of, shape_from_json
from experiments.compilation import compiler_options, use_compilation_cache
from experiments.runs.assemble import initial_params
from model.flops import flops_per_token, parameter_count
from model.generate import Sampling, generate
from model.transformer import Transformer
from train.loop import LoopSettings, train
from train.losses import cross_entropy
from train.optimizers import build
from train.records import Record
from train.step import init_state, make_train_step


def training(settings: Mapping[str, Any]) -> Subject:
    """Answers "time" (steps), "loop" (steps), "peak" and "memory".

    Args:
      settings: "shape", as `shape_to_json` has it.
    """
    use_compilation_cache()
    shape = shape_from_json(settings["shape"])
    if shape.device == "cuda" and jax.default_backend() != "gpu":
        raise ValueError(f"JAX has no GPU here, only {jax.default_backend()}; leave this table out")
    run, config = settings_of(shape), shape.model
    if shape.device == "cuda":  # rows of a whole number of vector loads
        run = dataclasses.replace(run, vocabulary_multiple=128)
    before = peak_bytes()
    model = Transformer(config)
    params = jax.jit(lambda: initial_params(run, config))()
    tx = build(run.optimizer, run.schedule, run.steps, params)
    plain = make_train_step(model, [cross_entropy()], tx)
    step = jax.jit(plain, donate_argnums=0, compiler_options=compiler_options())
    state = jax.jit(lambda key, params: init_state(key, params, tx))(jax.random.key(1), params)
    del params
    data = batches_of(shape)

    def timed(steps: int, untimed: int = 0) -> dict[str, Any]:
        """Seconds of so many steps, after some that are not timed."""
        nonlocal state
        first = int(state.step)
        numbers = range(first, first + untimed + steps)
        ready = [jax.device_put(data[number]) for number in numbers]
        jax.block_until_ready(ready)
        losses = []
        start = time.perf_counter()
        for number, batch in enumerate(ready):
            if number == untimed:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, metrics = step(state, {}, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

    def loop(steps: int) -> dict[str, float]:
        """Seconds of the loop by kind; `data` is what it waits for batches."""
        nonlocal state
        from train.data import prefetched

        first = int(state.step)
        outcome = train(
            step,
            state,
            {},
            lambda start, stop: prefetched(data, start, stop),
            until=first + steps,
            record=Record(None),
            settings=LoopSettings(),
        )
        state = outcome.state
        return dict(outcome.seconds)

    facts = {
        "parameters": parameter_count(config),
        "flops_per_token": 3 * flops_per_token(config, shape.sequence_length),
        "device": jax.devices()[0].device_kind,
    }

    def memory() -> dict[str, int]:
        if shape.device == "cuda":
            stats = jax.devices()[0].memory_stats() or {}
            return {"before": 0, "peak": stats["peak_bytes_in_use"]}
        return {"before": before, "peak": peak_bytes()}

    asks: dict[str, Any] = {"time": timed, "loop": loop, "peak": peak_products, "memory": memory}
    return Subject(facts, asks)


def decoding(settings: Mapping[str, Any]) -> Subject:
    """Answers "time" (rows, new): seconds to read the prompts and write `new` tokens each.

    Args:
      settings: "shape", and "prompt": tokens of each prompt.
    """
    use_compilation_cache()
    shape, length = shape_from_json(settings["shape"]), settings["prompt"]
    run, config = settings_of(shape), shape.model
    model = Transformer(config)
    params = jax.jit(lambda: initial_params(run, config))()
    # Weights in the type of the products, as on the other side: what is decoded is not trained.
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)

    def timed(rows: int, new: int, slots: int) -> dict[str, Any]:
        prompts = prompts_of(shape, rows, length)
        start = time.perf_counter()
        found = generate(
            model,
            params,
            prompts,
            key=jax.random.key(0),
            max_new_tokens=new,
            sampling=Sampling(temperature=0),
            slots=slots,
        )
        tokens = found.new_tokens()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return Subject({"parameters": parameter_count(config)}, {"time": timed})


def peak_products(size: int, repeats: int, device: str, dtype: str) -> float:
    """Returns the operations a second of the fastest of some square products."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
