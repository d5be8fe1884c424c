"""The tables of stories260K: their cells and texts, what is read off results, and a tiny run."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.ablate import transfer_stories as stories
from experiments.ablate import transfer_stories_report as report
from experiments.ablate import transfer_stories_tuning as tuning
from experiments.ablate.subjects import STORIES_FILES
from experiments.tables.gathered import Gathered, Results
from experiments.tables.table import Request, complete
from tests import test_llama2c
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.corpus import build_corpus
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer


@pytest.fixture
def request_(tmp_path, monkeypatch):
    """A tiny model in the foreign format, with drawn numbers, and a play of many speeches."""
    for name, value in {"VOCABULARY": 260, "POSITIONS": 16}.items():
        monkeypatch.setattr(test_llama2c, name, value)
    for name, value in {
        "ROWS": 2,
        "LENGTH": 8,
        "STEPS": 4,
        "EVERY": 2,
        "BLOCK": 40,
        "STORY": 12,
        "STORIES": 6,
        "HELD_OUT": 3,
        "REPEATS": 2,
    }.items():
        monkeypatch.setattr(stories, name, value)
    folder = tmp_path / "stories"
    folder.mkdir()
    tensors = test_llama2c.tensors_of(np.random.default_rng(0), True)
    test_llama2c.write(folder / STORIES_FILES[0], tensors, True)
    (folder / STORIES_FILES[1]).write_bytes(test_llama2c.vocabulary(["ab"]))
    plays = tmp_path / "plays.txt"
    lines = (f"FIRST {n}:\nThou art the {n}th of them.\n\n" for n in range(40))
    plays.write_text("".join(lines) + "THE END")
    return Request(tmp_path / "cells", seeds=1, stories=folder, shakespeare=plays)


def test_rows_share_their_texts_and_start(request_, tmp_path):
    items = stories.cells(request_)
    runs = {item.name: item.needs[0].settings for item in items if item.name in stories.WAYS}
    assert list(runs) == list(stories.WAYS)
    assert len({item.key for item in items}) == len(items)
    for name, settings in runs.items():
        way = stories.WAYS[name]
        assert (settings.parent is None) == way.scratch
        assert settings.tokenizer.endswith("/tokenizer")
        assert len(settings.data) == (2 if way.replay else 1)
        assert settings.phases[0].model.layers == (4 if way.deeper else 2)
    (old,) = {settings.data[1] for settings in runs.values() if len(settings.data) == 2}
    (new,) = {s.data[0].removeprefix("9*") for s in runs.values()}
    assert f"1*{new}" != old
    assert runs[stories.GROWN].phases == runs[stories.SCRATCH].phases
    # Where files lie is no part of what a cell is; what is in them, and the share, is.
    plays = request_.shakespeare.rename(tmp_path / "moved.txt")
    elsewhere = dataclasses.replace(request_, shakespeare=plays, cells=tmp_path / "a" / "cells")
    assert [item.key for item in stories.cells(elsewhere)] == [item.key for item in items]
    plays.write_text(plays.read_text() + "\n")
    assert not {item.key for item in stories.cells(elsewhere)} & {
        item.key for item in items if item.name != stories.COSTS
    }
    assert stories.cells(Request()) == []
    with pytest.raises(ValueError, match=r"lacks stories260K\.bin and tok512\.bin"):
        stories.cells(dataclasses.replace(request_, stories=tmp_path))
    assert "--shakespeare" in report.TABLES[0].notes(Request())[0]


def test_a_share_of_old_text_is_part_of_what_a_cell_is(request_):
    cell = next(i.needs[0] for i in stories.cells(request_) if i.name == stories.FULL_REPLAY)
    new, old = cell.settings.data
    data = (new.replace("9*", "5*"), old)
    half = dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, data=data))
    assert half.key != cell.key


def test_the_last_tenth_is_not_trained_on(request_):
    text = request_.shakespeare.read_text()
    end = stories.last_tenth(request_.shakespeare)
    assert text.endswith(end)
    assert len(text) // 10 <= len(end) <= len(text) // 10 + 40
    item = next(i for i in stories.cells(request_) if i.name == stories.FULL)
    plays = next(n for n in item.needs[0].needs if n.name == "plays")
    plays.function(plays.settings)
    documents = list(open_source(item.needs[0].settings.data[0]).documents())
    assert " ".join(documents).split() == text.removesuffix(end).split()
    assert all(len(document) >= stories.BLOCK for document in documents[:-1])


def results():
    def values(plays, told, curve=()):
        text = {"tokens": 10.0}
        both = {
            "plays": {"token": plays, "byte": plays / 2, **text},
            "stories": {"token": told, "byte": told / 2, **text},
        }
        return {**both, "trained_parameters": 10, "curve": [list(pair) for pair in curve]}

    fast = [[2, 3.0], [4, 2.0], [6, 1.9], [8, 1.8]]
    slow = [[2, 5.0], [4, 4.0], [6, 3.0], [8, 2.5]]
    never = [[2, 5.0], [4, 4.0], [6, 3.0], [8, 2.6]]
    costs = {"seconds": 2.0, "ratio": 1.3, "bytes": 2**20}
    return Results(
        {
            stories.BEFORE: {0: values(5.0, 1.0), 1: values(5.0, 1.2)},
            stories.LORA: {0: values(3.0, 2.0), 1: values(3.2, 2.4)},
            stories.LORA_REPLAY: {0: values(3.1, 1.5), 1: values(3.3, 1.5)},
            stories.FULL: {0: values(2.5, 3.0, never), 1: values(2.5, 3.0, fast)},
            stories.GROWN: {0: values(2.4, 3.0, fast), 1: values(2.2, 3.0, fast)},
            stories.SCRATCH: {0: values(3.4, 9.0, slow), 1: values(3.4, 9.0, slow)},
            stories.GROWTH: {
                0: {"greatest difference": 2e-4, "greatest logit": 20.0, "parameters": [10, 20]}
            },
            stories.COSTS: {
                0: {
                    stories.LORA: costs,
                    stories.FULL: {**costs, "seconds": 1.0},
                    stories.GROWN: costs,
                    stories.SCRATCH: costs,
                }
            },
        }
    )


def test_forgetting_is_paired_with_the_start_of_the_same_seed():
    text = "\n".join(report.render(results()))
    line = next(line for line in text.splitlines() if line.startswith(f"| {stories.LORA} |"))
    assert line.endswith("| 1.100 ± 0.141 |")  # 1.0 and 1.2
    assert (
        f"| {stories.LORA} forgets more: loss on stories > {stories.LORA_REPLAY} | 2 of 2" in text
    )
    assert "+0.700 | +3.5" in text
    assert "takes 1.30 times as long" in text
    assert report.picture(results()) is not None
    assert report.picture(Results()) is None


def test_the_ratio_is_of_seconds_to_where_scratch_ends():
    text = "\n".join(report.render_growth(results()))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows[stories.GROWN].endswith("| 4 ± 0 | 2 of 2 | 8.0 ± 0.0 | 2.0 ± 0.0 |")
    assert rows[stories.SCRATCH].endswith("| 8 ± 0 | 2 of 2 | 16.0 ± 0.0 | 1.0 ± 0.0 |")
    assert rows["not grown (full)"].endswith("| 4 | 1 of 2 | 4.0 | 4.0 |")
    assert "at most 2.0e-04 (the greatest is 20.0), NOT within 0.0001" in text
    assert "-0.200 nats a token at the end" in text
    assert report.picture_growth(results()) is not None
    assert report.picture_growth(Results()) is None
    assert math.isnan(report.steps_to([], 1.0))
    for render in (report.render, report.render_growth):
        assert render(Results())  # any row may be missing


def test_every_way_has_as_many_trials_and_tables_use_one_of_them():
    for way in tuning.ADAMW_RATES:
        trials = tuning.trials(way)
        assert len(trials) == 7
        assert stories.WAYS[way].optimizer in trials.values()
    replays = {stories.LORA_REPLAY: stories.LORA, stories.FULL_REPLAY: stories.FULL}
    assert {*tuning.ADAMW_RATES, *replays} == {*stories.WAYS}
    for replay, way in replays.items():
        assert stories.WAYS[replay].optimizer == stories.WAYS[way].optimizer


def test_trials_say_when_another_than_the_best_is_used():
    made = tuning.trials(stories.FULL)
    used = next(name for name in made if made[name] == stories.WAYS[stories.FULL].optimizer)
    order = sorted(made, key=lambda name: name == used)  # what is used comes last
    found = {name: {tuning.SEED: {"loss": 2.0 + number}} for number, name in enumerate(order)}
    best, *_, last = order
    text = "\n".join(tuning.render(Results(found)))
    shown = (name.removeprefix(f"{stories.FULL}, ") for name in (best, used))
    assert f"| {' | '.join(shown)} |" in text
    assert "Not the best of these trials is what is used of: full." in text
    assert len(found) == 7
    assert all(f"| {2 + n}.000 " in text for n in range(7))
    del found[last]
    assert "Not the best" not in "\n".join(tuning.render(Results(found)))  # not all are there


@pytest.mark.slow
def test_every_trial_runs_at_tiny_size(request_):
    gathered = Gathered({})
    complete((tuning.TABLE,), request_, gathered)
    found = gathered.results(tuning.TABLE.name)
    assert len(found.by_name) == 28
    assert len({row[tuning.SEED]["loss"] for row in found.by_name.values()}) == 28


@pytest.mark.slow
def test_every_row_runs_at_tiny_size(request_):
    gathered = Gathered({})
    complete(report.TABLES, request_, gathered)
    for table in report.TABLES:
        assert not gathered.missing(table.name)
        found = gathered.results(table.name)
        assert any(line.startswith("|") for line in table.render(found))
        assert table.picture(found) is not None
    row = {name: found.by_name[name][0] for name in found.by_name}
    assert row[stories.GROWTH]["greatest difference"] <= report.TOLERANCE
    small, large = row[stories.GROWTH]["parameters"]
    assert row[stories.FULL]["trained_parameters"] == small
    assert row[stories.GROWN]["trained_parameters"] == large
    assert row[stories.LORA]["trained_parameters"] < small
    assert [step for step, _ in row[stories.SCRATCH]["curve"]] == [2, 4]
    end = stories.last_tenth(request_.shakespeare)
    for name in (stories.BEFORE, *stories.WAYS):
        plays, told = (row[name][text] for text in ("plays", "stories"))
        nats, size = plays["token"] * plays["tokens"], len(end.encode())
        assert plays["byte"] == pytest.approx(nats / size, rel=1e-5)
        assert told["byte"] == pytest.approx(told["token"], rel=0.2)  # most ids are bytes
        assert told["tokens"] == 3 * 12
    cell = next(i for i in stories.cells(request_) if i.name == stories.FULL_REPLAY).needs[0]
    old = cell.settings.data[1].removeprefix("1*")
    pieces = load_tokenizer(request_.stories / STORIES_FILES[1])
    corpus = build_corpus(open_source(old), pieces)
    tokens = np.concatenate([split.tokens for split in corpus.splits.values()])
    assert len(tokens) == 6 * 13
    held_out = np.load(f"{old}/held_out.npy")
    assert not any(row.tobytes() in tokens.astype(np.int32).tobytes() for row in held_out[:, 1:])
