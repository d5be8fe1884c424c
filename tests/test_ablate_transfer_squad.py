"""The table of SQuAD: its cells, the floor and the texts they rest on, what is read off results."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments.ablate import transfer_squad as table
from experiments.ablate import transfer_squad_report as report
from experiments.grid import Cell
from experiments.tables.gathered import Gathered, Results
from experiments.tables.table import Request, complete
from experiments.tasks.squad_floor import floor_scores
from model.presets import modern_mini
from tests.squad_cases import colours, write_squad
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.tasks.task import TEST, VALID

TRIALS = [table.trial_of(way, tuned) for way in table.CHOSEN for tuned in table.TRIALS]


@pytest.fixture
def request_(tmp_path):
    path = write_squad(tmp_path / "a.json", [colours(seed, 1) for seed in range(20)])
    return Request(tmp_path / "cells", seeds=2, squad=path)


def test_rows_share_their_model_and_texts(request_, tmp_path):
    items = table.cells(request_)
    of_seed = [table.FLOOR, table.LANGUAGE, *table.WAYS]
    assert [item.name for item in items] == 2 * of_seed + TRIALS
    assert len({item.key for item in items}) == len(items)
    languages = [item.needs[0] for item in items if item.name == table.LANGUAGE]
    runs = [item.needs[0] for item in items if item.name in table.WAYS]
    assert all(isinstance(run, Cell) for run in runs)
    parents = [[None, None, str(request_.cells / language.key)] for language in languages]
    assert [run.settings.parent for run in runs] == [*parents[0], *parents[1]]
    # Ids of the language model mean its own pieces: those of other texts come in another order.
    pieces = [f"{run.settings.parent}/tokenizer" for run in runs if run.settings.parent]
    assert [run.settings.tokenizer for run in runs if run.settings.parent] == pieces
    assert [run.settings.task.mark for run in runs] == [False, True, True] * 2
    moved = tmp_path / "moved.json"
    request_.squad.rename(moved)
    there = dataclasses.replace(request_, squad=moved, cells=tmp_path / "other" / "cells")
    elsewhere = table.cells(there)
    assert [item.key for item in elsewhere] == [item.key for item in items]
    assert table.cells(Request()) == []
    assert "--squad" in table.notes(Request())[0]


def test_each_seed_is_tested_on_articles_that_no_trial_chooses_by(request_):
    items = table.cells(dataclasses.replace(request_, seeds=9))
    runs = {name: [i.needs[0] for i in items if i.name == name] for name in (*table.WAYS, *TRIALS)}
    tasks = {name: [run.settings.task for run in found] for name, found in runs.items()}
    held = [{q.title for q in task.questions(TEST)[0]} for task in tasks[table.SCRATCH]]
    assert sum(map(len, held)) == len(set().union(*held))
    for name in TRIALS:
        (task,) = tasks[name]
        assert not {q.title for q in task.questions(VALID)[0]} & set().union(*held)
        (run,) = runs[name]
        assert run.settings.seed not in range(9)
    for way in (table.SCRATCH, table.TRANSFER):  # as many trials, of the same settings
        tried = [
            (run.settings.optimizer, run.settings.phases)
            for name in TRIALS
            for run in runs[name]
            if name.startswith(f"trial at {way},")
        ]
        assert len(tried) == len(table.TRIALS)
        one = runs[way][0].settings
        assert (one.optimizer, one.phases) in tried
    texts = [item for item in items if item.name == table.LANGUAGE]
    assert len({item.needs[0].needs[0].key for item in texts}) == 9


def test_the_language_model_sees_no_held_out_article(request_):
    seed = [item for item in table.cells(request_) if item.name == table.LANGUAGE][1]
    texts = seed.needs[0].needs[0]
    assert texts.function(texts.settings) == {"documents": 16}
    (path,) = (request_.cells / texts.key).iterdir()
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    task = table.task_of(request_.squad, fold=1)
    held_out = {q.paragraph for split in (VALID, TEST) for q in task.questions(split)[0]}
    assert len(held_out) == 4
    assert not any(paragraph in line for paragraph in held_out for line in lines)
    first = task.questions("train")[0][0]
    assert any(first.text in line and line.endswith(first.paragraph) for line in lines)


def test_the_floor_is_that_of_the_test_articles(request_):
    for fold, floor in enumerate(i for i in table.cells(request_) if i.name == table.FLOOR):
        questions, _ = table.task_of(request_.squad, fold).questions(TEST)
        found = floor.function(floor.settings)
        wanted = {**floor_scores(questions), "questions": len(questions)}
        assert {name: found[name] for name in wanted} == wanted
        articles = found["articles"].values()
        whole = sum(one["questions"] * one["f1"] for one in articles) / len(questions)
        assert whole == pytest.approx(found["f1"])


def articles(seed, f1, count=2):
    """Two articles of a seed, one twice as long."""
    return {
        f"{seed}.{n}": {"questions": 10 * (n + 1), "exact_match": f1 / 2, "f1": f1 + n}
        for n in range(count)
    }


def values(seed, f1, curve):
    test = {"exact_match": f1 / 2, "f1": f1, "loss": 2.0, "representable": 95.0}
    rows = [{"step": step, "f1": value} for step, value in curve]
    more = {"articles": articles(seed, f1), "curve": rows, "step_seconds": 0.5}
    return {"test": test, "step": 400, **more}


@pytest.fixture
def found():
    ends = {0: 11.0, 1: 15.0}
    floor = {"exact_match": 13.0, "f1": 23.0}
    return {
        table.FLOOR: {seed: {**floor, "articles": articles(seed, 23.0)} for seed in (0, 1, 2)},
        table.LANGUAGE: {seed: {"step": 100, "step_seconds": 1.0} for seed in (0, 1, 2)},
        table.SCRATCH: {
            seed: values(seed, end + 1, [(200, 5.0), (400, end)]) for seed, end in ends.items()
        },
        table.TRANSFER: {
            0: values(0, 26.0, [(200, 12.0), (400, 13.0)]),
            1: values(1, 28.0, [(200, 12.0), (400, 14.0)]),
            2: values(2, 90.0, [(200, 80.0)]),
        },
    }


def test_figures_are_set_against_the_floor_by_article(found):
    text = "\n".join(report.render(Results(found)))
    # Over all questions: 12 - 23 and 16 - 23, of as many.
    assert "From scratch against the sliding window, over all test questions: " in text
    assert "F1 -9.0 (95 % of draws of the articles: -11.0 to -7.0)" in text
    assert "The language model adds +13.0 " in text  # of shared seeds
    assert "over 2 seeds in standard errors +13.0" in text
    assert report.picture(Results(found)) is not None
    for part in ({}, {table.FLOOR: found[table.FLOOR]}, {table.SCRATCH: found[table.SCRATCH]}):
        assert report.render(Results(part))
    assert report.picture(Results({})) is None


def test_the_target_is_the_seed_s_own_and_a_miss_is_below_one(found):
    times = report.times_of(Results(found))
    assert times[0] == report.Times(11.0, 200.0, 100.0, 100.0)
    assert times[1][:2] == (15.0, 200.0)
    assert math.isnan(times[1].transfer)
    assert 2 not in times
    lines = report.render(Results(found))
    assert "| 0 | 11.0 | 200 | 100 | 2.00 | 100 | 1.00 |" in lines
    assert "| 1 | 15.0 | 200 | not reached | <1 | 100 | <1 |" in lines


def test_an_interval_holds_the_mean_and_widens_with_the_spread():
    narrow, wide = (report.interval([(10, 5 + d), (10, 5 - d)] * 4) for d in (1.0, 3.0))
    assert narrow.difference == wide.difference == 5.0
    assert wide.low < narrow.low < 5.0 < narrow.high < wide.high
    # The error of a mean of 8, three from it each: 1.96 * 3 / sqrt(8), about.
    np.testing.assert_allclose(wide.high - 5.0, 2.1, atol=0.4)
    assert report.interval([(30, 1.0), (10, 5.0)]).difference == 2.0


def test_the_best_trials_are_those_of_the_rows_or_the_report_says_so(found):
    results = {}
    for way in table.CHOSEN:
        for number, tuned in enumerate(table.TRIALS):
            f1 = {str(n): 30.0 + number + n / 100 for n in table.ANSWER_LENGTHS}
            results[table.trial_of(way, tuned)] = {0: {"step": 100, "f1": f1}}
    best = table.TRIALS[-1]
    assert report.best_trial(Results(results), table.SCRATCH) == best
    text = "\n".join(report.render(Results(results)))
    assert text.count("do not have the best of their trials") == sum(
        chosen != best for chosen in table.CHOSEN.values()
    )
    for way, chosen in table.CHOSEN.items():
        results[table.trial_of(way, chosen)][0]["f1"][str(table.ANSWER_LENGTH)] = 99.0
    text = "\n".join(report.render(Results(results)))
    assert "do not have the best" not in text
    assert "| from scratch | " in text
    assert report.best_trial(Results(found), table.SCRATCH) is None


@pytest.mark.slow
def test_a_tiny_table_from_start_to_end(request_, monkeypatch, own_cache):  # noqa: F811
    sizes = {"STEPS": 4, "EVERY": 2, "LANGUAGE_STEPS": 2, "WARMUP": 0, "LENGTH": 64, "ROWS": 4}
    few = {"LOG": 1, "TRIALS": table.TRIALS[:1], "ANSWER_LENGTHS": (3, 30)}
    for name, value in {**sizes, **few, "PIECES": "bytes"}.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(report, "TRIALS", table.TRIALS)
    monkeypatch.setattr(
        table, "model_of", lambda dropout: modern_mini(layers=2, width=32, heads=2, max_length=64)
    )
    gathered = Gathered({})
    request_ = dataclasses.replace(request_, seeds=1)
    complete([report.TABLE], request_, gathered)
    lines = report.render(gathered.results(report.TABLE.name))
    tables = [line for line in lines if line.startswith("| ")]
    assert len(tables) == (1 + 1 + len(table.WAYS)) + (1 + 1) + (1 + 2)
    assert sum(line.startswith("* ") for line in lines) == len(table.WAYS) + 2
