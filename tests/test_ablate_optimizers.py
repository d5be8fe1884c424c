"""The optimizers' table: own rates, alike trials, figures from the results alone."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from experiments.ablate import optimizers
from experiments.ablate import rates as topic
from experiments.ablate.optimizers import CLASSIC, COSTS, MISSION, NAMES, cells, trials
from experiments.grid import Cell
from experiments.tables.gathered import Gathered, Results
from experiments.tables.table import Request, complete
from model.flops import parameter_count
from model.presets import modern_tiny
from train.optimizers import OPTIMIZERS
from train.optimizers.table import RATE_GRIDS, VARIANTS
from train.schedules import InverseTime, Linear
from train.tokenizers.tokenizer import load_tokenizer


def test_every_optimizer_stands_in_the_table_and_the_missions_first():
    assert NAMES[:4] == MISSION == (CLASSIC, "adam", "adamw", "adamax")
    assert set(NAMES) == {CLASSIC, *OPTIMIZERS, *VARIANTS}


def test_what_is_exchanged_in_an_optimizer_is_a_row_of_its_own():
    changes = {
        "muon, Polar Express": {"newton_schulz_coefficients": "polar_express"},
        "muon, cautious decay": {"cautious_decay": True},
        "adamw, cautious steps": {"cautious": True},
        "adamw, tail average": {"tail_fraction": 0.2},
    }
    assert set(changes) == set(VARIANTS)
    for name, change in changes.items():
        own, plain = trials(name), trials(name.split(", ")[0])
        for one, other in zip(own, plain, strict=True):
            optimizer = dataclasses.replace(other.settings.optimizer, **change)
            assert one.settings == dataclasses.replace(other.settings, optimizer=optimizer)
            assert one.key != other.key


def test_trials_differ_in_their_rate_alone():
    for name in (CLASSIC, "adamw", "muon", "prodigy"):
        tried = trials(name)
        settings = [cell.settings for cell in tried]
        rates = [s.optimizer.learning_rate for s in settings]
        assert tuple(rates) == RATE_GRIDS["sgd" if name == CLASSIC else name]
        assert len({cell.key for cell in tried}) == 5
        assert len({dataclasses.replace(s, optimizer=settings[0].optimizer) for s in settings}) == 1
    classic, plain = (trials(name)[0].settings for name in (CLASSIC, "adamw"))
    assert type(classic.schedule) is InverseTime
    assert type(plain.schedule) is Linear
    assert (classic.optimizer.momentum, classic.optimizer.weight_decay) == (0.9, 1e-4)


def test_no_seed_of_the_table_was_tuned_on():
    items = cells(Request(seeds=5))
    seeds = {item.settings["seed"] for item in items if item.name != COSTS}
    assert seeds == set(range(5))
    tuned = {cell.settings.seed for item in items for cell in item.needs}
    assert tuned == {optimizers.TUNING_SEED}
    assert not seeds & tuned
    assert len({item.key for item in items}) == len(items)


def test_a_run_is_made_at_the_best_rate_that_did_not_diverge(tmp_path, monkeypatch):
    losses = {"0.0005": 3.0, "0.001": 2.5, "0.002": 2.75, "0.004": "nan", "0.008": 9.0}
    ran = []

    def write(cell, folder, loss):
        out = folder / cell.key
        load_tokenizer("bytes").save(out / "tokenizer")
        row = {"kind": "evaluation", "step": 300, "loss": loss, "bits_per_byte": 1.0}
        (out / "metrics.jsonl").write_text(json.dumps({**row, "seconds": 1.0}) + "\n")
        result = {"reason": "finished", "step": 300, "seconds": {}}
        (out / "result.json").write_text(json.dumps(result))

    def fake(some, folder, *, execution):
        (cell,) = some
        ran.append(cell.settings)
        write(cell, folder, 2.0)
        return [optimizers.read_result(cell, folder)]

    for cell in trials("adamw"):
        write(cell, tmp_path, losses[f"{cell.settings.optimizer.learning_rate:g}"])
    monkeypatch.setattr(optimizers, "run_cells", fake)
    of_table = next(item for item in cells(Request(seeds=3)) if item.name == "adamw")
    about = {**of_table.settings, "seed": 2}
    found = optimizers.tuned_run(tmp_path, about)
    assert (ran[0].optimizer.learning_rate, ran[0].seed) == (0.001, 2)
    assert ran[0].held_out == "validation"  # the test split is for recipes that are chosen
    assert len(ran) == 1  # the best is at neither end
    assert (found["rate"], found["loss"]) == (0.001, 2.0)
    assert [loss for _, loss in found["tried"]][:3] == [3.0, 2.5, 2.75]


def test_rates_beyond_an_end_are_tried_as_long_as_they_are_better():
    for true, rates in ((0.25, [0.2, 0.4]), (0.008, [0.025, 0.0125, 0.00625]), (9.0, None)):
        tried = {rate: math.log(rate / true) ** 2 for rate in (0.05, 0.1)}
        added = []
        while (rate := optimizers.further_rate(tried, 2 + 3)) is not None:
            added.append(rate)
            tried[rate] = math.log(rate / true) ** 2
        assert added == (rates or [0.2, 0.4, 0.8])
    assert optimizers.further_rate({0.1: math.nan, 0.2: math.nan}, 3) == 0.05


def test_bytes_of_the_state_are_those_of_the_moments():
    model = dataclasses.replace(optimizers.MODEL, vocabulary_size=257)
    size = parameter_count(model)
    expected = {"adamw": 8, "adam": 8, CLASSIC: 4, "lion": 4}
    for name, number in expected.items():
        settings = optimizers.settings_at(name, 1e-3, 0)
        parameters, state = optimizers.state_bytes(settings, 257)
        assert parameters == size
        assert number * size <= state <= number * size + 64, name
    _, muon = optimizers.state_bytes(optimizers.settings_at("muon", 1e-2, 0), 257)
    assert 4 * size < muon < 8 * size


def run(loss, curve, rate=0.002, state=800, reason="finished", beyond=()):
    return {
        "rate": rate,
        "tried": [[0.001, 4.0], [0.002, 3.0], [0.032, 3.0], *beyond],
        "loss": loss,
        "bits per byte": loss / 2 if math.isfinite(loss) else math.nan,
        "evaluations": [{"step": step, "loss": value} for step, value in curve],
        "parameters": 100,
        "state bytes": state,
        "reason": reason,
    }


RESULTS = Results(
    {
        "adamw": {
            0: run(2.0, [(150, 3.0), (300, 2.0)]),
            1: run(2.2, [(150, 3.0), (300, 2.2)]),
        },
        "muon": {
            0: run(1.5, [(150, 2.1), (300, 1.5)], 0.064, 500, beyond=[[0.064, 2.9]]),
            1: run(1.7, [(150, 2.1), (300, 1.7)], 0.064, 500, beyond=[[0.064, 2.9]]),
        },
        "lion": {0: run(math.nan, [(150, 3.0)], rate=0.001, reason="nonfinite")},
        "adam": {
            0: run(2.0, [(150, 2.2), (300, 2.0)]),
            1: run(2.2, [(150, 3.0), (300, 2.2)]),
        },
        COSTS: {
            0: {
                "steps": {
                    "adamw": {"ratio": 1.0, "seconds": 0.01},
                    "muon": {"ratio": 1.5, "seconds": 0.015},
                    "adam": {"ratio": 0.5, "seconds": 0.005},
                }
            }
        },
    }
)


def test_the_table_is_sorted_by_loss_and_counts_to_adamws():
    lines = [line for line in optimizers.render(RESULTS) if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [each[0] for each in rows[1:]] == ["muon", "**adamw**", "**adam**", "lion"]
    muon, adamw, adam, lion = rows[1:]
    # AdamW ends at 2.1 in the mean, which it takes all 300 steps for and muon 150
    assert muon[1:] == [
        *("0.064 ↑", "4", "1.600 ± 0.141", "0.800 ± 0.071", "150"),
        *("15.0", "2.2", "1.50x", "1.33x", "5.0", "finished"),
    ]
    assert adamw[2] == "3"
    assert adamw[5:10] == ["300", "10.0", "3.0", "1.00x", "1.00x"]
    # a seed of another that missed it would have taken more than all 300, 225 being the first's
    assert adam[5:10] == ["> 262 (1 of 2)", "5.0", "> 1.3", "0.50x", "< 2.29x"]
    assert (lion[5], lion[-1]) == ("not reached", "nonfinite")
    assert optimizers.picture(RESULTS) is not None
    assert optimizers.picture(Results()) is None


def test_rows_that_are_asked_for_run_with_their_trials_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "experiments.tables.table.run_item", lambda item, *rest: asked.append(item.name)
    )
    monkeypatch.setattr(
        "experiments.tables.table.values_of",
        lambda item, folder: ({}, {}) if item.name in asked else None,
    )
    request = Request(tmp_path, seeds=1, rows=("adam",))
    complete(optimizers.TABLES, request, Gathered({}))
    assert asked == ["adam", *(f"adam at {rate:g}" for rate in RATE_GRIDS["adam"])]
    with pytest.raises(ValueError, match=r"no row is called 'ada'; there are .*adam"):
        complete(optimizers.TABLES, Request(tmp_path, rows=("ada",)), Gathered({}))


def test_the_best_rate_is_read_off_a_parabola():
    rates = [2.0**n for n in range(-9, -3)]
    for true in (0.006, 0.011):
        losses = {rate: (math.log(rate) - math.log(true)) ** 2 for rate in rates}
        assert topic.best_rate(losses) == pytest.approx(true)
    assert topic.best_rate({0.1: math.nan, 0.2: 1.0, 0.4: 2.0}) == 0.2
    assert math.isnan(topic.best_rate({0.1: math.nan}))


def test_ways_differ_in_mup_alone_and_the_base_is_the_width_that_the_rate_is_tuned_at():
    assert (topic.TUNED, topic.WIDE) == (128, 512)
    for width in topic.WIDTHS:
        by_way = {way: topic.settings_at(width, 0.01, way, 0) for way in topic.WAYS}
        assert dataclasses.replace(by_way["muP"], mup=None) == by_way["standard"]
        (phase,) = by_way["muP"].phases
        rates, scales = by_way["muP"].mup.rules(phase.model, by_way["muP"].optimizer)
        assert dict(rates)["blocks/.*/kernel"] == 128 / width
        assert ({factor for _, factor in (*rates, *scales)} == {1.0}) == (width == 128)
    assert {128, 512} <= set(topic.WIDTHS)


def test_the_table_of_widths_says_how_far_the_best_rate_wanders():
    found = {}
    for way, factor in (("standard", 4.0), ("muP", 1.0)):
        for number, width in enumerate(topic.WIDTHS):
            best = 0.03 / factor ** (number / 3)
            for rate in topic.RATES:
                loss = 2 + math.log(rate / best) ** 2
                found[f"{way}, width {width}, rate {rate:.4g}"] = {0: {"loss": loss}}
    results = Results(found)
    lines = topic.render(results)
    assert any(re.match(r"\| standard \| 4\.00x \| 0\.40x", line) for line in lines)
    assert any(re.match(r"\| muP \| 1\.00x \| 1\.00x \| 0\.0", line) for line in lines)
    assert "lost at most by the best rate of width 128" in "\n".join(lines)
    few = {name: seeds for name, seeds in found.items() if "width 64" in name}
    assert topic.render(Results(few))[-1].startswith("| muP | 1.00x |  |  |")
    assert topic.picture(results) is not None
    assert len({cell.key for cell in topic.cells(Request(seeds=2))}) == 2 * 2 * 4 * 8


@pytest.mark.slow
def test_both_topics_run_at_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "texts"
    text.mkdir()
    draw = np.random.default_rng(0)
    for number in range(100):  # enough documents for each split to have some
        (text / f"{number}.txt").write_text("".join(chr(97 + c) for c in draw.integers(0, 6, 400)))
    for module in (optimizers, topic):
        monkeypatch.setattr(module, "DATA", (str(text),))
        monkeypatch.setattr(module, "TOKENIZER", "bytes")
        monkeypatch.setattr(module, "STEPS", 12)
        monkeypatch.setattr(module, "ROWS", 4)
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(optimizers, "WARMUP", 2)
    monkeypatch.setattr(optimizers, "VOCABULARY", 257)
    monkeypatch.setattr(optimizers, "NAMES", (CLASSIC, "adamw", "adamw, tail average"))
    monkeypatch.setattr(optimizers, "MODEL", modern_tiny(layers=1, max_length=16))
    monkeypatch.setattr(topic, "WIDTHS", (16, 32))
    monkeypatch.setattr(topic, "TUNED", 32)
    monkeypatch.setattr(topic, "HEAD", 16)
    monkeypatch.setattr(topic, "RATES", (0.01, 0.1))
    for module in (optimizers, topic):
        gathered = Gathered({})
        complete(module.TABLES, Request(tmp_path / "cells", seeds=1), gathered)
        for table in module.TABLES:
            results = gathered.results(table.name)
            assert not gathered.missing(table.name)
            assert sum(line.startswith("|") for line in table.render(results)) > 2
            if table.picture:
                table.picture(results).savefig(tmp_path / "picture.png")
    losses = gathered.results("widths").by_name
    for rate in ("0.01", "0.1"):  # at the base width both ways are one run
        by_width = {
            width: [losses[f"{way}, width {width}, rate {rate}"][0]["loss"] for way in topic.WAYS]
            for width in (16, 32)
        }
        assert by_width[32][0] == by_width[32][1]
        assert by_width[16][0] != by_width[16][1]
    assert isinstance(topic.cells(Request())[0], Cell)
