"""Runs tasks of lm-evaluation-harness on a run.

    python -m experiments.harness --run runs/first --tasks my_task.yaml lambada_openai

A task is one of the harness by its name, or a YAML file of one's own; data files that it names are
looked for from the current folder. With files alone nothing is fetched. It needs the extra `eval`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.json_files import write_json
from experiments.lm_eval_bridge import harness_model
from experiments.runs.run import open_run
from train.records import plain

RESAMPLES = 1000  # for the standard errors of figures that have no formula


@dataclass(frozen=True)
class Harness:
    """What is measured.

    Attributes:
      run: folder of the run.
      tasks: names, or paths of YAML files.
      limit: documents of each task, the first ones; all by default.
      few_shot: examples before each document; by default as many as the task says.
      step: checkpoint; by default the newest, or of a task the best.
      batch_size: rows at a time; changes no figure.
      out: file for the figures, JSON.
    """

    run: Path
    tasks: tuple[str, ...]
    limit: int | None = None
    few_shot: int | None = None
    step: int | None = None
    batch_size: int = 8
    out: Path | None = None


def run_command(command: Harness) -> dict[str, dict[str, Any]]:
    """Returns the figures of each task, as the harness names them.

    Raises:
      ValueError: no task, or one that there is not.
      ImportError: the harness is not installed.
    """
    if not command.tasks:
        raise ValueError("name a task: --tasks FILE.yaml or a name of the harness")
    files = [Path(task).suffix in (".yaml", ".yml") for task in command.tasks]
    if lost := [
        t
        for t, is_file in zip(command.tasks, files, strict=True)
        if is_file and not Path(t).is_file()
    ]:
        raise ValueError(f"{lost[0]} is not there")
    if all(files):  # before the libraries are imported, which read it once
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = harness_model(open_run(command.run, command.step), batch_size=command.batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(files))
    try:
        found: Any = simple_evaluate(
            model,
            tasks=list(command.tasks),
            num_fewshot=command.few_shot,
            limit=command.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            task_manager=manager,
        )
    except KeyError as error:
        raise ValueError(f"the harness has no such task: {error}") from None
    figures = {task: plain(dict(values)) for task, values in found["results"].items()}
    if command.out is not None:
        write_json(command.out, figures)
    return figures


def describe(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Returns lines with the figures of each task, those that are numbers.

    >>> describe({"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}})
    ['a  acc 0.5000']
    """
    lines = []
    for task, values in figures.items():
        numbers = {n: v for n, v in values.items() if isinstance(v, float)}
        said = (f"{name.removesuffix(',none')} {value:.4f}" for name, value in numbers.items())
        lines.append("  ".join([task, *said]))
    return lines


def main() -> None:
    """Parses the command line, measures, prints."""
    import tyro

    command = tyro.cli(Harness, description=__doc__)
    use_compilation_cache()
    print("\n".join(describe(run_command(command))))


if __name__ == "__main__":
    run_main(main)
