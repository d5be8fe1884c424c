"""Generation against Hugging Face's `generate` with its cache: prefill and decoding apart.

Greedy, from the same weights and prompts. A round asks for one new token and for many; the first
is the prefill, and what the others take longer is the decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.ratios import ratio
from experiments.bench.shapes import SHAPES, environment_of, shape_from_json, shape_to_json
from experiments.bench.sides import Side, interleaved
from experiments.bench.table import Table, rows_of
from experiments.grid import Measured, Measurement

OURS, THEIRS = "ours", "generate"
LIMIT_CUDA = 200.0  # seconds that a side may take in all


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times both sides in turn.

    Args:
      settings: "shape", "prompt" tokens, "new" tokens, "rows" (batch sizes), "rounds".

    Returns:
      Side -> rows -> "prefill" and "decode" seconds of each round; and "agree", the share of equal
      tokens by rows.

    Raises:
      ValueError: the models differ.
    """
    given = {"shape": settings["shape"], "prompt": settings["prompt"]}
    slots = settings["prompt"] + settings["new"]
    questions = [
        {"rows": rows, "new": new, "slots": slots}
        for rows in settings["rows"]
        for new in (1, settings["new"])
    ]
    shape = shape_from_json(settings["shape"])
    here, there = environment_of(shape, "ours"), environment_of(shape, "torch")
    limit = None if shape.device == "cpu" else LIMIT_CUDA
    with (
        Side("decode.jax", given, here, limit) as ours,
        Side("decode.torch", given, there, limit) as theirs,
    ):
        sides = {OURS: ours, THEIRS: theirs}
        if ours.facts != theirs.facts:
            raise ValueError(f"the sides differ: {ours.facts} and {theirs.facts}")
        interleaved(sides, 1, "time", questions)  # compiles, and starts what is started once
        found = interleaved(sides, settings["rounds"], "time", questions)
    values: dict[str, Any] = {name: {} for name in sides}
    values["agree"] = {}
    for number, rows in enumerate(settings["rows"]):
        for name in sides:
            one, many = (
                [answer["seconds"] for answer in answers]
                for answers in found[name][2 * number : 2 * number + 2]
            )
            decode = [b - a for a, b in zip(one, many, strict=True)]
            values[name][str(rows)] = {"prefill": one, "decode": decode}
        tokens = [found[name][2 * number + 1][0]["tokens"] for name in sides]
        pairs = [
            a == b
            for rows_of_both in zip(*tokens, strict=True)
            for a, b in zip(*rows_of_both, strict=True)
        ]
        values["agree"][str(rows)] = sum(pairs) / len(pairs)
    return values


def text(results: Sequence[Measured]) -> str:
    """Returns the ratios as Markdown."""
    rows = []
    for measured in results:
        for count, ours in measured.values[OURS].items():
            theirs = measured.values[THEIRS][count]
            ratios = [str(ratio(ours[part], theirs[part])) for part in ("prefill", "decode")]
            new = (measured.measurement.settings["new"] - 1) * int(count)
            rates = [f"{new / statistics.median(side['decode']):,.0f}" for side in (ours, theirs)]
            rows.append([count, *ratios, f"{measured.values['agree'][count]:.1%}", *rates])
    settings = results[0].measurement.settings
    names = ["rows", "prefill, ours / theirs", "decode, ours / theirs", "equal tokens"]
    names += ["ours, decoded tokens / s", "theirs"]
    return (
        f"Tokens a second of greedy generation in {settings['shape']['model']['dtype']} against "
        f"transformers' `generate` with its cache: prompts of {settings['prompt']} tokens, "
        f"{settings['new']} new ones; median of {settings['rounds']} rounds and quartiles.\n\n"
        f"{rows_of(names, rows)}"
    )


def decode_table() -> Table:
    """One row and eight of them, at 12 M parameters."""
    settings = {
        "table": "decode",
        "shape": shape_to_json(SHAPES["12m"]),
        "prompt": 128,
        "new": 65,
        "rows": [1, 8],
        "rounds": 10,
    }
    return Table("Generation", (Measurement("decode", settings, measure),), text)


def gpu_decode_table() -> Table:
    """The same at 124 M parameters in bfloat16 on a GPU."""
    settings = {
        "table": "decode",
        "shape": shape_to_json(SHAPES["124m-cuda"]),
        "prompt": 512,
        "new": 65,
        "rows": [1, 8],
        "rounds": 6,
    }
    return Table("Generation on a GPU", (Measurement("gpu-decode", settings, measure),), text)
