"""The ladder: visible rungs, one rule for lengths, figures from what is gathered alone."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments.baselines.cells import BaselineCell
from experiments.grid import Cell
from experiments.ladder import command as ladder_command
from experiments.ladder import rows, rungs
from experiments.ladder.child import job_from_json, job_to_json, run_here
from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_TUNED,
    Site,
    climb,
    job_of,
    lengths_of,
    recipe_for,
)
from experiments.ladder.command import run_ladder
from experiments.ladder.measure import between, fastest, reached
from experiments.ladder.recipe import Ramp, Recipe
from experiments.ladder.rows import mean_end
from experiments.ladder.rungs import RUNGS, below, formats_of, recipe_of
from experiments.ladder.scales import CPU, GPU, SCALES, TINY, Choices
from experiments.ladder.side_by_side import Speed
from experiments.speedrun import Speedrun, check_demo, ladder_of
from experiments.tables.gathered import Gathered
from experiments.tables.report import read
from model.presets import gpt2_tiny
from tests.ladder_cases import NAMES, WEIGHTS, Counting, cells_of, fake, ladder, row
from train.optimizers import Adam
from train.schedules import Linear
from train.settings import to_json


def recipe(**fields):
    return Recipe(
        **{
            "model": gpt2_tiny(),
            "optimizer": Adam(),
            "rows": 8,
            "length": 16,
            "tokenizer": "bytes",
            **fields,
        }
    )


def test_ramps_share_the_tokens_of_a_run():
    ramps = (Ramp("length", ((0.25, 0.25), (0.5, 0.5))), Ramp("layers", ((0.375, 1),)))
    settings = recipe(ramps=ramps).settings(("stdlib",), 8 * 16 * 80, 0)
    found = [(p.steps, p.batch_size, p.sequence_length, p.model.layers) for p in settings.phases]
    assert found == [(20, 32, 4, 1), (10, 16, 8, 1), (10, 16, 8, 2), (40, 8, 16, 2)]
    rows = recipe(ramps=(Ramp("rows", ((0.5, 0.25),)),)).settings(("stdlib",), 128 * 80, 0)
    assert [(p.steps, p.batch_size) for p in rows.phases] == [(160, 2), (40, 8)]


def test_warmups_are_shares_of_the_steps_whatever_the_batch():
    for factor, steps in ((1, 5), (4, 20)):
        made = recipe(schedule=Linear(), warmup=0.05, rows=8 // factor)
        assert made.settings(("stdlib",), 128 * 100, 0).schedule.warmup_steps == steps


def test_parts_of_a_batch_come_out_even_in_every_phase():
    for batch, parts in ((8, 4), (2, 1), (1, 1), (6, 3), (9, 3)):
        made = recipe(rows=batch, part_rows=2).settings(("stdlib",), 10_000, 0)
        assert made.micro_batches == parts
    fewer = recipe(ramps=(Ramp("rows", ((0.5, 0.5),)),), part_rows=2)
    found = fewer.settings(("stdlib",), 10_000, 0)
    assert [phase.batch_size for phase in found.phases] == [4, 8]
    assert found.micro_batches == 2
    assert recipe().settings(("stdlib",), 10_000, 0).micro_batches == 1


def test_ramps_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match=r"a ramp asks for 32 rows of 4 tokens|2\.66667"):
        recipe(ramps=(Ramp("rows", ((0.5, 1 / 3),)),)).settings(("stdlib",), 10_000, 0)
    with pytest.raises(ValueError, match="rise between 0 and 1"):
        Ramp("rows", ((0.5, 1), (0.4, 2)))


def test_every_rung_differs_visibly_from_the_one_below():
    for scale in (CPU, GPU.at(data=("text",))):
        for rung in RUNGS:
            mine = to_json(recipe_of(rung.name, scale).settings(scale.data, scale.tokens // 3, 0))
            under = below(rung.name)
            if under is None:
                assert rung.name == "jax"
                continue
            theirs = to_json(recipe_of(under, scale).settings(scale.data, scale.tokens // 3, 0))
            assert mine != theirs, rung.name


def test_a_rung_builds_on_the_kept_ones_alone(monkeypatch):
    for kept in (True, False):
        flipped = (dataclasses.replace(r, kept=kept) if r.name == "softcap" else r for r in RUNGS)
        monkeypatch.setattr(rungs, "RUNGS", tuple(flipped))
        assert (recipe_of("cautious", CPU).model.logit_softcap == 15.0) is kept
        assert recipe_of("softcap", CPU).model.logit_softcap == 15.0
        assert below("shortcuts") == ("softcap" if kept else "bigrams")


def test_names_say_one_thing():
    assert len(set(NAMES)) == len(NAMES)
    assert not any(", " in name for name in NAMES)  # which parts a name from its tokens
    with pytest.raises(ValueError, match="no rung is called 'mu'; there are jax, rate"):
        recipe_of("mu", CPU)


def test_the_baselines_and_their_counterparts_learn_alike():
    data = ("stdlib",)
    mission = recipe_for(CPU, TORCH).settings(data, CPU.tokens, 0)
    assert recipe_for(CPU, "jax").settings(data, CPU.tokens, 0) == mission
    assert mission.steps == CPU.steps
    assert (mission.optimizer, mission.phases[0].model.dropout) == (Adam(learning_rate=1e-4), 0.1)
    plain = CPU.at(choices=Choices())  # with the batch of the scale
    tuned = recipe_for(plain, TORCH_TUNED).settings(data, CPU.tokens, 0)
    assert tuned.phases[0] == dataclasses.replace(
        mission.phases[0], model=dataclasses.replace(CPU.model, dropout=0.0)
    )


def test_restricted_recipes_fit_their_formats_and_keep_what_they_can():
    for name, place in (("for-hf", "HF"), ("for-gguf", "GGUF")):
        found = recipe_of(name, CPU)
        assert any(place in each for each in formats_of(found))
        assert type(found.optimizer) is type(CPU.choices.muon)
        assert found.rows == CPU.choices.muon_rows
        assert not found.model.value_embeddings
    assert formats_of(recipe_of("rate", CPU)) == ("HF gpt2", "GGUF gpt2")
    assert formats_of(recipe_of("values", CPU)) == ()


@pytest.mark.parametrize("name", ["torch", "torch-tuned", "length", "vocabulary"])
def test_a_cell_goes_to_a_process_of_its_own_and_is_the_same_there(name):
    job = job_of(CPU, name, CPU.tokens // 2, 1)
    again = job_from_json(json.loads(json.dumps(job_to_json(job))))
    assert (again, again.key) == (job, job.key)
    assert isinstance(job, BaselineCell if name in BASELINES else Cell)


def point(bits, seconds, step=1):
    return {
        "bits": bits,
        "loss": bits,
        "steps": step,
        "tokens": 100 * step,
        "flops": 1e3 * step,
        "training": seconds,
        "compiling": 1.0,
        "cold": 2 * seconds,
    }


def test_the_first_crossing_counts_and_the_fastest_run():
    run = [point("nan", 1.0), point(3.0, 2.0), point(1.9, 3.0, step=3), point(2.2, 4.0, step=4)]
    assert reached(run, 1.9).training == 3.0
    assert 2.0 < reached(run, 2.0).training < 3.0  # a line in the logarithm of tokens
    tokens = [e["tokens"] for e in run[1:3]]
    assert reached(run, 2.0).tokens == round(tokens[0] * (tokens[1] / tokens[0]) ** (1 / 1.1))
    assert reached([run[0], run[2]], 2.0).training == 3.0  # nothing to read it off
    assert reached(run[:2], 2.0) is None
    quick = [point(2.0, 2.5, step=2)]
    assert fastest([run, quick], 2.0).training == 2.5
    assert fastest([], 2.0) is None


def test_what_lies_between_two_runs_is_read_off_a_line_in_the_logarithm_of_tokens():
    law = lambda tokens: 30 * tokens**-0.2
    runs = [[point(9.0, 0.1), point(law(100 * n), 0.02 * n + 1, n)] for n in (80, 100, 120)]
    for true in (8_100, 9_000, 9_900, 11_000):
        found = between(runs, law(true))
        assert found.bits == law(true)
        assert found.tokens == pytest.approx(true, rel=2e-3)
        assert found.training == pytest.approx(0.0002 * true + 1, rel=2e-3)
        assert found.cold == pytest.approx(2 * found.training)
        assert fastest(runs, law(true)) == found
    assert between(runs, law(7_500)) is None is between(runs, law(12_500))
    assert between(runs, law(12_500), 1.15).tokens == pytest.approx(12_500, rel=3e-3)
    assert between(runs, law(7_500), 1.15).tokens == pytest.approx(7_500, rel=3e-3)
    assert between(runs, law(14_500), 1.15) is None
    # Ends too far apart, of one run alone, that diverged, or that rise, say nothing.
    assert between([runs[0], [point(law(20_000), 5.0, 200)]], law(9_000)) is None
    assert between(runs[:1], law(8_000)) is None
    assert between([[point("nan", 1.0, 80)], runs[1]], law(9_000)) is None
    assert between([runs[0], [point(7.0, 2.0, 100)]], 6.0) is None


def test_ratios_are_of_paired_seeds():
    ours, theirs = row("a", {0: 2.0, 1: 4.0, 2: 1.0}), row("b", {0: 6.0, 1: 8.0})
    found = rows.ratio(ours, theirs)
    assert (found.mean, found.error, found.pairs) == (2.5, 0.5, 2)
    assert rows.ratio(ours, theirs, "compiled").mean == np.mean([7 / 3, 9 / 5])
    assert rows.ratio(ours, theirs, "cold").mean == np.mean([8 / 4, 10 / 6])
    assert math.isnan(rows.ratio(ours, row("c", {})).mean)


def test_the_p_value_is_of_a_paired_t_test_of_logarithms():
    from scipy.stats import ttest_rel

    ours = row("a", {0: 2.0, 1: 4.0, 2: 1.0, 3: 3.0})
    theirs = row("b", {0: 3.0, 1: 4.5, 2: 1.9, 3: 3.1})
    found = rows.ratio(ours, theirs)
    logs = [np.log([2.0, 4.0, 1.0, 3.0]), np.log([3.0, 4.5, 1.9, 3.1])]
    expected = ttest_rel(logs[1], logs[0])
    assert found.p == pytest.approx(expected.pvalue)
    assert found.errors == pytest.approx(expected.statistic)
    back = rows.ratio(theirs, ours)
    assert (back.p, back.errors) == (pytest.approx(found.p), pytest.approx(-found.errors))
    # A factor that all pairs share moves the mean and widens the error.
    ratios = [1.5, 1.125, 1.9, 3.1 / 3.0]
    faster = rows.ratio_of(ratios, Speed(1.2, 0.05))
    assert faster.mean == pytest.approx(1.2 * np.mean(ratios))
    error = np.std(np.log(ratios), ddof=1) / 2
    assert faster.errors == pytest.approx(
        np.log(1.2 * np.array(ratios)).mean() / np.hypot(error, 0.05)
    )
    same = rows.ratio(row("a", {0: 1.0, 1: 2.0}), row("b", {0: 1.0, 1: 2.0}))
    assert (same.errors, same.p) == (0.0, 1.0)
    assert math.isnan(rows.ratio(row("a", {0: 1.0}), row("b", {0: 2.0})).p)


def test_the_whole_ladder_is_climbed_once_and_written_from_the_json_alone(tmp_path):
    chosen = ("torch", "torch-tuned", "jax", "rate", "muon", "cautious", "length")
    first = ladder(tmp_path, seeds=3, rung=chosen)
    path, text, picture = run_ladder(first)
    assert picture.suffix == ".png"
    content = text.read_text()
    for name in chosen:
        assert f"| {name} | 3 of 3 |" in content or f"| {name} | 0 of 3 |" in content, name
    assert cells_of(content, "torch-tuned")[1:3] == ["3 of 3", "48 ± 0"]
    found = read(path)
    site = Site(TINY, tmp_path, found)
    for name in ("rate", "cautious"):
        for seed in range(3):
            assert len(lengths_of(site, name, seed)) <= 2 * TINY.search.runs
    again = ladder(tmp_path, seeds=3, rung=chosen, cells=tmp_path / "elsewhere")
    run_ladder(again)
    assert again.run.ran == []
    assert text.read_text() == content
    fresh = ladder(tmp_path, rung=("torch",), cells=tmp_path / "fresh", fresh=True)
    run_ladder(fresh)
    assert len(fresh.run.ran) == TINY.target_seeds  # of the row that is named alone
    assert "| muon |" in text.read_text()
    fresh = ladder(tmp_path, rung=(), cells=tmp_path / "all", fresh=True)
    fresh = dataclasses.replace(fresh, max_minutes=0.0)
    run_ladder(fresh)
    assert "| muon |" not in text.read_text()


def test_later_seeds_begin_where_the_first_ended_and_have_an_end_on_either_side(tmp_path):
    run = Counting()
    site = Site(TINY, tmp_path, Gathered({}), run=run)
    target = 30 * WEIGHTS["block"] * 4000**-0.2
    lengths = climb(site, "block", 0, target)
    best = min(n for n, v in lengths.items() if v["points"][-1]["bits"] <= target)
    for seed in (1, 2):
        ends = {n: v["points"][-1]["bits"] for n, v in climb(site, "block", seed, target).items()}
        assert next(iter(ends)) == best
        assert len(ends) <= 3
        assert min(ends.values()) <= target < max(ends.values())
        # The law of a seed: as far above that of the first as it is said to be.
        true = ((target - 0.001 * seed) / (30 * WEIGHTS["block"])) ** -5
        found = rows.row_of(site, "block", target).reached[seed]
        assert found.tokens == pytest.approx(true, rel=0.01)


def test_a_row_that_has_both_ends_needs_no_run_wherever_it_would_begin_now(tmp_path, monkeypatch):
    path = run_ladder(ladder(tmp_path, rung=("rate",)))[0]
    site = Site(TINY, tmp_path, read(path), run=Counting())
    target = mean_end(site, TORCH_TUNED)
    begins = dict(climb(site, "rate", 0, target))
    monkeypatch.setattr("experiments.ladder.climb._start", lambda *about: TINY.tokens)
    assert climb(site, "rate", 0, target) == begins
    assert not site.run.ran
    assert climb(site, "rate", 1, target)  # of another seed there is nothing
    assert site.run.ran


def test_a_baseline_counts_with_all_of_its_run_where_a_seed_ends_above_the_mean(tmp_path):
    site = Site(TINY, tmp_path, Gathered({}), run=fake)
    for seed in range(4):
        site.outcome(TORCH_TUNED, TINY.tokens, seed)
    target = rows.mean_end(site, TORCH_TUNED)
    assert set(rows.row_of(site, TORCH_TUNED, target).reached) == {0}
    found = rows.row_of(site, TORCH_TUNED, target, TORCH_TUNED)
    assert found.reached[2].steps == TINY.steps


def test_a_baseline_that_never_arrives_gives_a_lower_bound(tmp_path):
    site = Site(TINY, tmp_path, Gathered({}), run=fake)
    for name in (TORCH, TORCH_TUNED):
        for seed in range(TINY.target_seeds):
            site.outcome(name, TINY.tokens, seed)
    site.outcome("muon", TINY.tokens, 0)
    target = rows.mean_end(site, TORCH_TUNED)
    ours = rows.row_of(site, "muon", target)
    whole = lengths_of(site, TORCH, 0)[TINY.tokens]["points"][-1]["training"]
    assert rows.at_least(site, ours, TORCH) == whole / ours.reached[0].training


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rung": ("muons",)}, "no rung is called 'muons'"),
        ({"seeds": 0}, "give at least 1"),
        ({"scale": "gpu"}, "has no data of its own"),
        ({"tune": ("muon",), "sizes": True}, "a command of its own"),
        ({"tune": ("muon",), "rung": ("muon",)}, "names its rungs itself"),
        ({"side_by_side": True, "seeds": 3}, "whatever the seed"),
        ({"tune": ("softcap",)}, "softcap has nothing to tune; there are trials for torch-tuned"),
        ({"held_out": "test", "sizes": True}, "never see the test split"),
        ({"held_out": "test"}, "opened for rungs that are named"),
        ({"tuned": True}, "are not all on record"),
    ],
)
def test_mistakes_are_said_before_anything_runs(tmp_path, fields, says):
    command = dataclasses.replace(ladder(tmp_path), **fields)
    with pytest.raises(ValueError, match=says):
        run_ladder(command)
    assert command.run.ran == []


def test_a_text_is_read_as_bytes_and_has_a_section_of_its_own(tmp_path):
    text = tmp_path / "tale.txt"
    text.write_text("once upon a time ")
    command = ladder(tmp_path, data=(str(text),), rung=("rate",))
    scale = ladder_command.scale_of(command)
    assert (scale.tokenizer, scale.data) == ("bytes", (str(text),))
    run_ladder(command)
    run_ladder(ladder(tmp_path, rung=("rate",)))
    report = (tmp_path / "results" / "speedrun-tiny.md").read_text()
    assert "## tale.txt, bytes" in report
    assert "## stdlib, bytes" in report


def test_the_demo_refuses_what_is_the_ladders(tmp_path):
    check_demo(Speedrun())
    for fields, flag in (({"rung": ("muon",)}, "rung"), ({"max_minutes": 3.0}, "max-minutes")):
        with pytest.raises(ValueError, match=f"the demo has no --{flag}"):
            check_demo(Speedrun(**fields))
    with pytest.raises(ValueError, match="--seeds N"):
        ladder_of(Speedrun(scale="cpu", seed=1), tmp_path)


def test_untying_late_is_the_only_thing_that_its_rung_changes():
    for scale in (CPU, TINY):
        mine, under = recipe_of("untie", scale), recipe_of(below("untie"), scale)
        assert dataclasses.replace(mine, ramps=under.ramps) == under


@pytest.mark.slow
@pytest.mark.parametrize("name", [rung.name for rung in RUNGS])
def test_every_rung_trains_at_tiny_size(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    draw = np.random.default_rng(0)
    text.write_text("".join(chr(97 + c) for c in draw.integers(0, 26, 20_000)))
    choices = dataclasses.replace(SCALES["tiny"].choices, vocabulary="bytes")
    scale = TINY.at(data=(str(text),), choices=choices)
    site = Site(scale, tmp_path / "cells", Gathered({}), run=run_here)
    values = site.outcome(name, scale.tokens // 4, 0)
    assert values["points"][-1]["bits"] < 8.2
    assert values["points"][-1]["tokens"] == pytest.approx(scale.tokens // 4, rel=0.2)
    assert values["peak_bytes"] > 1e8
