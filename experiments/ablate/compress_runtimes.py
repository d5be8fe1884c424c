"""Speed of 8 and 4 bits at GPT-2 124M shapes, 512 tokens: inside XLA, and where kernels for it are.

Three measurements: the probe of `compress.quantization.probe` on the shapes of a block and of the
head; the exported model under ONNX Runtime, int8 beside float32; and GGUF files under llama.cpp,
where its Python binding is installed (the extra `llama-cpp`).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.export.gguf import write_gguf
from compress.export.onnx import write_onnx
from compress.quantization.formats import format_of, format_to_json
from compress.quantization.probe import Row, probe, time_interleaved
from compress.quantization.probe import Table as Probed
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.w8a8 import Activation, integer_products
from experiments.ablate.random_weights import fields_of, random_weights
from experiments.compression.timings import prefill
from experiments.grid import Measurement
from experiments.tables.markdown import grid
from experiments.tables.ratios import paired
from experiments.tables.table import Item, Request, Results, Table
from model.config import TransformerConfig, config_from_dict
from model.presets import gpt2
from model.transformer import Transformer

LENGTH = 512
REPEATS = 9
PROBED = {"the prompt": LENGTH, "8 rows": 8, "one token": 1}
"""Work -> rows of the activations."""
XLA, ONNX, LLAMA = "probe", "ONNX Runtime", "llama.cpp"
FASTER = 2.0  # int8 than float32 under ONNX Runtime
GGUF_FORMATS = ("float32", "q8_0", "q4_1", "q4_0")


def model_shape() -> TransformerConfig:
    """Returns the shape that is timed."""
    return gpt2(dropout=0.0)


def has_llama() -> bool:
    """Whether the Python binding of llama.cpp is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def cells(request: Request) -> list[Item]:
    """Returns the three measurements."""
    settings = {
        "config": fields_of(model_shape()),
        "length": LENGTH,
        "repeats": REPEATS,
        "grids": {name: format_to_json(format_of(name)) for name in ("int8", *GGUF_FORMATS[1:])},
    }
    made: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        XLA: in_xla,
        ONNX: under_onnx_runtime,
    }
    if has_llama():
        made[LLAMA] = under_llama_cpp
    return [
        Measurement(name, {"measured": f"speed under {name}", **settings}, function)
        for name, function in made.items()
    ]


def notes(request: Request) -> list[str]:
    """Says what is left out."""
    if has_llama():
        return []
    return [
        "llama.cpp's Python binding is not installed here (`pip install '.[llama-cpp]'`), so that "
        "nothing of it is measured."
    ]


def kernels_of(config: TransformerConfig) -> dict[tuple[int, int], int]:
    """Returns (inputs, outputs) -> how often a forward pass multiplies with such a kernel.

    >>> from model.presets import gpt2
    >>> kernels_of(gpt2())[(768, 768)]
    48
    """
    D, F, K = config.width, config.ffn_width_, config.head_width_
    shapes = [(D, config.heads * K), (config.heads * K, D), (D, F), (F, D)]
    shapes += 2 * [(D, config.kv_heads_ * K)]
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + config.layers
    return counts


def in_xla(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Probes all kernels of a model: what the probe says, and its choice, by shape."""
    config = config_from_dict(settings["config"])
    head = (config.width, config.vocabulary_size)
    shapes = [
        (rows, *shape)
        for name, rows in PROBED.items()
        for shape in ([*kernels_of(config)] if rows > 1 else [*kernels_of(config), head])
    ]
    return {"table": probe(shapes, repeats=settings["repeats"]).to_json()}


def under_onnx_runtime(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times the exported model, int8 and float32 in turn, and compares its logits with ours."""
    config, tokens = _setting(settings)
    plain = random_weights(config)
    int8 = quantize_params(plain, weight_rules(plain, "int8"))
    # What the graph computes: activations by tensor, with a zero point, found as they come.
    activation = Activation("dynamic", "tensor", "zero_point")
    rules = [("kernel", True), ("token_embedding/embedding", True)]
    exact = {"float32": plain, "int8": integer_products(int8, activation, rules=rules)}
    calls: dict[str, Callable[[], Any]] = {}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, params in (("float32", plain), ("int8", int8)):
            path = Path(folder) / f"{name}.onnx"
            write_onnx(path, config, params)
            sizes[name] = path.stat().st_size
            calls[name] = _onnx_call(path, tokens)
        errors = {
            name: _apart(call(), Transformer(config).apply({"params": exact[name]}, tokens))
            for name, call in calls.items()
        }
        times = time_interleaved(calls, settings["repeats"])
    return {**_compared(times, "float32"), "bytes": sizes, "logits": errors}


def _onnx_call(path: Path, tokens: np.ndarray) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _cores()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"tokens": tokens.astype(np.int64)})[0]


def under_llama_cpp(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times GGUF files, and our float32 prompt beside them, and compares logits with ours."""
    import llama_cpp

    config, tokens = _setting(settings)
    plain = random_weights(config)
    model = Transformer(config)
    calls: dict[str, Callable[[], Any]] = {"ours, float32": prefill(model, plain, tokens.shape[1])}
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in GGUF_FORMATS:
            params = plain
            if format != "float32":
                params = quantize_params(plain, weight_rules(plain, format, positions=None))
            path = Path(folder) / f"{format}.gguf"
            write_gguf(path, config, params)
            calls[format] = _llama_call(path, tokens, config.vocabulary_size)
            ours = model.apply({"params": params}, tokens)
            errors[format] = _apart(calls[format](), np.asarray(ours)[0, -1])
        times = time_interleaved(calls, settings["repeats"])
    return {**_compared(times, "float32"), "logits": errors, "version": llama_cpp.__version__}


def _llama_call(path: Path, tokens: np.ndarray, vocabulary_size: int) -> Callable[[], Any]:
    import llama_cpp

    at_once: dict[str, Any] = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), tokens.shape[1])
    threads: dict[str, Any] = {name: _cores() for name in ("n_threads", "n_threads_batch")}
    loaded = llama_cpp.Llama(str(path), **at_once, **threads, verbose=False)

    def read() -> np.ndarray:
        loaded.reset()
        loaded.eval(tokens[0].tolist())
        last = llama_cpp.llama_get_logits_ith(loaded.ctx, -1)
        return np.ctypeslib.as_array(last, (vocabulary_size,)).copy()

    return read


def _setting(settings: Mapping[str, Any]) -> tuple[TransformerConfig, np.ndarray]:
    config = config_from_dict(settings["config"])
    length = min(settings["length"], config.max_length)
    rng = np.random.default_rng(0)
    return config, rng.integers(0, config.vocabulary_size, (1, length)).astype(np.int32)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apart(theirs: Any, ours: Any) -> float:
    """|theirs - ours| / |ours|."""
    theirs, ours = (np.asarray(a, np.float64).reshape(-1) for a in (theirs, ours))
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


def _compared(times: Mapping[str, list[float]], first: str) -> dict[str, Any]:
    rows = {
        name: {"seconds": statistics.median(seconds), **paired(times[first], seconds)}
        for name, seconds in times.items()
    }
    return {"rows": rows}


def render(results: Results) -> list[str]:
    """Returns what was measured of the three."""
    values = {name: next(iter(rows.values())) for name, rows in results.by_name.items() if rows}
    lines = []
    if XLA in values:
        lines += _xla(values[XLA]["table"])
    if ONNX in values:
        found = values[ONNX]
        ratio = found["rows"]["int8"]["ratio"]
        verdict = "reaches" if ratio >= FASTER else "misses"
        lines += [
            f"The exported model under ONNX Runtime, {LENGTH} tokens; int8 {verdict} the wanted "
            f"{FASTER:.0f}x of its float32. Logits are compared with ours in the same arithmetic.",
            "",
            *_rows(found),
            "",
        ]
    if LLAMA in values:
        found = values[LLAMA]
        lines += [
            f"GGUF under llama.cpp (llama-cpp-python {found['version']}), a prompt of {LENGTH} "
            "tokens and the logits after it. Logits are compared with ours in float products of "
            "the same weights; llama.cpp rounds activations to 8 bits beside quantized weights, "
            "and keeps keys and values in float16.",
            "",
            *_rows(found),
        ]
    return lines


def _rows(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in found["rows"].items():
        low, high = row["quartiles"]
        size, error = found.get("bytes", {}).get(name), found["logits"].get(name)
        rows.append(
            [
                name,
                f"{1000 * row['seconds']:,.0f}",
                f"{row['ratio']:.2f}x",
                f"{low:.2f} to {high:.2f}",
                f"{size / 1e6:,.1f}" if size else "",
                f"{error:.1e}" if error is not None else "",
            ]
        )
    names = ["model", "ms", "to float32", "quartiles", "file, MB", "logits off by"]
    return grid(names, rows, "lrrrrr")


def _xla(table: Mapping[str, Any]) -> list[str]:
    rows = [Row(tuple(row["shape"]), row["seconds"], row["spread"]) for row in table["rows"]]
    found = Probed(tuple(rows), table["device"], table["jax_version"], table["repeats"])
    kernels = kernels_of(model_shape())
    lines = []
    for name, count in PROBED.items():
        these = [row for row in rows if row.shape[0] == count and row.shape[1:] in kernels]
        if not these:
            continue
        total = {
            path: sum(row.seconds[path] * kernels[row.shape[1:]] for row in these)
            for path in these[0].seconds
        }
        best = min(total, key=lambda path: total[path])
        ratios = {path: total["float32"] / total[path] for path in total}
        lines.append([name, *(f"{ratio:.2f}x" for ratio in ratios.values()), best])
    paths = list(rows[0].seconds)
    return [
        f"All kernels of the blocks inside XLA, speed to float32 by the probe (jax "
        f"{found.jax_version}, {found.device}, medians of {found.repeats}); what it picks is the "
        "fastest:",
        "",
        *grid(["activations", *paths, "picked"], lines, "l" + "r" * len(paths) + "l"),
        "",
        "By shape:",
        "",
        "```",
        *str(found).splitlines(),
        "```",
        "",
    ]


TABLES: tuple[Table, ...] = (
    Table("runtimes", "Speed of few bits, by runtime", cells, render, notes=notes),
)
