"""SQuAD's files: archives, what is no question, splits by article."""

import gzip
import json
import zipfile

import pytest

from tests.squad_cases import article, colours, write_squad
from train.tasks.squad_files import article_splits, read_squad


@pytest.fixture
def plain(tmp_path):
    return write_squad(tmp_path / "a.json", [colours(0), colours(1)])


def test_archives_hold_the_same_questions(plain, tmp_path):
    content = plain.read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/a.json", content)
        archive.writestr("README.txt", "none")
    wanted = read_squad(str(plain))
    assert len(wanted[0]) == 18
    assert wanted[1] == []
    for name in ("a.json.gz", "a.zip", "a.zip#folder/a.json"):
        assert read_squad(str(tmp_path / name)) == wanted


def test_answers_stand_where_they_are_said_to(plain):
    for question in read_squad(str(plain))[0]:
        for text, start in question.answers:
            assert question.paragraph[start : start + len(text)] == text


@pytest.mark.parametrize("member", ["../a.json", "/a.json", "b/../../a.json", "..\\a.json"])
def test_members_out_of_the_archive_are_refused(member, plain, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, plain.read_bytes())
    with pytest.raises(ValueError, match="out of its folder"):
        read_squad(str(tmp_path / "a.zip"))


def test_an_archive_of_several_files_needs_a_name(plain, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.json", "b.json"):
            archive.writestr(name, plain.read_bytes())
    with pytest.raises(ValueError, match=r"2 .json members.*a.json, b.json.*#MEMBER"):
        read_squad(str(tmp_path / "a.zip"))
    with pytest.raises(ValueError, match=r"no member 'c.json'"):
        read_squad(f"{tmp_path / 'a.zip'}#c.json")


def damaged(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("write", "about"),
    [
        (lambda folder: folder / "none.json", "is not there"),
        (lambda folder: folder, "is a folder"),
        (damaged("a.zip", b"PK\x03\x04 cut"), "no intact .zip"),
        (damaged("a.json.gz", b"\x1f\x8b\x08 cut"), "no intact .gz"),
        (damaged("a.json", b"{"), "no file of SQuAD"),
        (damaged("a.json", b'{"rows": []}'), "no file of SQuAD"),
        (damaged("a.json", b'{"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}'), "no text"),
        (damaged("a.json", b'{"data": "\xff"}'), "no UTF-8"),
    ],
)
def test_files_that_are_none(write, about, tmp_path):
    with pytest.raises(ValueError, match=about):
        read_squad(str(write(tmp_path)))


def test_what_is_no_question_is_told_by_its_id(tmp_path):
    made = article("A", [("Ann likes red.", [("q1", "What?", ["red"]), ("q2", "Who?", ["Ann"])])])
    asked = made["paragraphs"][0]["qas"]
    asked.append({"id": "q1", "question": "Who?", "answers": asked[1]["answers"]})
    changes = [
        ("q3", "Who?", []),
        ("q4", " ", [{"text": "Ann", "answer_start": 0}]),
        ("q5", "Who?", [{"text": "Bob", "answer_start": 0}]),
        ("q6", "Who?", [{"text": "Ann", "answer_start": 3}]),
        ("q7", "Who?", [{"text": "Ann", "answer_start": -14}]),
        ("q8", "Who?", [{"text": " ", "answer_start": 3}]),
    ]
    asked += [{"id": a, "question": b, "answers": c} for a, b, c in changes]
    questions, bad = read_squad(str(write_squad(tmp_path / "a.json", [made])))
    assert [question.id for question in questions] == ["q1", "q2"]
    reasons = {row.line: row.reason for row in bad}
    assert list(reasons) == [3, 4, 5, 6, 7, 8, 9]
    assert "twice" in reasons[3]
    assert "question q3" in reasons[4]
    assert "'Bob' does not occur" in reasons[6]
    assert "not at 3; the first is at 0" in reasons[7]


def test_splits_are_by_article_whatever_their_order():
    titles = [f"t{number}" for number in range(20)]
    shares = [("train", 0.8), ("valid", 0.1), ("test", 0.1)]
    found = article_splits(titles * 2, shares)
    assert sorted(found) == sorted(titles)
    assert [list(found.values()).count(name) for name, _ in shares] == [16, 2, 2]
    assert article_splits(titles[::-1], shares) == found
    listed = article_splits(titles, shares, [("t3", "test"), ("t4", "valid")])
    assert (listed["t3"], listed["t4"]) == ("test", "valid")


@pytest.mark.parametrize(
    ("titles", "shares", "listed", "about"),
    [
        ("abc", [("train", 0.9), ("test", 0.1)], [], "leave none for test"),
        ("abc", [("train", 1.0), ("test", 0.0)], [], "positive"),
        ("abc", [("train", 1.0)], [("d", "train")], "no article is called 'd'; there are a, b, c"),
        ("abc", [("train", 1.0)], [("a", "test")], "no split 'test'"),
    ],
)
def test_splits_that_cannot_be(titles, shares, listed, about):
    with pytest.raises(ValueError, match=about):
        article_splits(titles, shares, listed)


def test_json_is_as_it_was_written(tmp_path):
    """The cases of other tests hold what they say."""
    path = write_squad(tmp_path / "a.json", [colours(0)])
    assert json.loads(path.read_text())["data"][0]["title"] == "Colours 0"


def test_folds_hold_out_other_articles():
    titles = [f"t{n}" for n in range(20)]
    shares = [("train", 0.8), ("valid", 0.1), ("test", 0.1)]
    folds = [article_splits(titles, shares, fold=fold) for fold in range(10)]
    held = {
        split: [{t for t, s in fold.items() if s == split} for fold in folds]
        for split in ("valid", "test")
    }
    assert folds[0] == article_splits(titles, shares)
    assert {len(part) for part in held["test"]} == {2}
    assert len(set().union(*held["test"])) == 20  # no two folds share any
    assert held["valid"][1:] == held["test"][:-1]
    with pytest.raises(ValueError, match="fold is -1"):
        article_splits(titles, shares, fold=-1)
