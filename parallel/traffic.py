"""Traffic: the collectives of a compiled program, counted from its own text.

    text = jax.jit(step).lower(state, frozen, batch).compile().as_text()
    print(table(collectives(text, mesh)))

The text is the program of one device, after the compiler has put the collectives in. What stands in
the body of a loop counts as often as the loop runs, which the compiler writes beside it or which
stands in its condition (the counter of a scan runs from 0 to below a constant). Bytes are those of
the whole array that one group of devices speaks of: the gathered array, the array that is summed,
the array that is redistributed.

The compiler for TPUs writes a reduce-scatter as an all-reduce inside a fusion of that name; it is
counted as what it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      times: that it runs in one step (once a loop of unknown length, see `exact`).
      bytes: of the array that one group of devices speaks of, once.
      axes: the mesh axes along which the devices of a group differ.
      size: devices in a group.
      exact: whether all loops around it say how often they run.
      source: where it comes from in the traced program.
      parts: bytes of each array that it speaks of at once: compilers join collectives into one.
    """

    kind: str
    times: int
    bytes: int
    axes: tuple[str, ...]
    size: int
    exact: bool
    source: str
    parts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all the times that it runs."""
        return self.times * self.bytes

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, where the group is a ring.

        >>> Collective("all-reduce", 1, 800, ("data",), 8, True, "").sent
        1400.0
        """
        return self.total * RING[self.kind](self.size)


# Bytes that each of n devices sends for a byte of the array, in a ring (Patarasuk & Yuan 2009).
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_TYPE = re.compile(r"\b(pred|token|bf16|c64|c128|f8\w*|[fsu]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|[%\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_CONSTANT = re.compile(r"%?(?P<name>[\w.\-]+) = s32\[\]\S* constant\((?P<value>\d+)\)")
_COPY = re.compile(r"%?(?P<name>[\w.\-]+) = s32\[\]\S* copy\(%?(?P<source>[\w.\-]+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*?%?(?P<right>[\w.\-]+)\), direction=LT")


def collectives(text: str, mesh: Mesh, *, scatters: bool = False) -> list[Collective]:
    """Returns the collectives of a compiled program, in the order of the text.

    Args:
      text: `compiled.as_text()`, of XLA for any backend; asynchronous pairs count once.
      mesh: the devices that it was compiled for, in the mesh's order.
      scatters: count an all-reduce of which each device only takes a part as a reduce-scatter, as
        XLA for GPUs does with a program that was divided but not compiled further.

    Raises:
      ValueError: a form of replica groups that this function does not know.

    >>> import jax
    >>> from parallel.mesh import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text(), mesh)
    []
    """
    lines_of, entry = _computations(text)
    found: list[Collective] = []
    chains: set[tuple[str, str]] = set()

    def visit(name: str, times: int, exact: bool) -> None:
        for line in lines_of.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match and (chain := _CHAIN.search(line)):
                # One gather is written in each of the fusions that it runs beside.
                match = None if (key := (chain[1], chain[2])) in chains else match
                chains.add(key)
            if match:
                made = _collective(line, match, times, exact, mesh, name)
                if scatters and made.kind == "all-reduce" and _is_cut(line, lines_of[name]):
                    made = made._replace(kind="reduce-scatter")
                found.append(made)
            if "=" not in line:
                continue
            trips, known = 1, True
            if " while(" in line:
                number = _trips(line, lines_of)
                trips, known = (1, False) if number is None else (number, True)
            for called in _called(line):
                visit(called, times * trips, exact and known)

    visit(entry, 1, True)
    return found


def by_kind(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Returns `(kind, axes) -> (count, bytes)`, summed over a step.

    >>> one = Collective("all-reduce", 2, 10, ("data",), 8, True, "")
    >>> by_kind([one, one])
    {('all-reduce', ('data',)): (4, 40)}
    """
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
    for each in found:
        count, total = sums.get((each.kind, each.axes), (0, 0))
        sums[each.kind, each.axes] = (count + each.times, total + each.total)
    return sums


def table(found: Sequence[Collective]) -> str:
    """Returns the collectives of a step as lines of text, by kind and axis.

    >>> print(table([Collective("all-reduce", 2, 1000, ("data",), 8, True, "")]))
    collective          over          count               bytes     sent by each device
    all-reduce          data              2               2,000                   3,500
    """
    lines = [f"{'collective':<20}{'over':<12}{'count':>7}{'bytes':>20}{'sent by each device':>24}"]
    for (kind, axes), (count, total) in sorted(by_kind(found).items()):
        same = [each for each in found if (each.kind, each.axes) == (kind, axes)]
        sent, unsure = sum(each.sent for each in same), not all(each.exact for each in same)
        lines.append(
            f"{kind:<20}{'+'.join(axes) or '-':<12}{count:>7,}{total:>20,}{sent:>24,.0f}"
            + ("  (a loop of unknown length counted once)" if unsure else "")
        )
    return "\n".join(lines)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first one to run."""
    lines_of: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match["name"]
            lines_of[current] = []
            entry = current if match["entry"] else entry
        elif current:
            lines_of[current].append(line)
    return lines_of, entry


def _is_cut(line: str, lines: Sequence[str]) -> bool:
    """Whether the one thing that is done with a result is to take a part of it."""
    name = re.escape(line.split(" = ")[0].replace("ROOT", "").strip())
    users = [each for each in lines if re.search(rf"[(, ]{name}[,)]", each.partition(" = ")[2])]
    return len(users) == 1 and " dynamic-slice(" in users[0]


def _trips(line: str, lines_of: dict[str, list[str]]) -> int | None:
    """How often a loop runs, or None if the program does not say."""
    if written := _TRIPS.search(line):
        return int(written[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = lines_of.get(condition[1], []) if condition else []
    constants = {m["name"]: int(m["value"]) for each in lines if (m := _CONSTANT.search(each))}
    # The division of a shard_map over some of the axes leaves copies between the two.
    copies = {m["name"]: m["source"] for each in lines if (m := _COPY.search(each))}
    for each in lines:
        if below := _BELOW.search(each):
            limit = below["right"]
            while limit in copies:
                limit = copies[limit]
            return constants.get(limit)
    return None


def _called(line: str) -> Iterator[str]:
    for group in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in group.strip("{}").split(","))


def _collective(
    line: str, match: re.Match, times: int, exact: bool, mesh: Mesh, computation: str
) -> Collective:
    kind = match["kind"]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        groups = _listed(f"{{{pairs[1]}}}}}") if pairs else []
        # The place of the pair in the array tells nothing: a permutation joins all that it reaches.
    else:
        groups = _groups(line, mesh.devices.size)
    size = max((len(group) for group in groups), default=1)
    parts = [_bits(*each) // 8 for each in _TYPE.findall(match["type"])]
    if match["start"] and kind in ("all-gather", "collective-permute"):
        # An asynchronous start gives its operands beside its results.
        parts = parts[len(parts) // 2 :] if kind == "all-gather" else parts[1:2]
    if kind == "reduce-scatter":
        parts = [size * part for part in parts]
    if kind == "all-to-all":  # one array for each device of the group, in some forms
        parts = [sum(parts)]
    axes = _axes(groups, mesh)
    if kind == "collective-permute":
        size = math.prod(mesh.shape[name] for name in axes)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind, times, sum(parts), axes, size, exact, source[1] if source else "", tuple(parts)
    )


def _bits(name: str, dims: str) -> int:
    width = 8 if name.startswith("f8") else _BITS.get(name) or int(re.sub(r"\D", "", name))
    return width * math.prod(int(n) for n in dims.split(",") if n)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices that speak with each other, in any of the ways that XLA writes them."""
    written = re.search(r"replica_groups=(.*)", line)
    text = written[1] if written else "{}"
    if text.startswith("{}"):
        return [list(range(devices))]
    if text.startswith("{{"):
        return _listed(text)
    if match := re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match[2]).reshape(_numbers(match[1])).tolist()
    if match := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", text):
        names = re.findall(r"'(\w+)'=(\d+)", match[1])
        sizes = [int(n) for _, n in names]
        ids = np.arange(math.prod(sizes)) if not match[2] else _iota(f"<={match[2]}")
        together = [part.strip() for part in match[3].split(",")]
        inside = [f"'{name}'" in together for name, _ in names]
        if sum(inside) == len(together):
            outer = [i for i, is_in in enumerate(inside) if not is_in]
            inner = [i for i, is_in in enumerate(inside) if is_in]
            moved = ids.reshape(sizes).transpose(outer + inner)
            return moved.reshape(-1, math.prod(sizes[i] for i in inner)).tolist()
    raise ValueError(f"replica groups of an unknown form: {text[:100]}")


def _iota(text: str) -> np.ndarray:
    """`<=[2,4]T(1,0)`: 0, 1, 2, ... of that shape, with its axes in that order."""
    match = re.match(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None
    shape = _numbers(match[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(match[2])) if match[2] else ids).reshape(-1)


def _listed(text: str) -> list[list[int]]:
    end = text.find("}}")
    return [
        _numbers(group) for group in re.findall(r"\{([\d,]+)", text[: end + 2 if end > 0 else None])
    ]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """Axes along which the devices of some group differ; devices count in the mesh's order."""
    differing: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), mesh.devices.shape))
        for name, row in zip(mesh.axis_names, places, strict=True):
            if len(set(row.tolist())) > 1:
                differing.add(name)
    return tuple(name for name in mesh.axis_names if name in differing)
