"""Hugging Face's side: the baseline's step, and `generate`, each behind questions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.baselines.learner import make_learner, make_model
from experiments.bench.child import Subject, peak_bytes
from experiments.bench.shapes import Shape, baseline_of, batches_of, prompts_of, shape_from_json


def training(settings: Mapping[str, Any]) -> Subject:
    """Answers "time" (steps), "peak" and "memory".

    Args:
      settings: "shape", as `shape_to_json` has it, and "mode".
    """
    import torch

    shape = shape_from_json(settings["shape"])
    baseline = baseline_of(shape, settings["mode"])
    before = peak_bytes()
    learner = make_learner(baseline, baseline.settings.phases[0].model)
    cuda = shape.device == "cuda"
    state, data = learner.state, batches_of(shape)

    def timed(steps: int, untimed: int = 0) -> dict[str, Any]:
        """Seconds of so many steps, after some that are not timed."""
        nonlocal state
        first = int(state.step)
        ready = [learner.place(data[number]) for number in range(first, first + untimed + steps)]
        losses = []
        wait()
        start = time.perf_counter()
        for number, batch in enumerate(ready):
            if number == untimed:
                wait()
                start = time.perf_counter()
            state, metrics = learner.step(state, {}, batch)
            losses.append(metrics["loss"])
        wait()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "losses": [float(np.asarray(loss)) for loss in losses]}
        if cuda:  # the other sides are to have their turn with all memory
            learner.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return found

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def memory() -> dict[str, int]:
        if cuda:
            return {"before": 0, "peak": torch.cuda.max_memory_allocated()}
        return {"before": before, "peak": peak_bytes()}

    facts = {
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "flops_per_token": flops_per_token(learner.model, shape),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return Subject(facts, {"time": timed, "peak": peak_products, "memory": memory})


def decoding(settings: Mapping[str, Any]) -> Subject:
    """Answers "time" (rows, new): seconds to read the prompts and write `new` tokens each.

    Args:
      settings: "shape", and "prompt": tokens of each prompt.
    """
    import torch

    shape, length = shape_from_json(settings["shape"]), settings["prompt"]
    model = make_model(baseline_of(shape, "eager"), shape.model).eval()
    model = model.to(shape.device, getattr(torch, shape.model.dtype))
    model.generation_config.eos_token_id = None

    def timed(rows: int, new: int, slots: int) -> dict[str, Any]:
        prompts = prompts_of(shape, rows, length)
        start = time.perf_counter()
        ids = torch.tensor(prompts, device=shape.device)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        tokens = found[:, length:].tolist()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return Subject({"parameters": sum(p.numel() for p in model.parameters())}, {"time": timed})


def peak_products(size: int, repeats: int, device: str, dtype: str) -> float:
    """Returns the operations a second of the fastest of some square products."""
    import torch

    x = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def flops_per_token(model: Any, shape: Shape) -> float:
    """Counts the products of Hugging Face's own forward pass; a training step is three times it.

    torch's counter sees the whole square of scores and values. Of it a causal query needs what lies
    at or before it, (T + 1) / 2 of T keys: that part is what counts on either side.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    c, T = shape.model, shape.sequence_length
    tokens = torch.zeros((1, T), dtype=torch.long, device=model.device)
    model.set_attn_implementation("eager")  # in products that the counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False)
    model.set_attn_implementation("sdpa")
    masked = c.layers * 4 * c.width * T * (T - (T + 1) / 2)
    return 3 * (counter.get_total_flops() - masked) / T
