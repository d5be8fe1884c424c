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
from experiments.grid import Measurement
from experiments.parameter_server_task import make_task
from experiments.tables.margins import margin
from experiments.tables.table import Request, Results, Table

ERRORS = 2.0  # standard errors from which two losses differ
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
    """Says whether the runs end at the same loss: not two standard errors apart, in pairs.

    The seed does not make an asynchronous run repeat, so that even undisturbed ones of one seed
    differ; a difference has to be told from that.

    >>> same_loss([2.02, 2.04], [2.0, 2.05])
    'the final loss is +0.26% (+1.00%, -0.49%) off that of the undisturbed run of the seed; those \
span 2.50%, the killed ones 0.99%; +0.3 standard errors over 2 seeds: the same, as far as they can \
tell'
    """
    off = [k / a - 1 for k, a in zip(killed, alive, strict=True)]
    each = ", ".join(f"{o:+.2%}" for o in off)
    found = margin(killed, alive)
    text = f"the final loss is {sum(off) / len(off):+.2%} ({each}) off that of the undisturbed run"
    if len(off) == 1:
        return f"{text}; one seed has no spread"
    apart = abs(found.errors) > ERRORS
    verdict = "**another**" if apart else "the same, as far as they can tell"
    spans = [max(losses) / min(losses) - 1 for losses in (alive, killed)]
    return (
        f"{text} of the seed; those span {spans[0]:.2%}, the killed ones {spans[1]:.2%}; "
        f"{found.text} standard errors over {len(off)} seeds: {verdict}"
    )


def picture(results: Results) -> Any:
    """Draws validation loss against seconds, a line a run."""
    found = complete_seeds(results)
    if not found:
        return None
    targets = runs.summary(runs.ParameterServer(pace=PACE), found)["targets"]
    return runs.figure(found, targets)


TABLE = Table("server", "Parameter server: a slow worker, and deaths", cells, render, picture)
