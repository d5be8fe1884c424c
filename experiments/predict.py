"""Predicts rows with a trained classifier or regressor; measures it where the rows have labels.

    python -m experiments.predict --run runs/sentiment --data new.tsv --out predictions.jsonl
    python -m experiments.predict --run hf:FOLDER --data new.csv --unlabelled --out new.jsonl

Nothing trains. A folder of Hugging Face is read as `experiments.finetune` reads it; where its
labels are called otherwise than those of the file, `--rename 0=NEGATIVE 1=POSITIVE` says so.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.cli import named_pairs, run_main
from experiments.compilation import use_compilation_cache
from experiments.folders import check_free
from experiments.json_files import write_lines
from experiments.runs.run import Run, open_run
from experiments.starts import HF, foreign_kind, start_run
from experiments.task_report import outputs_of
from experiments.tasks.table import REPORTS
from train.records import plain
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rows import LackingColumns, RowFormat, said_of
from train.tasks.rowwise import LABEL, template_for, unlabelled_rows
from train.tasks.task import TEST, TaskFiles

MULTIPLE = 8  # of the length of rows


@dataclass(frozen=True)
class Predict:
    """What to predict, and with what.

    Attributes:
      run: RUN, RUN@STEP or hf:FOLDER, of a classification or regression.
      data: file of the rows: .tsv, .csv, .jsonl, or any text with --separator.
      out: file to write, a JSON object a line.
      unlabelled: whether the rows have no labels, so that there is nothing to measure.
      columns: NAME=COLUMN where a column is called otherwise than text, text2 or label; by default
        as in the files that the run was trained on.
      separator: of columns; by default a tab in .tsv, a comma in .csv.
      column_names: in order, where the first line does not name them.
      bad_rows: "stop" at a row that does not parse, or "skip" it and count.
      rename: LABEL=NAME where labels of the file are called otherwise in the run.
      template: of the rows, as in `experiments.finetune`, for a folder that was not written here;
        by default that of the run, and the text alone for such a folder.
      tokenizer: of a folder that has none that is read here.
      batch_size: rows at a time.
    """

    run: str
    data: Path
    out: Path
    unlabelled: bool = False
    columns: tuple[str, ...] = ()
    separator: str | None = None
    column_names: tuple[str, ...] = ()
    bad_rows: Literal["stop", "skip"] = "stop"
    rename: tuple[str, ...] = ()
    template: str | None = None
    tokenizer: str | None = None
    batch_size: int = 64


def run_command(command: Predict) -> list[str]:
    """Writes the predictions and returns lines to print.

    Raises:
      ValueError: `out` is there, a run of another task, rows that do not parse.
    """
    check_free(command.out)
    if command.batch_size < 1:
        raise ValueError(f"batch_size is {command.batch_size}; give at least 1")
    if foreign_kind(command.run) != HF:
        if command.tokenizer is not None:
            raise ValueError(f"{command.run} keeps its tokenizer; leave --tokenizer out")
        return _predict(command, open_run(command.run))
    with tempfile.TemporaryDirectory() as folder:
        made = start_run(command.run, Path(folder) / "run", command.tokenizer)
        assert made is not None  # which scratch alone is not
        return _predict(command, open_run(made))


def _predict(command: Predict, run: Run) -> list[str]:
    task = _task(command, run)
    if command.unlabelled:
        rows, bad = unlabelled_rows(task, command.data)
    else:
        try:
            rows, bad = task.rows(TEST)
        except LackingColumns as error:
            if error.columns != (task.files.form.column(LABEL),):
                raise
            raise ValueError(f"{error}. For rows without labels give --unlabelled") from None
    # No longer than the rows need: those of a folder from elsewhere are as long as its model goes.
    whole = run.settings.phases[-1].sequence_length
    length = MULTIPLE
    while length < whole and task.encoded(rows, bad, run.tokenizer, length).cut:
        length *= 2
    examples = task.encoded(rows, bad, run.tokenizer, min(length, whole))
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, task=task))
    outputs = outputs_of(run, examples, min(command.batch_size, len(rows)))
    report = REPORTS[task.name]
    command.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(command.out, map(plain, report.predictions(task, examples, outputs, run.tokenizer)))
    lines = [f"model       {command.run} at step {run.step}", f"rows        {len(rows):,}"]
    if examples.cut:
        lines.append(f"            {examples.cut:,} cut to {whole} tokens, as they are too long")
    if bad:
        lines.append(f"            {said_of(bad)}")
    if not command.unlabelled:
        figures = report.metrics(task, examples, outputs, run.tokenizer)
        numbers = (f"{name} {value:.4f}" for name, value in figures.items())
        lines.append("measured    " + "  ".join(numbers))
    return [*lines, f"written     {command.out}"]


def _task(command: Predict, run: Run) -> Any:
    """The task of the run, on the rows of the command."""
    task = run.settings.task
    if not isinstance(task, Classification | Regression):
        kind = "no task" if task is None else f"the task {task.name}"
        raise ValueError(
            f"{command.run} has {kind}; classes and numbers are predicted here, "
            "experiments.generate and experiments.chat write text"
        )
    # Of a file whose columns are not named by hand, as those that the run was trained on.
    own = () if command.column_names else task.files.form.columns
    if command.unlabelled:
        own = tuple((name, column) for name, column in own if name != LABEL)
    form = RowFormat(
        named_pairs("columns", command.columns) or own,
        command.separator,
        command.column_names,
        command.bad_rows,
    )
    rename = named_pairs("rename", command.rename)
    if rename and not isinstance(task, Classification):
        raise ValueError("rename is for labels, and a regression has none; leave it out")
    if rename and command.unlabelled:
        raise ValueError("rename is for labels of the file, which has none; leave it out")
    changes: dict[str, Any] = {"rename": rename} if rename else {}
    if command.template is not None:
        changes["template"] = command.template
    elif task.template is None:  # chosen by the columns that it was trained with, not by these
        changes["template"] = template_for(task)
    return dataclasses.replace(task, files=TaskFiles(((TEST, str(command.data)),), form), **changes)


def main() -> None:
    """Parses the command line, predicts, says where things went."""
    import tyro

    command = tyro.cli(Predict, description=__doc__)
    use_compilation_cache()
    print("\n".join(run_command(command)))


if __name__ == "__main__":
    run_main(main)
