"""Runs side by side: a table and a picture out of their records."""

import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.compare import Curve, main, picture, read_curve, table, watched_by
from model.presets import gpt2_tiny
from train.records import Record
from train.settings import Phase, Settings, to_json
from train.tasks.classification import Classification


def make_run(folder, losses, reason=None, task=None, **figures):
    folder.mkdir(parents=True)
    settings = Settings(phases=(Phase(10, gpt2_tiny(), 4, 8),), task=task)
    (folder / "settings.json").write_text(json.dumps(to_json(settings)))
    with Record(folder / "metrics.jsonl") as record:
        for number, loss in enumerate(losses, start=1):
            record.write("train", 10 * number, {"loss": 99.0})
            row = {"loss": loss, "seconds": 1.5 * number, **figures}
            record.write("evaluation", 10 * number, row)
    if reason:
        (folder / "result.json").write_text(json.dumps({"reason": reason}))
    return folder


def test_a_curve_is_the_evaluations_of_a_run(tmp_path):
    curve = read_curve(make_run(tmp_path / "a", [4.0, 3.0, float("nan")], "nonfinite"))
    assert (curve.name, curve.steps, curve.seconds) == ("a", [10, 20, 30], [1.5, 3.0, 4.5])
    np.testing.assert_array_equal(curve.values, [4.0, 3.0, np.nan])
    assert curve.result == {"reason": "nonfinite"}


def test_the_table_has_last_and_best_losses_and_the_ends(tmp_path):
    first = read_curve(make_run(tmp_path / "first", [4.0, 2.5, 2.75], "finished"))
    second = read_curve(make_run(tmp_path / "second", [3.5]))
    third = read_curve(make_run(tmp_path / "third", [4.0, float("nan")], "nonfinite"))
    assert table([first, second, third]).split("\n")[2:] == [
        "| first | 30 | 4.5 | 2.7500 | 2.5000 | finished |",
        "| second | 10 | 1.5 | 3.5000 | 3.5000 | still running |",
        "| third | 20 | 3.0 | nan | 4.0000 | nonfinite |",
    ]


def test_the_best_loss_is_a_number_wherever_there_is_one():
    curve = Curve("a", [1, 2], [float("nan"), 3.0], [1.0, 2.0], {})
    assert "| 3.0000 | 3.0000 |" in table([curve])


def test_the_picture_opens_and_shows_the_curves(tmp_path):
    curve = Curve("a", [1, 2, 3], [4.0, 3.0, 2.5], [0.5, 1.0, 1.5], {})
    for name, curves in {"with": [curve], "without": [Curve("a", [], [], [], {})]}.items():
        picture(curves, tmp_path / f"{name}.png")
    images = [imread(tmp_path / f"{name}.png") for name in ("with", "without")]
    assert images[0].shape == (468, 1170, 4)  # 9 by 3.6 inches at 130 dots
    colours = [len(np.unique(image.reshape(-1, 4), axis=0)) for image in images]
    assert colours[0] > colours[1]  # a line in colour, beside black on white


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, [4.0, 3.0], "finished") for name in ("one", "two")]
    out = tmp_path / "out" / "comparison"
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--out", str(out)])
    main()
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed
    assert printed.count("| finished |") == 2
    assert imread(out / "comparison.png").ndim == 3


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name / "run", [4.0]) for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    main()
    printed = capsys.readouterr().out
    assert all(f"| {run} |" in printed for run in runs)


def test_runs_of_a_task_are_compared_by_what_they_were_watched_by(tmp_path, monkeypatch, capsys):
    task = Classification(labels=("a", "b"))
    first = make_run(tmp_path / "first", [4.0, 3.0], task=task, accuracy=0.5, f1=0.25)
    second = make_run(tmp_path / "second", [2.0], task=task, accuracy=0.75, f1=0.125)
    plain = make_run(tmp_path / "plain", [1.0])
    assert watched_by([first, second]) == "-accuracy"
    assert watched_by([first, plain]) == "loss"
    out = ["--out", str(tmp_path / "out")]
    for more, wanted in (([], "best accuracy"), (["--figure=-f1"], "best f1")):
        monkeypatch.setattr(sys, "argv", ["compare", str(first), str(second), *more, *out])
        main()
        assert wanted in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"plain have no 'f1'; they have loss, seconds"):
        read_curve(plain, "f1")


def test_the_best_is_the_most_where_more_is_better():
    curve = Curve("a", [1, 2, 3], [0.5, 0.75, float("nan")], [1.0, 2.0, 3.0], {})
    assert "| nan | 0.7500 |" in table([curve], "-accuracy")
    assert "| nan | 0.5000 |" in table([curve], "loss")


def test_what_is_no_run_or_has_no_evaluation_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no settings\.json"):
        read_curve(tmp_path)
    with pytest.raises(ValueError, match="young has no evaluation yet"):
        read_curve(make_run(tmp_path / "young", []))
    (tmp_path / "new").mkdir()
    settings = make_run(tmp_path / "other", []) / "settings.json"
    (tmp_path / "new" / "settings.json").write_text(settings.read_text())
    with pytest.raises(ValueError, match="new has no evaluation yet"):
        read_curve(tmp_path / "new")
