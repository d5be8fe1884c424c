"""The experiment of the parameter server on a tiny scale: files, audit, resuming."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import parameter_server as experiment
from experiments.parameter_server_task import TaskSettings, make_task

SMALL = TaskSettings(layers=1, width=16, batch_size=2, sequence_length=16)
TINY = experiment.ParameterServer(SMALL, pace=0.02, rounds=6, evaluate_every=6, seeds=1)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, 4)) for _ in range(20)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in draw.integers(0, 20, 4000)))
    task = dataclasses.replace(SMALL, data=(str(path),))
    return dataclasses.replace(TINY, task=task, out=tmp_path / "out")


@pytest.mark.slow
def test_all_three_forms(command, monkeypatch):
    pytest.importorskip("ray")
    facts = experiment.run(command)
    forms = facts["forms"]
    assert list(forms) == list(experiment.FORMS)
    assert forms["synchronous"]["applied"] == 2 * 6  # rounds, on two servers
    assert forms["asynchronous"]["batches"] == 2 * 18  # twice as many as the synchronous form's
    assert forms["asynchronous"]["applied"] == 2 * 36 - forms["asynchronous"]["stale"]
    for row in forms.values():
        assert row["lost"] == 0
        assert row["applied"] == row["acknowledged"] + row["unheard"]
        assert np.isfinite(row["loss"]).all()
    assert forms["killed"]["replayed"] > 0
    assert forms["killed"]["unheard"] <= 2
    written = json.loads((command.out / "parameter_server.json").read_text())
    assert written["forms"].keys() == forms.keys()
    assert (command.out / "parameter_server.md").read_text().count("\n") == 5
    assert (command.out / "parameter_server.png").stat().st_size > 1000

    # What is there is not run again.
    monkeypatch.setattr(experiment, "one_run", None)
    assert experiment.run(command)["targets"] == facts["targets"]


def test_the_task_is_the_same_wherever_it_is_made(command):
    """Workers and driver build it for themselves: equal starts, gradients and batches."""
    a, b = (make_task(command.task, seed=1) for _ in range(2))
    np.testing.assert_array_equal(a.start, b.start)
    first, second = (task.gradient(task.start, 3) for task in (a, b))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert np.linalg.norm(first[0]) <= command.task.clip * (1 + 1e-5)
    stepped = a.start - 0.1 * first[0]
    assert a.gradient(stepped.astype(np.float32), 3)[1] < first[1]
    assert a.gradient(a.start, 4)[1] != first[1]


AUDIT = dict.fromkeys(("acknowledged", "applied", "lost", "unheard", "stale", "seen"), 0)


def a_run(form, seed, curve):
    facts = {"form": form, "seed": seed, "seconds": curve[-1][0], "slowest_step": 0.1}
    return facts | {"curve": curve, "loss": curve[-1][2], "audit": AUDIT, "replayed": 0}


def test_the_target_of_a_seed_is_that_of_its_own_synchronous_run():
    """A seed whose synchronous run ends above the mean of all reaches its target all the same."""
    start = (0.0, 0, 5.0)
    runs = [
        # In another order than the other forms': pairs are by seed.
        a_run("synchronous", 1, [start, (10.0, 6, 4.0)]),
        a_run("synchronous", 0, [start, (12.0, 6, 3.0)]),
        a_run("asynchronous", 0, [start, (2.0, 3, 3.5), (4.0, 6, 2.9)]),
        a_run("asynchronous", 1, [start, (20.0, 3, 3.9)]),
        a_run("killed", 0, [start, (4.0, 6, 3.1)]),
        a_run("killed", 1, [start, (4.0, 6, 3.9)]),
    ]
    facts = experiment.summary(TINY, runs)
    assert facts["targets"] == [3.0, 4.0]
    found = {form: row["seconds_to_target"] for form, row in facts["forms"].items()}
    assert found == {
        "synchronous": [12.0, 10.0],
        "asynchronous": [4.0, 20.0],
        "killed": [None, 4.0],
    }
    assert "1 of 2" in experiment.table(facts)
    words = experiment.faster(found["synchronous"], found["asynchronous"])
    assert words == (
        "in 3.00 (3.00 to 3.00) times less time in 1 of 2 pairs; "
        "in 2.00 (2.00 to 2.00) times more time in 1 of 2 pairs"
    )
    assert experiment.faster(found["synchronous"], found["killed"]).endswith("in 1 of 2 never")


def test_errors(command):
    with pytest.raises(ValueError, match="1 workers and 1 seeds"):
        experiment.run(dataclasses.replace(command, workers=1))
