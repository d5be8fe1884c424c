"""Answers open questions: finds paragraphs of a corpus by BM25, then reads them.

    python -m experiments.open_qa --run runs/reader --data squad/dev-v1.1.json.zip --k 5
    python -m experiments.open_qa --run runs/reader --data notes.txt --question "Who paid?"

The reader is a run of the task squad. It reads each of the k paragraphs; of all spans that with the
greatest `(1 - weight) * s_retriever + weight * s_reader` is the answer (Yang et al. 2019,
arXiv:1902.01718), s_retriever being the BM25 score and s_reader the log-probability.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.retrieval import Hits, Index, build_index, recall_at
from experiments.runs.run import Run, open_run
from experiments.task_report import outputs_of
from experiments.tasks.squad_metrics import answers_of, squad_scores
from train.tasks.rows import content_hash
from train.tasks.squad import Squad, row_of
from train.tasks.squad_files import Question, file_of, read_squad
from train.tasks.task import TEST, Examples


@dataclass(frozen=True)
class OpenQa:
    """What is asked, and of what.

    Attributes:
      run: folder of a run of the task squad.
      data: the corpus: a file of SQuAD, whose questions are asked, or a text file, whose paragraphs
        are parted by empty lines.
      question: asks this one alone, and shows where the answer stands.
      k: paragraphs that are read.
      weight: of the reader in the score, from 0 to 1.
      split: of a SQuAD file that the run was trained on, the questions that are asked; the corpus
        is the whole file.
      most: questions, the first ones; all by default.
      step: checkpoint, the best by default.
      batch_size: rows at a time; changes no figure.
      out: file for the answers, a line each.
    """

    run: Path
    data: Path
    question: str | None = None
    k: int = 5
    weight: float = 0.5
    split: str = TEST
    most: int | None = None
    step: int | None = None
    batch_size: int = 16
    out: Path | None = None


class Found(NamedTuple):
    """An answer and where it stands.

    Attributes:
      text: of the answer; "" where no paragraph was found.
      passage: number of its paragraph, -1 for none.
      rank: of that paragraph among those found, from 1; 0 for none.
      score: that it was chosen by.
    """

    text: str
    passage: int
    rank: int
    score: float


def answer_open(
    run: Run,
    index: Index,
    questions: Sequence[str],
    *,
    k: int,
    weight: float,
    batch_size: int = 16,
) -> tuple[list[Found], Hits]:
    """Returns the answer to each question, and the paragraphs that were found.

    Args:
      run: the reader.
      index: of the paragraphs.
      questions: texts.
      k: paragraphs to read.
      weight: of the reader in the score.
      batch_size: rows at a time.

    Raises:
      ValueError: the run is no reader, or the weight is out of [0, 1].
    """
    task = run.settings.task
    if not isinstance(task, Squad):
        raise ValueError(
            f"{run.folder} is no run of the task squad; train one: python -m experiments.finetune "
            "--task squad"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; it must be from 0 to 1")
    hits = index.search(questions, k)
    pairs = [
        (q, rank) for q, row in enumerate(hits.passages) for rank, p in enumerate(row) if p >= 0
    ]
    read = [
        Question(n, str(n), "", index.passages[hits.passages[q, rank]], questions[q], ())
        for n, (q, rank) in enumerate(pairs)
    ]
    best = [Found("", -1, 0, -math.inf) for _ in questions]
    if read:
        length = run.settings.phases[0].sequence_length
        arrays, cut = task.windows(read, run.tokenizer, length)
        examples = Examples(arrays, [row_of(question) for question in read], [], cut)
        outputs = outputs_of(run, examples, batch_size)
        for (q, rank), (text, score) in zip(
            pairs, answers_of(examples, outputs, run.tokenizer), strict=True
        ):
            total = (1 - weight) * float(hits.scores[q, rank]) + weight * score
            if total > best[q].score:
                best[q] = Found(text, int(hits.passages[q, rank]), rank + 1, total)
    return best, hits


def run_command(command: OpenQa) -> list[str]:
    """Asks, and returns the lines to print.

    Raises:
      ValueError: see `answer_open`; a corpus without questions when none is given.
    """
    run = open_run(command.run, command.step)
    passages, questions = _corpus(command, run)
    index = build_index(passages)
    k = min(command.k, len(passages))
    asked = [question.text for question in questions] if questions else [str(command.question)]
    how: dict[str, Any] = {"weight": command.weight, "batch_size": command.batch_size}
    found, hits = answer_open(run, index, asked, k=k, **how)
    if command.out is not None:
        _write(command.out, asked, questions, found, passages)
    if not questions:
        if found[0].passage < 0:
            return ["no paragraph shares a word with the question"]
        return [found[0].text, f"    in: {passages[found[0].passage]}"]
    numbers = {passage: number for number, passage in enumerate(passages)}
    homes = [{numbers[question.paragraph]} for question in questions]
    ids = [str(number) for number in range(len(questions))]
    wanted = {
        name: [answer.text for answer in question.answers]
        for name, question in zip(ids, questions, strict=True)
    }
    scores = squad_scores({n: one.text for n, one in zip(ids, found, strict=True)}, wanted)

    recalls = recall_at(hits, homes, sorted({1, k}))
    return [
        f"{len(questions):,} questions, {len(passages):,} paragraphs, {k} read for each",
        *(f"recall at {n:<5}{100 * recall:6.2f} %" for n, recall in recalls.items()),
        f"exact match    {scores['exact_match']:6.2f} %",
        f"f1             {scores['f1']:6.2f} %",
    ]


def _corpus(command: OpenQa, run: Run) -> tuple[list[str], list[Question]]:
    """The paragraphs, and the questions to ask, none where one is given."""
    if command.data.suffix == ".txt":
        if command.question is None:
            raise ValueError(f"{command.data} holds text alone; ask with --question")
        text = command.data.read_text(encoding="utf-8")
        parts = (" ".join(part.split()) for part in text.split("\n\n"))
        passages = list(dict.fromkeys(part for part in parts if part))
        if not passages:
            raise ValueError(f"{command.data} is empty")
        return passages, []
    everything, _ = read_squad(str(command.data))
    passages = list(dict.fromkeys(question.paragraph for question in everything))
    if command.question is not None:
        return passages, []
    return passages, _questions(command, run, everything)[: command.most]


def _questions(command: OpenQa, run: Run, everything: list[Question]) -> list[Question]:
    """Those of the split, where the run knows the file by its content; else all."""
    task = run.settings.task
    if not isinstance(task, Squad):
        return everything
    content = content_hash(file_of(str(command.data)))
    known = zip(task.files.paths, task.files.sha256, strict=True)
    splits = [split for (split, _), sha256 in known if sha256 == content]
    if not splits:
        return everything
    if command.split not in splits:
        raise ValueError(
            f"{command.data} is {', '.join(splits)} to the run, not {command.split}; give --split "
            f"{splits[0]}"
        )
    here = tuple(
        (split, str(command.data) if split in splits else path) for split, path in task.files.paths
    )
    files = dataclasses.replace(task.files, paths=here)
    return dataclasses.replace(task, files=files).questions(command.split)[0]


def _write(
    path: Path,
    asked: Sequence[str],
    questions: Sequence[Question],
    found: Sequence[Found],
    passages: Sequence[str],
) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for n, (text, one) in enumerate(zip(asked, found, strict=True)):
            line: dict[str, Any] = {"question": text, "prediction": one.text, "rank": one.rank}
            line["passage"] = passages[one.passage] if one.passage >= 0 else None
            if questions:
                line |= {"id": questions[n].id}
                line |= {"answers": [answer.text for answer in questions[n].answers]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def main() -> None:
    """Parses the command line, asks, prints."""
    import tyro

    command = tyro.cli(OpenQa, description=__doc__)
    use_compilation_cache()
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
