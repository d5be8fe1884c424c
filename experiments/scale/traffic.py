"""Traffic: the collectives of a compiled step against the textbook, array by array.

For each way to divide a model: what `parallel.traffic_formulas` asks for, what XLA:CPU has made of
the step, and, where the extra `tpu-plan` is installed, what the compiler for TPUs makes of it for
eight chips that need not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from experiments import plan_compile
from experiments.ablate.markdown import grid
from experiments.ablate.tables import Request, Results, Table
from experiments.grid import Measurement
from experiments.layout import Division, mesh_of
from experiments.plan_step import abstract_step
from experiments.scale.program import settings_for
from model.config import TransformerConfig
from model.presets import modern_tiny
from parallel.chips import chip_named
from parallel.report import readable
from parallel.traffic import Collective, collectives
from parallel.traffic_formulas import CPU, TEXTBOOK, Expected, Row, expected, explain, volumes
from train.optimizers import AdamW
from train.settings import to_json

CHIP = "v5e"
ROWS, TIME = 16, 32

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "data parallel": ("data=8", ()),
    "ZeRO-1": ("data=8", ("zero1",)),
    "FSDP": ("fsdp=8", ()),
    "tensor": ("tensor=8", ()),
    "tensor + sequence": ("tensor=8", ("sequence",)),
    "ring": ("context=8", ()),
    "pipeline, data": ("data=2,pipeline=4", ()),
    "data, FSDP, tensor": ("data=2,fsdp=2,tensor=2", ()),
}


def model() -> TransformerConfig:
    """The model whose step is compiled: eight of everything that a mesh divides."""
    shape = {"layers": 4, "heads": 8, "width": 64, "vocabulary_size": 128}
    return modern_tiny(scan_layers=True, **shape)


def cells(request: Request) -> list[Measurement]:
    """A program of each compiler for each case."""
    backends = ["cpu"] if plan_compile.missing(chip_named(CHIP)) else ["cpu", CHIP]
    return [
        Measurement(
            f"{name} on {backend}",
            {
                "table": "traffic",
                "case": name,
                "mesh": mesh,
                "more": list(more),
                "backend": backend,
            },
            measure,
        )
        for name, (mesh, more) in CASES.items()
        for backend in backends
    ]


def notes(request: Request) -> list[str]:
    """Says what is left out, and why."""
    reason = plan_compile.missing(chip_named(CHIP))
    return [f"Without columns of the TPU's compiler: {reason}"] if reason else []


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles the step and holds it against the formulas."""
    config, more, mesh = model(), tuple(settings["more"]), mesh_of(settings["mesh"])
    run = settings_for(config, rows=ROWS, time=TIME, optimizer=AdamW(clip_norm=None))
    if settings["backend"] == "cpu":
        text = abstract_step(run, mesh, Division(more)).lower().compile().as_text() or ""
        found: Sequence[Collective] = collectives(text, mesh)
    else:
        asked = plan_compile.Request(to_json(run), CHIP, settings["mesh"], more)
        found = plan_compile.traffic_elsewhere(asked)
    v = volumes(config, mesh.shape, rows=ROWS, time=TIME)
    backend = CPU if settings["backend"] == "cpu" else TEXTBOOK
    return {
        "case": settings["case"],
        "backend": settings["backend"],
        "rows": [row._asdict() for row in explain(found, expected(v, more, backend))],
        "sent": sum(each.sent for each in found),
        "textbook": sum(sent(each, mesh) for each in expected(v, more, TEXTBOOK)),
        "exact": all(each.exact for each in found),
    }


def sent(each: Expected, mesh: Mesh) -> float:
    """Bytes that a device sends for what a formula asks for, as a ring."""
    size = 1
    for axis in each.axes:
        size *= mesh.shape[axis]
    return Collective(each.kind, each.times, each.bytes, each.axes, size, True, "").sent


def found_rows(values: Mapping[str, Any]) -> list[Row]:
    """Returns the rows that were kept."""
    return [Row(**{**row, "axes": tuple(row["axes"])}) for row in values["rows"]]


def by_case(results: Results) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    """Yields each case with its values by backend."""
    for name in CASES:
        of = {
            values["backend"]: values
            for seeds in results.by_name.values()
            for values in seeds.values()
            if values["case"] == name
        }
        if "cpu" in of:
            yield name, of


def render(results: Results) -> list[str]:
    """Returns a summary, then the arrays of each case by kind and axis."""
    rows, details = [], []
    for name, of in by_case(results):
        cpu, tpu = of["cpu"], of.get(CHIP)
        arrays = found_rows(cpu)
        off = [row for row in arrays if row.expected != row.found]
        mesh, more = CASES[name]
        rows.append(
            [
                name,
                f"`{' + '.join([mesh, *more])}`",
                f"{sum(row.found for row in arrays):,}",
                str(sum(abs(row.found - row.expected) for row in off)),
                *(readable(cpu[key]) for key in ("textbook", "sent")),
                "-" if tpu is None else readable(tpu["sent"]),
            ]
        )
        details += [[name, *cells] for cells in summed(arrays, found_rows(tpu) if tpu else None)]
    head = ["way", "mesh", "arrays", "unexplained", "textbook", "XLA:CPU", f"TPU {CHIP}"]
    c = model()
    return [
        f"One step of {c.layers} layers of width {c.width}, vocabulary {c.vocabulary_size}, "
        f"batches of {ROWS} x {TIME}, AdamW, on eight devices. Arrays are counted one by one, as "
        "often as the loops around them run; unexplained are those that no formula asks for, or "
        "that are missing. Bytes are what a device sends in a step, as a ring. XLA:CPU has no "
        "reduce-scatter: its formula has an all-reduce, of which each device takes a part.",
        "",
        *grid(head, rows, "llrrrrr"),
        "",
        "By kind and axis, arrays (and their bytes, before division):",
        "",
        *grid(
            ["way", "collective", "over", "formula", "XLA:CPU", f"TPU {CHIP}"],
            details,
            "lllrrr",
        ),
    ]


def summed(cpu: Sequence[Row], tpu: Sequence[Row] | None) -> list[list[str]]:
    """Returns kind, axes, and count and bytes by formula and by each compiler."""
    keys = sorted({(row.kind, row.axes) for row in [*cpu, *(tpu or [])]})

    def text(rows: Sequence[Row] | None, key: tuple[str, tuple[str, ...]], column: str) -> str:
        if rows is None:
            return "-"
        same = [row for row in rows if (row.kind, row.axes) == key]
        count = sum(getattr(row, column) for row in same)
        size = sum(getattr(row, column) * row.bytes for row in same)
        return f"{count:,} ({readable(size)})" if count else "0"

    return [
        [
            key[0],
            "+".join(key[1]),
            text(cpu, key, "expected"),
            text(cpu, key, "found"),
            text(tpu, key, "found"),
        ]
        for key in keys
    ]


TABLE = Table(
    "traffic", "Traffic: the collectives of a step", cells, render, picture=None, notes=notes
)
