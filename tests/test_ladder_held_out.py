"""The test split of the ladder: opened once, for rungs that are named, and nothing is searched."""

import numpy as np
import pytest

from experiments.ladder import command as command_module
from experiments.ladder.climb import TORCH, TORCH_TUNED, Site, enough, lengths_of, searched
from experiments.ladder.command import run_ladder
from experiments.ladder.held_out import planned, planned_row
from experiments.ladder.rows import mean_end
from experiments.ladder.scales import TINY
from experiments.tables.report import read
from tests.ladder_cases import TEST_IS_HARDER, Counting, cells_of, ladder, settings_of

CHOSEN = ("torch-tuned", "rate", "softcap", "cautious")
OPENED = ("rate", "cautious")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Which take longer than all else here."""
    monkeypatch.setattr(command_module, "draw", lambda site, path: False)


class Splits(Counting):
    """Remembers the split of each run as well."""

    def __call__(self, job, folder):
        super().__call__(job, folder)
        settings = settings_of(job)
        self.ran[-1] = (settings.held_out, job.name.partition(", ")[0], settings.seed, job.name)


@pytest.fixture
def climbed(tmp_path):
    run_ladder(ladder(tmp_path, rung=CHOSEN, seeds=2))
    return tmp_path


def sites(folder):
    gathered = read(folder / "results" / "speedrun-tiny.json")
    return [Site(TINY.at(held_out=split), folder, gathered) for split in ("validation", "test")]


def test_no_run_sees_the_test_split_unless_it_is_asked_for(tmp_path):
    run = Splits()
    run_ladder(ladder(tmp_path, rung=CHOSEN, seeds=2, run=run))
    run_ladder(ladder(tmp_path, tune=("muon",), run=Counting(bits_of=lambda job, share: 2.0)))
    assert {split for split, *_ in run.ran} == {"validation"}


def test_the_lengths_of_the_test_split_are_those_that_the_validation_split_chose(climbed):
    before = (climbed / "results" / "speedrun-tiny.md").read_text()
    run = Splits()
    command = ladder(climbed, rung=OPENED, seeds=2, held_out="test", run=run)
    text = run_ladder(command)[1].read_text()
    assert {split for split, *_ in run.ran} == {"test"}
    assert len(set(run.ran)) == len(run.ran)
    assert {name for _, name, *_ in run.ran} == {TORCH, TORCH_TUNED, *OPENED}
    validation, test = sites(climbed)
    for name in OPENED:
        for seed in range(2):
            # Every run of the test split misses: a search there would have asked for more.
            wanted = set()
            for baseline in (TORCH, TORCH_TUNED):
                if searched(name, baseline):
                    target = mean_end(validation, baseline)
                    best = enough(validation, name, seed, target)
                    under = [n for n in lengths_of(validation, name, seed) if n < best]
                    wanted |= {best, *under[-1:]}
            assert set(lengths_of(test, name, seed)) == wanted
    shown = before[before.index("## stdlib, bytes") :].strip()
    assert shown in text  # the validation section is as it was
    again = ladder(climbed, rung=OPENED, seeds=2, held_out="test", run=Splits())
    run_ladder(again)
    assert again.run.ran == []


def test_the_test_section_decides_nothing_and_gives_the_ends_of_whole_runs(climbed):
    command = ladder(climbed, rung=OPENED, seeds=2, held_out="test")
    text = run_ladder(command)[1].read_text()
    section = text[text.index("## stdlib, bytes, test") :]
    assert "What is kept" not in section
    assert "which no trial and no search has seen" in section
    _, test = sites(climbed)
    target = mean_end(test, TORCH_TUNED)
    assert f"To the end of the tuned baseline: {target:.4f}" in section
    row = planned_row(test, "cautious", TORCH_TUNED)
    ends = [end.bits - target for end in row.ends.values()]
    cells = cells_of(section, "cautious", "At the ends of the lengths")
    assert len(ends) == 2
    assert cells[4].startswith(f"{np.mean(ends):+.4f}")
    assert cells[5] == str(sum(end <= 0 for end in ends))
    whole = planned_row(test, TORCH_TUNED, TORCH_TUNED)
    ratios = [whole.ends[s].training / row.ends[s].training for s in range(2)]
    assert cells[7].startswith(f"{np.mean(ratios):.2f}")
    assert {end.tokens for end in whole.ends.values()} == {TINY.tokens}


def test_targets_of_the_test_split_are_the_baselines_own_ends_there(climbed):
    run_ladder(ladder(climbed, rung=("rate",), held_out="test"))
    validation, test = sites(climbed)
    for name in (TORCH, TORCH_TUNED):
        there = mean_end(test, name)
        assert there == pytest.approx(mean_end(validation, name) + TEST_IS_HARDER)
        assert len([s for s in range(9) if lengths_of(test, name, s)]) == TINY.target_seeds


def test_what_has_not_run_on_the_validation_split_is_refused(climbed):
    for fields, says in (
        ({"rung": ("muon",)}, r"muon \(seed 0\) have not been found on the validation split"),
        ({"rung": ("rate",), "seeds": 3}, r"rate \(seed 2\)"),
        ({}, "opened for rungs that are named"),
    ):
        command = ladder(climbed, held_out="test", **fields)
        with pytest.raises(ValueError, match=says):
            run_ladder(command)
        assert command.run.ran == []


def test_a_rung_that_reached_no_target_is_left_out(tmp_path, capsys):
    def hopeless(job, share):
        return 30.0 if job.name.startswith("muon") else 3.0 - share

    run_ladder(ladder(tmp_path, rung=("muon",), run=Counting(bits_of=hopeless)))
    command = ladder(tmp_path, rung=("muon",), held_out="test", run=Counting(bits_of=hopeless))
    run_ladder(command)
    assert "muon, seed 0: reached no target on the validation split" in capsys.readouterr().out
    assert not any(name.startswith("muon") for name in command.run.ran)


def test_a_baseline_is_planned_with_all_of_its_budget(climbed):
    _, test = sites(climbed)
    assert planned(test, TORCH_TUNED, 0, TORCH_TUNED) == TINY.tokens
    assert planned(test, TORCH, 0, TORCH) == TINY.tokens
    assert planned(test, TORCH_TUNED, 0, TORCH) < TINY.tokens
    assert planned(test, "torch-tuned-compiled", 0, TORCH_TUNED) == TINY.tokens
    assert planned(test, "softcap", 0, TORCH) is None  # which did not look for that
