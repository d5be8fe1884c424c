"""Tables: cells run once, are found again in a topic's JSON, and are shown from it alone."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ablate import __main__ as command_line
from experiments.ablate import (
    base,
    compress_outliers,
    compress_prune,
    compress_quantize,
    compress_sparse_training,
)
from experiments.ablate.__main__ import Ablate, run_command
from experiments.grid import Cell, Measurement, run_measurements
from experiments.recipes import Size
from experiments.tables import table as tables
from experiments.tables.gathered import Gathered, Results
from experiments.tables.margins import margin
from experiments.tables.report import read
from experiments.tables.table import Request, Table, complete
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer
from train.loop import LoopSettings
from train.schedules import Constant
from train.settings import Phase, Settings

SETTINGS = Settings(phases=(Phase(6, gpt2_tiny(), 4, 8),), tokenizer="bytes", schedule=Constant())


class Squares:
    """A measurement that notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, settings):
        self.asked.append(settings["number"])
        return {"square": settings["number"] ** 2}

    def cells(self, request):
        return [
            Measurement(f"number {n}", {"number": n + 10 * seed, "seed": seed}, self)
            for seed in range(request.seeds)
            for n in (2, 3)
        ]


def render(results):
    return [f"{name}: {results.column(name, 'square')}" for name in results.by_name]


@pytest.fixture
def squares(monkeypatch):
    squares = Squares()
    table = Table("squares", "Squares", squares.cells, render)
    other = Table("others", "Others", lambda request: [], render)
    monkeypatch.setattr(command_line, "TOPICS", {"numbers": (table, other)})
    return squares


def command(tmp_path, **fields):
    places = {"out": tmp_path / "out", "results": tmp_path / "results"}
    return Ablate("numbers", **{"seeds": 1, **places, **fields})


def test_a_measurement_is_made_once_and_lies_under_the_hash_of_its_settings(tmp_path):
    squares = Squares()
    cells = squares.cells(Request(seeds=2))
    run_measurements(cells[1:2], tmp_path)
    found = run_measurements(cells, tmp_path)
    assert squares.asked == [3, 2, 12, 13]
    assert [each.values["square"] for each in found] == [4, 9, 144, 169]
    assert {path.stem for path in tmp_path.iterdir()} == {cell.key for cell in cells}
    again = run_measurements(cells, tmp_path)
    assert again == found
    assert len(squares.asked) == 4


def test_a_measurement_that_failed_is_made_again(tmp_path):
    def fails(settings):
        raise RuntimeError("no power")

    for function in (fails, lambda settings: {"a": object()}):
        with pytest.raises((RuntimeError, ValueError), match=r"no power|'one' returned what JSON"):
            run_measurements([Measurement("one", {"n": 1}, function)], tmp_path)
        assert list(tmp_path.iterdir()) == []
    (found,) = run_measurements([Measurement("one", {"n": 1}, lambda s: {"a": math.inf})], tmp_path)
    assert found.values == {"a": "inf"}
    assert Results({"one": {0: found.values}}).column("one", "a") == [math.inf]


def test_no_measurement_begins_when_the_minutes_are_up(tmp_path):
    squares = Squares()
    assert run_measurements(squares.cells(Request()), tmp_path, max_minutes=0) == []
    assert squares.asked == []


def test_another_cell_counts_by_its_key_wherever_it_lies():
    cells = [
        Cell("child", dataclasses.replace(SETTINGS, parent=f"{folder}/0123456789abcdef{step}"))
        for folder, step in (("runs/cells", ""), ("/tmp/other", ""), ("runs/cells", "@3"))
    ]
    assert cells[0].key == cells[1].key != cells[2].key
    assert cells[0].key != Cell("child", SETTINGS).key


def test_a_fresh_clone_finds_the_results_and_runs_only_what_is_new(tmp_path, squares, capsys):
    run_command(command(tmp_path))
    assert squares.asked == [2, 3]
    run_command(command(tmp_path, out=tmp_path / "clone", seeds=2))
    assert squares.asked == [2, 3, 12, 13]
    assert "2 cells are finished, 2 run now" in capsys.readouterr().out
    run_command(command(tmp_path, out=tmp_path / "clone", fresh=True))
    assert squares.asked == [2, 3, 12, 13, 2, 3]


def test_a_fresh_run_goes_on_in_its_folder(tmp_path, squares):
    run_command(command(tmp_path))
    run_command(command(tmp_path, out=tmp_path / "again", fresh=True, max_minutes=0))
    assert squares.asked == [2, 3]
    for _ in range(2):
        run_command(command(tmp_path, out=tmp_path / "again", fresh=True))
    assert squares.asked == [2, 3, 2, 3]


def test_tables_are_made_from_the_json_alone(tmp_path, squares):
    path, text = run_command(command(tmp_path, seeds=2))[:2]
    before = text.read_text()
    assert "number 2: [4.0, 144.0]" in before
    assert "python -m experiments.ablate numbers" in before
    assert "Not run yet: `python -m experiments.ablate numbers --tables others`" in before
    content = json.loads(path.read_text())
    for cell in content["cells"].values():
        cell["values"]["square"] += 1
    path.write_text(json.dumps(content))
    squares.asked = None  # would fail if it were asked
    run_command(command(tmp_path, seeds=2))
    assert text.read_text() == before.replace("[4.0, 144.0]", "[5.0, 145.0]").replace(
        "[9.0, 169.0]", "[10.0, 170.0]"
    )


def test_what_is_missing_is_named_with_the_command_that_runs_it(tmp_path, squares):
    path, text = run_command(command(tmp_path, seeds=2))[:2]
    content = json.loads(path.read_text())
    del content["cells"][content["tables"]["squares"]["number 3"]["1"]]
    path.write_text(json.dumps(content))
    run_command(command(tmp_path, out=tmp_path / "clone", seeds=2, max_minutes=0))
    assert "`python -m experiments.ablate numbers --tables squares` runs them" in text.read_text()
    assert "* number 3 (seed 1)" in text.read_text()
    assert "* number 2" not in text.read_text()


def test_between_cells_a_process_may_forget_what_it_compiled(tmp_path, squares, monkeypatch):
    after = []
    monkeypatch.setattr(tables, "forget_programs_if_many", lambda: after.append(squares.asked[-1]))
    run_command(command(tmp_path, seeds=2))
    assert after == squares.asked == [2, 3, 12, 13]


def test_a_cell_that_fails_is_named_at_the_end_and_all_others_run(tmp_path, squares):
    def fails(settings):
        raise RuntimeError("no power")

    cells = [Measurement("first", {"n": 0}, fails), *squares.cells(Request(seeds=1))]
    table = Table("squares", "Squares", lambda request: cells, render)
    command_line.TOPICS["numbers"] = (table,)
    with pytest.raises(ValueError, match=r"1 failed, .*: first, seed 0 \(no power\)"):
        run_command(command(tmp_path))
    found = read(tmp_path / "results" / f"numbers-{jax.default_backend()}.json")
    assert found.results("squares").column("number 2", "square") == [4.0]
    assert found.missing("squares") == ["first (seed 0)"]


def test_an_unknown_name_is_refused_before_anything_runs(tmp_path, squares):
    with pytest.raises(ValueError, match=r"no table is called 'cubes'; there are squares, others"):
        run_command(command(tmp_path, tables=("cubes",)))
    with pytest.raises(ValueError, match="no topic is called 'letters'; there are numbers"):
        run_command(dataclasses.replace(command(tmp_path), topic="letters"))
    with pytest.raises(ValueError, match="give at least 1"):
        run_command(command(tmp_path, seeds=0))
    assert squares.asked == []


def test_two_cells_of_one_row_and_seed_are_refused():
    cells = [Measurement("a", {"n": n}, dict) for n in (1, 2)]
    with pytest.raises(ValueError, match="two cells 'a' of seed 0"):
        Gathered({}).enter("table", cells)


def test_a_row_that_has_changed_takes_the_place_of_the_old_one():
    gathered = Gathered({})
    old, new = (Measurement("a", {"bits": bits}, dict) for bits in (3, 4))
    for item in (old, new):
        gathered.enter("table", [item])
        gathered.add(item, {"x": item.settings["bits"]}, {"cores": 2})
    assert gathered.results("table").column("a", "x") == [4.0]
    assert list(gathered.content()["cells"]) == [new.key]


def test_a_result_stays_when_a_setting_is_added_and_goes_when_a_default_changes():
    parent = Cell("parent", SETTINGS)
    item = Measurement("a", {"n": 1}, dict, needs=(parent,))
    gathered = Gathered({})
    gathered.add(item, {"x": 1}, {})
    assert gathered.has(item)
    made = gathered.settings[parent.key]["settings"]
    del made["z_loss"]  # as if written before there was one
    assert gathered.has(item)
    made["schedule"]["unknown"] = 1  # as if it had been dropped since
    assert gathered.has(item)
    made["micro_batches"] = 2  # as if that had been the default
    assert not gathered.has(item)


def test_what_a_measurement_needs_runs_first_and_once(tmp_path, monkeypatch):
    ran = []

    def fake(cells, folder, *, execution):
        (cell,) = cells
        ran.append(cell.name)
        (folder / cell.key).mkdir(parents=True)
        result = {"reason": "finished", "step": 6, "seconds": {}}
        (folder / cell.key / "result.json").write_text(json.dumps(result))
        (folder / cell.key / "metrics.jsonl").write_text(
            '{"kind": "evaluation", "step": 6, "loss": 2.0, "bits_per_byte": 1.0, "seconds": 1.0}\n'
        )

    monkeypatch.setattr(tables, "run_cells", fake)
    parent = Cell("parent", SETTINGS)
    child = Cell("child", dataclasses.replace(SETTINGS, seed=1), needs=(parent,))
    items = [
        Measurement(name, {"name": name}, lambda s: ran.append(s["name"]) or {}, (child,))
        for name in ("one", "two")
    ]
    gathered = Gathered({})
    table = Table("t", "T", lambda request: [*items, child], render)
    complete([table], Request(tmp_path), gathered)
    assert ran == ["parent", "child", "one", "two"]
    values = gathered.results("t").by_name["child"][1]
    assert (values["loss"], values["reason"]) == (2.0, "finished")


def test_margins_are_of_pairs():
    high, low = [5.0, 9.0, 7.0], [4.0, 7.0, 6.0]
    found = margin(high, low)
    differences = np.array([1.0, 2.0, 1.0])
    assert found.difference == differences.mean()
    assert math.isclose(found.error, differences.std(ddof=1) / math.sqrt(3))
    assert margin(low, high).errors == -found.errors
    assert margin([2.0], [1.0]).text == "one seed"
    with pytest.raises(ValueError, match="no pairs"):
        margin([1.0], [1.0, 2.0])


def params_of(config):
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)
    return model, jax.tree.map(draw, params)


@pytest.mark.variants(1)
@pytest.mark.parametrize("preset", [modern_tiny, gpt2_tiny, llama_tiny])
def test_an_outlier_changes_no_output_but_the_activations(preset):
    model, params = params_of(preset(qk_norm=False, zero_init_projections=False))
    changed = compress_outliers.with_outlier(model.config, params, 30.0)
    tokens = jnp.arange(24).reshape(2, 12)
    apply = jax.jit(lambda p: model.apply({"params": p}, tokens))
    before, after = apply(params), apply(changed)
    assert jnp.linalg.norm(after - before) < 1e-5 * jnp.linalg.norm(before)
    ratio = changed["blocks"]["mlp_norm"]["scale"] / params["blocks"]["mlp_norm"]["scale"]
    assert np.allclose(ratio[:, 0], 30, rtol=1e-5)
    assert np.allclose(ratio[:, 1:], 1)


def test_what_is_published_of_gradual_pruning_is_no_one_shot_row():
    text = "\n".join(compress_sparse_training.TABLES[0].render(Results({})))
    assert "who report no one-shot row" in text
    assert "dense 83.37, gradually to 80, 90 and 95 % zeros 83.87, 87.86 and 96.30" in text


def test_sparse_runs_share_all_but_their_method():
    request = Request(seeds=2)
    cells = [
        *compress_sparse_training.cells(request),
        *compress_sparse_training.recovery_cells(request),
    ]
    assert len({cell.key for cell in cells}) == len(cells)
    for seed in range(2):
        own = [cell for cell in cells if cell.settings.seed == seed]
        bare = [dataclasses.replace(cell.settings, methods=()) for cell in own]
        scratch, recovered = (
            [settings for settings in bare if (settings.parent is None) == fresh]
            for fresh in (True, False)
        )
        assert all(settings == scratch[0] for settings in scratch)
        assert all(settings == recovered[0] for settings in recovered)
        assert recovered[0].parent.endswith(base.base_cell(seed).key)
        assert {cell.needs for cell in own} == {(), (base.base_cell(seed),)}


@pytest.mark.slow
def test_every_row_of_the_tables_runs_at_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    draw = np.random.default_rng(0)
    for number in range(40):
        words = "".join(chr(97 + c) for c in draw.integers(0, 6, 400))
        (text / f"{number}.txt").write_text(words)
    size = Size((str(text),), "bytes", 4, 16, 2, width=32, heads=4)
    monkeypatch.setattr(base, "SIZE", size)
    monkeypatch.setattr(base, "STEPS", 3)
    monkeypatch.setattr(base, "LOOP", LoopSettings())
    sparse = compress_sparse_training
    monkeypatch.setattr(sparse, "STEPS", 30)
    monkeypatch.setattr(sparse, "RECOVERY_STEPS", 12)
    monkeypatch.setattr(sparse, "METHODS", {n: sparse.METHODS[n] for n in ("dense", "RigL")})
    request = Request(tmp_path / "cells", seeds=1)
    chosen = [
        table
        for module in (compress_quantize, compress_outliers, compress_prune, sparse)
        for table in module.TABLES
    ]
    gathered = Gathered({})
    complete(chosen, request, gathered)
    for table in chosen:
        results = gathered.results(table.name)
        assert not gathered.missing(table.name)
        if table.name.endswith("stories"):
            assert not results.by_name
            assert "--stories" in table.notes(request)[0]
            continue
        lines = table.render(results)
        assert sum(line.startswith("|") for line in lines) > len(results.by_name)
        if table.picture:
            table.picture(results).savefig(tmp_path / "picture.png")
    found = gathered.results("quantize").by_name
    assert found["float32"][0]["rise in %"] == 0
    assert found["RTN8"][0]["bytes"] < 0.4 * found["float32"][0]["bytes"]
    zeros = {name: row[0]["zeros"] for name, row in gathered.results("prune").by_name.items()}
    assert all(abs(share - 0.5) < 0.01 for name, share in zeros.items() if name != "dense")
