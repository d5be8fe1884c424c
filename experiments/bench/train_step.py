"""The training step against Hugging Face's GPT-2 in torch, eager and compiled.

Both sides train the same model in float32 with AdamW, from the same initial weights on the same
batches, steps of equal analytic cost; that is checked, and no ratio is given where it is not so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from experiments.bench.ratios import farthest, ratio
from experiments.bench.shapes import SHAPES, environment_of, shape_from_json, shape_to_json
from experiments.bench.sides import Side, interleaved
from experiments.bench.table import Table, rows_of
from experiments.grid import Measured, Measurement

JAX, EAGER, COMPILE = "ours", "torch eager", "torch.compile"
# Nats: the most that rounding may part the sides in the first 100 steps.
SAME_LOSS = {"float32": 0.01, "bfloat16": 0.1}
PRODUCT, REPEATS = 1536, 3  # side of the square products whose speed is the machine's peak
PRODUCT_CUDA = 8192
LIMIT_CUDA = 300.0  # seconds that a side may take in all
# Rounds and steps of each: 100 steps with those before the first round, but for the largest model
# on a CPU, where they would take an hour.
EFFORT = {"3m": (12, 8), "12m": (12, 8), "124m": (6, 1), "124m-cuda": (10, 10)}


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times all sides in turn.

    Args:
      settings: "shape", "rounds", "steps" of a timing, "warmup" steps before, and "product", the
        side of the square product; the rate is there as part of the name.

    Returns:
      By side: "seconds" of each round, "losses" of each step, "facts", "memory"; and "peak", the
      operations a second that any side reached in a plain matrix product.

    Raises:
      ValueError: the sides did not do equal work.
    """
    given, shape = {"shape": settings["shape"]}, shape_from_json(settings["shape"])
    subjects = {
        JAX: ("train.jax", given, environment_of(shape, "ours")),
        EAGER: ("train.torch", {**given, "mode": "eager"}, environment_of(shape, "torch")),
        COMPILE: ("train.torch", {**given, "mode": "compile"}, environment_of(shape, "torch")),
    }
    limit = None if shape.device == "cpu" else LIMIT_CUDA
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(*subject, limit)) for name, subject in subjects.items()
        }
        warm = {name: side.ask("time", steps=settings["warmup"]) for name, side in sides.items()}
        steps = {"steps": settings["steps"], "untimed": settings.get("untimed", 0)}
        found = interleaved(sides, settings["rounds"], "time", [steps])
        product = {"size": settings["product"], "repeats": REPEATS}
        product |= {"device": shape.device, "dtype": shape.model.dtype}
        products = interleaved(sides, 2, "peak", [product])
        memory = {name: side.ask("memory") for name, side in sides.items()}
        facts = {name: side.facts for name, side in sides.items()}
    losses = {
        name: [*warm[name]["losses"], *(loss for answer in rounds for loss in answer["losses"])]
        for name, (rounds,) in found.items()
    }
    audit(facts)
    return {
        "seconds": {n: [answer["seconds"] for answer in rounds] for n, (rounds,) in found.items()},
        "losses": losses,
        "facts": facts,
        "memory": memory,
        "peak": max(speed for (rounds,) in products.values() for speed in rounds),
    }


def audit(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError unless parameters and analytic cost are equal.

    Args:
      facts: by side.
    """
    for name in ("parameters", "flops_per_token"):
        values = {side: fact[name] for side, fact in facts.items()}
        if not all(math.isclose(v, values[JAX], rel_tol=1e-9) for v in values.values()):
            raise ValueError(f"the sides differ in {name}: {values}; they are not the same model")


def ratio_where_equal(measured: Measured, side: str) -> str:
    """Returns the ratio of the tokens a second, ours over theirs; none if the losses part.

    Sides whose losses part by more than rounding do not train the same model on the same batches.
    """
    values, shape = measured.values, shape_from_json(measured.measurement.settings["shape"])
    most = SAME_LOSS[shape.model.dtype]
    if not (apart := farthest({n: values["losses"][n] for n in (JAX, side)})) <= most:
        return f"none: losses part by {apart:.3f}, more than {most}"
    return str(ratio(values["seconds"][JAX], values["seconds"][side]))


def steps_compared(measured: Measured, side: str) -> int:
    """Returns how many of the first steps the losses of both sides are compared over."""
    return min(100, *(len(measured.values["losses"][name]) for name in (JAX, side)))


def flops_per_second(measured: Measured, side: str) -> float:
    """Returns the model's floating-point operations a second, from the median round."""
    settings, values = measured.measurement.settings, measured.values
    shape = shape_from_json(settings["shape"])
    tokens = settings["steps"] * shape.batch_size * shape.sequence_length
    seconds = sorted(values["seconds"][side])
    middle = (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2
    return values["facts"][JAX]["flops_per_token"] * tokens / middle


def text(results: Sequence[Measured]) -> str:
    """Returns the ratios as Markdown: time, fraction of the peak, memory."""
    rows = []
    for measured in results:
        values = measured.values
        count = values["facts"][JAX]["parameters"] / 1e6
        for side in (EAGER, COMPILE):
            rows.append(
                [
                    f"{count:.1f} M",
                    side,
                    ratio_where_equal(measured, side),
                    f"{flops_per_second(measured, JAX) / values['peak']:.0%}",
                    f"{flops_per_second(measured, side) / values['peak']:.0%}",
                    f"{_grown(values, JAX) / _grown(values, side):.2f}x",
                    f"{farthest({n: values['losses'][n] for n in (JAX, side)}):.4f}",
                    str(steps_compared(measured, side)),
                ]
            )
    fewer = (
        " Where they are fewer than 100 (which at 124 M would take a CPU an hour), it is not shown "
        "that the sides stay together after them."
    )
    names = ["parameters", "against", "tokens a second, ours / theirs", "ours, of the peak"]
    names += ["theirs, of the peak", "memory, ours / theirs", "losses apart by", "in steps"]
    return (
        "Train step with AdamW, in float32 on a CPU and bfloat16 on a GPU, from the same initial "
        "weights on the same batches: median of the rounds and their quartiles.\n\n"
        f"{rows_of(names, rows)}\n\n"
        "The peak is the fastest square matrix product that any side reached in the same minutes; "
        "the operations are the model's analytic count. Memory is the most that the process held "
        "above what it held before the model, compilation included. Losses: the largest difference "
        "between the two sides in any of the first steps, 100 at most."
        + (fewer if any(int(row[-1]) < 100 for row in rows) else "")
    )


def _grown(values: Mapping[str, Any], side: str) -> float:
    memory = values["memory"][side]
    return float(max(1, memory["peak"] - memory["before"]))  # a tiny model may fit in what was held


def train_table(name: str) -> Table:
    """The table of one of `SHAPES`."""
    rounds, steps = EFFORT[name]
    settings = {
        "table": "train",
        "shape": shape_to_json(SHAPES[name]),
        "rounds": rounds,
        "steps": steps,
        "warmup": 4 if steps > 1 else 2,
        # On a GPU a side frees its memory after its turn, and asks for it again in the next.
        **({"untimed": 1} if SHAPES[name].device == "cuda" else {}),
        "product": PRODUCT if SHAPES[name].device == "cpu" else PRODUCT_CUDA,
    }
    return Table("Training step", (Measurement(f"train-{name}", settings, measure),), text)
