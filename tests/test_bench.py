"""The bench: its arithmetic, its protocol over pipes, and every table at a tiny size."""

import io
import itertools
import json
import math
from dataclasses import replace

import pytest

from experiments.bench import __main__ as bench
from experiments.bench import child, decode, growth, start, tokenise, train_step
from experiments.bench.child import Subject, serve
from experiments.bench.ratios import exponent, farthest, order, ratio
from experiments.bench.shapes import (
    SHAPES,
    Shape,
    baseline_of,
    batches_of,
    shape_from_json,
    shape_to_json,
)
from experiments.bench.sides import Side, interleaved
from experiments.bench.table import Table
from experiments.grid import Measured, Measurement
from model.flops import parameter_count
from model.presets import gpt2_tiny

TINY = Shape(gpt2_tiny(dropout=0.0), 2, 16)
MACHINE = {"processor": "one", "cores": 2}


def measured(settings, values, name="row"):
    return Measured(Measurement(name, settings, dict), values, 1.0, MACHINE)


def test_a_table_for_a_gpu_is_measured_where_it_is_named_alone():
    assert "train-124m-cuda" not in bench.chosen([], bench.TABLES)
    assert bench.chosen(["train-124m-cuda"], bench.TABLES) == ["train-124m-cuda"]
    shape = SHAPES["124m-cuda"]
    assert shape_from_json(json.loads(json.dumps(shape_to_json(shape)))) == shape
    assert baseline_of(shape, "compile").precision == "bfloat16"
    assert baseline_of(shape, "compile").device == "cuda"


def test_the_sizes_are_those_that_are_claimed():
    counts = {name: parameter_count(shape.model) / 1e6 for name, shape in SHAPES.items()}
    assert counts["3m"] == pytest.approx(3, rel=0.1)
    assert counts["12m"] == pytest.approx(12, rel=0.05)
    assert counts["124m"] == pytest.approx(124.4, rel=0.001)
    assert {shape.model.dropout for shape in SHAPES.values()} == {0.0}


def test_ratios_are_of_rounds_and_name_their_spread():
    found = ratio([1.0, 1.0, 2.0, 1.0, 1.0], [1.2, 1.0, 3.0, 9.0, 0.5])
    assert found == (1.2, 1.0, 1.5, 5)
    assert str(found) == "1.20x (1.00 to 1.50)"
    for ours, theirs in (([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="are no pairs"):
            ratio(ours, theirs)


@pytest.mark.parametrize("count", [2, 3])
def test_every_side_has_every_place_and_follows_every_other_equally_often(count):
    names = "abc"[:count]
    rounds = [order(names, round_) for round_ in range(2 * count)]
    assert all(sorted(each) == list(names) for each in rounds)
    places = {name: sorted(each.index(name) for each in rounds) for name in names}
    assert set(map(tuple, places.values())) == {tuple(sorted([*range(count)] * 2))}
    after = [(a, b) for each in rounds for a, b in itertools.pairwise(each)]
    assert len({after.count((a, b)) for a in names for b in names if a != b}) == 1


def test_slopes_and_distances():
    assert exponent([1, 10, 100], [2, 2e3, 2e6]) == pytest.approx(3)
    for sizes, costs, says in (([2, 2], [1, 1], "two sizes"), ([1, 2], [0, 1], "above 0")):
        with pytest.raises(ValueError, match=says):
            exponent(sizes, costs)
    assert farthest({"a": [1.0, 5.0], "b": [1.25, 9.0]}, steps=1) == 0.25


def test_a_child_answers_line_by_line_and_says_what_failed(monkeypatch):
    monkeypatch.setitem(child.SUBJECTS, "sum", (__name__, "summing"))
    asked = [
        {"subject": "sum", "settings": {"from": 10}},
        {"ask": "add", "arguments": {"number": 5}},
        {"ask": "add", "arguments": {"number": "five"}},
        {"ask": "add", "arguments": {"number": 1}},
    ]
    lines = io.StringIO("".join(json.dumps(message) + "\n" for message in asked))
    written = []
    serve(lines.readline, written.append)
    answers = [json.loads(text) for text in written]
    assert answers[0] == {"answer": {"total": 10}}
    assert answers[1] == {"answer": 15}
    assert "TypeError" in answers[2]["error"]
    assert answers[3] == {"answer": 16}


def summing(settings):
    total = settings["from"]

    def add(number):
        nonlocal total
        total += number
        return total

    return Subject({"total": total}, {"add": add})


class Recorded:
    """A side that notes when it was asked."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def ask(self, what, **arguments):
        self.log.append((self.name, what, arguments["n"]))
        return len(self.log)


def test_sides_are_asked_the_same_questions_in_turn(monkeypatch):
    monkeypatch.setattr("experiments.bench.sides.REST", 0)
    log = []
    sides = {name: Recorded(name, log) for name in ("a", "b")}
    found = interleaved(sides, 2, "time", [{"n": 1}, {"n": 2}])
    assert [(name, n) for name, _, n in log] == [
        *(("a", 1), ("a", 2), ("b", 1), ("b", 2)),
        *(("b", 1), ("b", 2), ("a", 1), ("a", 2)),
    ]
    assert found == {"a": [[1, 7], [2, 8]], "b": [[3, 5], [4, 6]]}


FACTS = {"parameters": 100, "flops_per_token": 600.0}


def test_sides_that_do_not_do_equal_work_are_refused():
    sides = (train_step.JAX, train_step.EAGER)
    train_step.audit(dict.fromkeys(sides, FACTS))
    for change in ({"parameters": 101}, {"flops_per_token": 601.0}):
        facts = {train_step.JAX: FACTS, train_step.EAGER: FACTS | change}
        with pytest.raises(ValueError, match=f"differ in {next(iter(change))}"):
            train_step.audit(facts)


@pytest.mark.parametrize("other", [[3.02], [math.nan]])
def test_sides_whose_losses_part_have_no_ratio(other):
    (measurement,) = train_step.train_table("3m").measurements
    values = training_values()
    values["losses"][train_step.EAGER] = other
    found = Measured(measurement, values, 1.0, {})
    assert train_step.ratio_where_equal(found, train_step.EAGER).startswith("none: losses part")
    assert train_step.ratio_where_equal(found, train_step.COMPILE).startswith("0.50")


def training_values():
    seconds = {"ours": [1.0, 1.0], "torch eager": [2.0, 3.0], "torch.compile": [0.5, 0.5]}
    memory = {name: {"before": 10, "peak": 10 + 10 * n} for n, name in enumerate(seconds, 1)}
    return {
        "seconds": seconds,
        "losses": {name: [3.0] for name in seconds},
        "facts": {name: {"parameters": 3_000_000, "flops_per_token": 2.0} for name in seconds},
        "memory": memory,
        "peak": 256.0,
    }


def test_the_training_table_gives_ratios_shares_of_the_peak_and_memory():
    settings = {"shape": shape_to_json(TINY), "rounds": 2, "steps": 2}
    text = train_step.text([measured(settings, training_values())])
    # 2 steps of 32 tokens of 2 operations each in a second, of 256
    assert "| 3.0 M | torch eager | 2.50x (2.25 to 2.75) | 50% | 20% | 0.50x | 0.0000 | 1 |" in text
    assert "| 3.0 M | torch.compile | 0.50x (0.50 to 0.50) | 50% | 100% | 0.33x |" in text
    assert "it is not shown that the sides stay together after them" in text
    values = training_values()
    values["losses"] = {name: [3.0] * 100 for name in values["losses"]}
    text = train_step.text([measured(settings, values)])
    assert "| 0.50x | 0.0000 | 100 |" in text
    assert "not shown" not in text


@pytest.mark.parametrize("name", ["3m", "12m", "124m-cuda"])
def test_the_first_hundred_losses_of_both_sides_are_compared(name):
    (measurement,) = train_step.train_table(name).measurements
    settings = measurement.settings
    assert settings["warmup"] + settings["rounds"] * settings["steps"] >= 100


def test_growth_is_fitted_beside_the_operations_and_what_exceeds_them_is_said():
    def row(n, **costs):
        return {"flops": n, "step": n, "memory": n, "compile": 2.0, **costs}

    def at(axis, n, **costs):
        settings = {"axis": axis, "size": n}
        return measured(settings, row(n, **costs))

    good = [at("layers", n) for n in (2, 4, 8, 16)]
    text = growth.text(good)
    assert "| layers | 2 to 16 | 1.00 | 1.00 | 1.00 | 0.00 |" in text
    assert "Nothing grows faster than the operations do." in text
    assert "scan" not in text
    scanned = [at(growth.SCANNED, n, step=2 * n, compile=0.5) for n in (2, 8)]
    text = growth.text([*good, *scanned])
    assert "| 2 | 0.50x | 1.00x | 4.00x |" in text
    assert "| 8 | 0.50x | 1.00x | 4.00x |" in text
    assert "| 4 | 0.50x" not in text
    bad = [at("length", n, step=None if n == 16 else n**1.5) for n in (2, 4, 8, 16)]
    text = growth.text([*good, *bad])
    assert "Over length the step grows as n^1.50, and its operations as n^1.00." in text
    assert "| length 16 | 8 | not run | 8 | 1 |" in text


def test_the_picture_is_drawn(tmp_path):
    rows = {"flops": 1.0, "step": None, "memory": 2.0, "compile": 3.0}
    results = [measured({"axis": "width", "size": n}, rows | {"step": n}) for n in (2, 4)]
    growth.picture(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_other_tables_as_text():
    seconds = {"prefill": [1.0, 1.0], "decode": [1.0, 2.0]}
    slower = {"prefill": [2.0, 2.0], "decode": [3.0, 3.0]}
    values = {"ours": {"1": seconds}, "generate": {"1": slower}, "agree": {"1": 0.5}}
    settings = {"prompt": 8, "new": 4, "rounds": 2, "shape": shape_to_json(TINY)}
    text = decode.text([measured(settings, values)])
    assert "in float32 against" in text
    assert "| 1 | 2.00x (2.00 to 2.00) | 2.25x (1.88 to 2.62) | 50.0% | 2 | 1 |" in text
    names = ("ours cold", "ours warm", "torch.compile cold", "torch.compile warm", "torch eager")
    rounds = ((4.0, 2.0, 8.0, 6.0, 3.0), (4.0, 2.0, 4.0, 6.0, 3.0))
    text = start.text([measured({}, dict(zip(names, each, strict=True))) for each in rounds])
    assert "| ours cold | 1.50x (1.25 to 1.75) | 1.50x (1.50 to 1.50) | 0.75x" in text
    assert "| ours warm | 3.00x (2.50 to 3.50) | 3.00x (3.00 to 3.00) | 1.50x" in text
    text = start.wait_text(
        [measured({"rounds": 1, "steps": 9}, {"seconds": [{"data": 1.0, "step": 3.0}]})]
    )
    assert "| 1 x 9 steps | 25.00% (25.00% to 25.00%) |" in text
    values = {"ours": {"seconds": [1.0]}, "tokenizers": {"seconds": [3.0]}, "bytes": 5e6}
    text = tokenise.text([measured({"tokenizer": "bytes", "data": "stdlib"}, values)])
    assert "| bytes | stdlib | 5.0 MB | 3.00x (3.00 to 3.00) |" in text


def test_the_command_measures_what_is_named_and_missing(tmp_path, monkeypatch, capsys):
    made = []

    def measure(settings):
        made.append(settings["n"])
        return {"found": settings["n"]}

    def table(n):
        one = Measurement(f"m{n}", {"n": n}, measure)
        return Table("Numbers", (one,), lambda results: str([m.values["found"] for m in results]))

    monkeypatch.setattr(bench, "TABLES", {"one": lambda: table(1), "two": lambda: table(2)})

    def run(words):
        monkeypatch.setattr("sys.argv", ["bench", *words.split()])
        folders = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["bench", *words.split(), *folders])
        bench.main()
        return (tmp_path / "out" / "bench-cpu.md").read_text()

    assert "## Numbers\n\n[1]" in run("--only one")
    assert "[1, 2]" in run("")
    assert made == [1, 2]
    run("--only two --fresh")
    assert made == [1, 2, 2]
    content = json.loads((tmp_path / "out" / "bench-cpu.json").read_text())
    assert content["two"][0]["values"] == {"found": 2}
    assert content["two"][0]["machine"]["cores"] >= 1
    with pytest.raises(ValueError, match="no table is called three; there are one, two"):
        bench.chosen(["three"], bench.TABLES)


def test_every_table_has_a_name_of_its_own_and_measurements_that_json_holds():
    keys = []
    for make in bench.TABLES.values():
        for measurement in make().measurements:
            json.dumps(dict(measurement.settings))
            keys.append(measurement.key)
    assert len(set(keys)) == len(keys)


def test_batches_are_the_same_on_either_side_and_can_be_learned():
    one, two = batches_of(TINY)[3], batches_of(TINY)[3]
    assert (one["tokens"] == two["tokens"]).all()
    size = TINY.model.vocabulary_size
    follows = (one["targets"] == (31 * one["tokens"] + 7) % size).mean()
    assert 0.2 < follows < 0.9


@pytest.mark.slow
def test_growth_measures_a_point_in_a_process_of_its_own():
    shape = replace(TINY, batch_size=1)
    settings = {"shape": shape_to_json(shape), "steps": 1, "largest": 2**30}
    found = growth.measure(settings)
    assert min(found[name] for name in ("compile", "step", "memory", "flops")) > 0
    small = growth.measure(settings | {"largest": 0})
    assert small["step"] is None
    assert small["memory"] == found["memory"]


@pytest.mark.hf
def test_training_is_measured_on_equal_work(monkeypatch):
    monkeypatch.setattr("experiments.bench.sides.REST", 0)
    settings = {"shape": shape_to_json(TINY), "rounds": 2, "steps": 1, "warmup": 1, "product": 32}
    sides = {"ours": "train.jax", "torch eager": "train.torch"}
    real = Side

    def eager(subject, given, environment, limit):
        return real(subject, {**given, "mode": "eager"}, environment, limit)

    monkeypatch.setattr(train_step, "Side", eager)  # torch.compile takes half a minute
    values = train_step.measure(settings)
    assert set(sides) < set(values["seconds"])
    assert {len(losses) for losses in values["losses"].values()} == {3}
    text = train_step.text([measured(settings, values)])
    assert text.count("torch eager") == 1


@pytest.mark.hf
def test_generation_is_measured_on_the_same_tokens(monkeypatch):
    monkeypatch.setattr("experiments.bench.sides.REST", 0)
    settings = {"shape": shape_to_json(TINY), "prompt": 4, "new": 6, "rows": [1, 2], "rounds": 1}
    values = decode.measure(settings)
    assert values["agree"] == {"1": 1.0, "2": 1.0}
    assert len(values["generate"]["2"]["decode"]) == 1


@pytest.mark.hf
def test_tokenising_writes_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.bench.sides.REST", 0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.txt").write_text(f"a text of some words, number {n}, is tokenised " * 20)
    values = tokenise.measure({"data": str(folder), "tokenizer": "bytes", "rounds": 1})
    assert values["ours"]["tokens"] == values["tokenizers"]["tokens"] > 30 * 900


@pytest.mark.slow
def test_the_wait_for_data_is_a_share_of_the_loop():
    settings = {"shape": shape_to_json(TINY), "rounds": 1, "steps": 3}
    values = start.measure_wait(settings)
    assert 0 < start.wait_share(values["seconds"][0]) < 1
