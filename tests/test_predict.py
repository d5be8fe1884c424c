"""Predicting without training: the same answers as the report's, from runs and from folders."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.compress import Compress
from experiments.compress import run_command as compress
from experiments.compression.compressors import Magnitude, RoundToNearest
from experiments.convert import to_huggingface
from experiments.finetune import settings_of
from experiments.predict import Predict, run_command
from experiments.runs.execute import execute
from experiments.runs.run import open_run
from experiments.task_report import report_task
from model.presets import modern_mini, modern_tiny
from tests.test_finetune import LOOP, QUIET, command, files, settings_for  # noqa: F401 (fixture)
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.settings import Phase
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rows import RowFormat
from train.tasks.task import TaskFiles

pytest.importorskip("sklearn")


@pytest.fixture
def run(files, tmp_path):  # noqa: F811
    execute(settings_for(files), tmp_path / "run", QUIET)
    report_task(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def numbers(tmp_path):
    """A regression on numbers far from 0, and its file."""
    path = tmp_path / "numbers.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{'ab' * n}\t{100 + 5 * n}\n" for n in range(1, 6)))
    three = TaskFiles(tuple((split, str(path)) for split in ("train", "valid", "test")))
    how = dataclasses.replace(QUIET, loop=dataclasses.replace(LOOP, watch="loss"))
    execute(settings_for(three, task=Regression), tmp_path / "regression", how)
    report_task(tmp_path / "regression")
    return tmp_path / "regression", path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(rows, expected):
    """The same guesses; numbers may differ by how the program was cut into pieces."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name in ("prediction", "probabilities"):
            ours, theirs = row.get(name), other.get(name)
            if isinstance(ours, str) or ours is None:
                assert ours == theirs
            else:
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_predictions_are_those_of_the_report(run, files, tmp_path):  # noqa: F811
    test = dict(files.paths)["test"]
    said = run_command(Predict(str(run), test, tmp_path / "out" / "a.jsonl"))
    expected = lines(run / "predictions-test.jsonl")
    close(lines(tmp_path / "out" / "a.jsonl"), expected)
    accuracy = np.mean([row["prediction"] == row["label"] for row in expected])
    assert any(f"accuracy {accuracy:.4f}" in line for line in said)
    bare = tmp_path / "bare.csv"
    bare.write_text("sentence\n" + "".join(f"{row['text']}\n" for row in expected))
    unlabelled = Predict(str(run), bare, tmp_path / "b.jsonl", True, ("text=sentence",))
    said = run_command(unlabelled)
    close(lines(tmp_path / "b.jsonl"), expected)
    assert not any("accuracy" in line for line in said)


def test_rows_without_labels_for_a_run_whose_columns_were_named(files, tmp_path):  # noqa: F811
    """Its label has a name of its own, which a file without labels does not have."""
    named = {}
    for split, path in files.paths:
        named[split] = tmp_path / f"{split}.tsv"
        with open(path) as file:
            named[split].write_text(file.read().replace("text\tlabel", "said\tmood", 1))
    form = RowFormat((("text", "said"), ("label", "mood")))
    its_own = TaskFiles(tuple((split, str(path)) for split, path in named.items()), form)
    execute(settings_for(its_own), tmp_path / "run", QUIET)
    bare = tmp_path / "bare.csv"
    bare.write_text("said\n" + "".join(f"{word}\n" for word in ("good", "bad", "ugly")))
    ask = Predict(str(tmp_path / "run"), bare, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"has no column 'mood'.*give --unlabelled"):
        run_command(ask)
    run_command(dataclasses.replace(ask, unlabelled=True))
    assert [row["text"] for row in lines(tmp_path / "a.jsonl")] == ["good", "bad", "ugly"]
    with pytest.raises(ValueError, match="--rename has 'mood'; give NAME=VALUE, as in 0=NEGATIVE"):
        run_command(dataclasses.replace(ask, rename=("mood",), out=tmp_path / "b.jsonl"))


def test_a_folder_of_transformers_says_the_same(files, tmp_path):  # noqa: F811
    """Its rows are the text alone; its labels may have other names than the file's."""
    settings = settings_for(files, task=lambda f, dropout: Classification(f, template="{text}"))
    execute(settings, tmp_path / "run", QUIET)
    report_task(tmp_path / "run")
    to_huggingface(tmp_path / "run", tmp_path / "hf")
    test, renamed = dict(files.paths)["test"], tmp_path / "renamed.tsv"
    with open(test) as file:
        renamed.write_text(file.read().replace("\tgood", "\t1").replace("\tbad", "\t0"))
    ask = Predict(f"hf:{tmp_path / 'hf'}", renamed, tmp_path / "c.jsonl", tokenizer="bytes")
    with pytest.raises(ValueError, match="not among those of the training file"):
        run_command(ask)
    said = run_command(dataclasses.replace(ask, rename=("0=bad", "1=good")))
    close(lines(tmp_path / "c.jsonl"), lines(tmp_path / "run" / "predictions-test.jsonl"))
    accuracy = json.loads((tmp_path / "run" / "task.json").read_text())["test"]["accuracy"]
    assert any(f"accuracy {accuracy:.4f}" in line for line in said)
    with pytest.raises(ValueError, match="keeps its tokenizer"):
        run_command(dataclasses.replace(ask, run=str(tmp_path / "run"), out=tmp_path / "d.jsonl"))


def test_a_folder_of_ours_says_how_its_rows_are_written(run, files, tmp_path):  # noqa: F811
    """With ends of documents around the text, which no folder from elsewhere has."""
    said = to_huggingface(run, tmp_path / "hf")
    assert any("'{end}{text}{end}' (row_template in config.json)" in line for line in said)
    test = dict(files.paths)["test"]
    ask = Predict(f"hf:{tmp_path / 'hf'}", test, tmp_path / "a.jsonl", tokenizer="bytes")
    run_command(ask)
    expected = lines(run / "predictions-test.jsonl")
    close(lines(tmp_path / "a.jsonl"), expected)
    bare = dataclasses.replace(ask, template="{text}", out=tmp_path / "b.jsonl")
    run_command(bare)
    apart = zip(lines(tmp_path / "b.jsonl"), expected, strict=True)
    assert any(
        abs(a["probabilities"]["good"] - b["probabilities"]["good"]) > 1e-4 for a, b in apart
    )


def test_columns_are_called_as_in_training(files, tmp_path):  # noqa: F811
    named = []
    for split, path in files.paths:
        renamed = tmp_path / f"{split}-named.tsv"
        renamed.write_text(Path(path).read_text().replace("text\tlabel", "sentence\tmood"))
        named.append((split, str(renamed)))
    columns = (("text", "sentence"), ("label", "mood"))
    theirs = TaskFiles(tuple(named), RowFormat(columns=columns))
    execute(settings_for(theirs), tmp_path / "run", QUIET)
    said = run_command(Predict(str(tmp_path / "run"), named[2][1], tmp_path / "a.jsonl"))
    assert any("accuracy" in line for line in said)
    plain = Predict(
        str(tmp_path / "run"),
        dict(files.paths)["test"],
        tmp_path / "b.jsonl",
        columns=("text=text", "label=label"),
    )
    run_command(plain)
    close(lines(tmp_path / "b.jsonl"), lines(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("method", [RoundToNearest("q8_0"), Magnitude()])
def test_a_classifier_with_an_idle_head_is_compressed(files, tmp_path, method):  # noqa: F811
    """The head of its language model lies beside what the task computes with, in plain numbers."""
    untied = Phase(8, modern_tiny(), batch_size=4, sequence_length=12)
    execute(settings_for(files, phases=(untied,)), tmp_path / "run", QUIET)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    ask = Compress(
        method=method, run=tmp_path / "run", out=tmp_path / "small", calibration=str(text)
    )
    compress(ask)
    before, after = (open_run(tmp_path / name) for name in ("run", "small"))
    heads = (opened.params["head"]["kernel"] for opened in (after, before))
    np.testing.assert_allclose(*heads, atol=1e-3)  # of 8 bits
    test = dict(files.paths)["test"]
    said = run_command(Predict(str(tmp_path / "small"), test, tmp_path / "a.jsonl"))
    assert any("accuracy" in line for line in said)


def test_a_regression_leaves_in_its_own_units(numbers, tmp_path):
    run, path = numbers
    kernel = np.asarray(open_run(run).params["score"]["kernel"])
    task = open_run(run).settings.task
    assert task.mean == pytest.approx(115)
    said = to_huggingface(run, tmp_path / "hf")
    assert any("plus 115 (label_mean" in line for line in said)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["label_mean"] == pytest.approx(115)
    start = command(
        TaskFiles((("train", str(path)), ("valid", str(path)))),
        tmp_path / "again",
        task=Regression(),
        model=modern_mini(),
        start=f"hf:{tmp_path / 'hf'}",
        tokenizer="bytes",
    )
    settings, _ = settings_of(start)
    assert (settings.task.mean, settings.task.scale) == (pytest.approx(115), 1.0)
    head = np.asarray(open_run(tmp_path / "again" / "start").params["score"]["kernel"])
    np.testing.assert_allclose(head, kernel * task.scale, rtol=1e-5)
    run_command(Predict(str(run), path, tmp_path / "a.jsonl"))
    close(lines(tmp_path / "a.jsonl"), lines(run / "predictions-test.jsonl"))


def test_a_start_says_how_its_head_reads(run, files, tmp_path):  # noqa: F811
    execute(
        settings_for(files, task=lambda f, dropout: Classification(f, template="{text}")),
        tmp_path / "other",
        QUIET,
    )
    plain = {"tokenizer": None, "model": modern_mini()}
    given = command(files, tmp_path / "again", start=str(tmp_path / "other"), **plain)
    assert settings_of(given)[0].task.template == "{text}"
    own = dataclasses.replace(given, task=Classification(template="{end}{text}"))
    assert settings_of(own)[0].task.template == "{end}{text}"


def test_what_is_no_row_task_is_refused(run, tmp_path, files):  # noqa: F811
    test = dict(files.paths)["test"]
    (tmp_path / "there.jsonl").touch()
    bad = {
        "exists already": Predict(str(run), test, tmp_path / "there.jsonl"),
        "batch_size is 0": Predict(str(run), test, tmp_path / "a.jsonl", batch_size=0),
        "has no column 'text'": Predict(
            str(run), test, tmp_path / "a.jsonl", column_names=("a", "b"), unlabelled=True
        ),
        "rename is for labels of the file": Predict(
            str(run), test, tmp_path / "a.jsonl", unlabelled=True, rename=("a=bad",)
        ),
    }
    for why, asked in bad.items():
        with pytest.raises(ValueError, match=why):
            run_command(asked)
