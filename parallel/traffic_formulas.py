"""Textbook traffic: which collectives a step should have, from the shapes of the model alone.

    v = volumes(config, mesh.shape, rows=64, time=1024)
    rows = explain(collectives(compiled.as_text(), mesh), expected(v))
    print(explained_table(rows))

One function for each way to divide a model says what it sends, array by array; `explain` holds a
compiled program against them, and what is left over is marked. Where a compiler departs from the
textbook, `Backend` says how, so that the difference has a name instead of a tolerance.

| way      | forward, per layer                 | backward, per layer                   |
|----------|------------------------------------|---------------------------------------|
| data     |                                    | gradients summed                      |
| ZeRO-1   |                                    | the same; updates gathered, once      |
| FSDP     | kernels gathered                   | kernels gathered, gradients summed    |
| tensor   | two sums of the stream             | two sums of its gradient              |
| sequence | two gathers, two scattered sums    | the same                              |
| ring     | n - 1 hops of keys and values      | n - 1 hops of them and their gradients|
| pipeline | M v + n - 1 hops of a micro-batch  | the same; gradients summed, once      |

Sources: Rajbhandari et al. 2020 (arXiv:1910.02054) for ZeRO and FSDP, Shoeybi et al. 2019
(arXiv:1909.08053) for tensor, Korthikanti et al. 2022 (arXiv:2205.05198) for sequence, Liu et al.
2023 (arXiv:2310.01889) for the ring, Huang et al. 2019 (arXiv:1811.06965) for the pipeline.

Shapes: B batch, T time, D width, V vocabulary, L layers, G key/value heads, K head width, M parts
of a batch in a pipeline that pass it v times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parallel.traffic import Collective
from parallel.traffic_volumes import Volumes, volumes

__all__ = [
    "CPU",
    "DEPARTURES",
    "TEXTBOOK",
    "TPU",
    "Backend",
    "Expected",
    "Row",
    "Volumes",
    "expected",
    "explain",
    "explained_table",
    "unexplained",
    "volumes",
]

NUMBER = 8
"""Bytes of the largest single number; sums of numbers (loss, norms) are named as what they are."""


class Backend(NamedTuple):
    """What a compiler makes of the textbook.

    Attributes:
      scatters: it has a reduce-scatter; otherwise an all-reduce, of which each device takes a part.
      joins_sums: it adds the gradients of a branch's input before it sums them over devices, one
        array, instead of summing each (q, k and v; up and gate).
      sums_after_loops: gradients of vectors are summed once for all layers, and those of the
        stages of a pipeline once for all micro-batches.
      looks_up_converted: the embedding's table is converted to the type of the computation before
        tokens are looked up in it.
      adds_rows: it adds the losses of a device's rows before it sums them over a ring, one number.
    """

    scatters: bool = False
    joins_sums: bool = False
    sums_after_loops: bool = False
    looks_up_converted: bool = False
    adds_rows: bool = False


CPU = Backend()
"""XLA:CPU. It leaves the sums of gradients in the loop of a pipeline, at each of its steps."""

TEXTBOOK = Backend(scatters=True, joins_sums=True, sums_after_loops=True, adds_rows=True)
"""As the papers count; GPipe accumulates the gradients of its micro-batches, and sums once."""

TPU = Backend(*[True] * 5)
"""XLA for TPUs."""

DEPARTURES = {
    "scatters": "no reduce-scatter: an all-reduce, of which each device takes a part",
    "joins_sums": "the gradients of a branch's input are summed over devices one by one",
    "sums_after_loops": "a pipeline's gradients are summed at each of its steps",
    "looks_up_converted": "the table is converted before tokens are looked up in it",
    "adds_rows": "the loss of each row is summed over a ring by itself",
}
"""What it says of a compiler that its `Backend` differs from `TEXTBOOK` there."""


class Expected(NamedTuple):
    """Arrays of one size that a collective speaks of.

    Attributes:
      kind: one of `parallel.traffic.KINDS`.
      axes: of the mesh.
      times: arrays in one step.
      bytes: of each, as `parallel.traffic.Collective` counts them.
      why: for a reader.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    why: str


class Row(NamedTuple):
    """Arrays of one kind, axis and size: how many a formula asks for, how many a program has."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    expected: int
    found: int
    why: str


def expected(
    v: Volumes, more: Sequence[str] = (), backend: Backend = CPU, recomputes: bool = False
) -> list[Expected]:
    """Returns all collectives of a step: those of each axis above 1, and of the strategies `more`.

    Args:
      v: from `volumes`.
      more: "zero1", "sequence".
      backend: `CPU`, `TPU` or `TEXTBOOK`.
      recomputes: whether the backward pass runs each block's forward pass again.

    >>> from model.presets import modern_tiny
    >>> v = volumes(modern_tiny(layers=3), {"data": 8}, rows=8, time=8)
    >>> sum(each.times * each.bytes for each in expected(v))  # every parameter, four bytes each
    164928
    """
    found = gradients(v, more, backend)
    if "zero1" in more:
        found += zero1(v)
    if v.sizes["fsdp"] > 1:
        found += fsdp(v, backend)
    if v.sizes["tensor"] > 1:
        form = sequence if "sequence" in more else tensor
        found += form(v, backend, recomputes) + vocabulary_loss(v)
    if v.sizes["context"] > 1:
        found += ring(v, backend, recomputes)
    if v.sizes["pipeline"] > 1:
        found += pipeline(v)
    return [each for each in found if each.times and each.bytes]


def gradients(v: Volumes, more: Sequence[str] = (), backend: Backend = CPU) -> list[Expected]:
    """Data parallelism: every gradient is summed once over all devices that saw other tokens.

    Over `fsdp`, which divides the kernels, a reduce-scatter leaves each device its part, which is
    then summed over the others. In a pipeline that is once for all micro-batches where the
    compiler moves the sum out of the loop, and otherwise at every step of it, idle ones too.
    """
    n = v.sizes
    blocks = v.layers if backend.sums_after_loops else v.blocks
    others = tuple(name for name in ("data", "context") if n[name] > 1)
    every = tuple(name for name in ("data", "fsdp", "context") if n[name] > 1)
    found: list[Expected] = []

    def matrix(why: str, count: int, size: int, axes: tuple[str, ...], divided: bool) -> None:
        if n["fsdp"] > 1 and divided:
            scattered = "reduce-scatter" if backend.scatters else "all-reduce"
            found.append(Expected(scattered, ("fsdp",), count, size, why))
            size //= n["fsdp"]
        if axes:
            zero = "zero1" in more and backend.scatters
            found.append(
                Expected("reduce-scatter" if zero else "all-reduce", axes, count, size, why)
            )

    for name, size in v.kernels.items():
        matrix(f"gradient of {name}", blocks, size, others, True)
    for name, size in v.ends.items():
        matrix(f"gradient of {name}", 1, size, others, True)
    if every:
        for names in (v.vectors, v.divided_vectors, v.whole_heads):
            found += _vectors(v, backend, every, names)
        found += [
            Expected("all-reduce", every, 1, size, f"gradient of {name}")
            for name, size in v.whole_ends.items()
        ]
        if "zero1" in more:
            pass  # it has a way of its own
        elif backend.scatters:
            matrix("gradient of token_embedding", 1, v.table, others, True)
        else:
            found.append(Expected("all-reduce", every, 1, v.table, "gradient of token_embedding"))
    return found


def _vectors(
    v: Volumes, backend: Backend, axes: tuple[str, ...], sizes: Mapping[str, int]
) -> list[Expected]:
    """Gradients of one kind of vectors."""
    times, layers = v.blocks, 1
    if backend.sums_after_loops:
        times, layers = 1, v.layers
    return [
        Expected("all-reduce", axes, times, layers * size, f"gradient of {name}")
        for name, size in sizes.items()
    ]


def _table(v: Volumes, backend: Backend) -> int:
    return round(v.table / v.kept) if backend.looks_up_converted else v.table


def zero1(v: Volumes) -> list[Expected]:
    """ZeRO-1: what each device has updated is gathered, once a step and for all layers at once.

    The embedding's gradient is no sum: its rows come from tokens, and each device takes its columns
    of the gradient of all tokens instead (an exchange, and a gather of the ids).
    """
    n, axes = v.sizes["data"], ("data",)
    stacks = {**{k: v.layers * size for k, size in v.kernels.items()}, **v.ends}
    stacks = {name: round(v.kept * size) for name, size in stacks.items()}
    return [
        *(Expected("all-gather", axes, 1, size, f"updated {k}") for k, size in stacks.items()),
        Expected("all-gather", axes, 1, v.table, "updated token_embedding"),
        Expected("all-gather", axes, 1, n * v.tokens, "ids, for the embedding's gradient"),
        Expected("all-to-all", axes, 1, v.embedded, "gradient of the embedded tokens, by columns"),
    ]


def fsdp(v: Volumes, backend: Backend = CPU) -> list[Expected]:
    """FSDP: each layer's kernels are gathered forwards and backwards, embedding and head once."""
    axes, twice = ("fsdp",), 2 * v.blocks
    return [
        *(Expected("all-gather", axes, twice, size, f"{k}") for k, size in v.kernels.items()),
        *(Expected("all-gather", axes, 1, size, k) for k, size in v.ends.items()),
        Expected("all-gather", axes, 1, _table(v, backend), "token_embedding"),
    ]


def tensor(v: Volumes, backend: Backend = CPU, recomputes: bool = False) -> list[Expected]:
    """Tensor parallelism: two sums of the stream a layer forwards, and two backwards.

    Besides, one for the embedded tokens, as each device has some rows of the table, one for the
    gradient of what the head reads, and those of vectors that every head shares.
    """
    axes, blocks = ("tensor",), v.blocks
    part = v.stream // v.parts
    inputs = 2 if backend.joins_sums else sum(v.branches)
    embedded = v.stream if backend.looks_up_converted else v.embedded
    return [
        Expected("all-reduce", axes, 1, embedded, "embedded tokens"),
        Expected("all-reduce", axes, (3 if recomputes else 2) * blocks, part, "end of a branch"),
        Expected("all-reduce", axes, inputs * blocks, part, "gradient of a branch's input"),
        Expected("all-reduce", axes, 1, v.stream, "gradient of the head's input"),
        *_vectors(v, backend, axes, v.whole_heads),
    ]


def sequence(v: Volumes, backend: Backend = CPU, recomputes: bool = False) -> list[Expected]:
    """Tensor and sequence: each sum becomes a reduce-scatter and an all-gather of the same bytes.

    Norms see a part of the tokens and sum their gradients. XLA gathers the embedding's table and
    sums its gradient, rather than look tokens up in part of it and scatter their sum.
    """
    axes, blocks = ("tensor",), v.blocks
    part = v.stream // v.parts
    summed = "reduce-scatter" if backend.scatters else "all-reduce"
    inputs = 2 if backend.joins_sums else sum(v.branches)
    again = 1 if recomputes else 0
    n, table_sum = v.sizes["tensor"], summed
    return [
        Expected("all-gather", axes, 1, n * _table(v, backend), "token_embedding"),
        Expected("all-gather", axes, (2 + 2 * again) * blocks, part, "a branch's input"),
        Expected("all-gather", axes, 2 * blocks, part, "gradient of a branch's output"),
        Expected("all-gather", axes, 1, v.stream, "the head's input"),
        Expected("collective-permute", axes, 1, v.borders, "the token before a device's first"),
        Expected(summed, axes, (2 + again) * blocks, part, "end of a branch"),
        Expected(summed, axes, inputs * blocks, part, "gradient of a branch's input"),
        Expected(summed, axes, 1, v.stream, "gradient of the head's input"),
        Expected(table_sum, axes, 1, n * v.table, "gradient of token_embedding"),
        *_vectors(v, backend, axes, {**v.whole_heads, **v.vectors}),
        *(Expected("all-reduce", axes, 1, b, f"gradient of {k}") for k, b in v.whole_ends.items()),
    ]


def vocabulary_loss(v: Volumes) -> list[Expected]:
    """The loss over a divided vocabulary: three numbers for each token, forward alone.

    The largest logit, the sum of the exponentials and the logit of the target.
    """
    why = "largest logit, normaliser and target's logit of each token"
    return [Expected("all-reduce", ("tensor",), 3, v.tokens, why)]


def ring(v: Volumes, backend: Backend = CPU, recomputes: bool = False) -> list[Expected]:
    """Ring attention: n - 1 hops of keys and values, and as many of them and of their gradients."""
    n, axes = v.sizes["context"], ("context",)
    hops = (n - 1) * v.blocks
    keys, key_gradients = v.keys // v.parts, v.key_gradients // v.parts
    return [
        Expected("collective-permute", axes, (6 if recomputes else 4) * hops, keys, "keys, values"),
        Expected("collective-permute", axes, 2 * hops, key_gradients, "their gradients"),
        Expected("all-reduce", axes, 0 if backend.adds_rows else 1, v.rows, "loss of each row"),
    ]


def pipeline(v: Volumes) -> list[Expected]:
    """A pipeline: M v + n - 1 hops of a micro-batch each way; the last stage's output goes to all.

    All stages hold all of what enters, so that its gradient is summed over them. With several
    rounds kernels also travel to their stages, and gradients back: compilers do this in ways of
    their own, and it is not in here.
    """
    axes, part = ("pipeline",), v.stream // v.parts
    return [
        Expected("collective-permute", axes, 2 * v.steps, part, "a micro-batch, to the next stage"),
        Expected("collective-permute", axes, 2, v.stream, "the last stage's output, its gradient"),
        Expected("all-reduce", axes, 1, v.stream, "the last stage's output, to all"),
        Expected("all-reduce", axes, 1, v.stream, "gradient of the first stage's input"),
    ]


def explain(found: Sequence[Collective], formulas: Sequence[Expected]) -> list[Row]:
    """Holds a program against the formulas, array by array.

    Returns:
      A row for each kind, axis and size; `why` is empty for what no formula asks for. Sums of
      single numbers make one row for each kind and axis, as many expected as found.

    >>> gather = Collective("all-gather", 2, 64, ("data",), 8, True, "", (64,))
    >>> explain([gather], [Expected("all-gather", ("data",), 2, 64, "a kernel")])[0].found
    2
    """
    compiled: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    numbers: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for each in found:
        for part in each.parts:
            if part <= NUMBER:
                numbers[each.kind, each.axes] += each.times
            else:
                compiled[each.kind, each.axes, part] += each.times
    asked: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    why: dict[tuple[str, tuple[str, ...], int], list[str]] = {}
    for formula in formulas:
        if formula.bytes <= NUMBER:  # of a row or two: among the single numbers
            continue
        key = (formula.kind, formula.axes, formula.bytes)
        asked[key] += formula.times
        why.setdefault(key, []).append(formula.why)
    rows = [
        Row(*key, asked[key], compiled[key], "; ".join(dict.fromkeys(why.get(key, []))))
        for key in sorted({*asked, *compiled})
    ]
    return rows + [
        Row(kind, axes, 0, count, count, "sums of single numbers")
        for (kind, axes), count in sorted(numbers.items())
    ]


def unexplained(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows in which a program has more or fewer arrays than the formulas ask for."""
    return [row for row in rows if row.expected != row.found]


def explained_table(rows: Sequence[Row]) -> str:
    """Returns the rows as lines of text.

    >>> print(explained_table([Row("all-reduce", ("data",), 64, 2, 2, "gradient of head")]))
    collective          over           bytes each  formula  compiled
    all-reduce          data                   64        2         2  gradient of head
    """
    lines = [f"{'collective':<20}{'over':<12}{'bytes each':>13}{'formula':>9}{'compiled':>10}"]
    for row in rows:
        size = f"{row.bytes:,}" if row.bytes else f"<= {NUMBER}"
        lines.append(
            f"{row.kind:<20}{'+'.join(row.axes) or '-':<12}{size:>13}{row.expected:>9,}"
            f"{row.found:>10,}  {row.why or 'UNEXPLAINED'}"
        )
    return "\n".join(lines)
