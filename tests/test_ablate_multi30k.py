"""The table of Multi30k: its cells, its text and picture, and a run of it at a small size."""

import gzip

import numpy as np
import pytest
from rich.console import Console

from experiments.ablate import transfer_multi30k as table
from experiments.grid import Measurement
from experiments.tables.gathered import Results
from experiments.tables.table import Request, run_item, values_of

PAIRS = [("a man sleeps", "ein Mann schläft"), ("two dogs run", "zwei Hunde laufen")] * 8


@pytest.fixture
def request_(tmp_path):
    for name in table.SPLITS.values():
        for side, texts in zip(("en", "de"), zip(*PAIRS, strict=True), strict=True):
            content = "".join(f"{text}\n" for text in texts).encode()
            (tmp_path / f"{name}.{side}.gz").write_bytes(gzip.compress(content))
    return Request(tmp_path / "cells", seeds=2, multi30k=tmp_path)


def test_every_seed_has_a_curve_and_all_searches_of_one_run(request_):
    items = table.cells(request_)
    assert len({item.key for item in items}) == len(items) == 2 * (1 + len(table.SEARCHES))
    assert len({item.needs[0].key for item in items}) == 2
    assert table.cells(Request()) == []
    assert "--multi30k" in table.notes(Request())[0]


def test_text_and_picture_come_from_results_alone():
    searched = {"chrf": 50.0, "length_ratio": 1.0, "log_p": -0.5, "sentences_per_second": 9.0}
    found = {
        name: {seed: {**searched, "bleu": 30.0 + beams, "signature": "tok:13a"} for seed in (0, 1)}
        for name, (beams, _) in table.SEARCHES.items()
    }
    rows = [{"step": n, "minutes": 30.0 * n, "loss": 1.0, "bleu": 10.0 * n} for n in (1, 2, 3)]
    took = {"evaluations": rows, "evaluation": 20.0, "cut": {"train": [3, 1200]}}
    found[table.TRAINED] = {0: {**took, "minutes": 90.0}, 1: {**took, "minutes": 130.0}}
    results = Results(found)
    text = "\n".join(table.render(results))
    assert "| 4 beams | 34.00 ± 0.00 |" in text
    assert "| +3.00 |" in text
    assert "| 0 | 70.0 | 20.0 | 30.00 | 3 of 1,200 |" in text
    # Greedy translations have 31 BLEU; one of two runs took longer than it had.
    assert "within 120 minutes: reached by 1 of 2 seeds. Greedy translations have 31.00" in text
    del found[table.TRAINED][1]
    assert "within 120 minutes: reached. " in "\n".join(table.render(Results(found)))
    found["greedy"][0]["bleu"] = 24.9
    assert "reached by 0 of 1 seeds" in "\n".join(table.render(Results(found)))
    assert table.picture(results) is not None
    assert table.picture(Results({})) is None
    assert table.render(Results({}))


def test_minutes_are_those_of_steps_and_evaluations_and_a_slow_spell_counts_little():
    def evaluation(number, **clock):
        figures = {"loss": 1.0, "bleu": 1.0, "chrf": 1.0}
        return {"kind": "evaluation", "step": number, "clock": clock, **figures}

    rows = [evaluation(10, step=60.0, evaluation=60.0), {"kind": "train", "step": 20}]
    rows += [evaluation(20, step=9000.0, evaluation=120.0)]
    rows += [evaluation(30, step=9060.0, evaluation=4000.0)]
    found = table.over_time(rows)
    assert [row["minutes"] for row in found["evaluations"]] == [2.0, 4.0, 6.0]
    assert (found["minutes"], found["evaluation"]) == (6.0, 3.0)


def test_log_p_a_token_takes_the_penalty_back():
    lengths, log_p = np.array([3, 9]), np.array([-2.0, -4.0])
    for alpha in (0.0, 0.6, 1.0):
        scores = log_p / ((5 + lengths) / 6) ** alpha
        outputs = {"score": scores, "translation_lengths": lengths}
        assert table.log_p_a_token(outputs, alpha) == pytest.approx(-0.5)


@pytest.mark.slow
def test_a_small_run_of_it_is_translated_by_every_search(request_, monkeypatch):
    sizes = {"STEPS": 2, "EVALUATE_EVERY": 1, "WARMUP": 0, "ROWS": 2, "LENGTH": 48}
    for name, value in {**sizes, "TOKENIZER": "bytes"}.items():
        monkeypatch.setattr(table, name, value)
    items = [item for item in table.cells(request_) if item.settings["seed"] == 0]
    for item in items[:3]:
        assert isinstance(item, Measurement)
        run_item(item, request_.cells, Console())
    curve, greedy, beams = (values_of(item, request_.cells)[0] for item in items[:3])
    assert [row["step"] for row in curve["evaluations"]] == [1, 2]
    assert curve["cut"] == {split: [0, len(PAIRS)] for split in table.SPLITS}
    assert curve["minutes"] > curve["evaluation"] > 0
    assert {"bleu", "signature"} <= set(greedy)
    assert greedy["log_p"] < 0
    assert beams["loss"] == greedy["loss"]  # of one model, whatever the search
