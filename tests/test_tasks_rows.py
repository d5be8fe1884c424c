"""Rows of task files: kinds, columns by name, and what does not parse."""

import json

import pytest

from train.tasks.rows import RowFormat, content_hash, keep_good, read_rows

WANTED = ("text", "label")


def rows(path, form=RowFormat(), wanted=WANTED, parse=lambda row: row):  # noqa: B008
    return keep_good(path, read_rows(path, form, wanted), form, parse)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.tsv", 'label\ttext\n1\ta "good" one\n0\tbad, very\n', RowFormat()),
        ("a.csv", 'text,label\n"a ""good"" one",1\n"bad, very",0\n', RowFormat()),
        ("a.csv", '1;"a ""good"" one"\r\n0;bad, very\r\n', RowFormat((), ";", ("label", "text"))),
        ("a.TSV", '\ufefflabel\ttext\textra\n1\ta "good" one\t\n0\tbad, very\tx\n', RowFormat()),
        (
            "a.jsonl",
            '{"s": "a \\"good\\" one", "label": 1}\n\n{"s": "bad, very", "label": "0"}',
            RowFormat((("text", "s"),)),
        ),
        ("a.dev", '1 a "good" one\n0 bad, very\n', RowFormat((), " ", ("label", "text"))),
        ("a.txt", 'label|text\n1|a "good" one\n0|bad, very', RowFormat((), "|")),
        ("b.txt", 'label text\n1 a "good" one\n0 bad, very\n', RowFormat((), " ")),
    ],
)
def test_one_table_in_every_kind_of_file(tmp_path, name, content, form):
    good, bad = rows(write(tmp_path, name, content), form)
    assert [row.columns for row in good] == [
        {"text": 'a "good" one', "label": "1"},
        {"text": "bad, very", "label": "0"},
    ]
    assert not bad


def test_a_cell_of_several_lines_counts_them(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\nthree\n')
    form = RowFormat(bad_rows="skip")
    good, bad = rows(path, form)
    assert good[0].columns["text"] == "one\ntwo"
    assert [row.line for row in bad] == [4]
    assert "1 of 2 columns" in bad[0].reason


BAD = {
    "a.tsv": ("text\tlabel\ngood\t1\nno label\nmany\t1\t2\nfine\t0\n", [3, 4]),
    "a.jsonl": ('{"text": "a", "label": 1}\n{"text"\n[1]\n{"text": "b"}\n', [2, 3, 4]),
    "b.jsonl": ('{"text": "a", "label": 1}\n{"text": null, "label": 0}\n', [2]),
    "b.tsv": (b"text\tlabel\nd\xe9j\xe0 vu\t1\nfine\t0\n", [2]),
    "a.csv": ('text,label\n"a"b,1\nfine,0\n', [2]),
    "b.csv": ('text,label\n"two\nlines",0\n"open,1\ngood,1\nfine,0\n', [4]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_stop_with_their_line_or_are_counted(tmp_path, name):
    content, lines = BAD[name]
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=rf"{name}, line {lines[0]}: .*--bad-rows skip"):
        rows(path)
    good, bad = rows(path, RowFormat(bad_rows="skip"))
    assert [row.line for row in bad] == lines
    assert len(good) >= 1


def test_what_the_caller_cannot_parse_is_bad_too(tmp_path):
    path = write(tmp_path, "a.tsv", "text\tlabel\na\t1\nb\tx\n")
    form = RowFormat(bad_rows="skip")
    good, bad = rows(path, form, parse=lambda row: int(row.columns["label"]))
    assert good == [1]
    assert bad[0].line == 3
    only = write(tmp_path, "b.tsv", "text\tlabel\nb\tx\n")
    with pytest.raises(ValueError, match=r"has no row to use; 1 row was left out: line 2"):
        rows(only, form, parse=lambda row: int(row.columns["label"]))


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    tsv = write(tmp_path, "a.tsv", "sentence\tlabel\na\t1\n")
    lines = write(tmp_path, "a.jsonl", json.dumps({"sentence": "a", "label": 1}))
    for path in (tsv, lines):  # even where bad rows are skipped: none has the column
        with pytest.raises(ValueError, match=r"no column 'text'; it has 'sentence', 'label'"):
            rows(path, RowFormat(bad_rows="skip"))
        good, _ = rows(path, RowFormat((("text", "sentence"),)))
        assert good[0].columns == {"text": "a", "label": "1"}
    with pytest.raises(ValueError, match="columns names txt, and the task reads text, label"):
        rows(tsv, RowFormat((("txt", "sentence"),)))


def test_a_first_object_without_the_column_is_left_out_where_asked(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"label": 1}\n{"text": "a", "label": 1}\n')
    with pytest.raises(ValueError, match="no column 'text'; it has 'label'"):
        rows(path)
    good, bad = rows(path, RowFormat(bad_rows="skip"))
    assert ([row.line for row in bad], len(good)) == ([1], 1)


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        rows(tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="is not there"):
        content_hash(tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="is a folder"):
        rows(tmp_path)
    with pytest.raises(ValueError, match=r"no known kind.*--column-names"):
        rows(write(tmp_path, "a.dev", "1 a\n"))
    with pytest.raises(ValueError, match="UTF-16"):
        rows(write(tmp_path, "u.tsv", "text\tlabel\na\t1\n".encode("utf-16")))
    with pytest.raises(ValueError, match="names its columns in every line"):
        rows(write(tmp_path, "a.jsonl", "{}"), RowFormat(separator=" "))
    for wrong in ({"bad_rows": "ignore"}, {"separator": ""}, {"names": ("a", "a")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RowFormat(**wrong)
