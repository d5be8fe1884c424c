"""What each method costs at GPT-2 124M shapes: seconds and peak memory, each in its own process.

    python -m experiments.ablate.compress_gpt2 '{"method": "gptq", "fields": {}, ...}'

is what such a process runs: random weights at a visible scale, random tokens for calibration. Time
is that of the method alone, its compilation included; memory is the most that the process ever
held, Python, weights and calibration tokens included.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.ablate.random_weights import fields_of, random_weights
from experiments.compression.compressors import COMPRESSORS
from experiments.grid import Measurement
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from model.config import TransformerConfig, config_from_dict
from model.presets import gpt2

WINDOWS = 128
LENGTH = 512
BATCH = 8
MINUTES, GIB = 30.0, 8.0  # GPTQ's bounds
GPTQ_ROW = "GPTQ q4_0"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest int8": ("rtn", {"format": "int8"}),
    "nearest q4_0": ("rtn", {"format": "q4_0"}),
    GPTQ_ROW: ("gptq", {"format": "q4_0"}),
    "AWQ q4_0": ("awq", {"format": "q4_0"}),
    "SmoothQuant": ("smoothquant", {}),
    "magnitude 50 %": ("magnitude", {}),
    "Wanda 50 %": ("wanda", {}),
    "SparseGPT 50 %": ("sparsegpt", {}),
    "SparseGPT 2:4 and q4_0": ("sparsegpt", {"pattern": "2:4", "format": "q4_0"}),
    "half of layers and neurons": ("structured", {"layers": 6, "neurons": 1536}),
}
"""Row -> (key of `experiments.compression.compressors.COMPRESSORS`, its fields)."""


def model_shape() -> TransformerConfig:
    """Returns the shape that is compressed."""
    return gpt2(dropout=0.0)


def cells(request: Request) -> list[Item]:
    """Returns a measurement for each method."""
    shape = {
        "config": fields_of(model_shape()),
        "windows": WINDOWS,
        "length": LENGTH,
        "batch": BATCH,
    }
    return [
        Measurement(
            name,
            {
                "measured": "cost",
                "method": method,
                # All of them: a default that changes is measured again.
                "fields": dataclasses.asdict(COMPRESSORS[method](**fields)),
                **shape,
            },
            in_a_process,
        )
        for name, (method, fields) in ROWS.items()
    ]


def in_a_process(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures in a process of its own, whose memory is the method's alone.

    Raises:
      RuntimeError: the process failed; what it wrote last is in the message.
    """
    command = [sys.executable, "-m", "experiments.ablate.compress_gpt2", json.dumps(dict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stderr.splitlines()[-5:])
        raise RuntimeError(f"the process ended with {done.returncode}: {end}")
    return json.loads(done.stdout.splitlines()[-1])


def cost(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compresses random weights and returns seconds and bytes of this process.

    Args:
      settings: config, method and its fields, calibration windows, their length, and batch.
    """
    import jax
    import numpy as np

    from model.transformer import Transformer

    config = config_from_dict(settings["config"])
    fields: Any = settings["fields"]
    method = COMPRESSORS[settings["method"]](**fields)
    params = jax.block_until_ready(random_weights(config))
    rng = np.random.default_rng(0)
    shape = (settings["windows"] // settings["batch"], settings["batch"], settings["length"])
    batches = list(rng.integers(0, config.vocabulary_size, shape).astype(np.int32))
    before, start = peak_bytes(), time.perf_counter()
    jax.block_until_ready(method(Transformer(config), params, batches)[1])
    seconds = time.perf_counter() - start
    return {"wall": seconds, "peak": peak_bytes(), "before": before}


def peak_bytes() -> int:
    """Returns the most memory that this process has held.

    >>> peak_bytes() > 1e6
    True
    """
    status = Path("/proc/self/status")
    # A child's `ru_maxrss` begins with what its parent held when it was made; this does not.
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def limits(minutes: float, peak: float) -> str:
    """Returns which of the bounds does not hold, and by how much; "" where both do.

    >>> limits(36.0, 4.0), limits(1.0, 8.0)
    ('no, minutes are 1.20x', '')
    """
    shares = {"minutes": minutes / MINUTES, "GiB": peak / GIB}
    over = [f"{name} are {share:.2f}x" for name, share in shares.items() if share > 1]
    return f"no, {' and '.join(over)}" if over else ""


def render(results: Results) -> list[str]:
    """Returns the costs of all methods that were measured."""
    rows = []
    for name in ROWS:
        for values in results.by_name.get(name, {}).values():
            minutes, peak = values["wall"] / 60, values["peak"] / 2**30
            wanted = ""
            if name == GPTQ_ROW:
                wanted = f"{MINUTES:.0f} min, {GIB:.0f} GiB: {limits(minutes, peak) or 'yes'}"
            before = f"{values['before'] / 2**30:.2f}"
            rows.append([name, f"{minutes:.1f}", f"{peak:.2f}", before, wanted])
    if not rows:
        return []
    names = ["method", "minutes", "peak, GiB", "of that before it began", "at most"]
    return [
        f"{WINDOWS} windows of {LENGTH} random tokens for calibration, {BATCH} at a time; random "
        "weights; compilation included.",
        "",
        *grid(names, rows, "lrrrr"),
    ]


TABLES: tuple[Table, ...] = (Table("gpt2", "Costs at GPT-2 124M shapes", cells, render),)


if __name__ == "__main__":
    print(json.dumps(cost(json.loads(sys.argv[1]))))
