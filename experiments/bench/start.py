"""From the start of a process to the end of its first training step, and the wait for data.

Cold is an empty compilation cache, warm the same start once more: ours and torch.compile both keep
what they have compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments.bench.ratios import order, ratio
from experiments.bench.shapes import SHAPES, shape_to_json
from experiments.bench.sides import Side
from experiments.bench.table import Table, rows_of
from experiments.grid import Measured, Measurement

COLD, WARM = ("ours cold", "torch.compile cold"), ("ours warm", "torch.compile warm")
EAGER = "torch eager"
STARTS = 3  # of each side in each state; compiling for torch takes the most of them


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Starts each side anew, once.

    Args:
      settings: "shape", and "round": which goes first.

    Returns:
      Name -> seconds from before the process to after its first step.
    """
    shape = {"shape": settings["shape"]}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        caches = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(name) / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            "TORCHINDUCTOR_CACHE_DIR": str(Path(name) / "torch"),
        }
        for names in ((*COLD, EAGER), WARM):
            for which in order(names, settings["round"]):
                mode = "eager" if which == EAGER else "compile"
                subject = "train.jax" if which.startswith("ours") else "train.torch"
                given = shape if subject == "train.jax" else {**shape, "mode": mode}
                with Side(subject, given, caches) as side:
                    side.ask("time", steps=1)
                    found[which] = perf_counter() - side.started
    return found


def text(results: Sequence[Measured]) -> str:
    """Returns the ratios as Markdown."""
    values = {which: [m.values[which] for m in results] for which in (*COLD, *WARM, EAGER)}
    names = ("start", "torch.compile, cold", "torch.compile, warm", "torch eager")
    rows = [
        [ours, *(str(ratio(values[ours], values[which])) for which in (COLD[1], WARM[1], EAGER))]
        for ours in (COLD[0], WARM[0])
    ]
    return (
        "From the start of the process to the end of the first training step, imports included; "
        "how many times as fast as each other side, median and quartiles of "
        f"{len(results)} starts of each.\n\n" + rows_of(names, rows)
    )


def start_table() -> Table:
    """At 3 M parameters."""
    rounds = [
        {"table": "start", "shape": shape_to_json(SHAPES["3m"]), "round": number}
        for number in range(STARTS)
    ]
    measurements = tuple(Measurement("start", settings, measure) for settings in rounds)
    return Table("Time to the first step", measurements, text)


def measure_wait(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the training loop and returns its seconds by kind, of each round.

    Args:
      settings: "shape", "rounds", "steps".
    """
    with Side("train.jax", {"shape": settings["shape"]}) as side:
        side.ask("loop", steps=4)
        rounds = range(settings["rounds"])
        return {"seconds": [side.ask("loop", steps=settings["steps"]) for _ in rounds]}


def wait_share(seconds: Mapping[str, float]) -> float:
    """Returns the share of a loop's time that it waits for batches.

    >>> wait_share({"compile": 1.0, "data": 1.0, "step": 3.0})
    0.2
    """
    return seconds["data"] / sum(seconds.values())


def wait_text(results: Sequence[Measured]) -> str:
    """Returns the shares as Markdown."""
    rows = []
    for measured in results:
        settings = measured.measurement.settings
        shares = sorted(wait_share(seconds) for seconds in measured.values["seconds"])
        middle = shares[len(shares) // 2]
        spread = f"{middle:.2%} ({shares[0]:.2%} to {shares[-1]:.2%})"
        rows.append([f"{settings['rounds']} x {settings['steps']} steps", spread])
    names = ("loop", "of its time, waits for batches")
    return (
        "What of the loop's time goes into waiting for batches and putting them on the device, at "
        f"3 M parameters.\n\n{rows_of(names, rows)}"
    )


def wait_table() -> Table:
    """At 3 M parameters."""
    settings = {"table": "data", "shape": shape_to_json(SHAPES["3m"]), "rounds": 5, "steps": 30}
    return Table("Data wait", (Measurement("data", settings, measure_wait),), wait_text)
