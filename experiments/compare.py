"""Puts runs side by side: a table, and a picture of a figure against steps and seconds.

    python -m experiments.compare runs/first runs/second --out runs/comparison

The figure is what the best checkpoint of these runs was chosen by, such as the accuracy of a task,
where that is the same of all; else it is the validation loss. `--figure=-f1` names another one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import run_main
from experiments.runs.run import read_settings
from train.records import Row, read_rows


@dataclass(frozen=True)
class Curve:
    """One figure of the evaluations of a run, and how it ended."""

    name: str
    steps: list[int]
    values: list[float]
    seconds: list[float]
    result: dict


def watched_by(folders: Sequence[Path]) -> str:
    """Returns what all runs were watched by, as `train.loop.LoopSettings` has it; else "loss"."""
    tasks = [read_settings(folder).task for folder in folders]
    found = {"loss" if task is None else task.watch for task in tasks}
    return found.pop() if len(found) == 1 else "loss"


def read_curve(folder: Path, figure: str = "loss") -> Curve:
    """Reads the record of a run.

    Args:
      folder: of the run.
      figure: of its evaluations.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the run has no evaluation yet, or its evaluations lack the figure.
    """
    read_settings(folder)
    record = folder / "metrics.jsonl"
    rows: list[Row] = list(read_rows(record)) if record.exists() else []
    rows = [row for row in rows if row["kind"] == "evaluation"]
    if not rows:
        raise ValueError(f"{folder} has no evaluation yet; let it run on")
    if any(figure not in row for row in rows):
        names = [name for name, value in rows[0].items() if isinstance(value, float)]
        raise ValueError(
            f"the evaluations of {folder} have no {figure!r}; they have {', '.join(names)}"
        )
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return Curve(
        folder.name,
        [row["step"] for row in rows],
        [float(row[figure]) for row in rows],
        [row["seconds"] for row in rows],
        result,
    )


def table(curves: Sequence[Curve], watch: str = "loss") -> str:
    """Returns a Markdown table, a row a run.

    Args:
      curves: of the runs.
      watch: the figure they are of, with "-" before it where more is better.

    >>> print(table([Curve("a", [10], [2.5], [3.0], {"reason": "finished"})]))
    | run | steps | seconds | last loss | best loss | ended |
    |---|--:|--:|--:|--:|---|
    | a | 10 | 3.0 | 2.5000 | 2.5000 | finished |
    """
    figure = watch.removeprefix("-")
    lines = [
        f"| run | steps | seconds | last {figure} | best {figure} | ended |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for c in curves:
        ended = c.result.get("reason", "still running")
        cells = (c.name, c.steps[-1], f"{c.seconds[-1]:.1f}", f"{c.values[-1]:.4f}")
        numbers = [value for value in c.values if not math.isnan(value)] or [math.nan]
        best = f"{max(numbers) if figure != watch else min(numbers):.4f}"
        lines.append("| " + " | ".join(map(str, (*cells, best, ended))) + " |")
    return "\n".join(lines)


def picture(curves: Sequence[Curve], path: Path, figure: str = "loss") -> None:
    """Draws a figure of the evaluations against steps and against seconds into a PNG."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for curve in curves:
        for axis, xs in zip(axes, (curve.steps, curve.seconds), strict=True):
            axis.plot(xs, curve.values, marker="o", markersize=3, label=curve.name)
    axes[0].set(
        xlabel="step", ylabel=f"validation {figure}{' (nats a token)' * (figure == 'loss')}"
    )
    axes[1].set(xlabel="seconds")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=130)


@dataclass(frozen=True)
class Compare:
    """What to compare.

    Attributes:
      runs: folders.
      figure: of their evaluations, with "-" before it where more is better; by default what they
        were watched by.
      out: where comparison.md and comparison.png go.
    """

    runs: tuple[Path, ...]
    figure: str | None = None
    out: Path = Path("runs/comparison")


def main() -> None:
    """Parses the command line, prints the table, writes both."""
    import tyro

    command = tyro.cli(Compare, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    if not command.runs:
        raise ValueError("name at least one run")
    watch = command.figure or watched_by(command.runs)
    figure = watch.removeprefix("-")
    curves = [read_curve(folder, figure) for folder in command.runs]
    if len({curve.name for curve in curves}) < len(curves):
        pairs = zip(curves, command.runs, strict=True)
        curves = [dataclasses.replace(curve, name=str(folder)) for curve, folder in pairs]
    command.out.mkdir(parents=True, exist_ok=True)
    text = table(curves, watch)
    (command.out / "comparison.md").write_text(text + "\n")
    picture(curves, command.out / "comparison.png", figure)
    print(text)
    print(f"\n{command.out / 'comparison.md'}  {command.out / 'comparison.png'}")


if __name__ == "__main__":
    run_main(main)
