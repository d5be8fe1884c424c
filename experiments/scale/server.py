"""The parameter server on Ray, with a slow worker, and with a worker and a server killed half-way.

The runs are those of `experiments.parameter_server`, each a cell. A step is padded to a fixed time,
longer than it computes on this machine, so that cores do not decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import parameter_server as runs
from experiments.ablate.tables import Request, Results, Table
from experiments.grid import Measurement
from experiments.parameter_server_task import make_task

PACE = 0.5  # seconds; a step of the task computes for some hundredths, more on a busy machine


def cells(request: Request) -> list[Measurement]:
    """A run of each form on each seed."""
    command = runs.ParameterServer(pace=PACE)
    settings = runs.settings_of(command)
    return [
        Measurement(
            form,
            {"table": "server", "form": form, "seed": seed, **settings},
            functools.partial(measure, command, request.cells),
        )
        for seed in range(request.seeds)
        for form in runs.FORMS
    ]


def measure(
    command: runs.ParameterServer, folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes one run, with servers and workers of its own."""
    out = (folder / "server").resolve()  # workers have other folders
    command = dataclasses.replace(command, out=out)
    task = make_task(command.task, settings["seed"])
    with runs.ray_running():
        return runs.one_run(command, settings["form"], settings["seed"], task)


def complete_seeds(results: Results) -> list[dict[str, Any]]:
    """Returns the runs of the seeds that have all forms."""
    seeds = results.shared(*runs.FORMS)
    return [dict(results.by_name[form][seed]) for seed in seeds for form in runs.FORMS]


def render(results: Results) -> list[str]:
    """Returns the table of `experiments.parameter_server`, and what holds for the deaths."""
    found = complete_seeds(results)
    if not found:
        return ["No seed has all three forms yet."]
    command = runs.ParameterServer(pace=PACE)
    facts = runs.summary(command, found)
    forms = facts["forms"]
    killed, alive = (forms[form] for form in ("killed", "asynchronous"))
    times = [forms[form]["seconds_to_target"] for form in ("synchronous", "asynchronous")]
    reached = [(s, a) for s, a in zip(*times, strict=True) if s and a]
    ratios = [s / a for s, a in reached]
    off = [k / a - 1 for k, a in zip(killed["loss"], alive["loss"], strict=True)]
    slow = facts["slowest_step"]
    lines = [
        f"{command.workers} workers on {command.servers} servers, one of them "
        f"{command.slowness:g} times slower; every step is padded to {PACE:g} s "
        f"({PACE * command.slowness:g} s), and the slowest computed for {slow:.2f} s"
        + (". " if slow < PACE else ", **longer than the pace**: the times are this machine's. ")
        + f"{len(found) // len(runs.FORMS)} seeds. The target is the mean final loss of the "
        "synchronous runs. Updates are counted a server each.",
        "",
        runs.table(facts),
        "",
    ]
    if ratios:
        lines.append(
            f"To the target the asynchronous form needs {runs.spread(ratios, 2)} times less time."
        )
    applied = killed["acknowledged"] + killed["unheard"]
    lines.append(
        f"With a worker and a server killed half-way the final loss is {runs.spread(off, 4)} of "
        "that of the undisturbed runs away, relative; "
        f"{killed['lost']} acknowledged updates were lost, and {killed['applied']} applied = "
        f"{killed['acknowledged']} acknowledged + {killed['unheard']} whose worker died before it "
        f"heard{'' if applied == killed['applied'] else ' (**they differ**)'}."
    )
    return lines


def picture(results: Results) -> Any:
    """Draws validation loss against seconds, a line a run."""
    found = complete_seeds(results)
    if not found:
        return None
    target = runs.summary(runs.ParameterServer(pace=PACE), found)["target"]
    return runs.figure(found, target)


TABLE = Table("server", "Parameter server: a slow worker, and deaths", cells, render, picture)
