"""Every `shard_map` path on one device, compiled and timed against plain jit.

All axes are of size 1, so that what is timed is what a path itself costs on this device: its codes,
its copies, its loops. Calls of a path and of the plain program take turns, pair after pair; what is
short, or does not do the same in every step, is timed many calls at once. Beside the times stands
what the device says of its memory against the arithmetic of `experiments.plan`. It is the one table
for a machine with a single GPU or TPU; on a CPU it is a smoke test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.grid import Measurement
from experiments.methods.parallel import CompressedReduce, Delayed, Diloco
from experiments.plan.memory import memory_of
from experiments.runs.layout import Division, mesh_of, model_of
from experiments.scale.program import Program, batch_of, first, program, settings_for
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from model.attention import Visibility
from model.block import Block
from model.config import TransformerConfig
from model.positions import rotation
from model.presets import modern
from model.transformer import Transformer
from parallel.mesh import AXES
from parallel.parameter_server import init_server, server_step
from parallel.pipeline import pipeline
from parallel.report import readable
from parallel.ring_attention import ring_attention
from parallel.tensor_block import tensor_block
from train.losses import counts_of, loss_function
from train.optimizers import AdamW
from train.plugs import Context
from train.step import make_train_step

PAIRS = {"cpu": 5}
MANY = 20  # pairs on an accelerator
METHODS: dict[str, Any] = {
    "all-reduce": CompressedReduce("none"),
    "int8": CompressedReduce("int8"),
    "top-k, 1 %": CompressedReduce("top_k", density=0.01),
    "PowerSGD, rank 4": CompressedReduce("powersgd", rank=4),
    "DiLoCo, H = 10": Diloco(every=10, workers=1),
    "delayed by 2": Delayed(steps=2),
}
FORMS: dict[str, dict[str, Any]] = {
    "ring attention": {"attention": ring_attention},
    "pipeline": {"pipeline": lambda: lambda stage: pipeline(stage, 2)},
}
BLOCKS = ("all_reduce", "sequence", "overlapped")
SERVER = "parameter server, synchronous"
MEMORY = "memory of the plain step"
CALLS = {"DiLoCo, H = 10": 10}  # a round, so that its meeting is in every time
CALLS_OF_A_BLOCK = {"cpu": 1}
MANY_CALLS = 50  # a block takes about a millisecond, and starting a program as long
OPTIMIZER = AdamW(learning_rate=3e-3)


def cells(request: Request) -> list[Measurement]:
    """One for each path; what they were timed on is part of what they are."""
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    names = [*METHODS, *FORMS, SERVER, *(f"tensor-parallel block, {form}" for form in BLOCKS)]
    shape = vars(size(platform)) | {"rows": rows(platform)}
    facts = {"table": "device", "device": kind, "layers": shape["layers"], "rows": shape["rows"]}
    facts |= {"width": shape["width"], "dtype": shape["dtype"], "pairs": PAIRS.get(platform, MANY)}

    def timed(name: str) -> Measurement:
        more: dict[str, Any] = {"optimizer": "AdamW, clipped"} if name == SERVER else {}
        calls = calls_of(name, platform)
        more |= {"calls": calls} if calls > 1 else {}
        return Measurement(name, {**facts, **more, "path": name}, measure)

    rows_of_times = [timed(name) for name in names]
    if peak_bytes() is None:
        return rows_of_times
    # First: a device's peak is that of all that ever ran in its process.
    return [Measurement(MEMORY, {**facts, "path": MEMORY}, measure_memory), *rows_of_times]


def calls_of(name: str, platform: str) -> int:
    """Returns how many calls of a path are timed at once."""
    if name.startswith("tensor-parallel"):
        return CALLS_OF_A_BLOCK.get(platform, MANY_CALLS)
    return CALLS.get(name, 1)


def size(platform: str) -> TransformerConfig:
    """Returns the model: of 130 M parameters in bfloat16 on an accelerator, small on a CPU."""
    if platform == "cpu":
        return modern(
            layers=2, width=64, heads=4, vocabulary_size=256, max_length=64, scan_layers=True
        )
    return modern(
        layers=12,
        width=768,
        heads=12,
        vocabulary_size=50304,
        max_length=1024,
        scan_layers=True,
        dtype="bfloat16",
    )


def rows(platform: str) -> int:
    """Rows of a batch."""
    return 4 if platform == "cpu" else 8


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times one path against the plain step, or the plain block."""
    name, pairs = settings["path"], settings["pairs"]
    platform = jax.default_backend()
    config = size(platform)
    with jax.set_mesh(mesh_of("data=1")):
        if name.startswith("tensor-parallel"):
            run, plain = block_step(config, platform, name.rpartition(" ")[2])
        else:
            plain = plain_step(config, platform)
            run = path_step(name, config, platform)
        calls = settings.get("calls", 1)
        seconds = in_turns([plain, run], pairs, calls)
    ratios = [ours / theirs for theirs, ours in zip(*seconds, strict=True)]
    return {
        "device": settings["device"],
        "calls": calls,
        "plain": float(np.median(seconds[0])),
        "path": float(np.median(seconds[1])),
        "ratio": float(np.median(ratios)),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def in_turns(runs: Sequence[Callable[[], Any]], pairs: int, calls: int = 1) -> list[list[float]]:
    """Returns the seconds of a call of each, one after the other, pair after pair.

    Args:
      runs: the programs.
      pairs: how many times of each; one more, the first, is not kept.
      calls: that are timed at once; their mean counts as one.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(pairs + 1):
        for run, kept in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                last = run()
            jax.block_until_ready(last)
            if number:
                kept.append((time.perf_counter() - begin) / calls)
    return seconds


def measure_memory(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Holds what the device had in use at its peak against the arithmetic of a plan."""
    platform = jax.default_backend()
    config = size(platform)
    planned = memory_of(
        the_settings(config, platform), dict.fromkeys(AXES, 1), Division(), platform
    )
    before = peak_bytes()
    with jax.set_mesh(mesh_of("data=1")):
        step = plain_step(config, platform)
        for _ in range(2):
            jax.block_until_ready(step())
    return {
        "device": settings["device"],
        "planned": planned._asdict(),
        "before": before,
        "peak": peak_bytes(),
    }


def peak_bytes() -> int | None:
    """Returns the most bytes that were in use on the first device, None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def plain_step(config: TransformerConfig, platform: str) -> Callable[[], Any]:
    """One step of plain jit after the other."""
    return stepping(program(the_settings(config, platform), "data=1"))


def path_step(name: str, config: TransformerConfig, platform: str) -> Callable[[], Any]:
    """One step of a path after the other, the same training as the plain one's."""
    if name in METHODS:
        settings = the_settings(config, platform, methods=(METHODS[name],))
        return stepping(program(settings, "data=1"))
    built = program(the_settings(config, platform), "data=1")
    if name == SERVER:
        return server_steps(built)
    # A mesh on which the axis is 1 takes the plain form by itself.
    parts = {key: make() for key, make in FORMS[name].items()}
    model = model_of(built.layout, config).clone(**parts)
    step = make_train_step(model, built.parts.terms, built.parts.optimizer)
    return stepping(built._replace(step=jax.jit(step, donate_argnums=0)))


def the_settings(config: TransformerConfig, platform: str, **more: Any) -> Any:
    """Settings of the timed steps."""
    shape = {"rows": rows(platform), "time": config.max_length, "steps": 1000}
    return settings_for(config, **shape, optimizer=OPTIMIZER, **more)


def stepping(built: Program) -> Callable[[], Any]:
    """Returns a function that makes the next step."""
    state, batch = first(built), jax.device_put(batch_of(built.settings, 0))

    def run() -> Any:
        nonlocal state
        state, metrics = built.step(state, {}, batch)
        return metrics

    return run


def server_steps(built: Program) -> Callable[[], Any]:
    """Returns a function that makes the next step of the sharded synchronous server."""
    params, terms = first(built).params, built.parts.terms
    # The plain step's, but elementwise, as slices ask: it decays vectors as well.
    a = OPTIMIZER
    optimizer = optax.adamw(a.learning_rate, a.b1, a.b2, a.eps, weight_decay=a.weight_decay)
    state = init_server(params, optimizer, workers=1)
    model = Transformer(built.parts.config)
    step = server_step(
        loss_function(model, terms),
        optimizer,
        jax.eval_shape(lambda: params),
        clip=a.clip_norm,
    )
    batch = jax.device_put(batch_of(built.settings, 0))

    @jax.jit
    def one(state: Any, batch: Any) -> Any:
        context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(terms, batch))
        return step(state, batch, context)

    def run() -> Any:
        nonlocal state
        state, metrics = one(state, batch)
        return metrics

    return run


def block_step(
    config: TransformerConfig, platform: str, form: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the gradient of one block, with its collectives written out, and plain."""
    shape = (rows(platform), config.max_length, config.width)
    x_BTD = jax.random.normal(jax.random.key(0), shape, config.dtype)
    turn = rotation(jnp.arange(shape[1])[None], config.head_width_, config.rotary_base)
    plain, visibility = Block(config), Visibility()
    params = plain.init(jax.random.key(1), x_BTD, visibility, turn, None)["params"]
    written_out = tensor_block(config, form)

    def gradient(block: Callable[..., Any]) -> Callable[[], Any]:
        @jax.jit
        def run(params: Any, x_BTD: jax.Array) -> Any:
            return jax.grad(lambda p, x: block(p, x).astype(jnp.float32).sum(), (0, 1))(
                params, x_BTD
            )

        return lambda: run(params, x_BTD)

    ours = gradient(lambda p, x: written_out(p, x, visibility, turn))
    return ours, gradient(lambda p, x: plain.apply({"params": p}, x, visibility, turn, None)[0])


def render(results: Results) -> list[str]:
    """Returns the table, a row a path, and what is known of memory."""
    rows, devices, memory = [], set(), list[str]()
    for name, seeds in results.by_name.items():
        for v in seeds.values():
            devices.add(v["device"])
            if "planned" in v:
                memory += ["", memory_line(v)]
                continue
            spread = f"{v['lowest']:.2f} to {v['highest']:.2f}"
            seconds = [f"{1000 * v[key]:,.1f}" for key in ("plain", "path")]
            rows.append([name, str(v.get("calls", 1)), *seconds, f"{v['ratio']:.2f}", spread])
    return [
        f"On one {', '.join(sorted(devices))}, every axis of size 1. Median of pairs, and the "
        "range; blocks are the gradient of one block, all others a whole step of training. A time "
        "is the mean of so many calls, one after the other.",
        "",
        *grid(
            ["path", "calls", "plain jit, ms", "path, ms", "path / plain", "range"], rows, "lrrrrr"
        ),
        *memory,
    ]


def memory_line(values: Mapping[str, Any]) -> str:
    """Returns what a plan says of the plain step's memory beside what the device had in use."""
    planned, peak = values["planned"], values["peak"]
    total = sum(planned.values())
    parts = ", ".join(f"{name} {readable(number)}" for name, number in planned.items())
    arithmetic = (
        f"Memory of the plain step: {readable(total)} by the arithmetic of a plan ({parts})"
    )
    if values["before"] >= peak:
        return f"{arithmetic}; its peak is not known, as something before it needed more."
    return f"{arithmetic}, {readable(peak)} in use at its peak: {total / peak:.2f} times as much."


TABLE = Table("device", "One device: every `shard_map` path against plain jit", cells, render)
