"""The training step of GPT-2 124M on a GPU in many forms, one change at a time from the default.

Every row is a process of its own, so that compiler flags can differ. All are compiled first, many
at a time, into the persistent cache: the default alone at the beginning, so that the products that
the rows share are tuned once, on a quiet device, and alike for all. Then each is timed alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.alone import FAILED, ask_once
from experiments.bench.clock import spread
from experiments.bench.gpu_step import StepForm
from experiments.bench.shapes import SHAPES, environment_of, shape_from_json, shape_to_json
from experiments.bench.table import Job, Table, rows_of
from experiments.grid import Measured, Measurement

DATASHEET = 989e12  # operations a second in bfloat16 of an H100 or H200, dense
DEFAULT, AS_AGAINST_TORCH, AS_A_RUN = "default", "16 rows", "as a run does it"
BATCH = 32  # rows
STEPS, REPEATS = 6, 7  # that are timed
TIMED = 3  # processes that are started at a time, and wait for each other
COMPILE_LIMIT, TIME_LIMIT = 240.0, 120.0  # seconds of a process

ROWS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "attention with all scores": {"attention": "plain"},
    "attention in blocks of queries": {"attention": "blocks"},
    "scan over layers": {"scan": True},
    "recompute all of a block": {"remat": "full"},
    "recompute all but products": {"remat": "dots"},
    "logits of 8,192 positions at a time": {"chunk": 8192},
    "vocabulary of 50,257, not padded": {"multiple": 1},
    "logits of the padding masked": {"cut": False},
    "vocabulary of 50,304 tokens": {"vocabulary": 50304},
    "embedding gradient: scatter": {"lookup": "scatter"},
    "embedding gradient: sorted scatter": {"lookup": "sorted"},
    "embedding gradient: one-hot product": {"lookup": "one_hot"},
    AS_AGAINST_TORCH: {"rows": 16},
    "64 rows": {"rows": 64},
    "no products in Triton": {"flags": "--xla_gpu_enable_triton_gemm=false"},
    "products not merged": {"flags": "--xla_gpu_dot_merger_threshold_mb=0"},
    "neither": {"flags": "--xla_gpu_enable_triton_gemm=false --xla_gpu_dot_merger_threshold_mb=0"},
    AS_A_RUN: {"cut": False, "options": True},
    "4 steps in one program": {"dispatched": 4},
    "cuDNN's layer norm": {"flags": "--xla_gpu_enable_cudnn_layer_norm=true"},
    "no excess precision": {"flags": "--xla_allow_excess_precision=false"},
    "latency-hiding scheduler": {"flags": "--xla_gpu_enable_latency_hiding_scheduler=true"},
    "no command buffers": {"flags": "--xla_gpu_enable_command_buffer="},
}
"""What differs from the default, by row."""

PROFILED = (DEFAULT, "neither", AS_A_RUN)
EXPECTED: dict[str, str] = {
    "attention with all scores": "slower by half: reads and writes [B, H, T, T] a dozen times",
    "attention in blocks of queries": "slower by a third: half of the scores, through memory",
    "scan over layers": "slower by 2 to 5 %: copies into stacks, no fusion across layers",
    "recompute all of a block": "slower by a fourth: one more forward pass of the blocks",
    "recompute all but products": "slower by 5 to 8 %: norms, activations and attention again",
    "logits of 8,192 positions at a time": "slower by 8 %: the head's product once more",
    "vocabulary of 50,257, not padded": "slower by 5 to 10 %: rows that no vector load fits",
    "vocabulary of 50,304 tokens": "faster by 2 %: reductions over an even number of columns",
    "embedding gradient: scatter": "faster by 0.5 %, or far slower where additions are loops",
    "embedding gradient: sorted scatter": "equal, or slower where additions are loops",
    "embedding gradient: one-hot product": "slower by 7 %: one more product of the head's size",
    "16 rows": "slower a token by 2 %: fewer tiles, and the optimizer weighs double",
    "64 rows": "faster a token by 1 %",
    "4 steps in one program": "equal: the host is ahead of the device anyway",
    "logits of the padding masked": "faster by 3 %: as with a vocabulary of 50,304 tokens",
    "no products in Triton": "faster by up to 5 %",
    "products not merged": "faster by 3 %: no copies to and from the merged operands",
    "neither": "faster by up to 8 %",
    AS_A_RUN: "faster by 6 %: neither, and padding that is masked",
    "cuDNN's layer norm": "unknown",
    "no excess precision": "slower by 1 %: more roundings between fused operations",
    "latency-hiding scheduler": "equal: there is nothing to hide on one device",
    "no command buffers": "slower by 0 to 3 %",
}
"""What each change was expected to do, written before that row was measured."""


def measurements(shape_name: str = "124m-cuda") -> tuple[Measurement, ...]:
    """One for each row; and where the time of some of them goes."""
    shape = shape_to_json(dataclasses.replace(SHAPES[shape_name], batch_size=BATCH))
    return tuple(
        Measurement(
            name,
            {
                "table": "gpu-forms",
                "row": name,
                "shape": shape,
                "form": dataclasses.asdict(StepForm(**changes)),
                "steps": STEPS,
                "repeats": REPEATS,
            },
            measure,
        )
        for name, changes in ROWS.items()
    )


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Variables of the process of a row."""
    variables = environment_of(shape_from_json(settings["shape"]), "ours")
    flags = settings["form"]["flags"]
    return {**variables, "XLA_FLAGS": flags} if flags else variables


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times one row; of some also the kernels."""
    asked: dict[str, Any] = {"environment": environment(settings), "limit": TIME_LIMIT}
    effort = {"steps": settings["steps"], "repeats": settings["repeats"]}
    found = ask_once("gpu.step", settings, "time", **asked, **effort)
    if settings["row"] in PROFILED and FAILED not in found:
        found["profile"] = ask_once("gpu.step", settings, "profile", **asked, steps=3)
    return found


def compiling(missing: Sequence[Measurement]) -> list[Job]:
    """Compiles the rows that are missing, before all others the default and what torch is up to."""

    def job(measurement: Measurement) -> Job:
        def run() -> None:
            settings = measurement.settings
            asked: dict[str, Any] = {"environment": environment(settings), "limit": COMPILE_LIMIT}
            found = ask_once("gpu.step", settings, "compile", **asked)
            if FAILED in found:
                print(f"{measurement.name} does not compile: {found[FAILED][-300:]}", flush=True)

        return Job(0 if measurement.name in (DEFAULT, AS_AGAINST_TORCH) else 1, run)

    return [job(measurement) for measurement in missing]


def text(results: Sequence[Measured]) -> str:
    """Returns the rows as Markdown."""
    made = {m.measurement.name: m.values for m in results}
    base = _rate(made[DEFAULT]) if DEFAULT in made else None
    rows = []
    for name, v in made.items():
        middle, low, high = (1000 * s for s in spread(v["seconds"]))
        rows.append(
            [
                name,
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{_rate(v) / 1000:,.0f} k",
                f"{v['flops'] / (middle / 1000) / DATASHEET:.1%}",
                "" if base is None else f"{_rate(v) / base - 1:+.1%}",
                f"{v['peak'] / 2**30:.1f}",
                f"{v['compile']:.0f}",
                EXPECTED.get(name, ""),
            ]
        )
    names = ["form", "ms a step", "tokens / s", "of 989 TFLOP/s", "against default", "peak, GiB"]
    names += ["compile, s", "expected"]
    lines = [
        "GPT-2 124M at context 1,024 in bfloat16 with AdamW in float32; one change at a time from "
        "the default: cuDNN's attention, a Python loop over layers, nothing computed again, all "
        "logits at once, a vocabulary padded to 50,304 whose padding is cut off, the "
        "compiler's own options, 32 rows. Medians and quartiles of repeats "
        "of some steps. Operations are the model's analytic count. Compile seconds are of a "
        "process that may have read the program from the cache.",
        "",
        rows_of(names, rows),
    ]
    for name, v in made.items():
        if kernels := v.get("profile", {}).get("kernels"):
            lines += ["", f"Where the time of a step goes, {name}:", "", _profile(kernels)]
    return "\n".join(lines)


def _rate(values: Mapping[str, Any]) -> float:
    return float(values["tokens"] / spread(values["seconds"])[0])


def _profile(kernels: Mapping[str, Sequence[float]]) -> str:
    rows = [
        [f"`{name[:90]}`", f"{1000 * seconds:.3f}", f"{count:.0f}"]
        for name, (seconds, count) in list(kernels.items())[:25]
    ]
    return rows_of(["kernel", "ms a step", "launches"], rows)


def forms_table() -> Table:
    """The table."""
    return Table(
        "Training step on a GPU, form by form",
        measurements(),
        text,
        prepare=compiling,
        together=TIMED,
    )
