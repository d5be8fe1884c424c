"""Retrieval: BM25 against its formula, order, recall, and SQuAD's form."""

import gzip
import json
import math

import numpy as np
import pytest

from experiments.retrieval import Hits, Retrieval, build_index, recall_at, run_command

PASSAGES = (
    "The cat sat on the mat.",
    "A dog and a cat met a bird; the cat ran.",
    "Nobody was in the house at 7.",
    "The cat sat on the mat.",
)


@pytest.fixture(scope="module", autouse=True)
def library():
    pytest.importorskip("bm25s")


def formula(question, passages, k1=1.5, b=0.75):
    """Scores as Lucene has them: idf log(1 + (N - n + 0.5) / (n + 0.5)), no factor k1 + 1."""
    words = [p.lower().replace(".", "").replace(";", "").split() for p in passages]
    mean = np.mean([len(w) for w in words])
    scores = np.zeros(len(words))
    for word in question.split():
        n = sum(word in w for w in words)
        idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
        for i, w in enumerate(words):
            f = w.count(word)
            scores[i] += idf * f / (f + k1 * (1 - b + b * len(w) / mean))
    return scores


def test_scores_are_those_of_the_formula():
    hits = build_index(PASSAGES).search(["cat bird", "the house at 7"], k=4)
    for row, question in enumerate(["cat bird", "the house at 7"]):
        expected = formula(question, PASSAGES)
        order = sorted(range(4), key=lambda i: (-expected[i], i))
        places = [i for i in order if expected[i] > 0]
        assert hits.passages[row].tolist() == places + [-1] * (4 - len(places))
        np.testing.assert_allclose(hits.scores[row], sorted(expected)[::-1], rtol=1e-5, atol=1e-7)


def test_a_question_without_a_known_word_finds_nothing():
    hits = build_index(PASSAGES).search(["zebra", ""], k=9)
    assert hits.passages.shape == (2, 4)
    assert (hits.passages == -1).all()
    assert recall_at(hits, [{0}, {1}], [1, 4]) == {1: 0.0, 4: 0.0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_index([]), "no passages"),
        (lambda: build_index(["...", " "]), "has a word"),
        (lambda: build_index(["a"], b=2.0), "from 0 to 1"),
        (lambda: build_index(["a"]).search(["a"], 0), "at least 1 passage"),
        (lambda: recall_at(Hits(np.zeros((1, 2)), np.zeros((1, 2))), [{0}], [3]), "1 to 2"),
        (lambda: recall_at(Hits(np.zeros((1, 2)), np.zeros((1, 2))), [], [1]), "0 have answers"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_command_reads_squad(tmp_path):
    def paragraph(number, *qas):
        context = PASSAGES[number]
        asked = [
            {
                "id": f"{number}{n}",
                "question": q,
                "answers": [{"text": a, "answer_start": context.find(a)}],
            }
            for n, (q, a) in enumerate(qas)
        ]
        return {"context": context, "qas": asked}

    first, second = (PASSAGES[n].split()[0] for n in (1, 2))
    paragraphs = [
        paragraph(1, ("Which bird met the dog?", first)),
        paragraph(2, ("Who was in the house?", second), ("zebra?", second), ("x?", "not there")),
    ]
    path = tmp_path / "squad.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [{"paragraphs": paragraphs}]}).encode()))
    lines = run_command(Retrieval(str(path), (1, 100)))
    assert lines[0] == "3 questions, 2 passages"
    assert lines[1].startswith("1 row was left out")
    assert "does not occur" in lines[1]
    assert [line.split()[:2] for line in lines[3:]] == [["1", "66.7%"], ["2", "66.7%"]]
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="no file of SQuAD"):
        run_command(Retrieval(str(path)))
