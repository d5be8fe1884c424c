"""Time to a loss: the first crossing counts, and nothing that ran on is taken for it."""

from pathlib import Path

import pytest

from experiments.grid import Cell, Result
from experiments.protocol import Time, table, time_to, tokens_until
from model.presets import gpt2_tiny
from train.settings import Phase, Settings

PHASES = (Phase(10, gpt2_tiny(), 4, 8), Phase(20, gpt2_tiny(), 2, 32))
SECONDS = {"compile": 8.0, "data": 1.0, "step": 30.0, "evaluation": 4.0, "checkpoint": 2.0}


def result(evaluations, step=None, phases=PHASES[:1]):
    rows = [
        {"kind": "evaluation", "step": n, "loss": loss, "seconds": n} for n, loss in evaluations
    ]
    last = step or evaluations[-1][0]
    cell = Cell("ours", Settings(phases=phases))
    return Result(cell, Path("run"), "target", last, SECONDS, rows)


def test_the_time_of_a_run_that_stopped_at_its_first_crossing():
    found = time_to(result([(2, 4.0), (4, 3.5), (6, 2.9)]), 3.0)
    assert found == Time("ours", True, 2.9, 6, 6 * 4 * 8, training=31.0, total=45.0)


def test_at_the_target_is_reached():
    assert time_to(result([(2, 4.0), (4, 3.0)]), 3.0).reached


@pytest.mark.parametrize("last", [2.0, 3.5])
def test_a_run_that_went_on_after_the_crossing_is_refused(last):
    """Also where it lost the target again: its seconds are not those to the crossing."""
    with pytest.raises(ValueError, match=r"ours crossed 3.0000 at step 4 and ran to 6; set target"):
        time_to(result([(2, 4.0), (4, 2.5), (6, last)]), 3.0)


def test_steps_after_the_evaluation_that_crossed_are_refused():
    with pytest.raises(ValueError, match="at step 4 and ran to 5"):
        time_to(result([(2, 4.0), (4, 2.5)], step=5), 3.0)


@pytest.mark.parametrize("last", [3.0001, "nan"])
def test_a_run_that_never_crossed_is_said_to_have_not(last):
    found = time_to(result([(2, 4.0), (4, last)]), 3.0)
    assert not found.reached
    assert found.steps == 4
    assert table([found, found]).count("not reached") == 4


def test_a_run_that_diverged_before_its_first_evaluation_is_a_row():
    found = time_to(result([], step=3), 3.0)
    assert (found.reached, found.steps) == (False, 3)
    assert "nan" in table([found])


def test_tokens_are_those_of_the_phases_gone_through():
    settings = Settings(phases=PHASES)
    assert [tokens_until(settings, n) for n in (0, 1, 10, 11, 30)] == [0, 32, 320, 384, 1600]
    assert time_to(result([(12, 2.0)], phases=PHASES), 3.0).tokens == 320 + 2 * 64


def test_ratios_compare_with_the_first_row():
    base = Time("baseline", True, 3.0, 100, 1000, training=60.0, total=90.0)
    ours = Time("ours", True, 2.95, 20, 200, training=10.0, total=30.0)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table([base, ours]).split("\n")
    ]
    assert rows[0] == [
        *("run", "loss", "steps", "tokens", "training s", "speed-up", "all s", "speed-up"),
    ]
    assert rows[2] == ["baseline", "3.000", "100", "1,000", "60.0", "1.0x", "90.0", "1.0x"]
    assert rows[3] == ["ours", "2.950", "20", "200", "10.0", "6.0x", "30.0", "3.0x"]
