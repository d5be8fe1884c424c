"""SQuAD's rules, the sliding window, and answers over windows."""

import json

import numpy as np
import pytest

from experiments.tasks.squad_floor import floor_scores, sliding_window
from experiments.tasks.squad_metrics import (
    answers_of,
    exact_match,
    normalized,
    official,
    span_metrics,
    span_predictions,
    squad_scores,
    word_f1,
)
from tests.squad_cases import colours, write_squad
from train.tasks.squad import Squad
from train.tasks.squad_files import read_squad
from train.tasks.squad_words import words_of
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles
from train.tokenizers.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The  U.S. Army,", "us army", 1, 1),
        ("an apple", "apple", 1, 1),
        ("theatre", "atre", 0, 0),  # an article is a word of its own
        ("a b c", "b c d", 0, 2 / 3),  # b c against b c d: without "a", 2 * 2 / 5
        ("red red", "red", 0, 2 / 3),
        ("the", "a", 1, 1),
        ("the", "apple", 0, 0),
        ("", "apple", 0, 0),
    ],
)
def test_rules(prediction, reference, exact, f1):
    assert exact_match(prediction, reference) == exact
    wanted = 4 / 5 if prediction == "a b c" else f1
    assert word_f1(prediction, reference) == pytest.approx(wanted)
    assert word_f1(reference, prediction) == pytest.approx(wanted)


def test_normalized_is_stable():
    for text in ("The (first) U.S.  an-d", "naïve: 24→10%", "a", ""):
        assert normalized(normalized(text)) == normalized(text)


def test_the_best_reference_counts_and_what_is_missing_is_wrong():
    references = {"1": ["blue", "dark blue"], "2": ["red"]}
    assert squad_scores({"1": "dark blue"}, references) == {"exact_match": 50.0, "f1": 50.0}
    with pytest.raises(ValueError, match="answer no question, as '3'"):
        squad_scores({"3": "red"}, references)
    with pytest.raises(ValueError, match="no question"):
        squad_scores({}, {})


@pytest.fixture
def task(tmp_path):
    path = write_squad(tmp_path / "a.json", [colours(seed) for seed in range(4)])
    thirds = ((TRAIN, 0.5), (VALID, 0.25), (TEST, 0.25))
    return Squad(TaskFiles(((TRAIN, str(path)),)), thirds, stride=9).resolve()


def test_the_right_spans_are_perfect_answers_and_others_are_not(task):
    tokenizer = load_tokenizer("bytes")
    examples = task.examples(VALID, tokenizer, 48)
    arrays = examples.arrays
    inside = arrays["starts"] >= arrays["first"]
    assert examples.size > inside.sum() > len(examples.rows)  # windows overlap, some are without
    outputs = {"start": arrays["starts"], "stop": arrays["ends"], "score": inside - 1.0}
    # Where the answer is not: the first piece, at a low score.
    outputs["start"] = np.where(inside, outputs["start"], arrays["first"])
    outputs["stop"] = np.where(inside, outputs["stop"], arrays["first"])
    outputs["loss"] = np.arange(examples.size)
    figures = span_metrics(task, examples, outputs, tokenizer)
    assert figures["exact_match"] == figures["f1"] == figures["representable"] == 100
    assert figures["loss"] == (examples.size - 1) / 2
    lines = list(span_predictions(task, examples, outputs, tokenizer))
    assert [line["prediction"] for line in lines] == [line["answers"][0] for line in lines]
    assert json.loads(json.dumps(lines)) == lines
    assert list(official(lines)) == [row.columns["id"] for row in examples.rows]
    wrong = {**outputs, "score": -outputs["score"]}  # now windows without it win where there are
    assert span_metrics(task, examples, wrong, tokenizer)["exact_match"] < 100
    assert answers_of(examples, wrong, tokenizer) != answers_of(examples, outputs, tokenizer)


def test_the_sliding_window_finds_what_stands_beside_the_words_of_the_question(tmp_path):
    text = "The bridge was built by Ann Smith in 1901. Bob sold the mill to Eve Stone in 1905."
    assert sliding_window(text, "Who built the bridge?") == "Ann Smith"
    assert sliding_window(text, "Who sold the mill to Eve Stone?") == "Bob"
    assert sliding_window("Yes.", "Yes?") == ""
    path = write_squad(tmp_path / "a.json", [colours(0)])
    questions, _ = read_squad(str(path))
    # "What does Ann like?" shares "Ann" with her sentence alone, whose other words are two.
    scores = floor_scores(questions, longest=1)
    assert 0 < scores["f1"] <= 100


def test_words_keep_numbers_whole():
    assert [w.text for w in words_of("It's 1,066.5% (up)")] == ["it's", "1,066.5%", "(", "up", ")"]
