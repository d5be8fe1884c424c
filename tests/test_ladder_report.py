"""What the ladder's report says of costs and comparisons beyond single ratios."""

import math
import re

import pytest

from experiments.ladder import command as ladder_command
from experiments.ladder import report, rows
from experiments.ladder.climb import TORCH, TORCH_TUNED, Site
from experiments.ladder.command import run_ladder
from experiments.ladder.report import paced, render, verdict
from experiments.ladder.scales import TINY
from experiments.ladder.side_by_side import speed_of
from experiments.ladder.techniques import OUTSIDE_TRIALS
from experiments.tables.report import read
from tests.ladder_cases import Counting, cells_of, ladder, law
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
    assert "x to the first baseline's end, the other is out of reach below, p " in says
    _, says = verdict(site, rows.row_of(site, "muon", tuned, TORCH_TUNED))
    assert "first baseline" not in says


def test_rows_without_short_runs_are_not_held_against_those_that_have_them(tmp_path, monkeypatch):
    ends = {"muon": [[2.6, 1.8], [2.55, 1.7]], "block": [[2.6, 1.8], [1.9, 1.8]]}
    runs = {name: dict(enumerate(found)) for name, found in ends.items()} | {TORCH: {}}
    monkeypatch.setattr(report, "curves_of", lambda site, name: runs[name])
    monkeypatch.setattr(report, "last_bits", float)
    assert report._short(None, "muon", 2.6)
    assert not report._short(None, "muon", 2.7)  # its second seed ends well under it
    assert not report._short(None, "block", 2.6)
    assert report._short(None, TORCH, 9.0)
    monkeypatch.undo()

    monkeypatch.setattr(ladder_command, "draw", lambda site, path: False)
    site, path = climbed(tmp_path)
    titles = ("To the rung below, seconds of training:", f"To {TORCH}, seconds of training:")
    for alike in (True, False):
        monkeypatch.setattr(
            report, "_short", lambda site, name, t, alike=alike: name == "muon" or alike
        )
        below, to_torch = (cells_of("\n".join(render(site, path)), "muon", t) for t in titles)
        assert below[1].endswith("x") is alike
        assert below[-1].endswith("x")
        assert to_torch[1].endswith("x")


def test_runs_outside_of_the_trials_and_the_whole_of_a_seed_are_told(tmp_path, no_pictures):
    site, path = climbed(tmp_path)
    text = "\n".join(render(site, path))
    said = re.search(r"one seed of 5 rungs: (\d+) runs, (\d+) minutes of training", text)
    assert int(said[1]) == sum(
        len(runs[0]) for n in CHOSEN[2:] if (runs := rows.curves_of(site, n))
    )
    assert len(OUTSIDE_TRIALS) == 2
