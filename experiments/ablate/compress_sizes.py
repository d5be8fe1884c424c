"""Bytes of a GPT-2-shaped model by format, on disk and in memory: measured, all matrices quantized.

The position table is quantized too. Random weights, which no format stores in fewer bytes than
trained ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from compress.export.gguf import HOLDS, write_gguf
from compress.export.native import save_native
from compress.quantization.formats import format_of, format_to_json
from compress.quantization.quantize import quantize_params, report, weight_rules
from experiments.ablate.random_weights import fields_of, random_weights
from experiments.grid import Measurement
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from model.config import TransformerConfig, config_from_dict
from model.flops import parameter_count
from model.presets import gpt2

PLAIN = "float32"
FORMATS = (PLAIN, "int16", "int8", "q8_0", "e4m3", "int4_g128", "q4_1", "q4_0", "int4")
MOST = {"int8": 0.272, "q4_0": 0.145, "q4_1": 0.163}
"""Format -> the share of float32 that it may take."""


def model_shape() -> TransformerConfig:
    """Returns the shape that is measured."""
    return gpt2(dropout=0.0)


def cells(request: Request) -> list[Item]:
    """Returns a measurement for each format."""
    settings = {"measured": "sizes", "config": fields_of(model_shape())}
    return [
        Measurement(name, {**settings, "format": name, "grid": grid_of(name)}, sizes)
        for name in FORMATS
    ]


def grid_of(name: str) -> dict[str, Any] | None:
    """Returns what a format is, so that another one of the same name is measured again."""
    return None if name == PLAIN else format_to_json(format_of(name))


def sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Quantizes random weights, writes them, and counts.

    Args:
      settings: config, and the name of a format.

    Returns:
      Parameters, the share that is quantized, and bytes: in memory, of the native file, and of GGUF
      where it holds the format.
    """
    config, format = config_from_dict(settings["config"]), settings["format"]
    params = random_weights(config)
    if format != PLAIN:
        positions = format if config.positions == "learned" else None
        rules = weight_rules(params, format, positions=positions)
        params = jax.block_until_ready(quantize_params(params, rules))
    leaves = jax.tree.leaves(params)
    with tempfile.TemporaryDirectory() as name:
        save_native(Path(name) / "native", config, params)
        native = sum(file.stat().st_size for file in (Path(name) / "native").iterdir())
        gguf = None
        if format in (PLAIN, *HOLDS):
            write_gguf(Path(name) / "model.gguf", config, params)
            gguf = (Path(name) / "model.gguf").stat().st_size
    return {
        "parameters": parameter_count(config),
        "quantized": report(params).share,
        "memory": sum(leaf.on_device_size_in_bytes() for leaf in leaves),
        "native": native,
        "gguf": gguf,
    }


def render(results: Results) -> list[str]:
    """Returns the table of all formats that were measured."""
    found = {name: results.by_name[name][0] for name in FORMATS if results.by_name.get(name)}
    if not found:
        return []
    plain = found.get(PLAIN)
    rows = []
    for name, values in found.items():
        cells = [name, f"{values['quantized']:.2%}" if name != PLAIN else ""]
        shares = []
        for place in ("memory", "native", "gguf"):
            size = values[place]
            share = size / plain[place] if size and plain else None
            cells.append(f"{size / 1e6:,.1f}" if size else "")
            cells.append(f"{share:.3f}x" if share is not None else "")
            if share is not None:
                shares.append(share)
        wanted = MOST.get(name)
        holds = "yes" if wanted and shares and max(shares) <= wanted else "no"
        rows.append([*cells, f"{wanted}x: {holds}" if wanted and shares else ""])
    names = ["format", "quantized", "memory, MB", "", "native, MB", "", "GGUF, MB", "", "at most"]
    count = next(iter(found.values()))["parameters"]
    return [
        f"{count:,} parameters, embedding, positions and head included; MB are 10^6 bytes; biases "
        "and norms stay float32. Formats of up to 4 bits take two numbers to a byte.",
        "",
        *grid(names, rows, "lrrrrrrrr"),
    ]


TABLES: tuple[Table, ...] = (Table("sizes", "Sizes", cells, render),)
