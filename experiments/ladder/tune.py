"""Runs and writes the trials that the choices of rungs and of the tuned baseline come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.attempts import Failures
from experiments.grid import Measurement
from experiments.json_files import write_text
from experiments.ladder.climb import Site, data_name, job_called, recipe_for, scale_named
from experiments.ladder.measure import last_bits
from experiments.ladder.scales import Choices, Scale
from experiments.ladder.trials import (
    SEED,
    Chosen,
    Group,
    chain,
    changes,
    edges,
    groups,
    groups_named,
    read_group,
    table_of,
    trial_job,
    tuned_on,
)
from experiments.machine import machine
from experiments.tables.markdown import grid
from experiments.tables.report import read


def run_tuning(site: Site, names: Sequence[str], path: Path, failures: Failures) -> list[Path]:
    """Runs the trials of rungs or of the tuned baseline and returns the files written.

    Groups choose in order: what one has chosen holds for all that follow, whether they are named
    or on record.

    Args:
      site: where; its scale has the choices that the first group starts from.
      names: of rungs, the tuned baseline, or "all".
      path: of the JSON; the Markdown lies beside it.
      failures: takes in trials that failed; others go on.

    Raises:
      ValueError: a rung has nothing to tune.
    """
    scale = site.scale
    try:
        named = groups_named(names)
        for group in groups():
            if group not in named:
                scale = scale.at(choices=read_group(site.gathered, scale, group).after)
                continue
            _run(site, scale, group, failures)
            chosen = read_group(site.gathered, scale, group)
            print("\n" + "\n".join(_said(chosen)))
            scale = scale.at(choices=chosen.after)
    except TimeoutError as late:
        print(f"\nthe minutes are up: {late}")
    finally:
        site.save()
        written = write_trials(site, path)
        print(f"\nwritten: {', '.join(map(str, written))}")
    print("\n".join(standing(site)))
    return written


def _run(site: Site, scale: Scale, group: Group, failures: Failures) -> None:
    trials, table = group.trials(scale), table_of(scale, group)
    rows = site.gathered.index.get(table, {})
    # A title of the past is no trial of today.
    site.gathered.index[table] = {title: rows[title] for title in trials if title in rows}
    for title, choices in trials.items():
        with failures.passed_over(f"the trial {title} of {group.name}"):
            pace = pace_of(site, scale, group, choices)
            job, recipe = trial_job(scale, group, title, choices, pace)
            values = site.take(job, table, SEED, recipe)
            print(f"{group.name}, {title}: {last_bits(values['points']):.4f} bits per byte")


def pace_of(site: Site, scale: Scale, group: Group, choices: Choices) -> float:
    """Returns how many times as many tokens a trial learns from in a second as at the whole batch.

    1 for a group whose trials are of equal tokens. Steps of the two are timed in turn, once.
    """
    if group.with_rows is None:
        return 1.0
    rows = recipe_for(scale.at(choices=choices), group.subject).rows
    if rows == scale.rows:
        return 1.0
    # Of no choices but the rows: rates make no step longer, and what was timed stays so.
    both = [scale.at(choices=group.with_rows(Choices(), each)) for each in (rows, scale.rows)]
    jobs = [job_called("pace", each, group.subject, each.tokens, SEED) for each in both]
    name = f"{group.subject}, {rows} rows: tokens a second to {scale.rows} rows"
    item = Measurement(name, {"pace": [job.key for job in jobs]}, dict)
    table = f"{data_name(scale.at(held_out='validation'))}: pace"
    site.gathered.index.setdefault(table, {})[name] = {str(SEED): item.key}
    if not site.gathered.has(item):
        print(f"\n{item.name}")
        site.gathered.add(item, {"ratio": site.pace(*jobs)}, machine())
        site.save()
    return float(site.gathered.cells[item.key]["values"]["ratio"])


def _said(chosen: Chosen) -> list[str]:
    name = chosen.group.name
    if chosen.best is None:
        left = len(chosen.trials) - len(chosen.bits)
        why = f"{left} of its trials are missing" if left else "every trial diverged"
        return [f"{name}: nothing is chosen, {why}; what stood before holds"]
    lines = [f"{name}: {chosen.best}, {chosen.bits[chosen.best]:.4f} bits per byte"]
    return [*lines, *(f"{name}: AT AN EDGE of the grid: {edge}" for edge in edges(chosen))]


def standing(site: Site) -> list[str]:
    """Returns lines that say whether `scales.py` has what the trials on record chose."""
    scale = tuned_on(site.gathered, site.scale)
    found = chain(site.gathered, scale)
    lines = []
    if missing := [chosen.group.name for chosen in found if chosen.best is None]:
        lines.append(f"Not all trials are on record of {'; '.join(missing)}: those are guesses.")
    if new := changes(scale.choices, found[-1].after):
        lines.append("Trials chose otherwise than experiments/ladder/scales.py (--tuned takes it):")
        lines += [f"    {name}={value!r}," for name, value in new.items()]
    elif not missing:
        lines.append("The choices in experiments/ladder/scales.py are those of the trials.")
    return lines


def write_trials(site: Site, path: Path) -> list[Path]:
    """Writes all trials that are gathered, best first, and what was chosen from them."""
    lines = [f"# Trials, scale {site.scale.name}", ""]
    lines += [f"    python -m experiments.speedrun --scale {site.scale.name} --tune all", ""]
    lines += [
        f"One run each, of seed {SEED}, which no other table uses, measured at its end on the "
        "validation split. A group holds what those before it chose. Its trials have equal tokens; "
        "those of batches equal seconds, by steps that were timed in turn; the seconds below are "
        "no measure, since trials may share the machine. What was chosen is to "
        "stand in `experiments/ladder/scales.py`; `--tuned` takes it from here."
    ]
    for name in dict.fromkeys(table.partition(": ")[0] for table in site.gathered.index):
        scale = scale_named(site.scale, name)
        found = [each for each in chain(site.gathered, scale) if each.bits]
        lines += ["", f"## {name}", "", counts(found), *_paces(site, name)]
        for chosen in found:
            lines += ["", f"### {chosen.group.name}", ""]
            lines += [*_listed(site, scale, chosen), "", *(f"* {x}" for x in _said(chosen))]
    written = [path, path.with_suffix(".md")]
    write_text(written[1], "\n".join(lines) + "\n")
    return written


def counts(found: Sequence[Chosen]) -> str:
    """Says how many runs either side was tuned with."""
    runs = {side: set[str]() for side in ("torch", "ours", "beside")}
    for chosen in found:
        runs[chosen.group.side] |= chosen.keys
    return (
        f"Trials on record: {len(runs['torch'])} of the tuned torch baseline, "
        f"{len(runs['ours'])} of ours, {len(runs['beside'])} of rungs that nothing builds on."
    )


def _paces(site: Site, data: str) -> list[str]:
    cells = site.gathered.cells
    lines = [
        f"* {name}: {cells[seeds[str(SEED)]]['values']['ratio']:.2f}x"
        for name, seeds in site.gathered.index.get(f"{data}: pace", {}).items()
    ]
    return ["", *lines] if lines else []


def _listed(site: Site, scale: Scale, chosen: Chosen) -> list[str]:
    rows = site.gathered.index[table_of(scale, chosen.group)]
    body = []
    # NaN, of one that diverged, is last.
    for title, bits in sorted(chosen.bits.items(), key=lambda r: (math.isnan(r[1]), r[1])):
        values = site.gathered.cells[rows[title][str(SEED)]]["values"]
        last = values["points"][-1] if values["points"] else {}
        cost = [f"{last['tokens']:,}", f"{last['training']:.1f}"] if last else ["", ""]
        body.append([title, f"{bits:.4f}", *cost, values["reason"]])
    return grid(
        ["trial", "bits per byte at the end", "tokens", "training s", "ended"], body, "lrrrl"
    )


def on_record(path: Path, site: Site) -> list[Chosen]:
    """Returns what the groups say that hold for a site's data, from the JSON of the trials."""
    gathered = read(tuning_path(path, site.scale))
    return chain(gathered, tuned_on(gathered, site.scale))


def tuning_path(path: Path, scale: Scale) -> Path:
    """Returns where the trials of a scale lie, beside another JSON of the ladder."""
    return path.with_name(f"speedrun-tuning-{scale.name}.json")
