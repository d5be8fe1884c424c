"""The trials that the choices of a rung come from."""

from __future__ import annotations

from pathlib import Path

from experiments.ablate.markdown import grid
from experiments.grid import Cell, read_result
from experiments.ladder.child import FACTS
from experiments.ladder.climb import Site
from experiments.ladder.measure import last_bits, points_of
from experiments.ladder.rungs import recipe_of, rung_named
from experiments.run import read_json, write_text
from train.loop import LoopSettings

SEED = 100  # one that no table uses


def run_tuning(site: Site, name: str, path: Path) -> list[Path]:
    """Runs the trials of a rung and returns the files written.

    Args:
      site: where; its scale has the choices that the trials differ from.
      name: of the rung.
      path: of the JSON; the Markdown lies beside it.

    Raises:
      ValueError: the rung has nothing to tune.
    """
    rung = rung_named(name)
    if rung.trials is None:
        raise ValueError(f"the rung {name} has nothing to tune")
    table = f"{site.table}: {name}"
    try:
        for trial, choices in rung.trials(site.scale).items():
            scale = site.scale.at(choices=choices)
            tokens = scale.search.rounded(rung.trial_share * scale.tokens)
            settings = recipe_of(name, scale).settings(scale.data, tokens, SEED)
            cell = Cell(trial, settings, LoopSettings(log_every=max(1, settings.steps // 20)))
            values = _run(site, cell)
            site.gathered.index.setdefault(table, {})[trial] = {str(SEED): cell.key}
            site.save()
            print(f"{trial}: {last_bits(values['points']):.4f} bits per byte")
    except TimeoutError as late:
        print(f"\nthe minutes are up: {late}")
    return write_trials(site, path)


def _run(site: Site, cell: Cell) -> dict:
    import time

    if not site.gathered.has(cell):
        if site.minutes is not None and time.monotonic() - site.begun > 60 * site.minutes:
            raise TimeoutError(f"{cell.name} is left for another time")
        if read_result(cell, site.folder) is None:
            print(f"\n{cell.name}")
            site.run(cell, site.folder)
        result = read_result(cell, site.folder)
        assert result is not None
        facts = read_json(result.folder / FACTS)
        values = {"reason": result.reason, "points": points_of(result)}
        site.gathered.add(cell, values, facts["machine"])
    return site.gathered.cells[cell.key]["values"]


def write_trials(site: Site, path: Path) -> list[Path]:
    """Writes all trials that are gathered, best first."""
    lines = ["# Trials of the ladder's rungs", ""]
    lines += [f"    python -m experiments.speedrun --scale {site.scale.name} --tune RUNG", ""]
    lines += ["One run each, of a seed that no other table uses; what was chosen from them stands"]
    lines += ["in `experiments/ladder/scales.py`."]
    for table in site.gathered.index:
        results = site.gathered.results(table).by_name
        rows = [
            (last_bits(values["points"]), trial, values)
            for trial, seeds in results.items()
            for values in seeds.values()
        ]
        # NaN, of one that diverged, is last
        rows.sort(key=lambda row: (row[0] != row[0], row[0]))
        body = [
            [trial, f"{bits:.4f}", f"{values['points'][-1]['tokens']:,}", values["reason"]]
            for bits, trial, values in rows
            if values["points"]
        ]
        lines += ["", f"## {table}", ""]
        lines += grid(["trial", "bits per byte at the end", "tokens", "ended"], body, "lrrl")
    site.save()
    written = [path, path.with_suffix(".md")]
    write_text(written[1], "\n".join(lines) + "\n")
    print(f"\nwritten: {', '.join(map(str, written))}")
    return written
