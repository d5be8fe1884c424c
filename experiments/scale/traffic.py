"""Traffic: the collectives of a compiled step against the textbook, array by array.

For each way to divide a model: what `parallel.traffic_formulas` asks for, what XLA:CPU has made of
the step, and, where the extra `tpu-plan` is installed, what the compiler for TPUs makes of a larger
one, whose arrays fill its tiles, for eight chips that need not exist. Each compiler is held against
the formulas with its own departures from the textbook, which have names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from experiments.grid import Measurement
from experiments.plan import compile as plan_compile
from experiments.plan.step import abstract_step
from experiments.runs.layout import Division, mesh_of
from experiments.scale.program import settings_for
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from model.config import TransformerConfig
from model.presets import modern_tiny
from parallel.chips import chip_named
from parallel.report import readable
from parallel.traffic import Collective, collectives
from parallel.traffic_formulas import (
    CPU,
    DEPARTURES,
    TEXTBOOK,
    TPU,
    Backend,
    Expected,
    Row,
    Volumes,
    expected,
    explain,
    volumes,
)
from train.optimizers import AdamW
from train.settings import to_json

CHIP = "v5e"


class Subject(NamedTuple):
    """What is compiled: eight of everything that a mesh divides.

    Attributes:
      shape: of the model.
      rows: of a batch.
      time: tokens of a row.
      backend: the departures of its compiler.
    """

    shape: dict[str, Any]
    rows: int
    time: int
    backend: Backend

    def config(self) -> TransformerConfig:
        """The model whose step is compiled."""
        return modern_tiny(scan_layers=True, layers=4, heads=8, **self.shape)

    def volumes(self, sizes: Mapping[str, int]) -> Volumes:
        """Its bytes on a mesh."""
        return volumes(self.config(), sizes, rows=self.rows, time=self.time)


SUBJECTS = {
    "cpu": Subject({"width": 64, "vocabulary_size": 128}, 16, 32, CPU),
    # Narrower kernels it pads, or sums whole and cuts; and what is float32 it multiplies as
    # bfloat16, and may send as such.
    CHIP: Subject({"width": 512, "vocabulary_size": 1024, "dtype": "bfloat16"}, 16, 128, TPU),
}
"""By compiler."""

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


REASONS = {
    (CHIP, "ring"): "a sum is left in the loop over layers that the formula has once for all; the "
    "bytes are the same",
    (CHIP, "pipeline, data"): "the final norm's sum of squares, one number for each token, is made "
    "on the last stage and given to all beside its output",
    (CHIP, "data, FSDP, tensor"): "gradients of heads' norms are summed over all axes at once "
    "instead of one after the other; the embedding's gradient is summed whole and cut, and its "
    "table gathered whole",
}
"""What is known of arrays that no formula asks for, by compiler and case; said only of those."""


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
                "shape": SUBJECTS[backend].shape,
                "batch": [SUBJECTS[backend].rows, SUBJECTS[backend].time],
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
    subject, more = SUBJECTS[settings["backend"]], tuple(settings["more"])
    mesh = mesh_of(settings["mesh"])
    run = settings_for(
        subject.config(), rows=subject.rows, time=subject.time, optimizer=AdamW(clip_norm=None)
    )
    if settings["backend"] == "cpu":
        text = abstract_step(run, mesh, Division(more)).lower().compile().as_text() or ""
        found: Sequence[Collective] = collectives(text, mesh)
    else:
        asked = plan_compile.Request(to_json(run), CHIP, settings["mesh"], more)
        found = plan_compile.traffic_elsewhere(asked)
    v = subject.volumes(mesh.shape)
    rows = explain(found, expected(v, more, subject.backend))
    return {
        "case": settings["case"],
        "backend": settings["backend"],
        "rows": [row._asdict() for row in rows],
        "sent": sum(each.sent for each in found),
        "textbook": sum(sent(each, mesh) for each in expected(v, more, TEXTBOOK)),
        "departures": departures(v, more, subject.backend, mesh),
        "exact": all(each.exact for each in found),
    }


def departures(v: Volumes, more: Sequence[str], backend: Backend, mesh: Mesh) -> list[str]:
    """Returns what a compiler does otherwise than the textbook that changes the bytes of a step."""

    def total(of: Backend) -> float:
        return sum(sent(each, mesh) for each in expected(v, more, of))

    flags = backend._asdict()
    return [
        words
        for name, words in DEPARTURES.items()
        if flags[name] != getattr(TEXTBOOK, name)
        and total(backend) != total(Backend(**flags | {name: getattr(TEXTBOOK, name)}))
    ]


def sent(each: Expected, mesh: Mesh) -> float:
    """Bytes that a device sends for what a formula asks for, as a ring."""
    size = 1
    for axis in each.axes:
        size *= mesh.shape[axis]
    return Collective(each.kind, each.times, each.bytes, each.axes, size, True, "").sent


def found_rows(values: Mapping[str, Any]) -> list[Row]:
    """Returns the rows that were kept."""
    return [Row(**{**row, "axes": tuple(row["axes"])}) for row in values["rows"]]


def by_case(results: Results, backend: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each case that a compiler has, with its values."""
    found = {
        values["case"]: values
        for seeds in results.by_name.values()
        for values in seeds.values()
        if values["backend"] == backend
    }
    for name in CASES:
        if name in found:
            yield name, found[name]


def render(results: Results) -> list[str]:
    """Returns, for each compiler, a summary and the arrays of each case by kind and axis."""
    lines = [
        "Arrays are counted one by one, as often as the loops around them run; unexplained are "
        "those that no formula asks for, or that are missing. Bytes are what a device sends in a "
        "step, as a ring. The formula is the textbook's with the departures that are named.",
    ]
    for backend, label in (("cpu", "XLA:CPU"), (CHIP, f"TPU {CHIP}")):
        if list(by_case(results, backend)):
            lines += ["", *section(results, backend, label)]
    return lines


def section(results: Results, backend: str, label: str) -> list[str]:
    """Returns the tables of one compiler."""
    rows, details, loops, left = [], [], [], list[str]()
    for name, values in by_case(results, backend):
        arrays = found_rows(values)
        off = sum(abs(row.found - row.expected) for row in arrays)
        mesh, more = CASES[name]
        rows.append(
            [
                name,
                f"`{' + '.join([mesh, *more])}`",
                f"{sum(row.found for row in arrays):,}",
                str(off) if not off else f"**{off}**",
                *(readable(values[key]) for key in ("textbook", "sent")),
                "; ".join(values["departures"]) or "-",
            ]
        )
        details += [[name, *cells] for cells in summed(arrays)]
        loops += [] if values["exact"] else [name]
        if off:
            left.append(f"- {name}: {left_over(arrays)} ({REASONS.get((backend, name), 'why?')})")
    subject = SUBJECTS[backend]
    c = subject.config()
    head = [
        "way",
        "mesh",
        "arrays",
        "unexplained",
        "textbook",
        label,
        "otherwise than the textbook",
    ]
    return [
        f"**{label}**: one step of {c.layers} layers of width {c.width}, vocabulary "
        f"{c.vocabulary_size}, {c.dtype}, batches of {subject.rows} x {subject.time}, AdamW, on "
        "eight devices. "
        + (
            f"A loop of unknown length was counted once in: {', '.join(loops)}."
            if loops
            else "All loops of these programs say how often they run."
        ),
        "",
        *grid(head, rows, "llrrrrl"),
        "",
        *(["Found where the formula has another number:", "", *left, ""] if left else []),
        "By kind and axis, arrays (and their bytes, before division):",
        "",
        *grid(["way", "collective", "over", "formula", label], details, "lllrr"),
    ]


def left_over(rows: Sequence[Row]) -> str:
    """Returns the arrays that a formula and a program disagree about.

    >>> left_over([Row("all-reduce", ("data",), 64, 1, 3, ""), Row("all-gather", (), 8, 1, 1, "")])
    'all-reduce over data of 64 B, 3 for 1'
    """
    return "; ".join(
        f"{row.kind} over {'+'.join(row.axes)} of {readable(row.bytes)}, {row.found} for "
        f"{row.expected}"
        for row in rows
        if row.expected != row.found
    )


def summed(rows: Sequence[Row]) -> list[list[str]]:
    """Returns kind, axes, and count and bytes by formula and by the compiler."""

    def text(same: Sequence[Row], column: str) -> str:
        count = sum(getattr(row, column) for row in same)
        size = sum(getattr(row, column) * row.bytes for row in same)
        return f"{count:,} ({readable(size)})" if count else "0"

    def of(key: tuple[str, tuple[str, ...]]) -> list[str]:
        same = [row for row in rows if (row.kind, row.axes) == key]
        return [key[0], "+".join(key[1]), text(same, "expected"), text(same, "found")]

    return [of(key) for key in sorted({(row.kind, row.axes) for row in rows})]


TABLE = Table(
    "traffic", "Traffic: the collectives of a step", cells, render, picture=None, notes=notes
)
