"""The parameter server on Ray, with a slow worker, and with a worker and a server killed half-way.

The runs are those of `experiments.parameter_server`, each a cell. A step is padded to a fixed time,
longer than it computes on this machine, so that cores do not decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
    slow = facts["slowest_step"]
    applied = killed["acknowledged"] + killed["unheard"]
    to_target = runs.faster(forms["synchronous"]["seconds_to_target"], alive["seconds_to_target"])
    return [
        f"{command.workers} workers on {command.servers} servers, one of them "
        f"{command.slowness:g} times slower; every step is padded to {PACE:g} s "
        f"({PACE * command.slowness:g} s), and the slowest computed for {slow:.2f} s"
        + (". " if slow < PACE else ", **longer than the pace**: the times are this machine's. ")
        + f"{len(found) // len(runs.FORMS)} seeds. The target of a seed is the final loss of its "
        f"synchronous run ({', '.join(f'{target:.3f}' for target in facts['targets'])}). Updates "
        "are counted a server each.",
        "",
        runs.table(facts),
        "",
        f"The asynchronous form reaches the target {to_target}, against the synchronous one of "
        "the same seed.",
        f"With a worker and a server killed half-way {same_loss(killed['loss'], alive['loss'])}; "
        f"{killed['lost']} acknowledged updates were lost, and {killed['applied']} applied = "
        f"{killed['acknowledged']} acknowledged + {killed['unheard']} whose worker died before it "
        f"heard{'' if applied == killed['applied'] else ' (**they differ**)'}.",
    ]


def same_loss(killed: Sequence[float], alive: Sequence[float]) -> str:
    """Says whether the runs end at the same loss: within what the undisturbed runs' seeds span.

    >>> same_loss([2.01, 2.04], [2.0, 2.05])
    'the runs end at the same loss: off the undisturbed run of the seed by +0.0100, -0.0100, at \
most 0.0100, and the undisturbed runs span 0.0500 over 2 seeds'
    """
    off = [k - a for k, a in zip(killed, alive, strict=True)]
    differences = ", ".join(f"{d:+.4f}" for d in off)
    worst, span = max(map(abs, off)), max(alive) - min(alive)
    if len(off) == 1:
        return f"the run ends {differences} off the undisturbed one; one seed has no spread"
    verdict = "at the same loss" if worst <= span else "at **another** loss"
    return (
        f"the runs end {verdict}: off the undisturbed run of the seed by {differences}, at most "
        f"{worst:.4f}, and the undisturbed runs span {span:.4f} over {len(off)} seeds"
    )


def picture(results: Results) -> Any:
    """Draws validation loss against seconds, a line a run."""
    found = complete_seeds(results)
    if not found:
        return None
    targets = runs.summary(runs.ParameterServer(pace=PACE), found)["targets"]
    return runs.figure(found, targets)


TABLE = Table("server", "Parameter server: a slow worker, and deaths", cells, render, picture)
