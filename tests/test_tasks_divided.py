"""One file of a task that is divided into splits by its rows."""

import numpy as np
import pytest

from model.presets import modern_tiny
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rows import RowFormat
from train.tasks.task import TaskFiles
from train.tokenizers.tokenizer import load_tokenizer

T = 16
CONFIG = modern_tiny(vocabulary_size=257)
LINES = [f"{'good' if n % 3 else 'bad'} number {n}\t{'yes' if n % 3 else 'no'}" for n in range(13)]


def test_one_file_alone_serves_all_splits(tmp_path, monkeypatch):
    """Each row in one split, by what it says: twice the same text lies in one, moved or not."""
    path = tmp_path / "all.csv"
    rows = [f"words {n % 40} and more,{'abc'[n % 3]}" for n in range(80)]
    path.write_text("\n".join(["text,label", *rows, "once only,rare"]) + "\n")
    task = Classification(TaskFiles((("train", str(path)),))).resolve()
    assert task.labels == ("a", "b", "c", "rare")  # which is held out
    assert task.resolve() == task
    tokenizer = load_tokenizer("bytes")

    def texts(of, split):
        return [row.columns["text"] for row in of.examples(split, tokenizer, T).rows]

    found = {split: texts(task, split) for split in ("train", "valid", "test")}
    assert sum(map(len, found.values())) == 81
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not set(found[one]) & set(found[other])
    assert len(found["train"]) > 81 / 2
    path.write_text("\n".join(["text,label", *reversed(rows), "once only,rare"]) + "\n")
    moved = Classification(TaskFiles((("train", str(path)),))).resolve()
    for split, those in found.items():
        assert sorted(texts(moved, split)) == sorted(those)
    path.write_text("text,label\n" + "".join(f"a,{n}\nb,{n}\n" for n in (1, 2)))
    few = Regression(TaskFiles((("train", str(path)),)))
    with pytest.raises(ValueError, match=r"of the 4 rows .* none falls to \w+; give a file"):
        [texts(few.resolve(), split) for split in ("train", "valid", "test")]


def test_what_one_file_leaves_out_is_counted_once(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("text,label\n,1\n" + "".join(f"text {n},{n % 2}\n" for n in range(60)))
    form = RowFormat(bad_rows="skip")
    task = Regression(TaskFiles((("train", str(path)),), form)).resolve()
    made = {s: task.examples(s, load_tokenizer("bytes"), T) for s in ("train", "valid", "test")}
    assert [len(each.bad) for each in made.values()] == [1, 0, 0]
    values = [
        float(row.columns["label"]) for row in made["train"].rows
    ]  # held-out rows say nothing
    assert task.mean == np.mean(values)
