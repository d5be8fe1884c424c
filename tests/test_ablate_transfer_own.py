"""The tables of transfer on a user's own files: how they are named, divided and run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.ablate import transfer_multi30k as multi30k
from experiments.ablate import transfer_own as own
from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate.__main__ import Ablate, own_files, run_command
from experiments.json_files import read_json
from experiments.tables.table import Request
from model.presets import encoder_decoder_tiny, modern_mini
from tests.squad_cases import colours, write_squad
from tests.test_run import own_cache  # noqa: F401 (fixture)
from train.settings import digest
from train.tasks.rows import RowFormat, content_hash

pytest.importorskip("sklearn")
WORDS = {"calm": "sea lake moss", "glad": "song dance sun", "sore": "thorn blister ache"}


@pytest.fixture
def reviews(tmp_path):
    """One file of three labels, its columns called in its own way."""
    draw = np.random.default_rng(0)
    rows = []
    for n in range(90):
        label = list(WORDS)[n % 3]
        said = " ".join(draw.choice(WORDS[label].split(), 4))
        rows.append({"review": f"{said} {n}", "mood": label})
    path = tmp_path / "my reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def captions(tmp_path):
    for side in ("en", "de"):
        lines = [f"{'a man' if side == 'en' else 'ein Mann'} {n}\n" for n in range(60)]
        (tmp_path / f"all.{side}").write_text("".join(lines))
    return f"{tmp_path / 'all.en'},{tmp_path / 'all.de'}"


def command(**fields):
    columns = ("text=review", "label=mood")
    return Ablate("transfer", **{"columns": columns} | fields)


def test_any_labels_and_columns_make_the_rows_of_the_table(reviews, tmp_path):
    files, none = own_files(command(labelled=(str(reviews),)))
    assert none is None
    request = Request(tmp_path / "cells", seeds=1, labelled=files)
    items = own.labelled_cells(request)
    assert [item.name for item in items] == [
        own.BASELINE,
        *(item.name for item in sst2.cells_of(request, rows_of(request), {"a": 1})),
    ]
    assert len({item.key for item in items}) == len(items)
    run = next(item for item in items if item.name == sst2.FULL).needs[0]
    assert run.settings.task.labels == ("calm", "glad", "sore")
    (language,) = (item for item in items if item.name == sst2.LANGUAGE)
    assert language.settings.data[1:] == ("stdlib",)  # no plays were given
    # The language model has read the training rows, and no others.
    texts = language.needs[0]
    texts.function(texts.settings)
    kept = (request.cells / texts.key / "sentences.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in kept] == list(run.settings.task.texts())
    assert 90 / 2 < len(kept) < 90
    found = items[0].function(items[0].settings)
    assert found["accuracy"] == 1.0  # the words say it
    assert (sum(found["rows"].values()), found["labels"]) == (90, 3)
    # By content and format, not by place.
    moved = reviews.rename(tmp_path / "moved.jsonl")
    again = replace(request, labelled=own_files(command(labelled=(str(moved),)))[0])
    assert [item.key for item in own.labelled_cells(again)] == [item.key for item in items]
    assert own.name_of(files).startswith("my-reviews-")
    assert own.name_of(files)[-8:] == own.name_of(again.labelled)[-8:]
    with moved.open("a") as file:
        file.write('{"review": "more", "mood": "odd"}\n')
    other, _ = own_files(command(labelled=(str(moved),)))
    assert own.name_of(other)[-8:] != own.name_of(files)[-8:]


def rows_of(request):
    return sst2.Rows(sst2.task_of(request.labelled), "bytes", 32)


def test_one_pair_of_files_is_divided(captions, tmp_path):
    _, files = own_files(Ablate("transfer", parallel=(captions,)))
    items = own.parallel_cells(Request(tmp_path / "cells", seeds=2, parallel=files))
    assert len(items) == 1 + 2 * (1 + len(multi30k.SEARCHES))
    assert sum(items[0].function(items[0].settings)["rows"].values()) == 60
    assert items[1].needs[0].settings.tokenizer == "bytes"  # so few words


def test_other_data_make_a_report_of_their_own(tmp_path, monkeypatch):
    path = write_squad(tmp_path / "my squad.json", [colours(seed, 1) for seed in range(20)])
    request = Request(squad=path)
    name = own.other_data(request)
    assert name.startswith("my-squad-")
    copy = tmp_path / "my squad.again.json"
    copy.write_bytes(path.read_bytes())
    assert own.other_data(Request(squad=copy)) == name
    plays = tmp_path / "plays.txt"
    plays.write_text("Enter a ghost.")
    assert own.other_data(replace(request, shakespeare=plays)) not in (name, "")
    assert own.other_data(Request()) == ""
    monkeypatch.setitem(own.KNOWN, "squad", digest([content_hash(path)]))
    assert own.other_data(request) == ""  # the tables' own
    assert own.other_data(replace(request, shakespeare=plays)).startswith("plays-")


def test_a_published_report_is_not_written_over(tmp_path, monkeypatch):
    path = write_squad(tmp_path / "other.json", [colours(seed, 1) for seed in range(20)])
    seen = {}

    def run_tables(topic, tables, chosen, request, path, **more):
        seen.update(path=path, tables=[table.name for table in tables], **more)
        return []

    monkeypatch.setattr("experiments.ablate.__main__.run_tables", run_tables)
    run_command(Ablate("transfer", squad=path, results=tmp_path, out=tmp_path / "out"))
    assert seen["path"].name.startswith("transfer-other-")
    assert seen["tables"] == ["squad"]
    assert seen["command"].endswith(f"transfer --squad {path}")
    monkeypatch.setitem(own.KNOWN, "squad", digest([content_hash(path)]))
    run_command(Ablate("transfer", squad=path, results=tmp_path, out=tmp_path / "out"))
    assert seen["path"].name.startswith("transfer-cpu")
    assert "sst2" in seen["tables"]


def test_what_does_not_fit_is_said(reviews, tmp_path):
    path = str(reviews)
    for fields, why in (
        ({"labelled": (path,), "parallel": (path,)}, "--labelled --parallel: a report on own"),
        ({"labelled": (path,), "sst2": tmp_path}, "without other data"),
        ({"labelled": (f"train={path}", f"test={path}")}, "not files for all splits"),
        ({"labelled": (path, path)}, "not files for all splits"),
        ({}, "are for own files"),
        ({"labelled": (path,), "columns": ("text=body",)}, r"no column 'body'.*'review', 'mood'"),
        ({"labelled": (str(tmp_path / "none.csv"),)}, "is not there"),
        ({"labelled": (path,), "topic": "rates"}, "is one of transfer"),
    ):
        with pytest.raises(ValueError, match=why):
            own_files(replace(command(), **fields))
    with pytest.raises(ValueError, match="files for all splits"):
        own.files_named(("valid=a",), RowFormat())


@pytest.mark.slow
def test_a_report_on_own_files(reviews, captions, tmp_path, monkeypatch, own_cache):  # noqa: F811
    for name, value in {
        "STEPS": 4,
        "EVERY": 2,
        "KEEP_EVERY": 2,
        "BUCKETS": 64,
        "LANGUAGE_STEPS": 2,
        "LANGUAGE_ROWS": 2,
        "ROWS": 2,
        "WAYS": (sst2.SCRATCH, sst2.HEAD, sst2.FULL),
        "SHARES": {0.1: 2, 1.0: 4},
        "REPEATS": 2,
        "model_of": lambda dropout, length: modern_mini(
            layers=1, width=16, heads=2, dropout=dropout
        ),
    }.items():
        monkeypatch.setattr(sst2, name, value)
    where = {"out": tmp_path / "out", "results": tmp_path / "results", "seeds": 1}
    written = run_command(command(labelled=(str(reviews),), **where))
    text = written[1].read_text()
    assert written[0].name.startswith("transfer-my-reviews-")
    assert "3 labels, of which the commonest is" in text
    assert "that TF-IDF and logistic regression on words reach" in text
    assert "| from scratch |" in text
    assert "Missing" not in text
    assert len(read_json(written[0])["cells"]) == 1 + 1 + 3 + 4 + 1

    sizes = {"STEPS": 2, "EVALUATE_EVERY": 1, "WARMUP": 0, "ROWS": 2, "LENGTH": 48}
    searches = {"greedy": (1, 0.0), "2 beams": (2, 0.6)}
    tiny = {"encoder_decoder_mini": lambda **_: encoder_decoder_tiny(max_length=64)}
    for name, value in {**sizes, **tiny, "SEARCHES": searches}.items():
        monkeypatch.setattr(multi30k, name, value)
    written = run_command(command(parallel=(captions,), columns=(), **where))
    text = written[1].read_text()
    assert "Pairs: train" in text
    assert "| 2 beams |" in text
    assert f"--parallel {captions}" in text
