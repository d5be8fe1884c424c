"""Trials: as many on either side, one chain of choices, and what is said of them."""

import dataclasses
import json
import math

import pytest

from experiments.baselines import tune
from experiments.baselines.cells import BaselineCell
from experiments.ladder import command as command_module
from experiments.ladder.climb import TORCH_TUNED, Site, job_of
from experiments.ladder.command import run_ladder, scale_of
from experiments.ladder.rungs import recipe_of
from experiments.ladder.scales import CPU, TINY, Choices
from experiments.ladder.trials import (
    SEED,
    chain,
    changes,
    edges,
    groups,
    groups_named,
    numbers,
    read_group,
    table_of,
    trial_job,
)
from experiments.tables.gathered import Gathered
from experiments.tables.report import read
from tests.ladder_cases import Counting, cells_of, ladder, law, settings_of
from train.optimizers import AdamW


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Which take longer than all else here."""
    monkeypatch.setattr(command_module, "draw", lambda site, path: False)


BEST = {  # neither what stands in the code nor at an edge, but for b1 and the rows
    "torch": {"learning_rate": 3e-3, "b1": 0.7, "b2": 0.98, "weight_decay": 0.3},
    "adamw": 2e-3,
    "muon": 0.02,
    "adam": 0.4 * 0.02,
    "rows": 1,
}


def bowl(job, share):
    """Bits that are lowest at `BEST`; those of the ladder's own runs follow their law."""
    settings = settings_of(job)
    if settings.seed != SEED:
        return law(job, share)
    optimizer, bits = settings.optimizer, 2.0
    if isinstance(job, BaselineCell):
        for name, value in BEST["torch"].items():
            bits += abs(math.log((getattr(optimizer, name) + 1e-4) / (value + 1e-4)))
        return bits + (type(settings.schedule).__name__ != "Cosine")
    rate = BEST["adamw" if isinstance(optimizer, AdamW) else "muon"]
    bits += abs(math.log(optimizer.learning_rate / rate))
    bits += abs(math.log(getattr(optimizer, "adam_learning_rate", BEST["adam"]) / BEST["adam"]))
    bits += abs(math.log2(settings.phases[0].batch_size / BEST["rows"]))
    for path, factor in optimizer.learning_rate_rules:
        bits += abs(math.log(factor / {"token_embedding": 4.0, "head": 1.0}[path]))
    return bits


def tuned(folder, *names, **fields):
    run = Counting(bits_of=bowl)
    return ladder(folder, tune=names or ("all",), **{"run": run, **fields})


@pytest.mark.parametrize("scale", [CPU, TINY])
def test_either_side_has_as_many_trials(scale):
    """Runs, whatever is chosen on the way; what two groups share runs once."""
    for pick in (0, -1):
        keys = {"torch": [], "ours": []}
        now = scale
        for group in groups():
            trials = group.trials(now)
            for title, choices in trials.items():
                job, _ = trial_job(now, group, title, choices)
                assert settings_of(job).held_out == "validation"
                assert settings_of(job).seed == SEED
                keys.setdefault(group.side, []).append(job.key)
            now = now.at(choices=list(trials.values())[pick])
        assert len(set(keys["torch"])) == len(set(keys["ours"]))


def test_the_baseline_is_tuned_in_rate_schedule_betas_and_decay():
    trials = tune.rates_and_schedules(CPU)
    adamws = {choices.torch_adamw.learning_rate for choices in trials.values()}
    schedules = {type(choices.torch_schedule) for choices in trials.values()}
    assert (len(adamws) >= 5, len(schedules)) == (True, 2)
    best = CPU.at(choices=trials["cosine 0.003"])
    pairs = {(c.torch_adamw.b1, c.torch_adamw.b2) for c in tune.betas(best).values()}
    assert len({b1 for b1, _ in pairs}) >= 3 <= len({b2 for _, b2 in pairs})
    assert len(pairs) == len(tune.FIRST_MOMENTS) * len(tune.SECOND_MOMENTS)
    for choices in (*tune.betas(best).values(), *tune.decays(best).values()):
        assert choices.torch_adamw.learning_rate == 3e-3
        assert choices.torch_schedule == trials["cosine 0.003"].torch_schedule
    with pytest.raises(ValueError, match="4 rates and 2 schedules do not tune a baseline"):
        tune.rates_and_schedules(CPU, (1.0, 2.0, 3.0, 4.0))


def test_a_trial_of_the_baseline_is_the_ladders_baseline_with_other_choices():
    group = groups_named([TORCH_TUNED])[0]
    choices = group.trials(CPU)["linear 0.006"]
    job, _ = trial_job(CPU, group, "linear 0.006", choices)
    theirs = job_of(CPU.at(choices=choices), TORCH_TUNED, CPU.tokens, SEED)
    assert job.baseline == theirs.baseline


def test_groups_choose_one_after_another_and_unattended(tmp_path, capsys):
    command = tuned(tmp_path)
    path, text = run_ladder(command)
    assert len(command.run.ran) == 96
    found = chain(read(path), TINY)
    after = found[-1].after
    for name, value in BEST["torch"].items():
        assert getattr(after.torch_adamw, name) == value
    assert type(after.torch_schedule).__name__ == "Cosine"
    assert (after.adamw.learning_rate, after.rows, after.rows_rate) == (2e-3, 1, 2e-3)
    assert (after.muon.learning_rate, after.muon.adam_learning_rate) == (0.02, BEST["adam"])
    assert (after.embedding_rate, after.head_rate) == (4.0, 1.0)
    content = text.read_text()
    assert "45 of the tuned torch baseline, 45 of ours, 6 of rungs" in content
    printed = capsys.readouterr().out
    for lines in (content, printed):
        assert "betas: AT AN EDGE of the grid: torch_adamw.b1 0.7 is the lowest" in lines
        assert "groups: AT AN EDGE of the grid: embedding_rate 4 is the highest" in lines
        assert "rate and schedule: AT AN EDGE" not in lines
    assert "    rows=1," in printed
    again = tuned(tmp_path, cells=tmp_path / "clone")
    run_ladder(again)
    assert again.run.ran == []
    # Once the choices stand in the code, the same runs are theirs.
    assert [each.best for each in chain(read(path), TINY.at(choices=after))] == [
        each.best for each in found
    ]


def test_the_ladder_takes_the_choices_of_the_trials_and_prints_both_grids(tmp_path, capsys):
    run_ladder(tuned(tmp_path))
    command = ladder(tmp_path, rung=("rate",), tuned=True)
    assert scale_of(command).choices.torch_adamw.b1 == 0.7
    text = run_ladder(command)[1].read_text()
    assert "45 of the tuned torch baseline, 45 of ours" in text
    for group in groups():
        line = next(x for x in text.splitlines() if x.startswith(f"* {group.name} ("))
        assert line.count(";") == len(group.trials(TINY)) - 1
        assert line.count("**") == 2
    assert "at an edge: rows 1" in text
    assert "rows below do not have what they chose" not in text
    capsys.readouterr()
    text = run_ladder(dataclasses.replace(command, tuned=False))[1].read_text()
    assert "do not have what they chose: torch_adamw, torch_rows, torch_warmup" in text
    assert "--tuned takes it" in capsys.readouterr().out
    tale = tmp_path / "tale.txt"
    tale.write_text("once upon a time ")
    other = dataclasses.replace(command, data=(str(tale),))
    assert scale_of(other).choices.torch_adamw.b1 == 0.7
    text = run_ladder(other)[1].read_text()
    assert text.count("taken over from there on both sides, and nothing was tuned on this") == 1


def test_batches_are_tried_for_equal_seconds(tmp_path):
    timed = []

    def pace(job, to):
        sizes = [settings_of(each).phases[0].batch_size for each in (job, to)]
        timed.append((isinstance(job, BaselineCell), *sizes))
        return sizes[0] / sizes[1]

    command = tuned(tmp_path, pace=pace)
    path, text = run_ladder(command)
    whole = TINY.rows
    # Each smaller batch once for a side, at whatever rates it is tried.
    tried = {True: (1, 2, 4), False: (1, 2, 4, 16)}  # 16 under Muon alone
    assert sorted(set(timed)) == [(s, rows, whole) for s in (False, True) for rows in tried[s]]
    assert len(timed) == 9  # of ours under AdamW and under Muon
    for group in groups():
        if group.with_rows is not None:
            for rows in (2, 4, whole, 16) if group.name == "muon-batch" else (1, 2, 4, whole):
                section = text.read_text().partition(f"### {group.name}")[2]
                line = next(x for x in section.splitlines() if x.startswith(f"| {rows} rows"))
                tokens = TINY.search.rounded(group.share * TINY.tokens * rows / whole)
                found = int(line.split("|")[3].replace(",", ""))
                assert abs(found - tokens) <= rows * TINY.length / 2  # of whole steps
    assert "2 rows: tokens a second to 8 rows: 0.25x" in text.read_text()
    run_ladder(tuned(tmp_path, pace=pace, cells=tmp_path / "clone"))
    assert len(timed) == 9


def test_a_group_alone_stands_on_what_others_on_record_chose(tmp_path):
    for name in (
        "torch-tuned",
        "rate",
        "batch",
        "block",
        "muon",
        "muon-batch",
        "bigrams",
        "groups",
    ):
        run_ladder(tuned(tmp_path / "apart", name))
    apart = read(tmp_path / "apart" / "results" / "speedrun-tuning-tiny.json")
    whole = read(run_ladder(tuned(tmp_path / "whole"))[0])
    assert chain(apart, TINY)[-1].after == chain(whole, TINY)[-1].after
    assert all(chosen.best for chosen in chain(apart, TINY))


def test_a_group_that_is_not_whole_chooses_nothing(tmp_path):
    command = tuned(tmp_path, "muon", run=Counting(("rate 0.02",), bowl))
    with pytest.raises(ValueError, match=r"3 failed, .*the trial rate 0\.02, AdamW's 0\.008 of mu"):
        run_ladder(command)
    assert len(command.run.ran) == 15  # the others ran
    path = tmp_path / "results" / "speedrun-tuning-tiny.json"
    (group,) = groups_named(["muon"])
    found = read_group(read(path), TINY, group)
    assert (found.best, found.after, len(found.bits)) == (None, TINY.choices, 12)
    assert "nothing is chosen, 3 of its trials are missing" in path.with_suffix(".md").read_text()


def test_trials_of_the_past_are_no_longer_listed(tmp_path):
    path, text = run_ladder(tuned(tmp_path, "muon"))
    content = json.loads(path.read_text())
    (group,) = groups_named(["muon"])
    rows = content["tables"][table_of(TINY, group)]
    rows["rate 9"] = next(iter(rows.values()))
    path.write_text(json.dumps(content))
    assert "| rate 9 |" not in run_ladder(tuned(tmp_path, "muon"))[1].read_text()
    assert "rate 9" not in json.loads(path.read_text())["tables"][table_of(TINY, group)]
    # A trial of another recipe below counts no more, though its title is the same.
    other = TINY.at(choices=dataclasses.replace(TINY.choices, rows=8))
    assert read_group(read(path), other, group).bits == {}
    assert len(read_group(read(path), TINY, group).bits) == 15


def test_trials_are_listed_best_first_and_those_that_diverged_last(tmp_path):
    def some(job, share):
        return math.nan if settings_of(job).optimizer.learning_rate > 0.03 else bowl(job, share)

    text = run_ladder(tuned(tmp_path, "muon", run=Counting(bits_of=some)))[1].read_text()
    listed = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| rate")]
    assert listed[0] == "rate 0.02, AdamW's 0.008"
    assert {title.split(",")[0] for title in listed[-3:]} == {"rate 0.04"}
    tokens = int(cells_of(text, listed[0])[2].replace(",", ""))
    asked = TINY.search.rounded(0.3 * TINY.tokens)
    assert abs(tokens - asked) <= recipe_of("muon", TINY).step_tokens / 2  # of whole steps


def test_an_edge_needs_three_values_and_no_decay_is_none():
    (group,) = groups_named(["groups"])
    site = Site(TINY, None, Gathered({}))
    whole = read_group(site.gathered, TINY, group)
    at = lambda title: edges(whole._replace(best=title))
    assert edges(whole) == []
    assert at("embeddings x1, head x0.5") == ["embedding_rate 1 is the lowest that was tried"]
    assert at("embeddings x2, head x1") == []  # of two heads one has to be the higher
    decay = groups_named([TORCH_TUNED])[3]
    whole = read_group(site.gathered, TINY, decay)
    assert edges(whole._replace(best="decay 0")) == []
    assert edges(whole._replace(best="decay 1")) == [
        "torch_adamw.weight_decay 1 is the highest that was tried"
    ]


def test_differences_of_choices_are_named():
    new = dataclasses.replace(Choices(), rows=4, torch_adamw=AdamW(learning_rate=1e-3))
    assert list(changes(Choices(), new)) == ["torch_adamw", "rows"]
    assert numbers(new)["torch_adamw.learning_rate"] == 1e-3
