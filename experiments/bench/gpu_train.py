"""The training step of GPT-2 124M on a GPU against torch, eager and compiled.

In bfloat16 on either side: ours by its dtype, torch by autocast, with parameters and AdamW in
float32. Ours pads the table of the vocabulary to 50,304 rows, which are not counted
as operations; Hugging Face's has 50,257.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.alone import FAILED, ask_once
from experiments.bench.gpu_forms import DATASHEET
from experiments.bench.ratios import farthest
from experiments.bench.shapes import environment_of, shape_from_json
from experiments.bench.table import Job, Table, rows_of
from experiments.bench.train_step import (
    COMPILE,
    EAGER,
    JAX,
    flops_per_second,
    ratio_where_equal,
    train_table,
)
from experiments.grid import Measured, Measurement

COMPILE_LIMIT = 240.0  # seconds


def compiling(missing: Sequence[Measurement]) -> list[Job]:
    """Lets torch compile once, into its own cache; ours is the default of the table of forms."""

    def run(settings: Mapping[str, Any]) -> None:
        given = {"shape": settings["shape"], "mode": "compile"}
        environment = environment_of(shape_from_json(settings["shape"]), "torch")
        asked: dict[str, Any] = {"environment": environment, "limit": COMPILE_LIMIT}
        found = ask_once("train.torch", given, "time", **asked, steps=1)
        if FAILED in found:
            print(f"torch does not compile: {found[FAILED][-300:]}", flush=True)

    return [Job(0, functools.partial(run, m.settings)) for m in missing]


def text(results: Sequence[Measured]) -> str:
    """Returns tokens a second, shares of the ceilings, memory and losses as Markdown."""
    rows = []
    for measured in results:
        values = measured.values
        for side in (JAX, COMPILE, EAGER):
            rate = flops_per_second(measured, side)
            rows.append(
                [
                    side,
                    f"{rate / values['facts'][JAX]['flops_per_token'] / 1000:,.0f} k",
                    f"{rate / DATASHEET:.1%}",
                    f"{rate / values['peak']:.1%}",
                    "" if side == JAX else ratio_where_equal(measured, side),
                    f"{values['memory'][side]['peak'] / 2**30:.1f}",
                    ""
                    if side == JAX
                    else f"{farthest({n: values['losses'][n] for n in (JAX, side)}):.4f}",
                ]
            )
    names = ["side", "tokens / s", "of 989 TFLOP/s", "of the square product", "ours / this side"]
    names += ["peak, GiB", "losses apart by"]
    settings = results[0].measurement.settings
    shape = settings["shape"]
    return "\n\n".join(
        [
            f"GPT-2 124M, {shape['batch_size']} rows of {shape['sequence_length']:,} tokens, "
            "products in bfloat16, AdamW in float32 (fused in torch), from the same initial "
            "weights on the same batches, sides in turn; medians of the rounds and quartiles of "
            "their ratios. Attention is cuDNN's in ours and `scaled_dot_product_attention` in "
            "torch. Operations are the model's analytic count; the square product is the fastest "
            "of side 8,192 that any side reached in the same minutes. Losses: the largest "
            "difference from ours in any of the first 100 steps.",
            rows_of(names, rows),
        ]
    )


def gpu_train_table() -> Table:
    """Of one shape."""
    plain = train_table("124m-cuda")
    return Table("Training step on a GPU", plain.measurements, text, prepare=compiling)
