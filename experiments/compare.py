"""Puts runs side by side: a table, and a picture of validation loss against steps and seconds.

python -m experiments.compare runs/first runs/second --out runs/comparison
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
    """The evaluations of a run, and how it ended."""

    name: str
    steps: list[int]
    losses: list[float]
    seconds: list[float]
    result: dict


def read_curve(folder: Path) -> Curve:
    """Reads the record of a run.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the run has no evaluation yet.
    """
    read_settings(folder)
    record = folder / "metrics.jsonl"
    rows: list[Row] = list(read_rows(record)) if record.exists() else []
    rows = [row for row in rows if row["kind"] == "evaluation"]
    if not rows:
        raise ValueError(f"{folder} has no evaluation yet; let it run on")
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return Curve(
        folder.name,
        [row["step"] for row in rows],
        [float(row["loss"]) for row in rows],
        [row["seconds"] for row in rows],
        result,
    )


def table(curves: Sequence[Curve]) -> str:
    """Returns a Markdown table, a row a run.

    >>> print(table([Curve("a", [10], [2.5], [3.0], {"reason": "finished"})]))
    | run | steps | seconds | last loss | best loss | ended |
    |---|--:|--:|--:|--:|---|
    | a | 10 | 3.0 | 2.5000 | 2.5000 | finished |
    """
    lines = [
        "| run | steps | seconds | last loss | best loss | ended |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for c in curves:
        ended = c.result.get("reason", "still running")
        cells = (c.name, c.steps[-1], f"{c.seconds[-1]:.1f}", f"{c.losses[-1]:.4f}")
        best = f"{min(c.losses, key=lambda loss: (math.isnan(loss), loss)):.4f}"
        lines.append("| " + " | ".join(map(str, (*cells, best, ended))) + " |")
    return "\n".join(lines)


def picture(curves: Sequence[Curve], path: Path) -> None:
    """Draws validation loss against steps and against seconds into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        for axis, xs in zip(axes, (curve.steps, curve.seconds), strict=True):
            axis.plot(xs, curve.losses, marker="o", markersize=3, label=curve.name)
    axes[0].set(xlabel="step", ylabel="validation loss (nats a token)")
    axes[1].set(xlabel="seconds")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Compare:
    """What to compare.

    Attributes:
      runs: folders.
      out: where comparison.md and comparison.png go.
    """

    runs: tuple[Path, ...]
    out: Path = Path("runs/comparison")


def main() -> None:
    """Parses the command line, prints the table, writes both."""
    import tyro

    command = tyro.cli(Compare, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    if not command.runs:
        raise ValueError("name at least one run")
    curves = [read_curve(folder) for folder in command.runs]
    if len({curve.name for curve in curves}) < len(curves):
        pairs = zip(curves, command.runs, strict=True)
        curves = [dataclasses.replace(curve, name=str(folder)) for curve, folder in pairs]
    command.out.mkdir(parents=True, exist_ok=True)
    text = table(curves)
    (command.out / "comparison.md").write_text(text + "\n")
    picture(curves, command.out / "comparison.png")
    print(text)
    print(f"\n{command.out / 'comparison.md'}  {command.out / 'comparison.png'}")


if __name__ == "__main__":
    run_main(main)
