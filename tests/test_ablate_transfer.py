"""The tables of transfer: what their cells are, what is read off results, and a tiny run."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate import transfer_sst2_report as report
from experiments.grid import Cell
from experiments.tables.gathered import Gathered, Results
from experiments.tables.table import Request, complete
from model.presets import modern_mini
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.text.sources import open_source


@pytest.fixture
def request_(tmp_path):
    draw = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in sst2.FILES.values():
        labels = draw.integers(0, 2, 12)
        lines = [f"{n} {'good fine' if n else 'bad poor'} {draw.integers(9)} ." for n in labels]
        (folder / name).write_text("\n".join(["0 bad .", "1 good .", *lines]) + "\n")
    plays = tmp_path / "plays.txt"
    plays.write_text("To be, or not to be: that is the question. " * 40)
    return Request(tmp_path / "cells", seeds=1, sst2=folder, shakespeare=plays)


def test_pieces_are_learned_from_the_same_sentences_everywhere(request_):
    """A row that starts from the language model is given no tokenizer: it learns the same one."""
    items = sst2.cells(request_)
    (language,) = [item for item in items if item.name == sst2.LANGUAGE]
    texts = language.needs[0]
    texts.function(texts.settings)
    first, *_ = language.settings.data
    (full,) = [item.needs[0] for item in items if item.name == sst2.FULL]
    assert list(open_source(first).documents()) == list(full.settings.task.texts())


def test_rows_share_their_model_pieces_and_labels(request_, tmp_path):
    items = sst2.cells(request_)
    runs = {item.name: item.needs[0] for item in items if item.name != sst2.COSTS and item.needs}
    settings = {name: run.settings for name, run in runs.items() if isinstance(run, Cell)}
    (language,) = [item for item in items if item.name == sst2.LANGUAGE]
    for name in sst2.WAYS:
        made = settings[name]
        parent = None if name in (sst2.SCRATCH, sst2.BAG) else str(request_.cells / language.key)
        assert made.parent == parent
        assert made.task.labels == ("0", "1")
    few = settings["full, 1% of the labels"].task.files
    assert (few.share, few.share_seed) == (0.01, 0)
    assert len({item.key for item in items}) == len(items)
    # Where the files lie is no part of what a cell is, and what is in them is.
    moved = tmp_path / "moved"
    request_.sst2.rename(moved)
    elsewhere = dataclasses.replace(request_, sst2=moved)
    assert [item.key for item in sst2.cells(elsewhere)] == [item.key for item in items]
    with (moved / sst2.FILES["test"]).open("a") as file:
        file.write("1 more\n")
    same = {item.key for item in sst2.cells(elsewhere)} & {item.key for item in items}
    assert same == {item.key for item in items if item.name in (sst2.LANGUAGE, sst2.COSTS)}
    assert sst2.cells(Request()) == []


def results(**rows):
    def values(curve, accuracy):
        sizes = {"trained_parameters": 10, "gradient_bytes": 40, "optimizer_bytes": 80}
        return {"curve": curve, "test": {"accuracy": accuracy}, **sizes}

    found = {
        name: {seed: values(*each) for seed, each in enumerate(seeds)}
        for name, seeds in rows.items()
    }
    times = {name: {"seconds": 2.0, "bytes": 2**20} for name in (sst2.LANGUAGE, *sst2.WAYS)}
    return Results({**found, sst2.COSTS: {0: times}})


def test_the_ratio_of_times_is_paired_and_says_who_reached_the_target():
    scratch = [
        ([[100, 0.6], [200, 0.75], [300, 0.8]], 0.82),
        ([[100, 0.6], [200, 0.7], [300, 0.7]], 0.83),
    ]
    full = [([[100, 0.8], [200, 0.8], [300, 0.8]], 0.84), ([[100, 0.7], [200, 0.9]], 0.85)]
    found = results(**{sst2.SCRATCH: scratch, sst2.FULL: full})
    assert report.target_of(found) == pytest.approx(0.75)
    text = "\n".join(report.render(found))
    assert "From scratch: 1.5 points above the 81.0%" in text
    assert "from scratch over that of full fine-tuning: 2.00" in text  # 400 s over 200 s
    assert "both reach it: 1 of 2" in text
    assert "Full fine-tuning is +2.0 points" in text
    assert "1 of 2 | 400.0" in text
    assert math.isnan(report.steps_to([[1, 0.1]], 0.2))
    assert report.picture(results(**{sst2.SCRATCH: scratch})) is not None
    assert report.picture(Results()) is None


@pytest.mark.slow
def test_every_row_runs_at_tiny_size(request_, monkeypatch):
    for name, value in {
        "STEPS": 4,
        "EVERY": 2,
        "LANGUAGE_STEPS": 2,
        "LANGUAGE_ROWS": 2,
        "ROWS": 2,
        "LENGTH": 8,
        "RANKS": (1,),
        "WAYS": (sst2.SCRATCH, sst2.HEAD, "LoRA, rank 1", sst2.FULL),
        "SHARES": {0.1: 2, 1.0: 4},
        "REPEATS": 2,
        "PIECES": "bytes",
        "model_of": lambda dropout, length: modern_mini(
            layers=1, width=16, heads=2, dropout=dropout
        ),
    }.items():
        monkeypatch.setattr(sst2, name, value)
    gathered = Gathered({})
    complete(report.TABLES, request_, gathered)
    for table in report.TABLES:
        assert not gathered.missing(table.name)
        found = gathered.results(table.name)
        assert any(line.startswith("|") for line in table.render(found))
    values = found.by_name[sst2.HEAD][0]
    assert values["trained_parameters"] == 32
    assert values["optimizer_bytes"] < found.by_name[sst2.FULL][0]["optimizer_bytes"]
    costs = found.by_name[sst2.COSTS][0]
    assert costs[sst2.HEAD]["bytes"] < costs[sst2.FULL]["bytes"]
