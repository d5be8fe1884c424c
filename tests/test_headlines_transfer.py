"""The README's table of transfer: figures of paired seeds, or nothing before there are any."""

import json
import math

from experiments.headlines_transfer import sooner, transfer


def written(path, tables):
    """Writes results as the ablations do: table -> row -> values by seed."""
    content = {"machines": {}, "tables": {}, "cells": {}, "settings": {}}
    for table, rows in tables.items():
        for row, values in rows.items():
            keys = {str(seed): f"{table} {row} {seed}" for seed in values}
            content["tables"].setdefault(table, {})[row] = keys
            for seed, value in values.items():
                content["cells"][keys[str(seed)]] = {"values": value, "machine": ""}
    path.write_text(json.dumps(content))
    return path


def rows_of(text):
    cells = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
    return [row for row in cells if row and not row[0].startswith("---")][1:]


def squad_run(f1, curve):
    curve = [{"step": step, "f1": value} for step, value in curve]
    return {"test": {"f1": f1}, "curve": curve, "step": 1000, "step_seconds": 0.5}


LANGUAGE = {"step": 100, "step_seconds": 0.5}


def test_nothing_is_said_before_anything_is_measured(tmp_path):
    assert transfer(tmp_path / "none.json") == ""
    floor = {"sliding window": {0: {"f1": 20.0}}}
    assert transfer(written(tmp_path / "a.json", {"squad": floor})) == ""


def test_means_are_of_the_seeds_that_both_have(tmp_path):
    """Every seed has articles of its own: the third from scratch has nothing to stand beside."""
    scratch = {n: squad_run(30.0 + 10 * n, [(100, 20.0), (200, 35.0)]) for n in range(3)}
    start = {n: squad_run(f1, [(50, 40.0), (100, 45.0)]) for n, f1 in ((0, 38.0), (1, 44.0))}
    rows = {"from scratch": scratch, "from the language model": start}
    rows["language model"] = dict.fromkeys(range(3), LANGUAGE)
    rows["sliding window"] = {n: {"f1": 10.0 * n} for n in range(3)}
    (row,) = rows_of(transfer(written(tmp_path / "a.json", {"squad": rows})))
    assert row[1] == "F1 (a sliding window: 5.0 ± 7.1)"
    assert row[2:4] == ["35.0 ± 7.1", "41.0 ± 4.2"]
    assert row[4] == "+6.0, +3.0; 2 seeds"
    assert row[5:] == ["4.0 ± 0.0", "1.3 ± 0.0"]  # 200 steps to 50, and to 50 and 100


def test_a_start_that_never_gets_there_is_not_passed_over(tmp_path):
    scratch = {n: squad_run(30.0, [(200, 35.0)]) for n in range(2)}
    start = {0: squad_run(38.0, [(50, 40.0)]), 1: squad_run(20.0, [(50, 30.0)])}
    rows = {"from scratch": scratch, "from the language model": start}
    rows["language model"] = dict.fromkeys(range(2), LANGUAGE)
    text = transfer(written(tmp_path / "a.json", {"squad": rows}))
    assert rows_of(text)[0][5] == "<1, 4.0"
    assert "`<1` is a seed that never gets there" in text
    assert sooner([math.nan]) == "<1"


def test_translation_stands_beside_the_table(tmp_path):
    rows = {"greedy": {0: {"bleu": 30.0}, 1: {"bleu": 32.0}}, "4 beams": {0: {"bleu": 33.0}}}
    growth = {
        "twice the layers from scratch": {0: {"plays": {"token": 3.0}}},
        "grown to twice the layers": {0: {"plays": {"token": 2.0}}},
    }
    tables = {"multi30k": rows, "stories-growth": growth}
    text = transfer(written(tmp_path / "a.json", tables))
    assert "BLEU 31.0 ± 1.4 on test 2016 with greedy search, 33.0 with 4 beams (2 seeds)." in text
    (row,) = rows_of(text)
    assert row[2:] == ["3.000", "2.000", "-1.000, one seed", "", "not known"]
