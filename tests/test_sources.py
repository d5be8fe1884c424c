"""Sources: every form gives its documents exactly, in a fixed order, or says what is wrong."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.text import source_files, sources
from train.text.local_text import local_text_builder
from train.text.source_files import PIECE_BYTES, cut_position
from train.text.sources import open_source, parse_mixture

TEXTS = ["one\n", "zwei ä 世界 😀", "three\r\n\ttabs  and\x00nul", "x" * 3000]


class Ids:
    """As much of a tokenizer as shards need."""

    vocabulary_size = 100
    end_of_document = 99


def write_jsonl(path, texts, field="text"):
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    data = lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def write_llmc(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def token_documents(source):
    documents, parts = [], []
    for piece in source.pieces(Ids()):
        parts += piece.content.tolist()
        if piece.ends_document:
            documents.append(parts)
            parts = []
    assert not parts
    return documents


# What each form gives


def test_stdlib_is_its_source_without_tests_sorted_and_capped():
    source = open_source("stdlib")
    names = [path.as_posix() for _, path in source.files]
    assert 1_000_000 < source.size <= sources.STDLIB_BYTES
    assert all(name.endswith(".py") for name in names)
    assert not any(set(Path(n).parts[-4:-1]) & {"test", "tests", "site-packages"} for n in names)
    assert names == [p.as_posix() for _, p in open_source("stdlib").files] == sorted(names)
    texts = list(source.documents())
    filled = [p for _, p in source.files if p.stat().st_size]
    assert texts == [p.read_bytes().decode() for p in filled]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_text_file_is_one_document_exactly(tmp_path, packed):
    text = "".join(TEXTS) + "no end of line"
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert list(open_source(str(path)).documents()) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.parquet.gz"])
def test_fields(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        write_jsonl(path, TEXTS, "body")
    else:
        write_parquet(tmp_path / "a.parquet", {"id": list(range(4)), "body": TEXTS})
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert list(open_source(f"{path}#body").documents()) == TEXTS
    with pytest.raises(ValueError, match=r"no field 'text'.*'id', 'body'"):
        list(open_source(str(path)).documents())


def test_folders_and_globs_are_sorted_and_recursive(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    write_jsonl(tmp_path / "c.jsonl.gz", ["third", "", "fourth"])
    (tmp_path / "ignored.exe").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(open_source(str(tmp_path)).documents()) == ["first", "second", "third", "fourth"]
    assert list(open_source(f"{tmp_path}/**/*.txt").documents()) == ["second"]
    with pytest.raises(ValueError, match="no file matches"):
        open_source(f"{tmp_path}/*.tex")
    (tmp_path / "b/t.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="give them apart"):
        open_source(str(tmp_path))


def test_a_path_may_hold_the_field_sign(tmp_path):
    (tmp_path / "c#.txt").write_text("sharp")
    assert list(open_source(str(tmp_path / "c#.txt")).documents()) == ["sharp"]


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_shards_split_after_the_end_of_document(tmp_path, kind):
    documents = [[99], [1, 2, 99], [3, 99], [*range(50), 99], [7, 8]]
    flat = list(itertools.chain(*documents))
    path = tmp_path / "a.bin"
    if kind == "llmc":
        write_llmc(path, flat)
    else:
        np.asarray(flat, "<u2").tofile(path)
    source = open_source(str(path))
    assert token_documents(source) == documents
    with pytest.raises(ValueError, match="holds tokens"):
        list(source.documents())


def test_shard_pieces_depend_on_the_document_alone(tmp_path, monkeypatch):
    """Where a long document is cut must not depend on what stands before it."""
    monkeypatch.setattr(source_files, "PIECE_TOKENS", 4)
    monkeypatch.setattr(source_files, "SHARD_READ", 16)
    long = [*range(38), 99]
    for before in ([], [5, 99], [1] * 13 + [99], [1] * 15 + [99], [2] * 30 + [99]):
        np.asarray(before + long + [3], "<u2").tofile(tmp_path / "a.bin")
        pieces = list(open_source(str(tmp_path / "a.bin")).pieces(Ids()))
        mine = pieces[-11:-1]  # 39 tokens by 4
        assert [p.content.tolist() for p in mine] == [long[i : i + 4] for i in range(0, 39, 4)]
        assert [p.ends_document for p in mine] == [False] * 9 + [True]
        assert np.concatenate([p.content for p in pieces]).tolist() == before + long + [3]


# Long documents


@pytest.mark.parametrize("make", ["lines", "no_lines"])
def test_long_documents_come_in_parts_that_do_not_depend_on_the_form(tmp_path, make):
    unit = "Zeile ä\n\n  indented\nnext\n" if make == "lines" else "é世"
    text = (unit * (3 * PIECE_BYTES // len(unit.encode())))[: 2 * PIECE_BYTES]
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    write_jsonl(tmp_path / "a.jsonl", [text])
    parts = {}
    for name in ("a.txt", "a.txt.gz", "a.jsonl"):
        pieces = list(open_source(str(tmp_path / name)).pieces())
        parts[name] = [piece.content for piece in pieces]
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert sum(piece.read for piece in pieces) == (tmp_path / name).stat().st_size
    assert "".join(parts["a.txt"]) == text
    assert parts["a.txt"] == parts["a.txt.gz"] == parts["a.jsonl"]
    assert len(parts["a.txt"]) > 1
    assert max(len(part.encode()) for part in parts["a.txt"]) <= PIECE_BYTES
    if make == "lines":  # cut after a line's end, between two characters that are not white space
        for left, right in zip(parts["a.txt"], parts["a.txt"][1:], strict=False):
            assert left[-1] == "\n"
            assert not left[-2].isspace()
            assert not right[0].isspace()


def test_cut_position_never_splits_a_character():
    data = "aé世😀".encode() * 20
    for limit in range(4, len(data)):
        at = cut_position(data, limit)
        data[:at].decode()
        assert limit - 3 <= at <= limit


# Fingerprints


def test_fingerprint_is_of_content_and_reading(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    write_jsonl(a, TEXTS)
    write_jsonl(b, TEXTS)
    write_jsonl(c, [*TEXTS[:-1], TEXTS[-1] + "y"])
    (tmp_path / "a.txt").write_bytes(a.read_bytes())
    prints = [open_source(str(p)).fingerprint() for p in (a, b, c, tmp_path / "a.txt")]
    assert prints[0] == prints[1]
    assert len({*prints, open_source(f"{a}#id").fingerprint()}) == 4
    assert all(len(digest) == 64 for digest in prints)


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MEMO_BYTES", 10)
    path, memo = tmp_path / "a.txt", tmp_path / "memo"
    path.write_text("some text that is long")
    os.utime(path, (10**9, 10**9))
    first = open_source(str(path)).fingerprint(memo)
    assert first == open_source(str(path)).fingerprint()
    with monkeypatch.context() as context:
        context.setattr(sources.hashlib, "file_digest", None)  # would raise if it were called
        assert open_source(str(path)).fingerprint(memo) == first
    path.write_text("same text that is long")
    os.utime(path, (10**9 + 1, 10**9 + 1))
    assert open_source(str(path)).fingerprint(memo) != first
    for entry in memo.iterdir():  # a damaged entry is not believed
        entry.write_text("zz")
    assert open_source(str(path)).fingerprint(memo) == open_source(str(path)).fingerprint()


def test_young_files_are_not_remembered(tmp_path, monkeypatch):
    """A second change within a tick of the file system's clock would go unnoticed."""
    monkeypatch.setattr(sources, "MEMO_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("some text that is long")
    open_source(str(path)).fingerprint(tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


# Bad input


def bad(tmp_path, name, data, message, field=""):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        for _ in open_source(f"{tmp_path / name}{field}").pieces(Ids()):
            pass


def test_missing_and_empty(tmp_path):
    (tmp_path / "there.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no such file or folder.*there\.txt.*stdlib"):
        open_source(str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="no argument"):
        open_source("stdlib:3")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no file of a known suffix"):
        open_source(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="none of its files has fields"):
        open_source(f"{tmp_path / 'there.txt'}#text")
    bad(tmp_path, "a.txt", b"", "is empty")
    bad(tmp_path, "a.txt.gz", gzip.compress(b""), "holds no text")
    bad(tmp_path, "a.jsonl", b'{"text": ""}\n\n', "holds no text")


def test_undecodable_bytes_name_file_and_offset(tmp_path):
    bad(tmp_path, "a.txt", b"good\xe4bad", r"a\.txt.*0xe4 at offset 4")
    bad(tmp_path, "a.txt", b"cut \xc3", "0xc3 at offset 4")
    far = b"line\n" * (PIECE_BYTES // 2)
    bad(tmp_path, "b.txt", far + b"\xff", f"0xff at offset {len(far)}")
    bad(tmp_path, "b.txt.gz", gzip.compress(far + b"\xff", 1), f"0xff at offset {len(far)}")
    line = b'{"text": "a"}\n'
    bad(tmp_path, "a.jsonl", line * 3 + b"\xff", f"0xff at offset {3 * len(line)}")


def test_damaged_files(tmp_path):
    line = b'{"text": "a"}\n'
    bad(tmp_path, "a.jsonl", line + b'{"text": 3}', r"line 2, field 'text' is int")
    bad(tmp_path, "a.jsonl", line + b'{"text": "\\ud800"}', "line 2.*lone surrogate")
    bad(tmp_path, "a.jsonl", line + line[:5], "line 2 is not JSON")
    bad(tmp_path, "a.jsonl", line + b"[1]", "line 2 is list")
    bad(tmp_path, "a.jsonl", line + b"{}", "line 2 has no field 'text'; its fields are none")
    bad(tmp_path, "a.txt.gz", gzip.compress(b"text" * 99)[:-9], "not an intact gzip")
    bad(tmp_path, "a.txt.gz", b"plain text", "not an intact gzip")
    bad(tmp_path, "a.parquet", b"PAR1 but not really", "not an intact Parquet")
    write_parquet(tmp_path / "b.parquet", {"text": ["a", None]})
    with pytest.raises(ValueError, match=r"row 2.*NoneType"):
        list(open_source(str(tmp_path / "b.parquet")).documents())


def test_damaged_shards(tmp_path):
    bad(tmp_path, "a.bin", b"\1\0\2", "3 bytes where 2 were expected")
    bad(tmp_path, "a.bin", np.array([5, 6, 100], "<u2").tobytes(), "token 2 has id 100.*100 ids")
    bad(tmp_path, "a.bin.gz", b"x", "unpack it first")
    path = write_llmc(tmp_path / "b.bin", [1, 2, 3], count=4)
    with pytest.raises(ValueError, match="1030 bytes where 1032"):
        token_documents(open_source(str(path)))
    for change in ({"version": 2}, {"magic": 20240801}):
        path = write_llmc(tmp_path / "b.bin", [1, 2, 3], **change)
        with pytest.raises(ValueError, match="magic 20240520, version 1"):
            token_documents(open_source(str(path)))


# Mixtures


def test_mixture_weights_are_normalised():
    assert parse_mixture(["0.7*stdlib", "0.3*b.txt"]) == [("stdlib", 0.7), ("b.txt", 0.3)]
    assert parse_mixture(["a", "b"]) == [("a", 0.5), ("b", 0.5)]
    assert parse_mixture(["*.txt", "./2*.txt", "1e0*2*.txt"]) == [
        ("*.txt", pytest.approx(1 / 3)),
        ("./2*.txt", pytest.approx(1 / 3)),
        ("2*.txt", pytest.approx(1 / 3)),
    ]


@pytest.mark.parametrize("spec", ["0*a", "-1*a", "nan*a", "inf*a", "1.2.3*a", "2*", ""])
def test_bad_mixtures(spec):
    with pytest.raises(ValueError, match=r"weight|names no source"):
        parse_mixture([spec])


def test_an_empty_mixture():
    with pytest.raises(ValueError, match="at least one"):
        parse_mixture([])


# TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "texts/deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / f"texts/deep/{number}.txt").write_bytes(text.encode())
    local_text_builder(folder / "texts", folder / "prepared")
    local_text_builder(folder / "texts", folder / "other")  # a second time in one process
    return folder / "prepared"


def test_tfds_is_read_without_tensorflow(prepared):
    """As bytes or str, in the order of the files, from another process that knows no builder."""
    code = (
        "import json, sys; from train.text.sources import open_source\n"
        f"source = open_source('tfds:local_text@{prepared}')\n"
        "print(json.dumps([list(source.documents()), source.fingerprint(),"
        " 'tensorflow' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts, fingerprint, tensorflow = json.loads(done.stdout.splitlines()[-1])
    assert sorted(texts) == sorted(TEXTS)
    assert not tensorflow
    assert fingerprint == open_source(f"tfds:local_text:1.0.0@{prepared}#train/text").fingerprint()


def test_tfds_errors(prepared, tmp_path):
    for spec, message in {
        f"absent@{prepared}": "no prepared dataset 'absent'.*array_record",
        f"local_text@{prepared}#label": "no field 'label'; its fields are text",
        f"local_text@{prepared}#test/text": "no split 'test'; its splits are train",
        "@x": "not of the form",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(f"tfds:{spec}")
    with pytest.raises(ValueError, match=r"no \*\.txt"):
        local_text_builder(tmp_path, tmp_path)


def test_tfds_prepared_as_tfrecord(prepared, tmp_path):
    folder = tmp_path / "local_text/1.0.0"
    folder.mkdir(parents=True)
    for path in (prepared / "local_text/1.0.0").iterdir():
        (folder / path.name.replace("array_record", "tfrecord")).write_bytes(path.read_bytes())
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"prepared as tfrecord.*convert_format"):
        open_source(f"tfds:local_text@{tmp_path}")
