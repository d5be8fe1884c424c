"""The README's tables of speed: figures of the result files, or nothing before there are any."""

import json

from experiments import readme
from experiments.bench.alone import FAILED
from experiments.bench.shapes import SHAPES, shape_to_json
from experiments.headlines import bench, speedrun
from experiments.ladder import command as ladder_command
from experiments.ladder.climb import TORCH, TORCH_TUNED, Site, recipe_key, scale_named
from experiments.ladder.command import run_ladder
from experiments.ladder.rows import mean_end, ratio, row_of
from experiments.ladder.scales import TINY
from experiments.ladder.side_by_side import item_of, processors
from experiments.tables.report import read, write_data
from tests.ladder_cases import ladder


def rows_of(text):
    cells = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
    return [row for row in cells if row and not row[0].startswith("---")]


def test_the_blocks_are_empty_before_anything_is_measured(tmp_path, monkeypatch):
    assert speedrun(tmp_path / "none.json", TINY) == bench(tmp_path / "none.json") == ""
    (tmp_path / "speedrun-tiny.json").write_text(json.dumps({"tables": {"a text, bytes": {}}}))
    assert speedrun(tmp_path / "speedrun-tiny.json", TINY) == ""
    monkeypatch.setitem(readme.BLOCKS, "bench", lambda: "")
    text = (readme.ROOT / "README.md").read_text()
    assert "<!-- bench -->\n\n<!-- /bench -->" in readme.filled(text)


def test_headline_rungs_stand_with_ratios_to_both_baselines_and_their_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder_command, "draw", lambda site, path: False)
    path = run_ladder(
        ladder(tmp_path, rung=(TORCH, TORCH_TUNED, "jax", "muon", "momentum"), seeds=5)
    )[0]
    gathered = read(path)
    (table,) = gathered.index
    site = Site(scale_named(TINY, table), tmp_path, gathered)
    item = item_of(site, "muon", "")
    recipes = [recipe_key(site.scale, name) for name in ("muon", TORCH_TUNED)]
    base = {"token": 1e-3, "compiling": 1.0, "starting": 2.0}
    timed = {"ratio": 0.5, "quartiles": [0.5, 0.5], "rounds": 9, "recipes": recipes}
    timed |= {"compiling": 3.0, "starting": 4.0, "baseline": base}
    gathered.add(item, timed, {})
    gathered.index[table][item.name] = {"0": item.key}
    before = speedrun(path, TINY)
    write_data(path, gathered)
    for _, _, *cells, _ in rows_of(before)[1:]:  # seconds of runs are no claim
        assert cells == [*["not timed"] * 4, "not run"]

    text = speedrun(path, TINY)
    body = rows_of(text)[1:]
    assert [row[:2] for row in body] == [[table, "jax"], [table, "muon"]]  # no other is a headline
    for _, name, first, more, tuned, whole, compiled, where in body:
        assert where == processors(site)[0]
        # the first baseline has not been
        assert (first, more, compiled) == ("not timed", "not timed", "not run")
        target = mean_end(site, TORCH_TUNED)
        two = [row_of(site, each, target, TORCH_TUNED) for each in (name, TORCH_TUNED)]
        half = f"{ratio(*two, 'tokens').mean / 2:.1f}x"  # at half the tokens a second
        assert tuned.startswith(half) if name == "muon" else tuned == "not timed"
        cold = f"{ratio(*two, 'cold').mean:.1f}x"
        assert whole == (cold if name == "muon" else "not timed")
    assert len(two[0].reached) == 5
    assert "[speedrun-tiny.md](experiments/results/speedrun-tiny.md)" in text
    assert "muon: Muon on the kernels of the blocks" in text
    assert "momentum" not in text  # neither a headline nor kept

    run_ladder(ladder(tmp_path, rung=("muon",), seeds=5, held_out="test"))
    body = rows_of(speedrun(path, TINY))[1:]
    assert [row[:2] for row in body] == [[f"{table}, test", "muon"]]
    test = Site(scale_named(TINY, f"{table}, test"), tmp_path, read(path))
    assert body[0][4] == said(test, "muon", TORCH_TUNED)


def said(site, name, baseline):
    """A cell by the same figures, but in words of its own."""
    target = mean_end(site, baseline)
    mine, theirs = (row_of(site, each, target, baseline) for each in (name, baseline))
    found = ratio(mine, theirs)
    assert found.pairs == 5
    return f"{found.mean:.1f}x ± {found.error:.1f}, 5 seeds"


def test_rows_of_few_seeds_are_no_headlines(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder_command, "draw", lambda site, path: False)
    path = run_ladder(ladder(tmp_path, rung=("jax",), seeds=4))[0]
    assert speedrun(path, TINY) == ""


def measured(settings, values):
    machine = {"cores": 2, "processor": "Intel"}
    return {"settings": settings, "values": values, "seconds": 1.0, "machine": machine}


def training(losses):
    sides = ("ours", "torch eager", "torch.compile")
    return {
        "seconds": {side: [s, s] for side, s in zip(sides, (2.0, 3.0, 1.0), strict=True)},
        "losses": dict.fromkeys(sides, losses),
        "facts": {"ours": {"parameters": 2_950_000}},
    }


def test_the_bench_is_told_in_two_tables(tmp_path):
    shape = {"shape": shape_to_json(SHAPES["3m"])}
    parted = training([3.0] * 8)
    parted["losses"]["torch.compile"] = [3.0, "nan"]  # as JSON has it
    ours, theirs = ({"1": {"prefill": [s] * 2, "decode": [1.5 * s - 0.5] * 2}} for s in (1.0, 2.0))
    content = {
        "train-3m": [measured(shape, training([3.0] * 120))],
        "train-12m": [measured(shape, {FAILED: "Traceback\nMemoryError"})],
        "train-124m": [measured(shape, parted)],
        "decode": [
            measured({"shape": shape_to_json(SHAPES["12m"])}, {"ours": ours, "generate": theirs})
        ],
    }
    path = tmp_path / "bench-cpu.json"
    path.write_text(json.dumps(content))
    text = bench(path)
    steps, generation = (rows_of(part) for part in text.split("\n\n")[1:3])
    assert len(steps) == 3
    assert steps[1] == ["3.0 M", "1.50x (1.50 to 1.50)", "0.50x (0.50 to 0.50)", "100"]
    assert steps[2][1:] == [steps[1][1], "none: losses part by nan, more than 0.01", "2"]
    assert generation[1] == ["1 of 12.3 M", "2.00x (2.00 to 2.00)", "2.50x (2.50 to 2.50)"]
    assert "2 cores of an Intel" in text
    path.write_text(json.dumps({"train-3m": content["train-12m"]}))
    assert bench(path) == ""
