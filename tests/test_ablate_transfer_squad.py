"""The table of SQuAD: its cells, the floor and the texts they rest on, what is read off results."""

import dataclasses
import json

import pytest

from experiments.ablate import transfer_squad as table
from experiments.grid import Cell
from experiments.tables.gathered import Gathered, Results
from experiments.tables.table import Request, complete
from experiments.tasks.squad_floor import floor_scores
from model.presets import modern_mini
from tests.squad_cases import colours, write_squad
from tests.test_run import own_cache  # noqa: F401 (fixture)


@pytest.fixture
def request_(tmp_path):
    path = write_squad(tmp_path / "a.json", [colours(seed, 1) for seed in range(20)])
    return Request(tmp_path / "cells", seeds=2, squad=path)


def test_rows_share_their_model_and_texts(request_, tmp_path):
    items = table.cells(request_)
    assert [item.name for item in items] == [table.FLOOR] + 2 * [table.LANGUAGE, *table.WAYS]
    assert len({item.key for item in items}) == len(items)
    runs = [item.needs[0] for item in items if item.name in table.WAYS]
    assert all(isinstance(run, Cell) for run in runs)
    parents = [item for item in items if item.name == table.LANGUAGE]
    of_seed = [[None, None, str(request_.cells / parent.key)] for parent in parents]
    assert [run.settings.parent for run in runs] == [*of_seed[0], *of_seed[1]]
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


def test_the_language_model_sees_no_held_out_article(request_):
    language = next(item for item in table.cells(request_) if item.name == table.LANGUAGE)
    texts = language.needs[0]
    assert texts.function(texts.settings) == {"documents": 17}
    (path,) = (request_.cells / texts.key).iterdir()
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    task = table.task_of(request_.squad)
    held_out = {q.paragraph for split in ("valid", "test") for q in task.questions(split)[0]}
    assert len(held_out) == 3
    assert not any(paragraph in line for paragraph in held_out for line in lines)
    first = task.questions("train")[0][0]
    assert any(first.text in line and line.endswith(first.paragraph) for line in lines)


def test_the_floor_is_that_of_the_test_articles(request_):
    (floor,) = [item for item in table.cells(request_) if item.name == table.FLOOR]
    task = table.task_of(request_.squad)
    questions, _ = task.questions("test")
    found = floor.function(floor.settings)
    assert found == {**floor_scores(questions), "questions": len(questions)}


def curve(f1):
    """Two thirds of it at first, then one point less."""
    return [{"step": 200, "f1": f1 / 1.5}, {"step": 400, "f1": f1 - 1}]


def test_figures_are_set_against_the_floor_and_paired():
    def values(f1):
        test = {"exact_match": f1 / 2, "f1": f1, "loss": 2.0, "representable": 95.0}
        return {"test": test, "step": 400, "curve": curve(f1)}

    found = Results(
        {
            table.FLOOR: {0: {"exact_match": 13.0, "f1": 23.0}},
            table.SCRATCH: {0: values(12.0), 1: values(16.0)},
            table.TRANSFER: {0: values(26.0), 1: values(28.0), 2: values(90.0)},
        }
    )
    text = "\n".join(table.render(found))
    assert "From scratch, words marked: -6.0 exact match and -9.0 F1" in text
    assert "From the language model, words marked: +11.0 exact match and +25.0 F1" in text
    assert "The language model adds +13.0 F1, in standard errors +13.0" in text  # of shared seeds
    # Scratch ends at 11 and 15, 13 in the mean, which its second seed alone reaches.
    assert "Steps to 13.0 F1" in text
    assert "from the language model: 2.00 (seeds in which both reach it: 1 of 2" in text
    assert table.picture(found) is not None
    for part in (
        {},
        {table.FLOOR: found.by_name[table.FLOOR]},
        {table.SCRATCH: found.by_name[table.SCRATCH]},
    ):
        assert table.render(Results(part))
    assert table.picture(Results({})) is None


@pytest.mark.slow
def test_a_tiny_table_from_start_to_end(request_, monkeypatch, own_cache):  # noqa: F811
    sizes = {"STEPS": 4, "EVERY": 2, "LANGUAGE_STEPS": 2, "WARMUP": 0, "LENGTH": 64, "ROWS": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(table, "PIECES", "bytes")
    tiny = modern_mini(layers=2, width=32, heads=2, max_length=64)
    monkeypatch.setattr(table, "model_of", lambda: tiny)
    gathered = Gathered({})
    request_ = dataclasses.replace(request_, seeds=1)
    complete([table.TABLE], request_, gathered)
    lines = table.render(gathered.results(table.TABLE.name))
    assert sum(line.startswith("| ") for line in lines) == 1 + 1 + len(table.WAYS)
    assert sum(line.startswith("* ") for line in lines) == len(table.WAYS) + 3
