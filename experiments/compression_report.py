"""What compression cost and what it brought: one table, before and after.

    python -m experiments.compression_report --run runs/small --dense runs/first --data text.txt

Written as report.json and report.md into the run that was compressed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from compress.export.stored import is_packed, is_product
from compress.lowrank import LowRank, Sum, is_weight
from compress.quantization.quantize import dequantize_params
from experiments.audit import audit
from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.compression.probe import by_probe, choices, probe_run
from experiments.compression.quality import Side, quality
from experiments.compression.timings import PROMPT, Timing, timings
from experiments.json_files import write_json
from experiments.machine import machine
from experiments.runs.run import Run, open_run, phase_at
from model.config import TransformerConfig
from model.flops import flops_per_token
from model.rules import path_of
from train.corpus import Split, build_corpus
from train.data import evaluation_batches
from train.text.sources import open_source, parse_mixture


@dataclass(frozen=True)
class Report:
    """What to report on.

    Attributes:
      run: the compressed run.
      dense: the run that it was made of.
      data: source whose validation split is used; by default the first of the dense run.
      batch_size: rows at a time; changes no figure.
      repeats: of each timing; 0 leaves timings out.
    """

    run: Path
    dense: Path
    data: str | None = None
    batch_size: int = 8
    repeats: int = 5


def sizes(run: Run) -> Side:
    """Returns parameters, non-zeros, bytes on disk and on the device, FLOPs per token of a run."""
    phase = run.settings.phases[phase_at(run.settings, run.step)[0]]
    length = min(phase.sequence_length, run.model.config.max_length)
    plain = jax.tree.map(lambda w: w.weight if is_product(w) else w, run.params, is_leaf=is_packed)
    real = jax.tree.leaves(dequantize_params(plain))
    stored = run.folder / "checkpoints" / str(run.step)
    files = [file for file in (stored / "part.params").rglob("*") if file.is_file()]
    return {
        "parameters": sum(leaf.size for leaf in real),
        "non-zeros": sum(int(jnp.count_nonzero(leaf)) for leaf in real),
        "bytes on disk": sum(file.stat().st_size for file in files),
        "bytes on the device": sum(
            leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(run.params)
        ),
        "FLOPs per token": round(flops_of(run.model.config, run.params, length)),
    }


def flops_of(config: TransformerConfig, params: Any, length: int) -> float:
    """Returns `model.flops.flops_per_token`, kernels of two factors counted as what they are.

    A product with factors of rank R takes 2 R (I + O) operations in place of 2 I O, or, where they
    are added to a kernel that stays, besides.

    Args:
      config: of the model.
      params: its parameters, of any kind.
      length: tokens of a window.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    head = "token_embedding/embedding" if config.tied_head else "head/kernel"
    products = [
        leaf for at, leaf in leaves if (path := path_of(at)).endswith("/kernel") or path == head
    ]
    return flops_per_token(config, length) + sum(map(_more_flops, products))


def _more_flops(w: Any) -> float:
    """Of a product with a weight, beside those of a plain matrix of its shape."""
    if not isinstance(w, LowRank | Sum):
        return 0.0
    low = w if isinstance(w, LowRank) else w.low
    *layers, inputs, outputs = low.shape
    factors = 2.0 * low.rank * (inputs + outputs)
    if isinstance(w, LowRank):
        return math.prod(layers) * (factors - 2.0 * inputs * outputs)
    return math.prod(layers) * factors + _more_flops(w.base)


def report(
    dense: Run, small: Run, split: Split, *, batch_size: int = 8, repeats: int = 5
) -> dict[str, Any]:
    """Measures two runs: {"before", "after", "timings", "kernels", "machine"}.

    "kernels" says, for a prompt and for one row, which way of taking each product was fastest here,
    by what times, and what arithmetic a program of these choices does. It is empty where nothing is
    quantized, and without repeats.

    Args:
      dense: the run that was compressed.
      small: what it was compressed to.
      split: the text to measure on.
      batch_size: rows at a time.
      repeats: of each timing; 0 leaves timings out.

    Raises:
      ValueError: the runs have different vocabularies.
    """
    ours, theirs = (run.model.config.vocabulary_size for run in (small, dense))
    if ours != theirs:
        raise ValueError(
            f"{small.folder} has a vocabulary of {ours} and {dense.folder} one of {theirs}: "
            "neither was made of the other"
        )
    phase = small.settings.phases[phase_at(small.settings, small.step)[0]]
    batches = evaluation_batches(
        split,
        sequence_length=phase.sequence_length,
        batch_size=batch_size,
        document_boundaries=small.settings.document_boundaries,
    )
    pairs = [(run.model, run.params) for run in (dense, small)]
    qualities = quality(pairs[0], pairs[1], batches, split.bytes)
    before, after = (
        {**sizes(run), **measured, **_arithmetic(run)}
        for run, measured in zip((dense, small), qualities, strict=True)
    )
    raced = timings(pairs[0], pairs[1], repeats=repeats) if repeats else []
    return {
        "before": before,
        "after": after,
        "timings": [timing._asdict() for timing in raced],
        "kernels": _kernels(small, repeats) if repeats else {},
        "machine": machine(),
    }


def _kernels(run: Run, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work, rows in (("prefill", min(PROMPT, run.model.config.max_length)), ("decode", 1)):
        tables = probe_run(run.params, rows, repeats=repeats)
        if tables:
            chosen = by_probe(run.params, tables, rows)
            found[work] = {
                "rows": rows,
                "fastest": choices(run.params, tables, rows),
                "measured": [each.to_json() for each in tables.values()],
                "arithmetic": _arithmetic(dataclasses.replace(run, params=chosen)),
            }
    return found


def _arithmetic(run: Run) -> Side:
    found = audit(run.model, run.params)
    return {
        "integer dots": found.integer_dots,
        "float dots": found.float_dots,
        "float copies of quantized weights": found.float_copies,
        "bytes of those copies": found.float_copy_bytes,
    }


def table(found: dict[str, Any]) -> str:
    """Returns the report as Markdown.

    >>> print(table({"before": {"loss": 2.0}, "after": {"loss": 3.0}, "timings": []}))
    |  | before | after | after / before |
    |---|---:|---:|---:|
    | loss | 2.0000 | 3.0000 | 1.500 |
    """
    before, after = found["before"], found["after"]
    lines = ["|  | before | after | after / before |", "|---|---:|---:|---:|"]
    for name, old in before.items():
        ratio = f"{after[name] / old:.3f}" if old else ""
        lines.append(f"| {name} | {_number(old)} | {_number(after[name])} | {ratio} |")
    if found["timings"]:
        lines += ["", "|  | model | tokens/s | spread | ratio to dense float32 |"]
        lines.append("|---|---|---:|---:|---:|")
    for row in found["timings"]:
        t = Timing(**row)
        cells = (f"{t.tokens_per_second:,.0f}", f"{t.spread:.0%}", f"{t.ratio:.2f}")
        lines.append(f"| {' | '.join((t.work, t.model, *cells))} |")
    for work, kernels in found.get("kernels", {}).items():
        counts = Counter(kernels["fastest"].values())
        named = ", ".join(f"{name} for {count}" for name, count in counts.most_common())
        dots = kernels["arithmetic"]
        lines += [
            "",
            f"Fastest way of taking the products of {work} at {kernels['rows']} rows, by weight: "
            f"{named}; a program of these has {dots['integer dots']} integer and "
            f"{dots['float dots']} float dots.",
        ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def write(folder: Path, found: dict[str, Any]) -> str:
    """Writes report.json and report.md into a run; returns the latter."""
    text = table(found)
    write_json(folder / "report.json", found)
    (folder / "report.md").write_text(text + "\n")
    return text


def main() -> None:
    """Parses the command line, measures, prints."""
    import tyro

    command = tyro.cli(Report, description=__doc__)
    use_compilation_cache()
    dense, small = open_run(command.dense), open_run(command.run)
    if command.data is None and not dense.settings.data:
        raise ValueError(f"{command.dense} has no running text of its own; give --data")
    source = command.data or parse_mixture(dense.settings.data)[0][0]
    split = build_corpus(open_source(source), dense.tokenizer).split("validation")
    settings = {"batch_size": command.batch_size, "repeats": command.repeats}
    print(write(small.folder, report(dense, small, split, **settings)))


if __name__ == "__main__":
    run_main(main)
