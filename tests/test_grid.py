"""Cells: named by what they are, run once, resumed, and read from their results alone."""

import dataclasses
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grid
from experiments.grid import Cell, read_result, run_cells
from experiments.runs.execute import Execution
from model.presets import gpt2_tiny
from train.loop import LoopSettings
from train.records import Record
from train.schedules import Constant
from train.settings import Phase, Settings, fingerprint

SETTINGS = Settings(phases=(Phase(6, gpt2_tiny(), 4, 8),), tokenizer="bytes", schedule=Constant())


def cells_of(*seeds):
    return [Cell("ours", dataclasses.replace(SETTINGS, seed=seed)) for seed in seeds]


class Executor:
    """Ends each run at once, as `ends` says, and notes which were asked for and how."""

    def __init__(self):
        self.seeds, self.loops, self.ends, self.minutes = [], [], {}, 0.0

    def __call__(self, settings, folder, execution):
        self.seeds.append(settings.seed)
        self.loops.append(execution.loop)
        self.minutes += 10
        reason = self.ends.get(settings.seed, "finished")
        with Record(folder / "metrics.jsonl") as record:
            record.write("train", 3, {"loss": 9.0})
            if reason != "nonfinite":
                record.write("evaluation", 6, {"loss": 2.0 + settings.seed, "seconds": 1.0})
        content = {"reason": reason, "step": 6, "evaluation": {}, "seconds": {"step": 4.0}}
        (folder / "result.json").write_text(json.dumps(content))
        return SimpleNamespace(reason=reason, state=SimpleNamespace(step=jnp.int32(6)))


@pytest.fixture
def executor(monkeypatch):
    executor = Executor()
    monkeypatch.setattr(grid, "execute", executor)
    clock = SimpleNamespace(monotonic=lambda: 60 * executor.minutes)
    monkeypatch.setattr(grid, "time", clock)
    return executor


def test_a_cell_lies_under_the_hash_of_its_settings(tmp_path, executor):
    (cell,) = cells_of(0)
    assert cell.key == fingerprint(cell.settings, cell.loop)
    run_cells([cell], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [cell.key]
    same = Cell("another name", dataclasses.replace(SETTINGS, seed=0))
    assert same.key == cell.key
    others = [
        Cell("ours", dataclasses.replace(SETTINGS, seed=1)),
        Cell("ours", dataclasses.replace(SETTINGS, z_loss=1e-4)),
        Cell("ours", cell.settings, LoopSettings(target_loss=3.0)),
        Cell("ours", cell.settings, LoopSettings(evaluate_every=2)),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 5


def test_only_missing_cells_run_and_all_results_come_in_order(tmp_path, executor):
    run_cells(cells_of(1), tmp_path)
    results = run_cells(cells_of(0, 1, 2), tmp_path)
    assert executor.seeds == [1, 0, 2]
    assert [result.cell.settings.seed for result in results] == [0, 1, 2]
    assert [result.loss for result in results] == [2.0, 3.0, 4.0]
    run_cells(cells_of(2, 1, 0), tmp_path)
    assert executor.seeds == [1, 0, 2]


def test_a_cell_is_run_by_its_own_loop(tmp_path, executor):
    loop = LoopSettings(target_loss=3.0, evaluate_every=2)
    how = Execution(LoopSettings(log_every=77), progress=False)
    run_cells([Cell("ours", SETTINGS, loop)], tmp_path, execution=how)
    assert executor.loops == [loop]


def test_no_cell_starts_when_the_minutes_are_up_but_finished_ones_are_shown(tmp_path, executor):
    run_cells(cells_of(3), tmp_path)
    results = run_cells(cells_of(0, 1, 2, 3), tmp_path, max_minutes=15)
    assert executor.seeds == [3, 0, 1]  # each takes 10 minutes; after 20 none is begun
    assert [result.cell.settings.seed for result in results] == [0, 1, 3]
    assert run_cells(cells_of(2), tmp_path, max_minutes=0) == []


def test_a_cell_stopped_by_a_signal_stops_the_command_and_goes_on_with_the_next(tmp_path, executor):
    executor.ends = {1: "signal"}
    with pytest.raises(
        KeyboardInterrupt, match="ours is saved at step 6; the same command goes on"
    ):
        run_cells(cells_of(0, 1, 2), tmp_path)
    assert executor.seeds == [0, 1]
    assert read_result(cells_of(1)[0], tmp_path) is None
    executor.ends = {}
    assert len(run_cells(cells_of(0, 1, 2), tmp_path)) == 3
    assert executor.seeds == [0, 1, 1, 2]


def test_results_are_read_without_running_or_opening_anything_else(tmp_path, executor):
    before = run_cells(cells_of(0, 1), tmp_path)
    for folder in tmp_path.iterdir():
        for path in folder.iterdir():
            if path.name not in ("result.json", "metrics.jsonl"):
                shutil.rmtree(path)
    executor.ends = None  # would fail if it were asked
    after = [read_result(cell, tmp_path) for cell in cells_of(0, 1)]
    assert after == before
    assert [row["step"] for row in after[0].evaluations] == [6]
    assert (after[0].reason, after[0].seconds) == ("finished", {"step": 4.0})
    assert read_result(cells_of(7)[0], tmp_path) is None


def test_a_run_that_diverged_is_a_result_too(tmp_path, executor):
    executor.ends = {0: "nonfinite"}
    (result,) = run_cells(cells_of(0), tmp_path)
    assert result.reason == "nonfinite"
    assert math.isnan(result.loss)


@pytest.mark.slow
def test_a_real_cell_goes_on_after_a_signal_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    draw = np.random.default_rng(0)
    text.write_text("".join(chr(97 + c) for c in draw.integers(0, 4, 2000)))
    loop = LoopSettings(log_every=1, evaluate_every=2)
    cell = Cell("ours", dataclasses.replace(SETTINGS, data=(str(text),)), loop)
    how = Execution(progress=False)
    (calm,) = run_cells([cell], tmp_path / "calm", execution=how)

    write = Record.write

    def interrupted(self, kind, step, values):
        if (kind, step) == ("evaluation", 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, kind, step, values)

    monkeypatch.setattr(Record, "write", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved at step 4"):
        run_cells([cell], tmp_path / "cells", execution=how)
    monkeypatch.setattr(Record, "write", write)
    (result,) = run_cells([cell], tmp_path / "cells", execution=how)
    losses = [[row["loss"] for row in each.evaluations] for each in (result, calm)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert result.step == calm.step == 6
