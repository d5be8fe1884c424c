"""The ladder's command: which runs, where they are kept, what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.attempts import Failures
from experiments.json_files import write_text
from experiments.ladder.child import run_apart
from experiments.ladder.climb import (
    BASELINES,
    LEARNS_AS,
    TORCH,
    TORCH_TUNED,
    Pace,
    Runner,
    Site,
    baselines_of,
    climb,
    enough,
    rows_of,
    scale_named,
    searched,
    target_of,
)
from experiments.ladder.held_out import open_test
from experiments.ladder.pictures import draw
from experiments.ladder.report import render
from experiments.ladder.rows import mean_end
from experiments.ladder.rungs import RUNGS, below, rung_named
from experiments.ladder.scales import SCALES, Choices, HeldOut, Scale
from experiments.ladder.side_by_side import SIDE_BY_SIDE, measure, name_of, processor_of
from experiments.ladder.trials import chain, tuned_on
from experiments.ladder.tune import run_tuning, standing, tuning_path
from experiments.ladder.turns import pace
from experiments.machine import machine
from experiments.tables.gathered import Gathered
from experiments.tables.report import read, write_data


@dataclass(frozen=True)
class Asked:
    """What is asked of the ladder.

    Attributes:
      rung: those to run, baselines by their names torch, torch-tuned, torch-tuned-compiled and
        torch-tuned-bfloat16; all by default.
      seeds: how many, from 0, for the ladder.
      data: sources in place of the scale's; a file of text is read as bytes.
      tokenizer: in place of the scale's, or of bytes.
      max_minutes: begin no further run after so long.
      held_out: what is reported on; "test" opens the test split for the rungs named, at the
        lengths that were found on the validation split.
      tuned: take the choices of the trials on record in place of those in `scales.py`.
      tune: rungs, torch-tuned or all, whose trials are run in place of the ladder.
      sizes: measure rungs at four sizes in place of the ladder.
      size: those of the four that are measured, such as 12M; all by default.
      side_by_side: time the steps of rungs and of the tuned baseline in turn, in place of the runs;
        at four sizes together with `sizes`.
      fresh: forget earlier results of this command, of the rungs and sizes that are named or of
        all, and run again: runs, trials, or the steps timed on this machine.
      results: where JSON, Markdown and pictures of the ladder lie.
    """

    rung: tuple[str, ...] = ()
    seeds: int = 1
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_minutes: float | None = None
    held_out: HeldOut = "validation"
    tuned: bool = False
    tune: tuple[str, ...] = ()
    sizes: bool = False
    size: tuple[str, ...] = ()
    side_by_side: bool = False
    fresh: bool = False
    results: Path = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Ladder(Asked):
    """What is asked, and of what.

    Attributes:
      scale: by name.
      cells: folder of the runs.
      run: runs a cell.
      pace: times two cells in turn.
    """

    scale: str
    cells: Path
    run: Runner = run_apart
    pace: Pace = pace


def run_ladder(command: Ladder) -> list[Path]:
    """Runs what is missing and returns the files written.

    Raises:
      ValueError: an unknown rung, no seed, no data; or, at the end, what failed while the rest
        went on.
    """
    from experiments.ladder.sizes import run_sizes, time_sizes

    scale = scale_of(command)
    for name in command.rung:
        if name not in baselines_of(scale):
            rung_named(name)
    if command.seeds < 1:
        raise ValueError(f"{command.seeds} seeds are none; give at least 1")
    if command.tune and (command.sizes or command.side_by_side):
        raise ValueError("--tune is a command of its own; give it without --sizes, --side-by-side")
    if command.tune and (command.rung or command.seeds > 1):
        raise ValueError(
            "--tune names its rungs itself, and has a seed of its own: no --rung, --seeds"
        )
    if command.side_by_side and command.seeds > 1:
        raise ValueError(
            "steps take as long whatever the seed; leave --seeds out of --side-by-side"
        )
    if command.held_out == "test" and (command.tune or command.sizes or command.side_by_side):
        raise ValueError(
            "--held-out test is for the ladder alone: trials and sizes never see the test split, "
            "and steps are as long on either"
        )
    if command.size and not command.sizes:
        raise ValueError(f"--size {' '.join(command.size)} is one of --sizes; give that as well")
    kind = "tuning" if command.tune else "sizes" if command.sizes else ""
    path = command.results / f"speedrun-{'-'.join(filter(None, (kind, scale.name)))}.json"
    gathered = read(path)
    site = Site(
        scale,
        command.cells,
        gathered,
        save=lambda: write_data(path, gathered),
        run=command.run,
        pace=command.pace,
        minutes=command.max_minutes,
    )
    failures = Failures()
    if command.fresh:
        _forget(site, command)
    if command.tune:
        written = run_tuning(site, command.tune, path, failures)
    elif command.sizes and command.side_by_side:
        written = time_sizes(site, command.rung, path, failures, only=command.size)
    elif command.sizes:
        written = run_sizes(site, command.rung, command.seeds, path, failures, only=command.size)
    else:
        print("\n".join(standing(_trials_of(command, site))))
        try:
            _run(command, site, failures)
        except TimeoutError as late:
            print(f"\nthe minutes are up: {late}")
        except RuntimeError as failed:  # of a baseline: others are passed over
            failures.said.append(f"a baseline, without which there is no target ({failed})")
        finally:
            site.save()
            written = write_all(path, gathered, scale)
            print(f"\nwritten: {', '.join(map(str, written))}")
    failures.raise_if_any()
    return written


def _run(command: Ladder, site: Site, failures: Failures) -> None:
    if command.held_out == "test":
        open_test(site, command.rung, command.seeds, failures)
        return
    if not command.side_by_side:
        run_rungs(site, command.rung, command.seeds, failures)
        return
    others = (name for name in baselines_of(site.scale) if name != TORCH_TUNED)
    for name in command.rung or (*others, *(rung.name for rung in RUNGS)):
        with failures.passed_over(SIDE_BY_SIDE + name):
            measure(site, name)
            if name not in BASELINES and (under := below(name)):
                measure(site, name, under)


def _trials_of(command: Ladder, site: Site) -> Site:
    """The site with the trials of the scale, and with the choices that stand in the code."""
    plain = site.scale.at(choices=SCALES[command.scale].choices)
    trials = read(tuning_path(command.results / "any.json", plain))
    return Site(plain, command.cells, trials)


def _forget(site: Site, command: Ladder) -> None:
    """Forgets what a command would make: steps timed by this processor, trials, or runs.

    Of the rows that are named, or of all.
    """
    names = command.tune if "all" not in command.tune else ()
    names = names or command.rung
    here = processor_of(machine())
    for table, rows in site.gathered.index.items():
        label, *_ = of = table.split(": ")  # of a size, or of a group of trials
        if site.table not in (table, *of) or (command.size and label not in command.size):
            continue
        for title in list(rows):
            timed = title.removeprefix(SIDE_BY_SIDE)
            if command.side_by_side != (timed != title):
                continue
            if command.tune:
                name = table.rpartition(": ")[2].partition(", ")[0]
            else:
                name = name_of(title, here) if timed != title else title.split(", ")[0]
            if " on " not in name and (not names or name in names):
                for key in rows.pop(title).values():
                    site.gathered.cells.pop(key, None)


def scale_of(command: Ladder) -> Scale:
    """Returns the scale with the data and the split of the command; with --tuned its choices, too.

    Raises:
      ValueError: a scale without data of its own, and none given; a test split where there is none;
        no trials to take choices from.
    """
    scale = SCALES[command.scale].at(held_out=command.held_out)
    if command.data:
        whole = all(Path(spec).is_file() for spec in command.data)
        tokenizer = command.tokenizer or ("bytes" if whole and scale.name != "gpu" else None)
        scale = scale.at(data=command.data, tokenizer=tokenizer or scale.tokenizer)
        kinds = {suffix for spec in command.data for suffix in Path(spec).suffixes}
        if whole and not kinds & {".jsonl", ".parquet"} and command.held_out == "test":
            raise ValueError(
                f"{' + '.join(command.data)} is split in two, training and validation, and has no "
                "test split; give a folder of many files, or leave --held-out test out"
            )
    elif command.tokenizer:
        scale = scale.at(tokenizer=command.tokenizer)
    if not scale.data:
        raise ValueError(
            f"the scale {scale.name} has no data of its own; name text of at least "
            f"{scale.tokens / 1e6:.0f} million tokens with --data (less is read several times)"
        )
    return scale.at(choices=_tuned(command, scale)) if command.tuned else scale


def _tuned(command: Ladder, scale: Scale) -> Choices:
    gathered = read(tuning_path(command.results / "any.json", scale))
    found = chain(gathered, tuned_on(gathered, scale))
    if missing := [each.group.name for each in found if each.best is None]:
        raise ValueError(
            f"--tuned takes the choices of the trials, and those of {', '.join(missing)} are not "
            f"all on record; python -m experiments.speedrun --scale {scale.name} --tune all"
        )
    return found[-1].after


def run_rungs(site: Site, names: Sequence[str], seeds: int, failures: Failures) -> None:
    """Runs the baselines at their budget, then every rung at the lengths that it needs.

    Raises:
      TimeoutError: the minutes are up.
      RuntimeError: a baseline failed: without it there is no target.
    """
    scale = site.scale
    order = rows_of(scale)
    chosen = [name for name in order if not names or name in names]
    for name in (TORCH, TORCH_TUNED):
        target_of(site, name, max(seeds if name in chosen else 0, scale.target_seeds))
    for name in (name for name in chosen if name != TORCH):
        for seed in range(seeds):
            with failures.passed_over(f"{name}, seed {seed}"):
                _climb_to_both(site, name, seed)


def _climb_to_both(site: Site, name: str, seed: int) -> None:
    first, second = mean_end(site, TORCH), mean_end(site, TORCH_TUNED)
    if name in LEARNS_AS:
        for tokens in {site.scale.tokens, enough(site, LEARNS_AS[name], seed, first)} - {None}:
            site.outcome(name, tokens or 0, seed)
        return
    if name != TORCH_TUNED:  # whose length for the second target is its budget
        climb(site, name, seed, second)
    if searched(name, TORCH):
        climb(site, name, seed, first)


def write_all(path: Path, gathered: Gathered, scale: Scale) -> list[Path]:
    """Writes Markdown and pictures from what is gathered, all data sets of the scale."""
    lines = [f"# Speedrun: time to a loss, scale {scale.name}", ""]
    command = f"    python -m experiments.speedrun --scale {scale.name}"
    lines += [command, f"{command} --side-by-side", ""]
    lines += ["The first with `--seeds N` for more seeds, and `--rung NAMES` for single rows.", ""]
    for facts in gathered.content()["machines"].values():
        lines.append("* " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    written = [path, path.with_suffix(".md")]
    for table in sorted(gathered.index):
        site = Site(scale_named(scale, table), Path(), gathered)
        lines += ["", *render(site, path)]
        short = "".join(c if c.isalnum() else "-" for c in table).strip("-")
        image = path.with_name(f"{path.stem}-{short}.png")
        if draw(site, image):
            written.append(image)
            lines += ["", f"![Loss against time, and seconds of every rung]({image.name})"]
    write_text(written[1], "\n".join(lines) + "\n")
    return written
