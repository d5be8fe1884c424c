"""How the cost of a training step grows with depth, width, context and vocabulary.

Each point is a process of its own: step time, what the compiled step needs in memory beside its
arguments and for them, and the time to compile it, with no cache. Exponents are fitted over the
upper half of the sizes, where constants have faded, and stand beside that of the FLOP count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.child import Subject
from experiments.bench.ratios import exponent
from experiments.bench.shapes import (
    Shape,
    batches_of,
    settings_of,
    shape_from_json,
    shape_to_json,
)
from experiments.bench.sides import Side
from experiments.bench.table import Table, rows_of
from experiments.grid import Measured, Measurement
from model.config import TransformerConfig
from model.flops import flops_per_token
from model.presets import gpt2

LARGEST = 7 * 2**30  # bytes: a step that needs more is compiled, but not run
EXCESS = 0.2  # of an exponent over that of the FLOP count, from which the text says so
SCANNED = "layers in a scan"  # one block compiled for all, `TransformerConfig.scan_layers`
SIZES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16, 24, 32, 48),
    SCANNED: (2, 8, 24, 48),
    "width": (128, 256, 512, 1024, 2048),
    "length": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "vocabulary": (256, 1024, 4096, 16384, 32768, 65536, 131072),
}
BASE: dict[str, int] = {"layers": 2, "width": 128, "length": 128, "vocabulary": 1024}
TOKENS = 1024  # of a batch, unless one row is longer
COSTS = ("step", "memory", "compile")


def shape_at(axis: str, size: int) -> Shape:
    """Returns the shape whose `axis` has this size and which is `BASE` otherwise.

    >>> shape_at("length", 4096).batch_size, shape_at("layers", 48).batch_size
    (1, 8)
    >>> shape_at("layers in a scan", 8).model.scan_layers
    True
    """
    at = {**BASE, "layers" if axis == SCANNED else axis: size}
    model: TransformerConfig = gpt2(
        layers=at["layers"],
        width=at["width"],
        heads=at["width"] // 64,
        max_length=at["length"],
        vocabulary_size=at["vocabulary"],
        dropout=0.0,
        scan_layers=axis == SCANNED,
    )
    return Shape(model, max(1, TOKENS // at["length"]), at["length"])


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures one point in a process of its own.

    Args:
      settings: "shape", "steps" to time, "largest" bytes that are run.

    Returns:
      "compile" and "step" seconds (None where it was not run), "memory" bytes, "flops" of a step.
    """
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with Side("growth", {"shape": settings["shape"]}, environment) as side:
        return side.ask("point", steps=settings["steps"], largest=settings["largest"])


def subject(settings: Mapping[str, Any]) -> Subject:
    """Answers "point" (steps, largest)."""
    import jax

    from experiments.runs.assemble import initial_params
    from model.transformer import Transformer
    from train.losses import cross_entropy
    from train.optimizers import build
    from train.step import init_state, make_train_step

    shape = shape_from_json(settings["shape"])
    run, config = settings_of(shape), shape.model

    def first_state() -> Any:
        params = initial_params(run, config)
        return init_state(jax.random.key(1), params, transformation())

    def transformation() -> Any:
        abstract = jax.eval_shape(lambda: initial_params(run, config))
        return build(run.optimizer, run.schedule, run.steps, abstract)

    def point(steps: int, largest: float) -> dict[str, Any]:
        step = make_train_step(Transformer(config), [cross_entropy()], transformation())
        batch = batches_of(shape)[0]
        lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(first_state), {}, batch)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        sizes: Any = compiled.memory_analysis()
        memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
        tokens = shape.batch_size * shape.sequence_length
        found = {
            "compile": seconds,
            "memory": memory,
            "flops": 3 * tokens * flops_per_token(config, shape.sequence_length),
            "step": None,
        }
        if memory > largest:
            return found
        state, batch, times = jax.jit(first_state)(), jax.device_put(batch), []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, _ = compiled(state, {}, batch)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - start)
        return found | {"step": statistics.median(times[1:])}

    return Subject({}, {"point": point})


def fits(points: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the exponents of "flops" and of each cost over the upper half of the sizes.

    Args:
      points: size -> what `measure` returned.

    >>> row = lambda n: {"flops": n, "step": n * n, "memory": 3 * n, "compile": 2.0}
    >>> {name: round(found, 6) for name, found in fits({n: row(n) for n in (1, 2, 4, 8)}).items()}
    {'flops': 1.0, 'step': 2.0, 'memory': 1.0, 'compile': 0.0}
    """
    found: dict[str, float | None] = {}
    for name in ("flops", *COSTS):
        known = {n: row[name] for n, row in sorted(points.items()) if row[name] is not None}
        upper = list(known)[len(known) // 2 - (len(known) < 4) :] if len(known) > 1 else []
        found[name] = exponent(upper, [known[n] for n in upper]) if len(upper) > 1 else None
    return found


def excesses(axis: str, found: Mapping[str, float | None]) -> list[str]:
    """Returns a sentence for each cost that grows faster than the FLOP count does.

    >>> excesses("length", {"flops": 1.5, "step": 1.9, "memory": 1.4, "compile": None})
    ['Over length the step grows as n^1.90, and its operations as n^1.50.']
    """
    flops = found["flops"]
    names = {"step": "the step", "memory": "its memory", "compile": "its compilation"}
    return [
        f"Over {axis} {names[cost]} grows as n^{value:.2f}, and its operations as n^{flops:.2f}."
        for cost in COSTS
        if (value := found[cost]) is not None and flops is not None and value > flops + EXCESS
    ]


def points_of(results: Sequence[Measured]) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns axis -> size -> values."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for measured in results:
        settings = measured.measurement.settings
        found.setdefault(settings["axis"], {})[settings["size"]] = measured.values
    return found


def text(results: Sequence[Measured]) -> str:
    """Returns exponents, and costs relative to the smallest size, as Markdown."""
    exponents, rows, sentences = [], [], []
    for axis, points in points_of(results).items():
        found = fits(points)
        shown = ["" if (v := found[name]) is None else f"{v:.2f}" for name in ("flops", *COSTS)]
        exponents.append([axis, f"{min(points)} to {max(points)}", *shown])
        sentences += excesses(axis, found)
        first = points[min(points)]
        for size, row in sorted(points.items()):
            relative = [
                "not run" if row[name] is None else f"{row[name] / first[name]:.3g}"
                for name in ("flops", *COSTS)
            ]
            rows.append([f"{axis} {size}", *relative])
    names = ("operations", "step", "memory", "compilation")
    return "\n\n".join(
        [
            "Exponents of the cost over the upper half of the sizes, of a GPT-2 block at "
            + ", ".join(f"{name} {size}" for name, size in BASE.items())
            + f" otherwise, {TOKENS} tokens a batch (one row where it is longer):",
            rows_of(("over", "sizes", *names), exponents),
            *_scanned(points_of(results)),
            *(sentences or ["Nothing grows faster than the operations do."]),
            "Costs relative to the smallest size:",
            rows_of(("at", *names), rows),
        ]
    )


def _scanned(by_axis: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """What a scan over the layers costs and saves at the depths that both forms have."""
    loop, scan = (by_axis.get(axis, {}) for axis in ("layers", SCANNED))
    found = []
    for size in sorted(set(loop) & set(scan)):
        ratios = {
            cost: loop[size][cost] / scan[size][cost]
            for cost in COSTS
            if loop[size][cost] and scan[size][cost]
        }
        found.append([str(size), *(f"{ratios[c]:.2f}x" if c in ratios else "" for c in COSTS)])
    if not found:
        return []
    about = (
        "A program grows with its layers unless they are scanned (`scan_layers`). Costs of the "
        "loop over those of the scan, above 1 where the scan costs less:"
    )
    return [about, rows_of(("layers", "step", "memory", "compilation"), found)]


def picture(results: Sequence[Measured], path: Path) -> None:
    """Draws costs relative to the smallest size, an axis a panel, into a PNG."""
    from matplotlib.figure import Figure

    by_axis = points_of(results)
    figure = Figure(figsize=(3.4 * len(by_axis), 3.4), layout="constrained")
    panels = figure.subplots(1, len(by_axis), squeeze=False)[0]
    for panel, (axis, points) in zip(panels, by_axis.items(), strict=True):
        first = points[min(points)]
        for name in ("flops", *COSTS):
            known = {n: row[name] for n, row in sorted(points.items()) if row[name] is not None}
            relative = [value / first[name] for value in known.values()]
            style = {"color": "black", "linestyle": "--"} if name == "flops" else {"marker": "o"}
            label = "operations" if name == "flops" else name
            panel.plot(list(known), relative, label=label, markersize=3, **style)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel("relative to the smallest")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def growth_table() -> Table:
    """Every axis at every size."""
    measurements = tuple(
        Measurement(
            f"{axis} {size}",
            {
                "table": "growth",
                "axis": axis,
                "size": size,
                "shape": shape_to_json(shape_at(axis, size)),
                "steps": 3,
                "largest": LARGEST,
            },
            measure,
        )
        for axis, sizes in SIZES.items()
        for size in sizes
    )
    return Table("How cost grows", measurements, text, picture)
