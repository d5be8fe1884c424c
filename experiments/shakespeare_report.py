"""What `experiments.shakespeare` has to say of its runs: figures, tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compare import Curve
from experiments.grid import Result

Runs = dict[tuple[float | None, str], dict[int, Result]]
"""(target that the length was chosen for, or None for the published one; side) -> seed -> run."""

THEIRS, OURS = "nanoGPT", "ours"


def crossing(result: Result, loss: float) -> dict[str, float] | None:
    """Returns the costs at the first evaluation at or under a loss, or None.

    They are `steps`, `training` (seconds of data and steps) and `all` (seconds of everything from
    the start of the loop, compilation and evaluations included).
    """
    for row in result.evaluations:
        if float(row["loss"]) <= loss:
            clock = row["clock"]
            training = clock.get("data", 0.0) + clock.get("step", 0.0)
            return {"steps": row["step"], "training": training, "all": row["seconds"]}
    return None


def summary(
    runs: Runs,
    chosen: Mapping[float, Mapping[str, int | None]],
    steps: int,
    targets: Sequence[float],
) -> dict[str, Any]:
    """Returns the figures of all seeds as JSON values.

    Args:
      runs: see `Runs`.
      chosen: target -> side -> length of the schedule that was chosen for it, None where no
        schedule ends there; a side is not there whose search was cut off.
      steps: the published length.
      targets: losses; the first is the published one.
    """
    own = runs.get((None, OURS), {})
    facts: dict[str, Any] = {
        "published": targets[0],
        "steps": steps,
        "seeds": len(own),
        "losses": [result.loss for result in own.values()],
        "mean_loss": float(np.mean([result.loss for result in own.values()])) if own else None,
        "steps_to_published": [
            None if (there := crossing(result, targets[0])) is None else there["steps"]
            for result in own.values()
        ],
        "targets": list(targets),
    }
    facts["rows"] = [
        {
            "target": target,
            "chosen": plan is not None,
            "side": side,
            "steps": steps if plan is None else chosen[plan][side],
            "losses": {str(seed): result.loss for seed, result in by_seed.items()},
            "crossings": {str(seed): crossing(result, target) for seed, result in by_seed.items()},
        }
        for target in targets
        for (plan, side), by_seed in sorted(runs.items(), key=lambda run: run[0][0] is not None)
        if plan in (None, target)
    ]
    facts["minutes_apart"] = minutes_apart(runs)
    facts["searches_cut_off"] = [
        f"{side} to {target:g}"
        for target in targets
        for side in (THEIRS, OURS)
        if side not in chosen[target]
    ]
    return facts


def minutes_apart(runs: Runs) -> float | None:
    """Returns the most minutes between the ends of the two sides' runs of one seed and plan.

    How long the slower of the two runs is of it: far more than that, and they do not compare.
    """
    gaps = []
    for (plan, side), by_seed in runs.items():
        for seed, result in by_seed.items():
            if side == OURS and (other := runs.get((plan, THEIRS), {}).get(seed)):
                gaps.append(abs(_ended(result) - _ended(other)) / 60)
    return max(gaps, default=None)


def _ended(result: Result) -> float:
    return Path(result.folder / "result.json").stat().st_mtime


def report(facts: Mapping[str, Any]) -> str:
    """Returns the tables, as Markdown, from the figures alone."""
    apart = facts["minutes_apart"]
    lines = [
        "# Tiny Shakespeare in bytes, beside nanoGPT's setting for a CPU",
        "4 layers, width 128, context 64, batches of 12; nats a byte on the last tenth of the "
        f"text. nanoGPT's README gives {facts['published']} for this size. Theirs is that setting "
        "in torch, a Hugging Face GPT-2 in eager mode; ours the modern block under Muon. Made by "
        "`python -m experiments.shakespeare --data FILE`.",
        table(facts),
        "Seconds of training alone (data and steps), and of everything from the start, with "
        "compilation and evaluations; mean and standard error over seeds. A schedule is the "
        f"published one of {facts['steps']} steps, or as long as it takes to end at the loss, "
        "chosen for each side by one rule with a seed of its own. Faster: by seeds in pairs, "
        "geometric mean and, in brackets, lowest and highest, against nanoGPT's setting as "
        "published and against its chosen schedule.",
        seconds(facts),
    ]
    if apart is not None:
        lines.append(f"The runs of a pair ended at most {apart:.1f} minutes apart.")
    if facts["searches_cut_off"]:
        lines.append(
            f"No length is chosen yet for {', '.join(facts['searches_cut_off'])}: the search was "
            "cut off, and the same command goes on."
        )
    return "\n\n".join(lines)


def table(facts: Mapping[str, Any]) -> str:
    """Returns a table of our runs of the published length, a row a seed.

    >>> print(table({"published": 1.88, "losses": [1.5], "steps_to_published": [400], "steps": 9}))
    | seed | loss after 9 steps | step at 1.88 |
    |--:|--:|--:|
    | 0 | 1.500 | 400 |
    """
    lines = [
        f"| seed | loss after {facts['steps']} steps | step at {facts['published']} |",
        "|--:|--:|--:|",
    ]
    columns = (facts["losses"], facts["steps_to_published"])
    for seed, (loss, step) in enumerate(zip(*columns, strict=True)):
        lines.append(f"| {seed} | {loss:.3f} | {step or 'never'} |")
    return "\n".join(lines)


def seconds(facts: Mapping[str, Any]) -> str:
    """Returns the table of seconds to each loss."""
    names = (
        *("to", "side", "schedule", "loss at its end", "steps there", "training s", "all s"),
        *("faster than published", "faster than chosen"),
    )
    lines = ["| " + " | ".join(names) + " |", "|--:|---|---|" + "--:|" * 6]
    for row in facts["rows"]:
        there = [each for each in row["crossings"].values() if each]
        missed = len(row["crossings"]) - len(there)
        note = f" ({len(there)} of {len(row['crossings'])})" if there and missed else ""
        costs = [_spread([each[name] for each in there]) for name in ("training", "all")]
        against = [_theirs(facts, row["target"], chosen) for chosen in (False, True)]
        cells = (
            f"{row['target']:g}",
            row["side"],
            f"{row['steps']:,} steps" + (", chosen" if row["chosen"] else ""),
            _spread(list(row["losses"].values()), 3),
            f"{np.mean([each['steps'] for each in there]):.0f}{note}" if there else "not reached",
            *costs,
            *(faster(other, row["crossings"]) if row["side"] == OURS else "" for other in against),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(facts: Mapping[str, Any]) -> str:
    """Returns a line for the README: seconds to each loss, and how much less than theirs."""
    parts = []
    for target in facts["targets"]:
        mine = next(
            (
                r
                for r in facts["rows"]
                if (r["side"], r["chosen"], r["target"]) == (OURS, True, target)
            ),
            None,
        )
        there = [each for each in mine["crossings"].values() if each] if mine else []
        if mine is None or not there:
            continue
        against = {
            "nanoGPT's setting in torch": _theirs(facts, target, False),
            "the same on a schedule as long as it needs": _theirs(facts, target, True),
        }
        ratios = {name: faster(other, mine["crossings"]) for name, other in against.items()}
        told = " and ".join(
            f"{ratio} faster than {name}" for name, ratio in ratios.items() if ratio
        )
        cost = f"{np.mean([each['training'] for each in there]):.1f} s of training to {target:g}"
        parts.append(f"{cost}, {told}" if told else cost)
    return "; ".join(parts)


def faster(theirs: Mapping[str, Any], mine: Mapping[str, Any], name: str = "training") -> str:
    """Returns how many times less something takes, over the seeds that both got there with.

    >>> theirs = {"0": {"training": 8.0}, "1": {"training": 9.0}}
    >>> faster(theirs, {"0": {"training": 2.0}, "1": None})
    '4.0x (4.0 to 4.0)'
    """
    ratios = [
        theirs[seed][name] / there[name]
        for seed, there in mine.items()
        if there and theirs.get(seed)
    ]
    if not ratios:
        return ""
    mean = float(np.exp(np.mean(np.log(ratios))))
    return f"{mean:.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"


def _theirs(facts: Mapping[str, Any], target: float, chosen: bool) -> Mapping[str, Any]:
    for row in facts["rows"]:
        if (row["target"], row["chosen"], row["side"]) == (target, chosen, THEIRS):
            return dict(row["crossings"])
    return {}


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return ""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{np.mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def curves(runs: Runs) -> list[Curve]:
    """Returns the evaluations of the first seed's runs, by steps and by seconds of training."""
    found = []
    for by_seed in runs.values():
        result = by_seed[min(by_seed)]
        rows = result.evaluations
        found.append(
            Curve(
                result.cell.name,
                [row["step"] for row in rows],
                [float(row["loss"]) for row in rows],
                [row["clock"].get("data", 0.0) + row["clock"].get("step", 0.0) for row in rows],
                {},
            )
        )
    return found
