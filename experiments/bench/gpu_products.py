"""Products in bfloat16, int8 and fp8 at the shapes of GPT-2 124M, and the ceilings of the device.

Each product is one program over several inputs of its own, so that neither the host's dispatch nor
the device's cache is what is timed. Values are compared with float64 on the host.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.alone import FAILED, ask_once, device_alone
from experiments.bench.child import Subject
from experiments.bench.clock import calls_for, seconds_of, spread
from experiments.bench.kernels import products
from experiments.bench.table import Job, Table, rows_of
from experiments.compilation import use_compilation_cache
from experiments.grid import Measured, Measurement

LAYERS = {"qkv": (768, 2304), "o": (768, 768), "up": (768, 3072), "down": (3072, 768)}
LAYERS["head"] = (768, 50304)
ROWS = (16, 512, 8192, 32768)
BYTES = 200e6  # of weights that one program goes through: several times a cache of 50 MB
MOST_INPUTS = 24
CHECKED = 8  # rows whose values are compared
SECONDS = 0.03  # of a repeat
LIMIT = 240.0  # seconds of a process
ENVIRONMENT = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
SQUARE, COPIED = 8192, 2**30  # side of the square product; elements of what is copied


def bfloat16(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """The yardstick."""
    return _dot(x_MK, w_NK, jnp.bfloat16)


def int8(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Integers all through: int8 x int8 -> int32."""
    return _dot(x_MK, w_NK, jnp.int32)


def w8a8(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """The same, scaled to bfloat16 as a layer does."""
    scaled = _dot(x_MK, w_NK, jnp.int32).astype(jnp.float32) * jnp.float32(SCALE)
    return scaled.astype(jnp.bfloat16)


def fp8(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """float8_e4m3fn x float8_e4m3fn -> bfloat16."""
    return _dot(x_MK, w_NK, jnp.bfloat16)


def int8_weights(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Weights in int8 that become bfloat16 on the way to the product."""
    return _dot(x_MK, w_NK.astype(jnp.bfloat16) * jnp.bfloat16(SCALE), jnp.bfloat16)


SCALE = 1 / 256  # a power of two: exact in every type
# kind -> function, type of activations, type of weights, scale of its result
KINDS: dict[str, tuple[Callable[..., jax.Array], Any, Any, float]] = {
    "bf16": (bfloat16, jnp.bfloat16, jnp.bfloat16, 1.0),
    "int8 -> int32": (int8, jnp.int8, jnp.int8, 1.0),
    "int8 -> bf16": (w8a8, jnp.int8, jnp.int8, SCALE),
    "fp8 -> bf16": (fp8, jnp.float8_e4m3fn, jnp.float8_e4m3fn, 1.0),
    "bf16, weights int8": (int8_weights, jnp.bfloat16, jnp.int8, SCALE),
}


def subject(settings: Mapping[str, Any]) -> Subject:
    """Answers "time": every kind at every number of rows of one layer.

    Args:
      settings: "inputs" K, "outputs" N, "rows", and "kinds".
    """
    use_compilation_cache()
    K, N = settings["inputs"], settings["outputs"]
    programs: dict[tuple[str, int], Any] = {}
    failed: dict[tuple[str, int], str] = {}
    for rows in settings["rows"]:
        for kind in settings["kinds"]:
            try:
                programs[kind, rows] = _compiled(kind, rows, K, N)
            except Exception as error:  # of one kind: the others go on
                failed[kind, rows] = f"{type(error).__name__}: {str(error)[:300]}"

    def timed() -> dict[str, Any]:
        found: dict[str, Any] = {kind: {} for kind in settings["kinds"]}
        for (kind, rows), reason in failed.items():
            found[kind][str(rows)] = {FAILED: reason}
        with device_alone():
            for (kind, rows), program in programs.items():
                try:
                    found[kind][str(rows)] = _timed(program, kind, rows, K, N)
                except Exception as error:
                    reason = f"{type(error).__name__}: {str(error)[:300]}"
                    found[kind][str(rows)] = {FAILED: reason}
        return found

    return Subject({}, {"time": timed, "compile": dict})


def ceilings(settings: Mapping[str, Any]) -> Subject:
    """Answers "time": operations a second of a square product, and bytes a second of a copy.

    Args:
      settings: "square", side of the product, and "copied", bfloat16 elements of the copy.
    """
    use_compilation_cache()

    def timed() -> dict[str, Any]:
        size, count = settings["square"], settings["copied"]
        with device_alone():
            keys = jax.random.split(jax.random.key(0), 4)
            xs = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
            product = jax.jit(jnp.matmul)

            def multiply(number: int) -> jax.Array:
                return product(xs[number % 4], xs[(number + 1) % 4])

            matmul = seconds_of(multiply, calls=calls_for(multiply, SECONDS))
            sources = [jnp.full((count,), 1.5 + part, jnp.bfloat16) for part in range(2)]
            negated = jax.jit(jnp.negative)  # reads all and writes all; a plain copy is elided

            def copy(number: int) -> jax.Array:
                return negated(sources[number % 2])

            copied = seconds_of(copy, calls=calls_for(copy, SECONDS))
        return {
            "device": jax.devices()[0].device_kind,
            "flops": [2 * size**3 / s for s in matmul],
            "bandwidth": [2 * 2 * count / s for s in copied],
        }

    return Subject({}, {"time": timed})


def _compiled(kind: str, rows: int, K: int, N: int) -> Any:
    function, of_x, of_w, _ = KINDS[kind]
    count = _inputs(kind, rows, K, N)
    xs = [jax.ShapeDtypeStruct((rows, K), of_x)] * count
    ws = [jax.ShapeDtypeStruct((N, K), of_w)] * count

    def run(xs: Sequence[jax.Array], ws: Sequence[jax.Array]) -> list[jax.Array]:
        return [function(x, w) for x, w in zip(xs, ws, strict=True)]

    return jax.jit(run).lower(xs, ws).compile()


def _inputs(kind: str, rows: int, K: int, N: int) -> int:
    """How many products a program makes: one where its own arrays outgrow the cache."""
    weight_bytes = K * N * jnp.dtype(KINDS[kind][2]).itemsize
    moved = weight_bytes + rows * (K + N)
    return max(1, min(MOST_INPUTS, math.ceil(BYTES / moved)))


def _timed(program: Any, kind: str, rows: int, K: int, N: int) -> dict[str, Any]:
    _, of_x, of_w, scale = KINDS[kind]
    count = _inputs(kind, rows, K, N)
    keys = jax.random.split(jax.random.key(0), 2 * count)
    xs = [_drawn(key, (rows, K), of_x) for key in keys[:count]]
    ws = [_drawn(key, (N, K), of_w) for key in keys[count:]]

    def run(number: int) -> Any:
        return program(xs, ws)

    got = np.asarray(run(0)[0][:CHECKED].astype(jnp.float32), np.float64)
    exact = np.asarray(xs[0][:CHECKED].astype(jnp.float32), np.float64)
    exact = scale * exact @ np.asarray(ws[0].astype(jnp.float32), np.float64).T
    seconds = seconds_of(run, calls=calls_for(run, SECONDS))
    return {
        "seconds": [each / count for each in seconds],
        "error": float(np.linalg.norm(got - exact) / np.linalg.norm(exact)),
        "products": products(program.as_text()),
    }


def _drawn(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def _dot(x_MK: jax.Array, w_NK: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def measure_products(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times one layer in a process of its own."""
    return ask_once("gpu.products", settings, "time", environment=ENVIRONMENT, limit=LIMIT)


def measure_ceilings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times the device in a process of its own."""
    return ask_once("gpu.ceilings", settings, "time", environment=ENVIRONMENT, limit=LIMIT)


def compiling(missing: Sequence[Measurement]) -> list[Job]:
    """Compiles every layer's products."""
    asked: dict[str, Any] = {"environment": ENVIRONMENT, "limit": LIMIT}
    one = functools.partial(ask_once, "gpu.products", what="compile", **asked)
    return [Job(1, functools.partial(one, settings=m.settings)) for m in missing]


def products_text(results: Sequence[Measured]) -> str:
    """Returns operations a second by shape and kind, and which kernels there were."""
    kinds = list(results[0].measurement.settings["kinds"])
    rows, kernels, failures = [], dict[str, dict[str, None]](), []
    for m in results:
        K, N = (m.measurement.settings[name] for name in ("inputs", "outputs"))
        for count in m.measurement.settings["rows"]:
            by_kind = {kind: m.values[kind][str(count)] for kind in kinds}
            rates = {
                kind: 2 * count * K * N / spread(v["seconds"])[0]
                for kind, v in by_kind.items()
                if FAILED not in v
            }
            cells = [f"{m.measurement.name}, {K} x {N}", f"{count:,}"]
            for kind in kinds:
                if kind not in rates:
                    cells.append("failed")
                    failures.append(f"{kind}, {count} rows: {by_kind[kind][FAILED]}")
                    continue
                against = f" ({rates[kind] / rates['bf16']:.2f}x)" if "bf16" in rates else ""
                cells.append(f"{rates[kind] / 1e12:,.0f}{'' if kind == 'bf16' else against}")
                kernels.setdefault(kind, {}).update(dict.fromkeys(by_kind[kind]["products"]))
            worst = {kind: v["error"] for kind, v in by_kind.items() if FAILED not in v}
            rows.append([*cells, f"{max(worst.values(), default=math.nan):.1e}"])
    names = ["product", "rows", *(f"{kind}, TFLOP/s" for kind in kinds), "largest error"]
    lines = [
        "Median operations a second; in brackets against bfloat16. The error is the largest of any "
        "kind's distance from the product of the same operands in float64, over its norm.",
        "",
        rows_of(names, rows),
        "",
        *(f"* {kind}: {'; '.join(each)}" for kind, each in kernels.items()),
        *(f"* Failed: {each}" for each in failures),
    ]
    return "\n".join(lines)


def ceilings_text(results: Sequence[Measured]) -> str:
    """Returns the two ceilings."""
    rows = []
    for m in results:
        flops, bandwidth = spread(m.values["flops"]), spread(m.values["bandwidth"])
        rows.append([m.values["device"], *(f"{f / 1e12:,.0f}" for f in flops)])
        rows[-1] += [f"{b / 1e12:.2f}" for b in bandwidth]
    names = ["device", "TFLOP/s", "lower quartile", "upper", "TB/s", "lower quartile", "upper"]
    settings = results[0].measurement.settings
    return (
        f"A product of two random bfloat16 matrices of side {settings['square']:,}, and a pass "
        f"that reads and writes {2 * settings['copied'] / 2**30:.0f} GiB each, both by JAX.\n\n"
        f"{rows_of(names, rows)}"
    )


def products_table() -> Table:
    """One measurement a layer."""
    found = [
        Measurement(
            name,
            {
                "table": "gpu-products",
                "layer": name,
                "inputs": K,
                "outputs": N,
                "rows": list(ROWS),
                "kinds": list(KINDS),
            },
            measure_products,
        )
        for name, (K, N) in LAYERS.items()
    ]
    title = "Products by type on a GPU, at the shapes of GPT-2 124M"
    return Table(title, tuple(found), products_text, prepare=compiling, together=len(found))


def ceilings_table() -> Table:
    """One measurement."""
    settings = {"table": "gpu-ceilings", "square": SQUARE, "copied": COPIED}
    one = Measurement("ceilings", settings, measure_ceilings)
    return Table("Ceilings of the GPU", (one,), ceilings_text)
