"""What the ladder holds fixed, tells apart and says: targets, recipes of today, ratios."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from experiments.ladder import command as ladder_command
from experiments.ladder import report, rows, side_by_side
from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_BFLOAT16,
    TORCH_COMPILED,
    TORCH_TUNED,
    Site,
    changed_since,
    enough,
    job_of,
    lengths_of,
    recipe_key,
)
from experiments.ladder.command import run_ladder
from experiments.ladder.pictures import draw
from experiments.ladder.report import render
from experiments.ladder.rungs import RUNGS
from experiments.ladder.scales import CPU, TINY
from experiments.ladder.side_by_side import (
    clock_of,
    item_of,
    measure,
    processors,
    speed_against,
    speed_of,
)
from experiments.ladder.turns import Taken, settings_of
from experiments.tables.gathered import Gathered
from experiments.tables.report import read
from tests.ladder_cases import Counting, cells_of, fake, ladder, row


@pytest.fixture
def no_pictures(monkeypatch):
    """Which take longer than all else here."""
    monkeypatch.setattr(ladder_command, "draw", lambda site, path: False)


def test_a_target_never_moves_with_the_seeds_of_the_rungs(tmp_path, no_pictures):
    run_ladder(ladder(tmp_path, rung=("rate",)))
    path = tmp_path / "results" / "speedrun-tiny.json"
    site = Site(TINY, tmp_path, read(path))
    ends = [lengths_of(site, TORCH_TUNED, s)[TINY.tokens]["points"][-1]["bits"] for s in range(2)]
    before = [rows.mean_end(site, name) for name in (TORCH, TORCH_TUNED)]
    assert before[1] == np.mean(ends)
    run_ladder(ladder(tmp_path, rung=("torch", "torch-tuned"), seeds=4))
    again = Site(TINY, tmp_path, read(path))
    assert len(rows.curves_of(again, TORCH_TUNED)) == 4
    assert [rows.mean_end(again, name) for name in (TORCH, TORCH_TUNED)] == before


def with_rate(rate):
    muon = dataclasses.replace(TINY.choices.muon, learning_rate=rate)
    return TINY.at(choices=dataclasses.replace(TINY.choices, muon=muon))


def test_runs_of_an_older_recipe_are_in_no_row(tmp_path):
    gathered = Gathered({})
    old, new = (Site(with_rate(r), tmp_path, gathered, run=fake) for r in (0.02, 0.03))
    old.outcome("muon", 4096, 0)
    new.outcome("muon", 6144, 0)
    new.outcome("rate", 4096, 0)
    assert (list(lengths_of(old, "muon", 0)), list(lengths_of(new, "muon", 0))) == ([4096], [6144])
    assert changed_since(new) == {"muon": 1}
    assert list(lengths_of(old, "rate", 0)) == [4096]  # which builds on no Muon
    kept = Site(with_rate(0.03), tmp_path, Gathered(json.loads(json.dumps(gathered.content()))))
    assert list(lengths_of(kept, "muon", 0)) == [6144]


def test_a_run_of_two_recipes_stands_in_the_rows_of_both(tmp_path):
    """At a budget at which a share of the steps rounds to nothing, say."""
    site = Site(TINY, tmp_path, Gathered({}), run=fake)
    job = job_of(TINY, "muon", 4096, 0)
    for recipe_ in ("one", "two", "one"):
        values = site.take(job, "table", 0, recipe_)
    assert values["recipes"] == ["one", "two"]


def test_steps_side_by_side_count_for_todays_recipes_alone(tmp_path):
    site = Site(with_rate(0.02), tmp_path, Gathered({}))
    put_speeds(site, {"muon": 0.5, TORCH: 0.8})
    assert speed_of(site, "muon").ratio == 0.5
    test = dataclasses.replace(site, scale=site.scale.at(held_out="test"))
    assert speed_of(test, "muon").ratio == 0.5
    assert speed_of(dataclasses.replace(site, scale=with_rate(0.03)), "muon") is None
    against = speed_against(site, "muon", TORCH)
    assert against.ratio == pytest.approx(0.5 / 0.8)
    # Of both: quartiles that lie 10 % apart, of nine rounds.
    assert against.error == pytest.approx(2**0.5 * 1.25 * np.log(1.1) / 1.35 / 3)
    assert speed_against(site, TORCH_TUNED, TORCH_TUNED) == (1.0, 0.0)
    assert speed_against(site, "muon", "rate") is None


def test_a_row_timed_with_another_one_is_compared_by_that(tmp_path):
    site = Site(with_rate(0.02), tmp_path, Gathered({}))
    put_speeds(site, {"muon": 0.5, "rate": 0.8})
    put_speeds(site, {"muon": 0.7}, to="rate")
    assert speed_against(site, "muon", "rate").ratio == 0.7
    assert speed_against(site, "rate", "muon").ratio == pytest.approx(0.8 / 0.5)
    assert speed_of(site, "muon").ratio == 0.5
    assert processors(site) == ["one, 2 cores"]
    assert side_by_side.busy(site) == 0.0
    put_speeds(site, {"muon": 0.7}, to="rate", busy=1.5)
    assert side_by_side.busy(site) == 1.5
    assert clock_of(site, "muon").token == pytest.approx(2e-3)
    other = dataclasses.replace(site, scale=with_rate(0.03))
    put_speeds(other, {"muon": 0.5})
    assert speed_against(other, "muon", "rate").ratio == pytest.approx(0.5 / 0.8)


def test_a_token_of_a_run_takes_what_its_phases_take_by_their_shares(tmp_path, monkeypatch):
    """And compiling them is compiling them all."""
    site = Site(TINY, tmp_path, Gathered({}))
    phases = settings_of(job_of(TINY, "length", TINY.tokens, 0)).phases
    tokens = [phase.steps * phase.batch_size * phase.sequence_length for phase in phases]
    assert len(phases) == 3

    def turns(sides, rounds):
        seconds = {"mine 0": 1.0, "mine 1": 2.0, "mine 2": 4.0, "theirs 0": 2.0}
        assert list(sides) == list(seconds)
        return {side: Taken([taken] * rounds, 5, 7) for side, taken in seconds.items()}

    monkeypatch.setattr(side_by_side, "take_turns", turns)
    measure(site, "length")
    (values,) = (cell["values"] for cell in site.gathered.cells.values())
    mean = sum(count * taken for count, taken in zip(tokens, (1, 2, 4), strict=True)) / sum(tokens)
    assert values["ratio"] == pytest.approx(2 / mean)
    assert (values["compiling"], values["starting"]) == (15, 17)
    assert values["baseline"] == {"token": 2.0, "compiling": 5, "starting": 7}


BASE = {"token": 1e-3, "compiling": 1.0, "starting": 2.0}


def put_speeds(site, speeds, processor="one", to=TORCH_TUNED, busy=0.0):
    for name, ratio in speeds.items():
        item = item_of(site, name, f"{processor}, 2 cores", to)
        recipes = [recipe_key(site.scale, each) for each in (name, to)]
        values = {"quartiles": [ratio, 1.1 * ratio], "rounds": 9, "recipes": recipes}
        values |= {"compiling": 3.0, "starting": 4.0, "baseline": BASE, "busy": busy}
        site.gathered.add(item, {"ratio": ratio, **values}, {"processor": processor, "cores": 2})
        table = site.gathered.index.setdefault(site.table, {})
        table[item.name] = {"0": item.key}


def test_processors_are_told_apart_and_seconds_are_of_the_one_that_timed_most(tmp_path):
    path, *_ = run_ladder(ladder(tmp_path, rung=("rate", "muon"), seeds=2))
    site = Site(TINY, tmp_path, read(path))
    put_speeds(site, {"muon": 0.5, "rate": 2.0}, "two")
    put_speeds(site, {"muon": 0.8}, "one")
    assert processors(site) == ["two, 2 cores", "one, 2 cores"]
    assert speed_of(site, "muon").ratio == speed_of(site, "muon", "two, 2 cores").ratio == 0.5
    assert speed_of(site, "muon", "one, 2 cores").ratio == 0.8
    assert speed_of(site, "rate", "one, 2 cores") is None
    text = "\n".join(render(site, path))
    assert "nothing else on the machine (two, 2 cores)" in text
    name, pace, seconds, other, more = cells_of(text, "muon", "### Steps in turn, by processor")
    assert (pace[:4], other[:4]) == ("0.50", "0.80")
    in_turn = float(seconds.split()[0])
    assert float(more.split()[0]) == pytest.approx(in_turn * 0.8 / 0.5, abs=0.02)
    assert cells_of(text, "muon", "#### To torch-tuned\n")[1] == seconds
    put_speeds(site, {"rate": 1.0, "jax": 1.0}, "one")
    assert processors(site) == ["one, 2 cores", "two, 2 cores"]


def test_a_row_that_was_not_timed_where_others_were_has_no_seconds(tmp_path):
    path, *_ = run_ladder(ladder(tmp_path, rung=("rate", "muon"), seeds=2))
    site = Site(TINY, tmp_path, read(path))
    text = "\n".join(render(site, path))
    assert "Seconds are those of the runs" in text
    assert cells_of(text, "rate", "#### To torch-tuned\n")[1]
    put_speeds(site, {"muon": 0.5})
    text = "\n".join(render(site, path))
    assert "A row without seconds has not been timed on that machine" in text
    assert cells_of(text, "muon", "#### To torch-tuned\n")[1].endswith("x")
    whole, p, compiled, cold, tokens = cells_of(text, "rate", "#### To torch-tuned\n")[1:]
    assert (whole, p, compiled, cold) == ("", "", "", "")
    assert tokens.endswith("x")
    assert draw(site, tmp_path / "picture.png")


def test_what_fails_is_named_at_the_end_and_the_rest_goes_on(tmp_path, no_pictures):
    chosen = ("rate", "batch-warmup", "muon")
    for error in (RuntimeError, ValueError):
        command = ladder(tmp_path / error.__name__, rung=chosen, seeds=2)
        command = dataclasses.replace(command, run=Counting(("batch-warmup",), error=error))
        with pytest.raises(ValueError, match=r"2 failed, .*batch-warmup, seed 1 \(.*no power") as e:
            run_ladder(command)
        assert "muon" not in str(e.value)
        text = (tmp_path / error.__name__ / "results" / "speedrun-tiny.md").read_text()
        assert cells_of(text, "muon")[1] == "2 of 2"
        assert "| batch-warmup |" not in text
    stopped = ladder(tmp_path / "stopped", rung=chosen)
    stopped = dataclasses.replace(stopped, run=Counting(("rate",), error=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_ladder(stopped)
    assert not any(name.startswith("muon") for name in stopped.run.ran)


def test_without_a_baseline_nothing_is_climbed(tmp_path, no_pictures):
    command = dataclasses.replace(ladder(tmp_path, rung=("muon",)), run=Counting(("torch",)))
    with pytest.raises(ValueError, match="a baseline, without which there is no target"):
        run_ladder(command)
    assert command.run.ran == [f"torch, {TINY.tokens:,} tokens"]


@pytest.mark.parametrize(
    ("name", "how"),
    [(TORCH_COMPILED, ("compile", "float32")), (TORCH_BFLOAT16, ("eager", "bfloat16"))],
)
def test_a_baseline_in_another_program_takes_the_lengths_of_the_tuned_one(
    tmp_path, no_pictures, name, how
):
    command = ladder(tmp_path, rung=("torch-tuned", name), seeds=2)
    run_ladder(command)
    site = Site(TINY, tmp_path, read(tmp_path / "results" / "speedrun-tiny.json"))
    first = rows.mean_end(site, TORCH)
    for seed in range(2):
        found = list(lengths_of(site, name, seed))
        assert found == sorted({TINY.tokens, enough(site, TORCH_TUNED, seed, first)})
        assert len(found) == 2
    usual, other = (job_of(CPU, row, CPU.tokens, 0).baseline for row in (TORCH_TUNED, name))
    assert (usual.mode, usual.precision) == ("eager", "float32")
    assert (other.mode, other.precision) == how
    assert usual.settings == other.settings
    with pytest.raises(ValueError, match=f"no rung is called '{name}'"):
        run_ladder(dataclasses.replace(ladder(tmp_path, data=("a",), rung=(name,)), scale="gpu"))


def test_ratios_to_every_baseline_in_every_way_of_counting(tmp_path, no_pictures):
    chosen = (*BASELINES, "jax", "rate", "batch", "muon", "softcap")
    path, text, *_ = run_ladder(ladder(tmp_path, rung=chosen, seeds=3))
    gathered = read(path)
    site = Site(TINY, tmp_path, gathered)
    speeds = {"muon": 0.5, TORCH: 0.8, TORCH_COMPILED: 1.2, TORCH_BFLOAT16: 0.9}
    put_speeds(site, speeds)
    speeds[TORCH_TUNED] = 1.0  # which all are measured against
    text = "\n".join(render(site, path))
    for baseline in (TORCH_TUNED, TORCH):
        target = rows.mean_end(site, baseline)
        found = {n: rows.row_of(site, n, target, baseline) for n in chosen}
        after = text[text.index(f"{target:.4f} bits per byte") :]
        for name in BASELINES:
            whole, p, compiled, cold, tokens = cells_of(after, "muon", f"#### To {name}\n")[1:]
            if (name, baseline) == (TORCH, TORCH_TUNED):  # which never gets there
                assert all(e.startswith("> ") for e in (whole, compiled, cold, tokens))
                continue
            of = lambda what, name=name, found=found: rows.ratio(found["muon"], found[name], what)
            assert tokens == f"{of('tokens').mean:.2f} ± {of('tokens').error:.2f}x"
            for what, cell in {"compiled": compiled, "cold": cold}.items():
                mean, error = cell.removesuffix("x").split(" ± ")
                assert mean == f"{of(what).mean:.2f}"
                # That of the paces stands in it besides, as far as a pace has to do with it.
                share = found["muon"].mean("training")[0] / found["muon"].mean(what)[0]
                pace = speed_against(site, "muon", name).error * share * of(what).mean
                assert float(error) == pytest.approx(math.hypot(of(what).error, pace), abs=0.006)
            assert of("training").mean == pytest.approx(
                of("tokens").mean * 0.5 / speeds[name], rel=1e-3
            )
            turned = rows.ratio_in_turn(site, found["muon"], found[name])
            assert whole == f"{turned.mean:.2f} ± {turned.error:.2f}x"
            assert turned.error > of("training").error
            assert p == report.p_value(turned)
            there = found["muon"].reached[0]
            seconds = 2e-3 * there.tokens  # the baseline's for a token, at half the pace
            costs = (there.training, there.compiling, there.cold)
            assert costs == pytest.approx((seconds, 3.0, 4.0 + seconds))
    both = (
        f"To {TORCH_TUNED}, sec",
        f"To {TORCH}, sec",
        "To the rung below, sec",
        "and compiling:",
    )
    for what in both:
        assert what in text


def test_only_rows_that_looked_for_a_loss_are_compared_with_the_row_below(tmp_path, no_pictures):
    chosen = (*BASELINES, "jax", "rate", "batch", "parts", "block")
    text = run_ladder(ladder(tmp_path, rung=chosen))[1].read_text()
    second, first = text.split("### To the end of the first baseline")
    below = [part[part.index("#### To the rung below") :] for part in (first, second)]
    below = [part[: part.index("#### To torch")] for part in below]
    for name, there in (("rate", True), ("batch", False), ("block", False)):
        assert (f"| {name} |" in below[0]) == there
        assert cells_of(below[1], name)[1]
    assert "###" in first


def where_both(site, of, to, processor):
    """On one of two processors alone both rows have been timed."""
    return rows.ratio(of, to) if processor == "second" else None


@pytest.mark.parametrize(
    ("seconds", "kept", "says"),
    [
        ((1.0, 1.1, 1.2), True, r"yes, 1\.\d+ ± 0\.\d+x on second, p 0\.\d+$"),
        ((1.0, 1.1, 1.2), False, r"not what the recipe does"),
        ((2.0, 2.1, 2.2), True, r"no, .*\(\*\*not what the recipe does"),
        ((2.0, 2.1, 2.2), False, r"no, 0\.\d+ ± 0\.\d+x on second, p 0\.\d+$"),
        ((1.4, 1.6, 1.5), True, r"unclear, .*\(\*\*kept without proof"),
        ((1.4, 1.6, 1.5), False, r"unclear, .* p 0\.\d+$"),
        ((1.3, 1.5, 1.4), True, r"unclear, 1\.\d+.* p 0\.\d+ "),  # two standard errors
        ((1.0, 1.1), True, r"no verdict from 2 seeds, 1\.\d+"),
    ],
)
def test_a_verdict_needs_one_in_twenty_over_three_seeds(monkeypatch, seconds, kept, says):
    name = [rung.name for rung in RUNGS if rung.kept == kept][-1]
    mine, under = row(name, dict(enumerate(seconds))), row("x", {0: 1.5, 1: 1.52, 2: 1.51})
    monkeypatch.setattr(report, "row_of", lambda site, *args: under)
    monkeypatch.setattr(report, "processors", lambda site: ["first", "second"])
    monkeypatch.setattr(report, "ratio_in_turn", where_both)
    monkeypatch.setattr(report, "mean_end", lambda *args: 1.0)
    word, found = report.verdict(None, mine)
    assert word == ("yes" if kept else "no")
    assert re.search(says, found), found


def test_the_report_names_text_threads_and_trials(tmp_path, no_pictures):
    content = run_ladder(ladder(tmp_path, rung=("rate",)))[1].read_text()
    assert "* text: a text, sha256 c0ffee" in content
    assert "* threads: torch 2, ours 2" in content
    assert "The choices are guesses" in content


def test_a_run_without_an_evaluation_is_drawn_all_the_same(tmp_path):
    def none(job, folder):
        fake(job, folder)
        if job.name.startswith("muon"):
            (folder / job.key / "metrics.jsonl").write_text("")

    path, text, picture = run_ladder(ladder(tmp_path, rung=("rate", "muon"), run=none))
    assert picture.exists()


def test_without_steps_timed_in_turn_there_is_no_verdict(tmp_path, no_pictures):
    text = run_ladder(ladder(tmp_path, rung=("rate", "batch"), seeds=3))[1].read_text()
    kept = text[text.index("### What is kept") :]
    assert cells_of(kept, "batch")[2].startswith(
        "no verdict: its steps have not been timed in turn"
    )


def test_seeds_that_missed_the_target_leave_no_verdict(monkeypatch):
    mine = row("muon", dict(enumerate((1.0, 1.1, 1.2))))
    mine = (
        dataclasses.replace(mine, seeds=(0, 1, 2, 3, 4))
        if dataclasses.is_dataclass(mine)
        else (mine._replace(seeds=(0, 1, 2, 3, 4)))
    )
    under = row("x", {0: 1.5, 1: 1.52, 2: 1.51, 3: 1.5, 4: 1.5})
    monkeypatch.setattr(report, "row_of", lambda site, *args: under)
    monkeypatch.setattr(report, "processors", lambda site: ["first", "second"])
    monkeypatch.setattr(report, "ratio_in_turn", where_both)
    monkeypatch.setattr(report, "mean_end", lambda *args: 1.0)
    _, found = report.verdict(None, mine)
    assert re.search(r"no verdict, 1\.\d+ .* not reached with seed 3, 4", found), found
