"""Predictions of a run and of SQuAD's own file, scored alike."""

import json

import pytest

from experiments.squad_score import SquadScore, read_predictions, run_command
from experiments.tasks.squad_metrics import squad_scores
from tests.squad_cases import colours, write_squad
from train.tasks.squad_files import read_squad


def test_both_kinds_of_predictions_score_alike(tmp_path):
    data = str(write_squad(tmp_path / "a.json", [colours(0), colours(1)]))
    questions = [q for q in read_squad(data)[0] if q.title == "Colours 1"]
    answers = {q.id: q.answers[0].text for q in questions[1:]}  # one is left without
    answers[questions[1].id] = "mauve"
    lines = "".join(
        json.dumps({"id": a, "prediction": b, "score": 0}) + "\n" for a, b in answers.items()
    )
    (tmp_path / "p.jsonl").write_text(lines)
    command = SquadScore(data, tmp_path / "p.jsonl", tmp_path / "official.json", floor=True)
    said = run_command(command)
    assert said[0] == "9 questions of 1 articles, 8 answered"
    wanted = squad_scores(answers, {q.id: [a.text for a in q.answers] for q in questions})
    assert f"exact match {wanted['exact_match']:6.2f}" in said[1]
    assert wanted["exact_match"] == pytest.approx(100 * 7 / 9)
    assert said[2].startswith("sliding window")
    assert json.loads((tmp_path / "official.json").read_text()) == answers
    again = run_command(SquadScore(data, tmp_path / "official.json"))
    assert again == said[:2]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.jsonl", "{"), ("p.jsonl", '{"id": "1"}'), ("p.json", "[]"), ("p.json", "x")],
)
def test_files_without_predictions(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"holds no predictions|is damaged"):
        read_predictions(tmp_path / name)
    with pytest.raises(ValueError, match="is not there"):
        read_predictions(tmp_path / "none.json")
