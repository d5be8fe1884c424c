"""Scores predictions for a file of SQuAD by its rules, beside the sliding window.

    python -m experiments.squad_score --data dev-v1.1.json.zip \\
        --predictions runs/reader/predictions-test.jsonl --official test.json --floor

Predictions are the lines that a fine-tuning writes, or SQuAD's own file, answer by id, which
`--official` writes. Articles that have none are another split, and are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import run_main
from experiments.json_files import read_json, write_json
from experiments.tasks.squad_floor import floor_scores
from experiments.tasks.squad_metrics import official, squad_scores
from train.tasks.rows import said_of
from train.tasks.squad_files import read_squad


@dataclass(frozen=True)
class SquadScore:
    """What is scored.

    Attributes:
      data: a file of SQuAD.
      predictions: a `.jsonl` of a run, or a `.json` of answers by id.
      official: file to write the predictions to, as SQuAD's own scorer reads them.
      floor: scores the sliding window on the same questions, too.
    """

    data: str
    predictions: Path
    official: Path | None = None
    floor: bool = False


def run_command(command: SquadScore) -> list[str]:
    """Returns the lines to print.

    Raises:
      ValueError: a damaged file, or predictions for questions that are not in the data.
    """
    answers = read_predictions(command.predictions)
    questions, bad = read_squad(command.data)
    titles = {question.title for question in questions if question.id in answers}
    asked = [question for question in questions if question.title in titles]
    references = {question.id: [answer.text for answer in question.answers] for question in asked}
    lines = [f"{len(asked):,} questions of {len(titles)} articles, {len(answers):,} answered"]
    if bad:
        lines.append(said_of(bad))
    figures = {"predictions": squad_scores(answers, references)}
    if command.floor:
        figures["sliding window"] = floor_scores(asked)
    for name, scores in figures.items():
        lines.append(f"{name:<16}exact match {scores['exact_match']:6.2f}   f1 {scores['f1']:6.2f}")
    if command.official is not None:
        write_json(command.official, answers)
    return lines


def read_predictions(path: Path) -> dict[str, str]:
    """Returns answers by id.

    Raises:
      ValueError: the file is not there, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; give predictions, .jsonl or .json")
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return official(json.loads(line) for line in file if line.strip())
        return {str(name): str(text) for name, text in read_json(path).items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no predictions ({error!r}): lines with id and prediction, or one object "
            "of answers by id"
        ) from None


def main() -> None:
    """Parses the command line, scores, prints."""
    import tyro

    print("\n".join(run_command(tyro.cli(SquadScore, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
