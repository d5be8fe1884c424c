"""Tiny Shakespeare beside nanoGPT: both sides in turn, and figures from the records alone."""

import json
import re
import sys

import numpy as np
import pytest

from experiments import shakespeare
from experiments.baselines.cells import BaselineCell
from experiments.grid import Cell, Result
from experiments.readme import RESULTS
from experiments.shakespeare import TUNING_SEED, lengths, nanogpt, ours, run_all
from experiments.shakespeare_report import crossing, curves, headline, report, summary
from train.optimizers import AdamW
from train.schedules import Cosine


def row(step, loss, data, spent, total):
    return {"step": step, "loss": loss, "clock": {"data": data, "step": spent}, "seconds": total}


def result_of(job, folder, rows, ended=0.0):
    import os

    out = folder / job.key
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text("{}")
    os.utime(out / "result.json", (ended, ended))
    return Result(job, out, "finished", rows[-1]["step"], {}, rows)


def test_results_lie_where_the_readme_reads_them():
    assert shakespeare.Shakespeare(shakespeare.Path("a")).results == RESULTS


def test_the_sides_are_one_model_shape_and_one_text():
    mine, theirs = ours("plays.txt", 2000, 1), nanogpt("plays.txt", 2000, 1)
    assert isinstance(mine, Cell)
    assert isinstance(theirs, BaselineCell)
    one, two = mine.settings, theirs.baseline.settings
    assert (one.data, one.tokenizer, one.seed, one.steps) == (two.data, two.tokenizer, 1, two.steps)
    assert mine.loop == theirs.loop
    shapes = [
        (p.batch_size, p.sequence_length, p.model.layers, p.model.width, p.model.heads)
        for p in (one.phases[0], two.phases[0])
    ]
    assert shapes == [(12, 64, 4, 128, 4)] * 2
    assert type(two.optimizer) is AdamW
    assert two.schedule == Cosine(100, 0.1)
    shorter = nanogpt("plays.txt", 400, 1).baseline.settings
    assert (shorter.steps, shorter.schedule) == (400, Cosine(20, 0.1))


def test_a_crossing_is_the_first_with_its_own_clock(tmp_path):
    rows = [row(20, 2.0, 1.0, 4.0, 9.0), row(40, 1.5, 2.0, 8.0, 18.0), row(60, 1.4, 3.0, 12.0, 27)]
    result = result_of(ours("a", 60, 0), tmp_path, rows)
    assert crossing(result, 1.6) == {"steps": 40, "training": 10.0, "all": 18.0}
    assert crossing(result, 1.3) is None


class World:
    """Runs whose loss at their end follows from their length."""

    def __init__(self, folder, at=None):
        self.folder, self.asked = folder, []
        # steps that each side needs to end at 1.88, and ten times as many at 1.669
        self.needs = at or {"nanoGPT": 700.0, "ours": 230.0}

    def __call__(self, job):
        name, steps = job.name.removesuffix(" steps").split(", ")
        settings = job.settings if isinstance(job, Cell) else job.baseline.settings
        self.asked.append((name, int(steps), settings.seed))
        scale = np.log(int(steps) / self.needs[name]) / np.log(10)
        loss = float(1.88 - 0.211 * scale)
        each = 0.01 if name == "ours" else 0.02
        spent = each * int(steps)
        rows = [
            row(int(steps) // 2, 4.0, 0.0, spent / 2, spent),
            row(int(steps), loss, 0.0, spent, 2 * spent),
        ]
        return result_of(job, self.folder, rows, ended=60.0 * len(self.asked))


def test_lengths_are_looked_for_by_one_rule_with_a_seed_of_their_own(tmp_path):
    world = World(tmp_path)
    found = lengths(world, "plays.txt", 1.88)
    assert {seed for _, _, seed in world.asked} == {TUNING_SEED}
    for side, need in world.needs.items():
        assert need <= found[side] <= 1.35 * need  # the margin takes a tenth of it
    assert [name for name, _, _ in world.asked[:4]] == ["nanoGPT", "ours"] * 2
    never = World(tmp_path, {"nanoGPT": 1e6, "ours": 230.0})
    assert lengths(never, "plays.txt", 1.88)["nanoGPT"] is None


def test_both_sides_take_turns_and_the_table_says_what_the_records_say(tmp_path):
    world = World(tmp_path)
    runs, chosen = run_all(world, "plays.txt", range(2), (1.88, 1.669))
    of_table = [each for each in world.asked if each[2] != TUNING_SEED]
    pairs = list(zip(of_table[::2], of_table[1::2], strict=True))
    assert len(pairs) == 2 * 3
    for one, two in pairs:
        first = ("nanoGPT", "ours") if one[2] == 0 else ("ours", "nanoGPT")
        assert ((one[0], two[0]), two[2]) == (first, one[2])
    facts = json.loads(json.dumps(summary(runs, chosen, 2000, (1.88, 1.669))))
    # What the README reads.
    assert facts["steps_to_published"] == [2000, 2000]
    assert (facts["published"], facts["steps"], facts["seeds"], len(facts["losses"])) == (
        *(1.88, 2000, 2),
        2,
    )
    assert facts["minutes_apart"] == pytest.approx(1.0)
    assert len(facts["rows"]) == 2 * 2 * 2
    text = report(facts)
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:3] == "| 1"]
    by_name = {(cells[0], cells[1], "chosen" in cells[2]): cells for cells in lines}
    mine, n = by_name["1.88", "ours", True], chosen[1.88]
    assert mine[4] == str(n["ours"])
    assert mine[5] == f"{0.01 * n['ours']:.1f} ± 0.0"
    # Theirs takes 40 s over its 2,000 steps, and for its own length 0.02 s a step.
    assert mine[7].startswith(f"{40 / (0.01 * n['ours']):.1f}x")
    assert mine[8].startswith(f"{2 * n['nanoGPT'] / n['ours']:.1f}x")
    assert by_name["1.669", "nanoGPT", False][4] == "not reached"
    assert by_name["1.669", "ours", True][7] == ""
    mine88, mine, n = mine[7], by_name["1.669", "ours", True], chosen[1.669]
    assert mine[8].startswith(f"{2 * n['nanoGPT'] / n['ours']:.1f}x")
    assert len(curves(runs)) == 6
    line = headline(facts)
    assert line.startswith(
        f"{0.01 * chosen[1.88]['ours']:.1f} s of training to 1.88, {mine88} faster"
    )
    assert f"{0.01 * n['ours']:.1f} s of training to 1.669" in line


def test_what_a_side_never_reaches_is_no_row_of_a_chosen_length(tmp_path):
    world = World(tmp_path, {"nanoGPT": 1e6, "ours": 230.0})
    runs, chosen = run_all(world, "plays.txt", range(1), (1.88,))
    facts = summary(runs, chosen, 2000, (1.88,))
    assert [(row["side"], row["chosen"]) for row in facts["rows"]] == [
        *(("nanoGPT", False), ("ours", False), ("ours", True)),
    ]
    assert "not reached" in report(facts)
    assert not facts["searches_cut_off"]


def test_a_search_that_was_cut_off_has_chosen_nothing(tmp_path):
    whole = World(tmp_path)
    run_all(whole, "plays.txt", range(1), (1.88,))
    trials = sum(seed == TUNING_SEED for _, _, seed in whole.asked)
    for most in range(trials):
        world = World(tmp_path)

        def run(job, world=world, most=most):
            tuning = sum(seed == TUNING_SEED for _, _, seed in world.asked)
            return world(job) if job.name.endswith(" 2000 steps") or tuning < most else None

        runs, chosen = run_all(run, "plays.txt", range(1), (1.88,))
        cut = [side for side in ("nanoGPT", "ours") if side not in chosen[1.88]]
        assert cut, f"both lengths were chosen from {most} of {trials} runs"
        facts = summary(runs, chosen, 2000, (1.88,))
        assert not [row for row in facts["rows"] if row["chosen"] and row["side"] in cut]
        assert facts["searches_cut_off"] == [f"{side} to 1.88" for side in cut]
        assert f"No length is chosen yet for {cut[0]} to 1.88" in report(facts)


@pytest.mark.hf
@pytest.mark.slow
def test_the_command_runs_at_tiny_size(tmp_path, monkeypatch):
    text = tmp_path / "plays.txt"
    draw = np.random.default_rng(0)
    text.write_text("".join(chr(97 + c) for c in draw.integers(0, 6, 6_000)))
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shakespeare, "STEPS", 20)
    monkeypatch.setattr(shakespeare, "EVERY", 5)
    monkeypatch.setattr(shakespeare, "TARGETS", (4.0, 1.0))
    search = shakespeare.Search(least=10, most=40, quantum=10, runs=2)
    monkeypatch.setattr(shakespeare, "SEARCH", search)
    out = tmp_path / "results"
    folders = ["--out", str(tmp_path / "out"), "--results", str(out)]
    words = ["shakespeare", "--data", str(text), "--seeds", "1", *folders]
    monkeypatch.setattr(sys, "argv", words)
    shakespeare.main()
    facts = json.loads((out / "shakespeare.json").read_text())
    reached = {row["side"]: row["crossings"]["0"] for row in facts["rows"] if row["target"] == 4.0}
    assert all(there["training"] > 0 for there in reached.values() if there)
    assert reached["ours"]
    assert "not reached" in (out / "shakespeare.md").read_text()
    assert (out / "shakespeare.png").stat().st_size > 1000
