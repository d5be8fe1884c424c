"""Memory: what each device holds of parameters and optimizer, and what attention needs beside.

The state is laid out for real and the bytes of its parts are counted on every device; larger models
are counted from their shapes. Attention's temporaries are those that the compiler has planned for
the gradient of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from experiments.grid import Measurement
from experiments.runs.layout import mesh_of, of_state
from experiments.scale.program import first, program, settings_for
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from model.attention import Attention, Visibility, dot_product_attention
from model.presets import preset
from parallel.report import (
    bytes_of,
    bytes_per_device,
    readable,
    temporary_bytes,
    whole_leaves,
)
from parallel.ring_attention import ring_attention
from train.optimizers import AdamW, Muon

DEVICES = 8
CLOSE = 0.02
"""How far from one eighth the bytes of a device may be, relative."""

MODELS = (("modern_mini", 4096, True), ("gpt2_mini", 4096, True), ("gpt2", 50304, False))
"""Preset, vocabulary, and whether it is put onto the devices (the others are counted by shape)."""

TILE = 512  # of `parallel.ring_attention.ring_attention`, by default
TOKENS = (1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_WIDTH = 4, 32
FORMS = ("full", "full, divided", "ring")


def cells(request: Request) -> list[Measurement]:
    """States by model and optimizer; attention by form and length."""
    states = [
        Measurement(
            f"{name}, {optimizer}",
            {
                "table": "memory",
                "model": name,
                "vocabulary": vocabulary,
                "optimizer": optimizer,
                "placed": placed,
                "mesh": f"fsdp={DEVICES}",
                "counts": "vectors apart",
            },
            measure_state,
        )
        for name, vocabulary, placed in MODELS
        for optimizer in ("adamw", "muon")
    ]
    attention = [
        Measurement(
            f"{form} attention, {tokens} tokens",
            {"table": "memory", "attention": form, "tokens": tokens},
            measure_attention,
        )
        for form in FORMS
        for tokens in TOKENS
    ]
    return states + attention


def measure_state(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Counts the bytes of parameters and optimizer state, whole and on the fullest device."""
    config = preset(settings["model"], vocabulary_size=settings["vocabulary"], dropout=0.0)
    optimizer = {"adamw": AdamW, "muon": Muon}[settings["optimizer"]]()
    built = program(settings_for(config, optimizer=optimizer), settings["mesh"])
    if settings["placed"]:
        state = first(built)
        parts = {"parameters": state.params, "optimizer": state.optimizer}
        held = {name: max(held_by_device(tree).values()) for name, tree in parts.items()}
    else:
        parts = {"parameters": built.shapes.params, "optimizer": built.shapes.optimizer}
        laid = of_state(built.layout, built.shapes)
        of = {"parameters": laid.params, "optimizer": laid.optimizer}
        held = {name: bytes_per_device(parts[name], of[name]) for name in parts}
    whole = {name: bytes_of(tree) for name, tree in parts.items()}
    shapes, shardings = built.shapes, of_state(built.layout, built.shapes)
    kept = sum(
        size
        for tree, of in (
            (shapes.params, shardings.params),
            (shapes.optimizer, shardings.optimizer),
        )
        for _, size in whole_leaves(tree, of)
    )
    return {
        "kept_whole": kept,
        "placed": settings["placed"],
        **{f"{name}_whole": size for name, size in whole.items()},
        **{f"{name}_per_device": size for name, size in held.items()},
    }


def held_by_device(tree: Any) -> dict[int, int]:
    """Returns the bytes of the arrays' parts that lie on each device, by its id.

    >>> held_by_device({"a": jax.device_put(jnp.ones(4), jax.devices()[0])})
    {0: 16}
    """
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held


def measure_attention(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles the gradient of one layer of attention and asks for its temporaries."""
    form = settings["attention"]
    attention: Attention = ring_attention(tile=TILE) if form == "ring" else dot_product_attention
    devices = 1 if form == "full" else DEVICES
    shape = jax.ShapeDtypeStruct((1, settings["tokens"], HEADS, HEAD_WIDTH), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, Visibility(), None).sum()

    with jax.set_mesh(mesh_of(f"context={devices}")):
        spec = P(None, "context") if devices > 1 else P()
        step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=spec, out_shardings=spec)
        size = temporary_bytes(step.lower(shape, shape, shape).compile())
    return {"form": form, "tokens": settings["tokens"], "temporaries": size}


def render(results: Results) -> list[str]:
    """Returns both tables."""
    rows = []
    for name, values in each_of(results):
        if "placed" not in values:
            continue
        whole = values["parameters_whole"] + values["optimizer_whole"]
        held = values["parameters_per_device"] + values["optimizer_per_device"]
        off = held / (whole / DEVICES) - 1
        how = "on the devices" if values["placed"] else "from shapes"
        kept = "yes" if abs(off) <= CLOSE else "**no**"
        vectors = values["kept_whole"]
        divided = (held - vectors) / ((whole - vectors) / DEVICES) - 1
        rows.append(
            [
                name,
                *map(readable, (whole, held)),
                f"{off:+.2%}",
                *(readable(vectors), f"{divided:+.2%}", how, kept),
            ]
        )
    head = ["model, optimizer", "whole", "a device", "off one eighth"]
    head += ["of it whole", "the rest off", "counted", "within 2 %"]
    by_form = temporaries(results)
    lengths = [n for n in TOKENS if any(n in values for values in by_form.values())]
    second = []
    for n in lengths:
        sizes = [by_form.get(form, {}).get(n) for form in FORMS]
        full, _, ring = sizes
        ratio = f"{full / ring:,.0f}x" if full and ring else "-"
        second.append([f"{n:,}", *("-" if s is None else readable(s) for s in sizes), ratio])
    names = ["tokens", "full, 1 device", "full, divided over 8", "ring over 8", "full / ring"]
    return [
        f"Parameters and optimizer state at `fsdp={DEVICES}`, on the fullest device. Vectors "
        "(scales of norms, biases, and their moments) lie whole on every device: to gather each "
        "would cost a message a layer and save little. They grow as the width, and matrices as "
        "its square, so that narrow models miss 2 %.",
        "",
        *grid(head, rows, "lrrrrrll"),
        "",
        f"Temporary bytes a device in the gradient of one layer of attention ({HEADS} heads of "
        f"width {HEAD_WIDTH}, one row, float32). Full attention divided: plain attention on time "
        "laid over the same axis, as the compiler does it. The ring holds a tile of scores at a "
        f"time, [T / {2 * DEVICES}, {TILE}] at most: while a chunk of T / {2 * DEVICES} tokens is "
        f"no longer than a tile, to {2 * DEVICES * TILE:,} tokens, the tile is the whole chunk and "
        "its bytes grow as the square; behind that, with the row.",
        "",
        *grid(names, second, "rrrrr"),
    ]


def each_of(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields name and values of every finished row."""
    for name, seeds in results.by_name.items():
        for values in seeds.values():
            yield name, values


def temporaries(results: Results) -> dict[str, dict[int, int]]:
    """Returns form -> tokens -> temporary bytes a device."""
    by_form: dict[str, dict[int, int]] = {}
    for _, values in each_of(results):
        if values.get("temporaries"):
            by_form.setdefault(values["form"], {})[values["tokens"]] = values["temporaries"]
    return by_form


def picture(results: Results) -> Any:
    """Draws attention's temporaries against tokens; None if there are none yet."""
    from matplotlib.figure import Figure

    by_form = temporaries(results)
    if not by_form:
        return None
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    labels = {"full": "full, 1 device", "full, divided": "full, over 8", "ring": "ring, over 8"}
    for form, sizes in by_form.items():
        tokens = sorted(sizes)
        mebibytes = [sizes[n] / 2**20 for n in tokens]
        axis.plot(tokens, mebibytes, marker="o", markersize=4, label=labels[form])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(TOKENS, [f"{n // 1024}k" for n in TOKENS])
    low, high = (math.floor(math.log2(v)) for v in axis.get_ylim())
    powers = [2.0**n for n in range(low, high + 2, 2)]
    axis.set_yticks(powers, [f"{v:g}" for v in powers])
    axis.set(xlabel="tokens of a row", ylabel="temporaries a device (MiB)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


TABLE = Table("memory", "Memory: what each device holds", cells, render, picture)
