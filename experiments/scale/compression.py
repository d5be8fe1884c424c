"""Compressed gradients: the bytes that each worker sends, and the loss that they end at.

Bytes are counted twice: by the formula of each reduce, and from the collectives in the compiled
program of the gradient function, as a ring. Losses are those of runs on four workers, each a
training run like any other, on the same seeds (initial parameters, order of the data).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.grid import Measurement
from experiments.methods.parallel import CompressedReduce
from experiments.runs.assemble import abstract_whole
from experiments.runs.layout import mesh_of
from experiments.scale.training import SIZE, STEPS, VOCABULARY, settings_of, trained
from experiments.tables.margins import margin
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from parallel.per_worker import per_worker
from parallel.traffic import collectives

WORKERS = (2, 4, 8)
TRAINED_ON = 4
LARGEST_INT8 = 0.27  # of the bytes of a float32 all-reduce
CLOSE = 0.005  # how far int8 and PowerSGD may end from the uncompressed loss, relative

FORMS: dict[str, CompressedReduce] = {
    "none": CompressedReduce("none"),
    "int8": CompressedReduce("int8"),
    "PowerSGD, rank 4": CompressedReduce("powersgd", rank=4),
    "PowerSGD, rank 32, blocks alone": CompressedReduce(
        "powersgd", rank=32, matrices="blocks/.*/kernel"
    ),
    "top-k, 10 %": CompressedReduce("top_k", density=0.10),
    "top-k, 3 %": CompressedReduce("top_k", density=0.03),
    "top-k, 1 %": CompressedReduce("top_k", density=0.01),
}
BOUND = ("int8", "PowerSGD, rank 4", "PowerSGD, rank 32, blocks alone")
"""Those whose loss is held against `CLOSE`."""


class OnlyKey(NamedTuple):
    """As much of a step's context as a gradient function looks at."""

    rng: jax.Array
    extra: dict[str, Any]


def cells(request: Request) -> list[Measurement]:
    """Bytes by form and workers, then a run by form and seed."""
    sizes = [
        Measurement(
            f"{name}: {workers} workers",
            {
                "table": "compression",
                "form": name,
                "method": dataclasses.asdict(FORMS[name]),
                "workers": workers,
                **model_of_runs(),
            },
            measure_bytes,
        )
        for name in FORMS
        for workers in WORKERS
    ]
    runs = [
        trained(
            name, settings_of(seed, methods=(form,)), f"data={TRAINED_ON}", request, "compression"
        )
        for seed in range(request.seeds)
        for name, form in FORMS.items()
    ]
    return sizes + runs


def model_of_runs() -> dict[str, Any]:
    """What of the runs the bytes depend on."""
    return {"layers": SIZE.layers, "width": SIZE.width, "vocabulary": VOCABULARY}


def measure_bytes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Counts what one worker sends in a step: by formula, and in the compiled program."""
    reduce, workers = FORMS[settings["form"]].reduce(), settings["workers"]
    shapes = shapes_of_runs()
    plug = per_worker(reduce)

    # The program of the gradient function itself, around a loss that needs no model. Its gradient
    # is another one for each tensor, or the compiler would sum equal ones once.
    def loss(params: Any, batch: jax.Array, context: Any) -> tuple[jax.Array, dict]:
        squares = (jnp.square(leaf).sum() * batch.sum() for leaf in jax.tree.leaves(params))
        return sum(squares, jnp.float32(0)), {}

    mesh = mesh_of(f"data={workers}")
    with jax.set_mesh(mesh):
        carry = jax.eval_shape(lambda: plug.init(zeros_like(shapes), {}))
        run = jax.jit(functools.partial(plug.apply, loss))
        context = OnlyKey(jax.random.key(0), {})
        batch = jax.ShapeDtypeStruct((workers, 1), jnp.float32)
        text = run.lower(shapes, batch, context, carry).compile().as_text() or ""
    found = [each for each in collectives(text, mesh) if each.bytes > 8]  # not single numbers
    plain = FORMS["none"].reduce().bytes_sent(shapes, workers)
    kinds = sorted({each.kind for each in found})
    return {
        "workers": workers,
        "form": settings["form"],
        "formula": float(reduce.bytes_sent(shapes, workers)),
        "program": float(sum(each.sent for each in found)),
        "plain": float(plain),
        "kinds": kinds,
    }


def shapes_of_runs() -> Any:
    """Shapes of the parameters of the runs."""
    settings = settings_of(0)
    return abstract_whole(settings, settings.phases[0].model)


def zeros_like(shapes: Any) -> Any:
    """Zeros of these shapes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def sizes(results: Results) -> list[Mapping[str, Any]]:
    """Returns the values of the rows about bytes."""
    return [
        values
        for seeds in results.by_name.values()
        for values in seeds.values()
        if "formula" in values
    ]


def render(results: Results) -> list[str]:
    """Returns bytes by workers, then losses."""
    rows = []
    found = {(v["form"], v["workers"]): v for v in sizes(results)}
    for name in FORMS:
        of = [found.get((name, workers)) for workers in WORKERS]
        if not any(of):
            continue
        cells, kinds, off = [], set[str](), [0.0]
        for values in of:
            if values is None:
                cells.append("-")
                continue
            cells.append(f"{values['program']:,.0f} ({values['program'] / values['plain']:.1%})")
            kinds |= set(values["kinds"])
            off.append(abs(values["program"] / values["formula"] - 1))
        rows.append([name, *cells, f"{max(off):.2%}", ", ".join(sorted(kinds))])
    head = ["form", *(f"{n} workers" for n in WORKERS), "off the formula", "collectives"]
    int8 = [v["program"] / v["plain"] for v in sizes(results) if v["form"] == "int8"]
    lines = [
        "Bytes that one worker sends in a step, from the compiled program and counted as a ring; "
        "in brackets the part of a float32 all-reduce. Top-k codes are gathered, so that they grow "
        "with the workers.",
        "",
        *grid(head, rows, "l" + "r" * (len(WORKERS) + 1) + "l"),
    ]
    if int8:
        kept = "at most" if max(int8) <= LARGEST_INT8 else "**more than**"
        lines += ["", f"int8 sends {max(int8):.1%}, {kept} {LARGEST_INT8:.0%}."]
    return lines + losses(results)


def losses(results: Results) -> list[str]:
    """Returns the table of final losses, paired by seed with the uncompressed ones."""
    rows = []
    for name in FORMS:
        if not (seeds := results.shared("none", name)):
            continue
        plain, ours = results.pair("none", name, "loss")
        off = [o / p - 1 for o, p in zip(ours, plain, strict=True)]
        found = margin(ours, plain)
        kept = "-"
        if name in BOUND:
            kept = "yes" if abs(np.mean(off)) <= CLOSE else "**no**"
        cells = [f"{np.mean(ours):.4f}", f"{min(ours):.4f} to {max(ours):.4f}"]
        difference = "-" if name == "none" else f"{np.mean(off):+.2%}"
        each = "-" if name == "none" else ", ".join(f"{o:+.2%}" for o in off)
        error = "-" if name == "none" else found.text
        rows.append([name, str(len(seeds)), *cells, difference, each, error, kept])
    if not rows:
        return []
    names = ["form", "seeds", "loss", "range", "off uncompressed", "by seed", "standard errors"]
    return [
        "",
        f"Validation loss after {STEPS} steps on {TRAINED_ON} workers ({SIZE.layers} layers of "
        f"width {SIZE.width}, batches of {SIZE.batch_size} x {SIZE.sequence_length} tokens, the "
        "demo's recipe), error feedback throughout.",
        "",
        *grid([*names, f"within {CLOSE:.1%}"], rows, "lrrrrrrl"),
        "",
        "What other ranks, matrices and optimizers make of PowerSGD is in the next table.",
    ]


def picture(results: Results) -> Any:
    """Draws the loss against the bytes sent; None without both."""
    from matplotlib.figure import Figure

    found = {v["form"]: v for v in sizes(results) if v["workers"] == TRAINED_ON}
    names = [name for name in FORMS if name in found and results.by_name.get(name)]
    if len(names) < 2:
        return None
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(names):
        part = 100 * found[name]["program"] / found[name]["plain"]
        values = results.column(name, "loss")
        axis.plot([part] * len(values), values, "o", color=f"C{number}", label=name, alpha=0.8)
    axis.set_xscale("log")
    ticks = [2, 5, 10, 25, 50, 100]
    axis.set_xticks(ticks, [f"{n}" for n in ticks])
    axis.minorticks_off()
    axis.set(
        xlabel=f"bytes sent by each of {TRAINED_ON} workers (% of a float32 all-reduce)",
        ylabel=f"validation loss after {STEPS} steps",
    )
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


TABLE = Table("compression", "Compressed gradients: bytes and loss", cells, render, picture)
