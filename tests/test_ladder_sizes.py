"""Rungs at four sizes: the ratios, the line through them, and what it says of a larger one."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.ladder import side_by_side
from experiments.ladder.climb import TORCH_TUNED
from experiments.ladder.command import run_ladder
from experiments.ladder.rungs import below, recipe_of
from experiments.ladder.scales import CPU, TINY
from experiments.ladder.sizes import line, scales_of
from experiments.ladder.turns import Taken
from experiments.tables.report import read
from tests.ladder_cases import Counting, cells_of, ladder


def test_sizes_are_fitted_and_said_of_a_larger_one(tmp_path):
    command = ladder(tmp_path, sizes=True, rung=("batch", "muon"))
    path, text, picture = run_ladder(command)
    for title in ("muon", "muon, to rate"):
        cells = cells_of(text.read_text(), title)
        assert all(cell.endswith("x") for cell in cells[1:5])
        assert cells[5:7] == ["", ""]  # seconds of runs foretell nothing
    below, whole = (float(cells_of(text.read_text(), t)[4][:-1]) for t in ("muon", "muon, to rate"))
    batch = float(cells_of(text.read_text(), "batch")[4][:-1])
    assert whole == pytest.approx(below * batch, rel=0.01)
    assert picture.exists()
    with pytest.raises(ValueError, match="jax lies below rate"):
        run_ladder(ladder(tmp_path, sizes=True, rung=("jax",)))
    one = ladder(tmp_path / "one", sizes=True, size=("20k",), rung=("muon",))
    cells = cells_of(run_ladder(one)[1].read_text(), "muon")
    assert [bool(cell) for cell in cells[1:5]] == [False, True, False, False]
    path, text, _ = run_ladder(dataclasses.replace(one, size=("20k", "8k")))
    assert cells_of(text.read_text(), "muon")[5:7] == ["", ""]  # two sizes foretell nothing
    before = read(path)
    anew = dataclasses.replace(
        one, size=("8k",), fresh=True, cells=tmp_path / "anew", run=(again := Counting())
    )
    run_ladder(anew)
    assert again.ran
    other, small = sorted(before.index)  # 20k, 8k
    assert read(path).index == before.index
    anew = dataclasses.replace(anew, cells=tmp_path / "none", max_minutes=-1.0)
    run_ladder(anew)
    assert read(path).index[other] == before.index[other]  # which was not named
    assert len(read(path).index[small]) < len(before.index[small])
    with pytest.raises(ValueError, match="no size is called '1B'; there are 8k, 20k"):
        run_ladder(dataclasses.replace(one, size=("1B",)))
    with pytest.raises(ValueError, match="give that as well"):
        run_ladder(dataclasses.replace(one, sizes=False))
    with pytest.raises(ValueError, match="torch lies below rate"):
        run_ladder(ladder(tmp_path, sizes=True, rung=("torch", "muon")))


def test_ratios_at_sizes_are_of_tokens_at_the_pace_of_steps_timed_in_turn(tmp_path, monkeypatch):
    command = ladder(tmp_path, sizes=True, rung=("muon",))
    before = cells_of(run_ladder(command)[1].read_text(), "muon, to rate")
    assert before[5:7] == ["", ""]
    seconds = {"rate": 1e-3, "muon": 2e-3}

    def turns(sides, rounds):
        name = sides["mine 0"].job.name.partition(",")[0]
        found = {"mine 0": seconds[name], "theirs 0": 1e-3}
        return {side: Taken([taken] * rounds, 1, 2) for side, taken in found.items()}

    monkeypatch.setattr(side_by_side, "take_turns", turns)
    timed = dataclasses.replace(command, side_by_side=True)
    after = cells_of(run_ladder(timed)[1].read_text(), "muon, to rate")
    assert all("x" in cell for cell in after[5:7])
    # A step of the made-up runs takes as long whatever its batch.
    rows = recipe_of("muon", TINY).rows / recipe_of("rate", TINY).rows
    for old, new in zip(before[1:5], after[1:5], strict=True):
        assert float(new[:-1]) == pytest.approx(float(old[:-1]) / 2 / rows, rel=0.03)
    with pytest.raises(ValueError, match="jax lies below rate"):
        run_ladder(dataclasses.replace(timed, rung=("jax",)))


def test_steps_are_timed_anew_without_the_runs(tmp_path, monkeypatch):
    taken = []

    def turns(sides, rounds):
        taken.append([sides[side].job.name.partition(",")[0] for side in ("mine 0", "theirs 0")])
        return {name: Taken([1e-3 * len(taken)] * rounds, 1, 2) for name in sides}

    monkeypatch.setattr(side_by_side, "take_turns", turns)
    chosen = ("torch-tuned", "rate", "muon")
    runs = ladder(tmp_path, rung=chosen)
    path, *_ = run_ladder(runs)
    timed = ladder(tmp_path, rung=("rate", "muon"), side_by_side=True)
    run_ladder(timed)
    before = read(path)
    run_ladder(timed)
    of_muon = [["muon", TORCH_TUNED], ["muon", below("muon")]]
    both = [["rate", TORCH_TUNED], ["rate", below("rate")], *of_muon]
    assert taken == both
    run_ladder(dataclasses.replace(timed, fresh=True))
    assert taken == both * 2
    after = read(path)
    changed = {key for key, cell in after.cells.items() if cell != before.cells[key]}
    assert len(changed) == len(both)
    assert after.index == before.index
    run_ladder(dataclasses.replace(timed, rung=("muon",), fresh=True))
    assert taken == [*both * 2, *of_muon]
    run_ladder(dataclasses.replace(runs, run=(again := Counting())))
    assert again.ran == []


def test_a_line_through_points_and_its_error():
    rng = np.random.default_rng(0)
    xs = rng.normal(size=20)
    ys = 2 * xs + 1 + 0.1 * rng.normal(size=20)
    found = line(xs, ys, 5.0)
    slope, middle = np.polyfit(xs, ys, 1)
    assert found.value == pytest.approx(5 * slope + middle)
    assert found.slope == pytest.approx(slope)
    design = np.stack([np.ones(20), xs], 1)
    s2 = ((ys - design @ [middle, slope]) ** 2).sum() / 18
    at = np.array([1.0, 5.0])
    assert found.error == pytest.approx(
        math.sqrt(s2 * (1 + at @ np.linalg.inv(design.T @ design) @ at))
    )
    with pytest.raises(ValueError, match="two places"):
        line([1.0, 1.0], [2.0, 3.0], 0.0)


def test_sizes_cover_what_was_asked_for():
    from experiments.ladder.sizes import _parameters

    sizes = [_parameters(scale.model, scale) for scale in scales_of(CPU).values()]
    assert 0.4e6 < sizes[0] < 0.8e6
    assert 10e6 < sizes[-1] < 14e6
    assert sizes == sorted(sizes)
    tokens = [scale.tokens for scale in scales_of(CPU).values()]
    assert tokens == sorted(tokens)


def test_a_rung_is_held_against_the_same_one_at_every_size(tmp_path):
    """Where that one was not run there is no ratio: not one to what lies further down."""
    command = ladder(tmp_path, sizes=True, rung=("batch", "muon"), size=("8k", "20k"))
    run_ladder(command)
    less = dataclasses.replace(command, rung=("muon",), size=("40k",))
    text = run_ladder(less)[1].read_text()
    assert [bool(cell) for cell in cells_of(text, "muon")[1:5]] == [True, True, False, False]
    assert [bool(cell) for cell in cells_of(text, "batch")[1:5]] == [True, True, False, False]
