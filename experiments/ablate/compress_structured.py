"""Structured pruning: half of the layers and of the neurons go, distillation recovers what it can.

What comes out is a plain smaller model, so that it is faster without any kernel of its own: how
much is measured beside the whole model, in turn, and compared with what arithmetic promises. What
is no product of kernels (attention's scores and softmax, norms) becomes less with the layers alone,
and takes a larger share of the time than of the FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress.quantization.probe import Call, time_interleaved
from experiments.ablate import base
from experiments.ablate.compress_distil import OPTIMIZER
from experiments.ablate.compress_students import folder_of, student
from experiments.ablate.random_weights import fields_of, random_weights
from experiments.compression.timings import decode, prefill
from experiments.grid import Cell, Measurement
from experiments.methods.distill import Distil
from experiments.recipes import Size, recommended
from experiments.tables.margins import Claim, claims
from experiments.tables.markdown import grid, spread
from experiments.tables.ratios import paired
from experiments.tables.table import Item, Request, Results, Table
from model.config import TransformerConfig, config_from_dict
from model.flops import block_flops, head_flops
from model.presets import gpt2, modern_mini
from model.transformer import Transformer, features
from train.loop import LoopSettings

STEPS = 300
KIND = "half of the layers and neurons, by activation"
# Minitron's recovery has no hard loss and no temperature (Muralidharan et al. 2024,
# arXiv:2407.14679).
RECOVERY = Distil(hard=(0.0,), soft=(1.0,), temperature=(1.0,))

DENSE, CUT = "whole model", "half removed"
DISTILLED, ALONE = "then distilled", "then trained without a teacher"

LENGTH = 512
DECODED = 16  # tokens a call
BATCHES = (1, 8)
REPEATS = 15
BLOCKS, PROMPT = "blocks, prompt", "whole model, prompt"
FLOOR = 1.8  # of the blocks
SHARE = 0.9  # of the ratio of FLOPs, for the whole model


def shapes() -> dict[str, TransformerConfig]:
    """Returns the models whose halves are timed, by the name of their row."""
    size = base.SIZE
    small = modern_mini(layers=size.layers, width=size.width, heads=size.heads, max_length=LENGTH)
    return {
        "speed, base model": dataclasses.replace(small, vocabulary_size=2048),
        "speed, GPT-2 124M": gpt2(dropout=0.0),
    }


def halved(config: TransformerConfig) -> TransformerConfig:
    """Returns the config with half of the layers and of the neurons.

    >>> small = halved(gpt2())
    >>> small.layers, small.ffn_width
    (6, 1536)
    """
    return dataclasses.replace(config, layers=config.layers // 2, ffn_width=config.ffn_width_ // 2)


def cells(request: Request) -> list[Item]:
    """Returns what is removed, what is recovered, and the timings."""
    items: list[Item] = []
    for seed in range(request.seeds):
        whole = base.base_cell(seed)
        made = student(request.cells, whole, KIND)
        items += [
            dataclasses.replace(whole, name=DENSE),
            dataclasses.replace(made, name=CUT),
            _recovery(request, DISTILLED, made, seed, str(request.cells / whole.key)),
            _recovery(request, ALONE, made, seed, None),
        ]
    return items + [
        Measurement(
            name,
            {
                "measured": "speed of half",
                "config": fields_of(config),
                "length": LENGTH,
                "decoded": DECODED,
                "batches": BATCHES,
                "repeats": REPEATS,
            },
            speed,
        )
        for name, config in shapes().items()
    ]


def _recovery(
    request: Request, name: str, made: Measurement, seed: int, teacher: str | None
) -> Cell:
    size: Size = dataclasses.replace(base.SIZE, layers=base.SIZE.layers // 2, optimizer=OPTIMIZER)
    settings = recommended(size, STEPS, seed)
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, ffn_width=phase.model.ffn_width_ // 2)
    settings = dataclasses.replace(
        settings,
        phases=(dataclasses.replace(phase, model=model),),
        parent=str(folder_of(request.cells, made)),
        methods=() if teacher is None else (dataclasses.replace(RECOVERY, teacher=teacher),),
    )
    return Cell(name, settings, LoopSettings(log_every=50), needs=(made,))


def speed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times a model and its half in turn, on random weights.

    Args:
      settings: config, length of the prompt, tokens decoded a call, batches, repeats.

    Returns:
      Work -> seconds of both (medians), the median of the paired ratios, their quartiles, and the
      ratio of FLOPs.
    """
    config = config_from_dict(settings["config"])
    length, steps = settings["length"], settings["decoded"]
    pair = [(Transformer(c), random_weights(c)) for c in (config, halved(config))]
    found = {}
    work: dict[str, tuple[Any, tuple[float, float]]] = {
        BLOCKS: (lambda m, p: _blocks(m, p, length), _flops(config, length)),
        PROMPT: (lambda m, p: prefill(m, p, length), _flops(config, length, heads=1)),
    }
    for batch in settings["batches"]:
        work[f"whole model, decoding {batch}"] = (
            lambda m, p, batch=batch: decode(m, p, batch, length, steps),
            _flops(config, length, heads=steps, decoded=steps),
        )
    for name, (call, (whole_flops, half_flops)) in work.items():
        calls: dict[str, Call] = {
            side: call(*each) for side, each in zip(("whole", "half"), pair, strict=True)
        }
        times = time_interleaved(calls, settings["repeats"])
        found[name] = {
            **{side: statistics.median(each) for side, each in times.items()},
            **paired(times["whole"], times["half"]),
            "FLOPs": whole_flops / half_flops,
        }
    return {"work": found}


def _blocks(model: Transformer, params: Any, length: int) -> Call:
    tokens = jnp.zeros((1, length), jnp.int32)
    run = jax.jit(lambda p, t: features(model, p, t).final)
    return lambda: run(params, tokens)


def _flops(
    config: TransformerConfig, length: int, heads: int = 0, decoded: int | None = None
) -> tuple[float, float]:
    """FLOPs of the whole model and of the half, for a prompt or for its last tokens."""

    def one(c: TransformerConfig) -> float:
        if decoded is None:
            return length * block_flops(c, length) + heads * head_flops(c)
        before = (length - decoded) * block_flops(c, length - decoded)
        return length * block_flops(c, length) - before + heads * head_flops(c)

    return one(config), one(halved(config))


def render(results: Results) -> list[str]:
    """Returns quality, orderings, and measured beside promised speed-ups."""
    rows = []
    cut = results.by_name.get(CUT, {})
    sizes = next(iter(cut.values()), {})
    for name in (DENSE, CUT, DISTILLED, ALONE):
        losses = results.column(name, "loss")
        if not losses:
            continue
        count = sizes.get("parameters before" if name == DENSE else "parameters")
        perplexities = [math.exp(min(loss, 700.0)) for loss in losses]
        rows.append([name, f"{count:,}" if count else "", spread(losses), spread(perplexities, 2)])
    lines = grid(["row", "parameters", "loss", "perplexity"], rows, "lrrr") if rows else []
    pairs = []
    for above, below in ((CUT, DISTILLED), (ALONE, DISTILLED), (DISTILLED, DENSE)):
        high, low = results.pair(above, below, "loss")
        if high:
            pairs.append(Claim((above, high), (below, low)))
    if pairs:
        lines += ["", f"Recovery: {STEPS} steps.", "", *claims(pairs, 4)]
    for name in shapes():
        for values in results.by_name.get(name, {}).values():
            lines += ["", f"{name[0].upper()}{name[1:]}, {LENGTH} tokens, head on the last alone:"]
            lines += ["", *_speeds(values["work"])]
    return lines


def _speeds(work: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, found in work.items():
        low, high = found["quartiles"]
        if name == BLOCKS:
            wanted, holds = f"{FLOOR}x", found["ratio"] >= FLOOR
        else:
            wanted = f"{SHARE * found['FLOPs']:.2f}x"
            holds = found["ratio"] >= SHARE * found["FLOPs"]
        rows.append(
            [
                name,
                f"{1000 * found['whole']:,.1f}",
                f"{1000 * found['half']:,.1f}",
                f"{found['ratio']:.2f}x",
                f"{low:.2f} to {high:.2f}",
                f"{found['FLOPs']:.2f}x",
                f"{wanted}: {'yes' if holds else 'no'}",
            ]
        )
    names = ["work", "whole, ms", "half, ms", "faster", "quartiles", "by FLOPs", "at least"]
    return grid(names, rows, "lrrrrrr")


TABLES: tuple[Table, ...] = (Table("structured", "Structured pruning", cells, render),)
