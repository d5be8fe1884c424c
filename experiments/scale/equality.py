"""Equality: ten steps on a mesh against ten on one device.

Losses, the gradient of the first step (Adam's first moment after it is that gradient times
1 - b1) and the parameters after the last, in float64 and in float32. Each figure is the norm of the
difference over the norm: the worst tensor's, and that of all tensors as one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.grid import Measurement
from experiments.runs.layout import Division
from experiments.scale.program import program, settings_for, small_model, steps_of
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from model.rules import leaf_paths
from train.plugs import PyTree

STEPS = 10
LOSSES, FLOAT64, FLOAT32 = 1e-5, 1e-10, 1e-5
"""What is called equal: losses, relative; float64 a tensor; float32 all tensors as one."""

CASES: tuple[tuple[str, tuple[str, ...], int | None, int], ...] = (
    ("data=8", (), None, 1),
    ("data=8", ("zero1",), None, 1),
    ("fsdp=8", (), None, 1),
    ("data=2,fsdp=4", (), None, 1),
    ("data=2,tensor=4", (), None, 1),
    ("data=2,tensor=4", ("sequence",), None, 1),
    ("fsdp=4,tensor=2", (), None, 1),
    ("data=2,fsdp=2,tensor=2", ("sequence",), None, 1),
    ("context=8", (), None, 1),
    ("data=2,context=4", (), None, 1),
    ("fsdp=2,context=2,tensor=2", (), None, 1),
    ("data=2,pipeline=4", (), None, 1),
    ("data=2,pipeline=2,tensor=2", (), 4, 2),
    ("fsdp=2,pipeline=2,tensor=2", (), None, 1),
    ("data=2,pipeline=2,context=2", (), None, 1),
    ("pipeline=2,context=2,tensor=2", (), None, 1),
)
"""Mesh, strategies besides those of its axes, micro-batches and rounds of the pipeline."""


SCOPES = {"float64": "tensor", "float32": "all"}
OF = ("gradient", "parameters")


class Ten(NamedTuple):
    """What ten steps gave, on the host."""

    losses: np.ndarray
    gradient: PyTree
    parameters: PyTree


def cells(request: Request) -> list[Measurement]:
    """Every case; seeds say nothing here."""
    return [
        Measurement(
            name_of(mesh, strategies, rounds),
            {
                "table": "equality",
                "mesh": mesh,
                "strategies": list(strategies),
                "pipeline_micro_batches": micro_batches,
                "pipeline_rounds": rounds,
                "steps": STEPS,
            },
            measure,
        )
        for mesh, strategies, micro_batches, rounds in CASES
    ]


def name_of(mesh: str, strategies: Sequence[str], rounds: int) -> str:
    """What a case is called.

    >>> name_of("data=2,pipeline=4", ("zero1",), 2)
    'data=2,pipeline=4 + zero1, 2 rounds'
    """
    return " + ".join([mesh, *strategies]) + (f", {rounds} rounds" if rounds > 1 else "")


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one case in both types and compares each with one device."""
    division = Division(
        tuple(settings["strategies"]),
        settings["pipeline_micro_batches"],
        settings["pipeline_rounds"],
    )
    found = {}
    for dtype in ("float64", "float32"):
        want = ten_steps("", Division(), dtype, settings["steps"])
        got = ten_steps(settings["mesh"], division, dtype, settings["steps"])
        found[dtype] = {
            "losses": float(np.max(np.abs(got.losses - want.losses) / np.abs(want.losses))),
            "fell": float(want.losses[0] - want.losses[-1]),
            "gradient": distances(got.gradient, want.gradient),
            "parameters": distances(got.parameters, want.parameters),
        }
    return found


@functools.lru_cache(maxsize=2)  # that of one device, for both types
def _cached(dtype: str, steps: int) -> Ten:
    return _ten_steps("", Division(), dtype, steps)


def ten_steps(mesh: str, division: Division, dtype: str, steps: int) -> Ten:
    """Runs some steps of the small model from a visible start."""
    return _ten_steps(mesh, division, dtype, steps) if mesh else _cached(dtype, steps)


def _ten_steps(mesh: str, division: Division, dtype: str, steps: int) -> Ten:
    with jax.enable_x64() if dtype == "float64" else nullcontext():
        built = program(settings_for(small_model(dtype), steps=steps), mesh, division)
        after_one, losses, last = steps_of(built, steps)
    return Ten(np.array(losses), first_moment(after_one, last), last)


def first_moment(optimizer: PyTree, params: PyTree) -> PyTree:
    """Returns Adam's first moment, a tree like the parameters."""
    found = optax.tree.get(optimizer, "mu")
    assert leaf_paths(found) == leaf_paths(params)
    return found


def distances(got: PyTree, want: PyTree) -> dict[str, Any]:
    """Returns the relative distance of the worst tensor, its name, and of all tensors as one.

    >>> distances({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.full(2, 2.0)})
    {'tensor': 0.5, 'worst': 'b', 'all': 0.4472135954999579}
    """
    pairs = list(zip(_wide(got), _wide(want), strict=True))
    off = np.array([np.linalg.norm(a - b) for a, b in pairs])
    size = np.array([np.linalg.norm(b) for _, b in pairs])
    each = off / np.maximum(size, np.finfo(np.float64).tiny)
    worst = int(np.argmax(each))
    return {
        "tensor": float(each[worst]),
        "worst": leaf_paths(want)[worst],
        "all": float(np.linalg.norm(off) / np.linalg.norm(size)),
    }


def _wide(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def equal(values: Mapping[str, Any]) -> bool:
    """Whether a case is equal to one device, as the design defines it."""
    wide, narrow = values["float64"], values["float32"]
    return (
        max(wide[of]["tensor"] for of in ("gradient", "parameters")) <= FLOAT64
        and max(narrow[of]["all"] for of in ("gradient", "parameters")) <= FLOAT32
        and max(wide["losses"], narrow["losses"]) <= LOSSES
    )


def render(results: Results) -> list[str]:
    """Returns the table: a row a mesh, both types."""
    rows = []
    for name, seeds in results.by_name.items():
        for values in seeds.values():
            row = [f"`{name}`"]
            for dtype, scope in SCOPES.items():
                found = values[dtype]
                figures = [found["losses"], *(found[of][scope] for of in OF)]
                row += [f"{figure:.0e}" for figure in figures]
            rows.append([*row, "yes" if equal(values) else "**no**"])
    head = ["mesh"]
    for dtype in SCOPES:
        head += [f"{dtype}: losses", "first gradient", "parameters"]
    count = sum(row[-1] == "yes" for row in rows)
    return [
        f"{STEPS} steps of AdamW on a mesh against one device, relative distances: {count} of "
        f"{len(rows)} meshes are equal. Losses may differ by {LOSSES:.0e}; in float64 the worst "
        f"tensor by {FLOAT64:.0e} of its norm, in float32 all tensors as one by {FLOAT32:.0e}.",
        "",
        *grid([*head, "equal"], rows, "l" + "r" * 6 + "l"),
    ]


TABLE = Table("equality", "Equality: any mesh against one device", cells, render)
