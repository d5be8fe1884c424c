"""What the ladder's report says of costs and comparisons beyond single ratios."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from experiments.ladder import command as ladder_command
from experiments.ladder import report, report_about, rows
from experiments.ladder.climb import TORCH, TORCH_TUNED, Site
from experiments.ladder.command import run_ladder
from experiments.ladder.measure import COSTS, last_bits
from experiments.ladder.report import paced, render, verdict
from experiments.ladder.scales import CPU, TINY
from experiments.ladder.side_by_side import clock_of, speed_of
from experiments.ladder.techniques import OUTSIDE_TRIALS
from experiments.tables.gathered import Gathered
from experiments.tables.report import read
from tests.ladder_cases import Counting, cells_of, ladder, law, row
from tests.test_ladder_rules import put_speeds

CHOSEN = (TORCH, TORCH_TUNED, "jax", "rate", "block", "muon", "bigrams")


@pytest.fixture
def no_pictures(monkeypatch):
    """Which take longer than all else here."""
    monkeypatch.setattr(ladder_command, "draw", lambda site, path: False)


def climbed(tmp_path, **fields):
    path, *_ = run_ladder(ladder(tmp_path, rung=CHOSEN, seeds=3, **fields))
    site = Site(TINY, tmp_path, read(path))
    put_speeds(
        site, {TORCH: 0.8, "jax": 0.5, "rate": 2.0, "block": 1.0, "muon": 0.5, "bigrams": 1.5}
    )
    return site, path


def test_seconds_and_tokens_a_second_have_the_error_of_the_pace(tmp_path, no_pictures):
    site, path = climbed(tmp_path)
    target = rows.mean_end(site, TORCH_TUNED)
    mine = rows.row_of(site, "muon", target)
    pace, (seconds, seeds) = speed_of(site, "muon").error, mine.mean("training")
    assert pace > 0
    for what in ("training", "compiled", "cold"):  # compilation has no pace
        assert paced(site, mine, what) == (
            mine.mean(what)[0],
            pytest.approx(math.hypot(seeds, pace * seconds)),
        )
    assert paced(site, mine, "speed")[1] == pytest.approx(pace * mine.mean("speed")[0])
    shown = cells_of("\n".join(render(site, path)), "muon")[8]
    assert re.fullmatch(r"[\d,]+ ± [1-9][\d,]*", shown)
    base = rows.row_of(site, TORCH_TUNED, target, TORCH_TUNED)
    assert paced(site, base, "training") == base.mean("training")
    assert math.isnan(paced(site, base, "speed")[1])  # it is what all are measured by


def test_what_no_rung_below_can_reach_is_held_against_at_the_nearer_target(tmp_path, no_pictures):
    def slow(job, share):  # a constant 2 bits over, as at a rate that is far too low
        return law(job, share) + (2.0 if job.name.startswith("jax") else 0.0)

    site, _ = climbed(tmp_path, run=Counting(bits_of=slow))
    first, tuned = (rows.mean_end(site, name) for name in (TORCH, TORCH_TUNED))
    assert not rows.row_of(site, "jax", tuned, TORCH_TUNED).reached
    _, says = verdict(site, rows.row_of(site, "rate", tuned, TORCH_TUNED))
    near = [rows.row_of(site, name, first, TORCH) for name in ("rate", "jax")]
    figure = rows.ratio_in_turn(site, *near)
    assert f"yes, {figure.mean:.2f}" in says
    assert says.endswith(" (to the first baseline's end: jax never gets to the tuned one's)")
    _, says = verdict(site, rows.row_of(site, "muon", tuned, TORCH_TUNED))
    assert "first baseline" not in says


def test_between_the_ends_rows_are_compared_along_runs_planned_alike(tmp_path, no_pictures):
    site, path = climbed(tmp_path)
    first, tuned = (rows.mean_end(site, name) for name in (TORCH, TORCH_TUNED))
    targets = [first, *(t for t in rows.further_targets(site)[::-1] if tuned < t < first), tuned]
    targets.sort(reverse=True)
    assert len(targets) > 2
    text = "\n".join(render(site, path))
    below = cells_of(text, "muon", "To the rung below, seconds of training:")[1:]
    to_tuned = cells_of(text, "muon", f"To {TORCH_TUNED}, seconds of training:")[1:]
    assert len(below) == len(to_tuned) == len(targets)
    assert "suit this loss are looked for by jax, rate, muon. Others take at most" in text
    assert below[0] == ""  # muon looks for lengths that suit the first baseline's end, block not
    assert to_tuned[0].endswith("x")
    for target, cell in zip(targets[1:-1], to_tuned[1:-1], strict=True):
        along = [rows.along(site, name, target) for name in ("muon", TORCH_TUNED)]
        for each in along:
            for seed, there in each.reached.items():
                runs = rows.curves_of(site, each.name)[seed]
                planned = next(run for run in runs if last_bits(run) <= tuned or run is runs[-1])
                assert planned[0]["tokens"] < there.tokens <= planned[-1]["tokens"]
        figure = rows.ratio_in_turn(site, *along)
        assert cell.startswith(f"{figure.mean:.2f} ± ") if figure.pairs else cell == ""


def test_a_target_before_the_first_evaluation_is_not_read_off_a_run(monkeypatch):
    point = dict.fromkeys(COSTS, 1.0) | {"compiling": 0.0}
    runs = [[{**point, "bits": b, "tokens": n} for b, n in ((2.0, 100), (1.8, 200), (1.6, 300))]]
    short = [{**point, "bits": 2.1, "tokens": 50}]
    monkeypatch.setattr(rows, "curves_of", lambda site, name: {0: [short, *runs], 1: runs})
    monkeypatch.setattr(rows, "mean_end", lambda site, name: 1.7)
    monkeypatch.setattr(rows, "priced", lambda site, name, found: found)
    early, there, late = (rows.along(None, "muon", target) for target in (2.05, 1.9, 1.5))
    assert (early.reached, early.seeds) == ({}, ())
    assert {seed: each.tokens for seed, each in there.reached.items()} == {0: 141, 1: 141}
    assert (late.reached, late.seeds) == ({}, (0, 1))


def test_a_verdict_at_the_nearer_target_needs_rows_that_both_look_for_it(monkeypatch):
    def at(site, name, target, end_of=None):  # block never gets to the tuned one's end, 1.0
        there = {s: 2.0 + 0.01 * s for s in range(3)} if target == 2.0 or name != "block" else {}
        found = row(name, there)
        return replace(found, seeds=(0, 1, 2))

    monkeypatch.setattr(report, "row_of", at)
    monkeypatch.setattr(report, "mean_end", lambda site, name: 2.0 if name == TORCH else 1.0)
    monkeypatch.setattr(report, "processors", lambda site: ["one"])
    monkeypatch.setattr(report, "ratio_in_turn", lambda site, of, to, where: rows.ratio(of, to))
    monkeypatch.setattr(report, "compared_with", lambda name: "block")
    for looking in (True, False):
        also = {"muon"} | ({"block"} if looking else set())
        monkeypatch.setattr(report, "searched", lambda name, end, also=also: name in also)
        says = verdict(None, at(None, "muon", 1.0))[1]
        assert ("block never gets to the tuned one's)" in says) is looking, says
        assert (says == "nothing to compare") is not looking


def test_seeds_that_the_rung_below_missed_leave_no_verdict_either(monkeypatch):
    mine = replace(row("muon", {s: 1.0 + 0.01 * s for s in range(3)}), seeds=(0, 1, 2))
    under = replace(row("block", {0: 2.0, 1: 2.0}), seeds=(0, 1, 2))
    monkeypatch.setattr(report, "row_of", lambda *args: under)
    monkeypatch.setattr(report, "mean_end", lambda *args: 1.0)
    monkeypatch.setattr(report, "processors", lambda site: ["one"])
    monkeypatch.setattr(report, "ratio_in_turn", lambda site, of, to, where: rows.ratio(of, to))
    assert verdict(None, mine)[1].endswith("the target was not reached with seed 2")


def test_without_timed_steps_seconds_have_the_error_of_their_seeds(tmp_path, no_pictures):
    path, *_ = run_ladder(ladder(tmp_path, rung=CHOSEN, seeds=3))
    site = Site(TINY, tmp_path, read(path))
    for name in (TORCH_TUNED, "muon"):
        found = rows.row_of(site, name, rows.mean_end(site, TORCH_TUNED), TORCH_TUNED)
        for what in ("training", "compiled", "cold", "speed"):
            assert paced(site, found, what) == found.mean(what)


def test_runs_outside_of_the_trials_are_told_where_trials_are(tmp_path, monkeypatch):
    """Those of the scale that they were made at."""
    site = Site(CPU, tmp_path, Gathered({}))
    group = SimpleNamespace(name="rate")
    made = SimpleNamespace(group=group, trials=["a"], bits={"a": 1.0}, best="a", after=CPU.choices)
    monkeypatch.setattr(report_about, "on_record", lambda *args: [made])
    monkeypatch.setattr(report_about, "counts", lambda found: "1 trial.")
    monkeypatch.setattr(report_about, "edges", lambda chosen: [])
    monkeypatch.setattr(report_about, "tuned_on", lambda *args: CPU)
    first, *_ = report_about._trials(site, tmp_path / "any.json")
    assert f"Ours outside of them: {OUTSIDE_TRIALS['cpu'][0]}; " in first
    site = Site(TINY, tmp_path, Gathered({}))
    assert "outside" not in report_about._trials(site, tmp_path / "any.json")[0]


def test_what_the_first_seed_took_is_told(tmp_path, no_pictures):
    site, path = climbed(tmp_path)
    said = re.search(
        r"seed of 5 rungs, .*: (\d+) runs on record, (\d+) minutes", "\n".join(render(site, path))
    )
    runs = [run for name in CHOSEN[2:] for run in rows.curves_of(site, name)[0]]
    assert int(said[1]) == len(runs)
    seconds = sum(
        clock_of(site, name).token * run[-1]["tokens"]
        for name in CHOSEN[2:]
        for run in rows.curves_of(site, name)[0]
    )
    assert int(said[2]) == round(seconds / 60)
