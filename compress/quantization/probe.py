"""Which way of taking a product is fastest here: integers, dequantizing, or plain floats, by shape.

    table = probe([(512, 768, 3072), (1, 768, 3072)])
    print(table)
    table.fastest((512, 768, 3072))

No rule tells it beforehand: integer products have fast kernels on some backends, at some shapes, in
some versions. So they are timed, interleaved, for inference and for reports. The choice is written
down with what it was measured on (`Table.to_json`), and is never made inside a training step: a run
must not depend on how busy the machine was.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress.quantization.rounding import quantize
from compress.quantization.w8a8 import integer_products
from model.linear import linear

Shape = tuple[int, int, int]
Call = Callable[[], Any]
Path = Callable[[jax.Array, jax.Array], Call]
"""`(x [N, I], w [I, O], both float32) -> a call without arguments that takes their product`."""


def _product(prepare: Callable[[jax.Array], Any], dtype: Any) -> Path:
    def path(x_NI: jax.Array, w_IO: jax.Array) -> Call:
        x, w = x_NI.astype(dtype), prepare(w_IO)
        compiled = jax.jit(linear).lower(x, w).compile()
        return lambda: compiled(x, w)

    return path


def _integers(w_IO: jax.Array) -> Any:
    return integer_products({"kernel": quantize(w_IO, "int8")})["kernel"]


PATHS: dict[str, Path] = {
    "float32": _product(lambda w: w, jnp.float32),
    "bfloat16": _product(lambda w: w.astype(jnp.bfloat16), jnp.bfloat16),
    "dequantize": _product(lambda w: quantize(w, "int8"), jnp.float32),
    "int8": _product(_integers, jnp.float32),
}
"""Name -> path. "dequantize" holds int8 weights and multiplies floats, "int8" multiplies integers
(`compress.quantization.w8a8`). The first is what the others are compared with."""


class Row(NamedTuple):
    """One shape.

    Attributes:
      shape: (N, I, O).
      seconds: path -> median.
      spread: path -> distance between the quartiles, in seconds.
    """

    shape: Shape
    seconds: dict[str, float]
    spread: dict[str, float]

    @property
    def fastest(self) -> str:
        """The path with the least median; of equal ones the first."""
        return min(self.seconds, key=self.seconds.__getitem__)


class Table(NamedTuple):
    """What `probe` found; printing it gives a table of speeds relative to the first path.

    Attributes:
      rows: one a shape.
      device: what it was measured on.
      jax_version: with which version.
      repeats: calls a path and shape.
    """

    rows: tuple[Row, ...]
    device: str
    jax_version: str
    repeats: int

    def fastest(self, shape: Shape) -> str:
        """Returns the path that was fastest at a shape.

        Raises:
          ValueError: if it was not probed.
        """
        for row in self.rows:
            if row.shape == tuple(shape):
                return row.fastest
        probed = ", ".join(str(row.shape) for row in self.rows)
        raise ValueError(f"the shape {tuple(shape)} was not probed; there are {probed}")

    def to_json(self) -> dict[str, Any]:
        """Returns what is written into a run: times, choices, and where they come from."""
        rows = [
            {**row._asdict(), "shape": list(row.shape), "fastest": row.fastest} for row in self.rows
        ]
        return {**self._asdict(), "rows": rows}

    def __str__(self) -> str:
        names = list(self.rows[0].seconds)
        width = max(len(str(row.shape)) for row in self.rows)
        head = "  ".join(f"{name:>12}" for name in names)
        lines = [
            f"speed relative to {names[0]} on {self.device}, jax {self.jax_version}, medians of "
            f"{self.repeats}",
            f"{'(N, I, O)':{width}}  {head}  fastest",
        ]
        for row in self.rows:
            first = row.seconds[names[0]]
            speeds = (f"{_ratio(first, row.seconds[name]):>11.2f}x" for name in names)
            lines.append(f"{row.shape!s:{width}}  {'  '.join(speeds)}  {row.fastest}")
        return "\n".join(lines)


def probe(
    shapes: Sequence[Shape],
    paths: Mapping[str, Path] | None = None,
    *,
    repeats: int = 15,
    clock: Callable[[], float] = time.perf_counter,
    key: jax.Array | None = None,
) -> Table:
    """Times every path at every shape, on the default device.

    Args:
      shapes: (N, I, O) each: rows of activations, inputs and outputs of a kernel.
      paths: by name, `PATHS` if not given.
      repeats: calls that are timed, after one that is not.
      clock: gives seconds.
      key: draws activations and weights.

    Raises:
      ValueError: no shape, path or repeat; a size below 1; or if called while a function is traced,
        where there is nothing to time.

    >>> table = probe([(2, 4, 4)], repeats=1)
    >>> table.fastest((2, 4, 4)) in PATHS, sorted(table.rows[0].seconds) == sorted(PATHS)
    (True, True)
    """
    paths = PATHS if paths is None else paths
    if not shapes or not paths or repeats < 1:
        raise ValueError(
            f"{len(shapes)} shapes, {len(paths)} paths, {repeats} repeats: give one of each or more"
        )
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"a shape is (rows, inputs, outputs), each at least 1, not {tuple(shape)}"
            )
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise ValueError(
            "a probe measures this machine and cannot be part of a traced function; probe before "
            "the step is built, and pass the choice in"
        )
    key = jax.random.key(0) if key is None else key
    rows = []
    for rows_of_x, inputs, outputs in shapes:
        for_x, for_w = jax.random.split(key)
        x_NI = jax.random.normal(for_x, (rows_of_x, inputs), jnp.float32)
        w_IO = jax.random.normal(for_w, (inputs, outputs), jnp.float32)
        calls = {name: path(x_NI, w_IO) for name, path in paths.items()}
        times = time_interleaved(calls, repeats, clock)
        rows.append(
            Row(
                (rows_of_x, inputs, outputs),
                {name: statistics.median(each) for name, each in times.items()},
                {name: _between_quartiles(each) for name, each in times.items()},
            )
        )
    device = jax.devices()[0]
    return Table(tuple(rows), f"{device.platform} {device.device_kind}", jax.__version__, repeats)


def time_interleaved(
    calls: Mapping[str, Call], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns name -> seconds of each repeat, all calls in turn, so that a slow spell meets all.

    Every round starts with another call, so that none always comes after the same one.

    Args:
      calls: by name; each is called once before, untimed, and its result is waited for.
      repeats: rounds.
      clock: gives seconds.

    >>> ticks = iter(range(100))
    >>> time_interleaved({"a": lambda: 0, "b": lambda: 0}, 2, lambda: next(ticks))
    {'a': [1, 1], 'b': [1, 1]}
    """
    for call in calls.values():
        jax.block_until_ready(call())
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            jax.block_until_ready(calls[name]())
            times[name].append(clock() - start)
    return times


def _between_quartiles(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def _ratio(one: float, other: float) -> float:
    return one / other if other else float("inf")
