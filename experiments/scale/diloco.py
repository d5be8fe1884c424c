"""DiLoCo: bytes and loss at several lengths of a round, against synchronous training.

All see the same batches, so the same tokens; the inner optimizer and its schedule are those of the
synchronous run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.grid import Measurement
from experiments.methods.parallel import Diloco
from experiments.runs.layout import mesh_of
from experiments.scale.compression import model_of_runs, shapes_of_runs, zeros_like
from experiments.scale.training import SIZE, STEPS, settings_of, trained
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from parallel.local_sgd import bytes_per_token, init_local, nesterov, outer_step, shardings
from parallel.traffic import collectives
from train.plugs import State

WORKERS = 4
ROUNDS = (1, 10, 50, 100)
OUTER_RATE, OUTER_MOMENTUM = 1.0, 0.5  # the best of the table diloco-outer
PLAIN = "synchronous"


def cells(request: Request) -> list[Measurement]:
    """The bytes of a meeting, then a run by length of a round and seed."""
    meeting = Measurement(
        "a meeting",
        {"table": "diloco", "workers": WORKERS, **model_of_runs()},
        measure_meeting,
    )
    mesh = f"data={WORKERS}"
    forms: list[tuple[str, tuple[Any, ...]]] = [(PLAIN, ())]
    outer = {"outer_rate": OUTER_RATE, "outer_momentum": OUTER_MOMENTUM}
    forms += [(name_of(H), (Diloco(every=H, workers=WORKERS, **outer),)) for H in ROUNDS]
    runs = [
        trained(name, settings_of(seed, methods=methods), mesh, request, "diloco")
        for seed in range(request.seeds)
        for name, methods in forms
    ]
    return [meeting, *runs]


def name_of(every: int) -> str:
    """What a row is called.

    >>> name_of(50)
    'H = 50'
    """
    return f"H = {every}"


def measure_meeting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Counts what one worker sends when all meet: by formula, and in the compiled program."""
    shapes, outer = shapes_of_runs(), nesterov()
    mesh = mesh_of(f"data={WORKERS}")

    def start() -> Any:
        state: Any = State(jnp.int32(0), zeros_like(shapes), {}, jax.random.key(0), {})
        return init_local(state, WORKERS, outer)

    with jax.set_mesh(mesh):
        local = jax.eval_shape(start)
        of = shardings(mesh, local)
        step = jax.jit(outer_step(outer), in_shardings=(of,), out_shardings=of)
        text = step.lower(local).compile().as_text() or ""
    found = collectives(text, mesh)
    tokens = SIZE.batch_size * SIZE.sequence_length // WORKERS
    return {
        "formula": bytes_per_token(shapes, WORKERS, 1, tokens) * tokens,
        "program": float(sum(each.sent for each in found)),
        "kinds": sorted({each.kind for each in found}),
    }


def meetings(every: int) -> int:
    """Returns how often the workers meet in a run; at its end they do in any case.

    >>> meetings(100), meetings(1)
    (5, 500)
    """
    return -(-STEPS // every)


def render(results: Results) -> list[str]:
    """Returns the table: a row a length of a round."""
    sent = results.column("a meeting", "program")
    rows = []
    plain = results.column(PLAIN, "loss")
    for name, count in [(PLAIN, STEPS), *((name_of(H), meetings(H)) for H in ROUNDS)]:
        seeds = results.shared(PLAIN, name)
        if not seeds:
            continue
        base, ours = results.pair(PLAIN, name, "loss")
        off = [o / b - 1 for o, b in zip(ours, base, strict=True)]
        total = f"{sent[0] * count / 1e6:,.1f}" if sent else "-"
        rows.append(
            [
                name,
                total,
                f"1/{STEPS / count:g}",
                str(len(seeds)),
                f"{np.mean(ours):.4f}",
                f"{min(ours):.4f} to {max(ours):.4f}",
                "-" if name == PLAIN else f"{np.mean(off):+.2%}",
            ]
        )
    head = ["form", "MB sent by a worker", "of synchronous", "seeds", "loss", "range"]
    lines = [
        f"{WORKERS} workers, {STEPS} steps of {SIZE.batch_size} x {SIZE.sequence_length} tokens "
        f"in all forms. The outer steps are Nesterov's with rate {OUTER_RATE:g} and momentum "
        f"{OUTER_MOMENTUM:g}, the best of the trials above; the inner "
        "optimizer is the synchronous run's, rate and all. H = 1 speaks as often as "
        "synchronous training, and steps twice.",
        "",
        *grid([*head, "off synchronous"], rows, "lrrrrrr"),
    ]
    if sent:
        formula = results.column("a meeting", "formula")[0]
        lines += [
            "",
            f"A meeting is {sent[0]:,.0f} bytes in the compiled program and {formula:,.0f} by the "
            "formula, 2 (W - 1) / W of the parameters.",
        ]
    return lines if plain or sent else []


def picture(results: Results) -> Any:
    """Draws loss against bytes, a point a run; None without runs."""
    from matplotlib.figure import Figure

    sent = results.column("a meeting", "program")
    names = [name for name in map(name_of, ROUNDS) if results.by_name.get(name)]
    if not sent or not names or not results.by_name.get(PLAIN):
        return None
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    counts = {PLAIN: STEPS, **{name_of(H): meetings(H) for H in ROUNDS}}
    for number, name in enumerate([PLAIN, *names]):
        values = results.column(name, "loss")
        x = [sent[0] * counts[name] / 1e6] * len(values)
        marker = "s" if name == PLAIN else "o"
        axis.plot(x, values, marker, color=f"C{number}", label=name, alpha=0.8)
    axis.set_xscale("log")
    axis.set(xlabel="MB sent by a worker", ylabel=f"validation loss after {STEPS} steps")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


TABLE = Table("diloco", "DiLoCo: bytes and loss at equal tokens", cells, render, picture)
