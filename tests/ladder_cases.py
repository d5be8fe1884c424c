"""Runs of the ladder that are made up: a law of learning in place of training."""

import json

from experiments.baselines.cells import BaselineCell
from experiments.json_files import write_json
from experiments.ladder.child import FACTS
from experiments.ladder.climb import BASELINES, TORCH
from experiments.ladder.command import Ladder
from experiments.ladder.measure import Reached
from experiments.ladder.rows import Row
from experiments.ladder.rungs import RUNGS
from train.tokenizers.tokenizer import load_tokenizer

NAMES = [*BASELINES, *(rung.name for rung in RUNGS)]
WEIGHTS = {name: 1.0 - 0.03 * number for number, name in enumerate(NAMES)}
TEST_IS_HARDER = 0.4  # bits: there every length of the validation split misses its target


def settings_of(job):
    return job.baseline.settings if isinstance(job, BaselineCell) else job.settings


def law(job, share):
    """Bits per byte after a share of a run: a power law, better the higher the rung."""
    name, _, rest = job.name.partition(", ")
    tokens = int(rest.split()[0].replace(",", ""))
    settings = settings_of(job)
    bits = 30 * WEIGHTS[name] * (share * tokens) ** -0.2 + 0.001 * settings.seed
    bits += 3 if name == TORCH else 0
    return bits + (TEST_IS_HARDER if settings.held_out == "test" else 0)


def fake(job, folder, bits_of=law):
    """A step takes as long whatever the rung."""
    settings = settings_of(job)
    out = folder / job.key
    load_tokenizer("bytes").save(out / "tokenizer")
    lines, last = [], settings.steps
    every = job.loop.evaluate_every or last
    for step in sorted({*range(every, last, every), last}):
        bits = bits_of(job, step / last)
        clock = {"data": 0.0, "step": 0.01 * step, "compile": 5.0}
        facts = {"loss": bits, "bits_per_byte": bits, "seconds": 5 + 0.01 * step, "clock": clock}
        lines.append(json.dumps({"kind": "evaluation", "step": step, **facts}) + "\n")
    (out / "metrics.jsonl").write_text("".join(lines))
    result = {"reason": "finished", "step": last, "seconds": {}, "evaluation": {}}
    write_json(out / "data.json", [{"name": "a text", "sha256": "c0ffee"}])
    facts = {"machine": {"cores": 2}, "peak_bytes": 5e8, "threads": 2, "outside": 3.0}
    write_json(out / FACTS, facts)
    write_json(out / "result.json", result)


class Counting:
    """Runs what it is asked for, and remembers it; some names fail."""

    def __init__(self, fails=(), bits_of=law, error=RuntimeError):
        self.ran, self.fails, self.bits_of, self.error = [], fails, bits_of, error

    def __call__(self, job, folder):
        self.ran.append(job.name)
        if job.name.partition(", ")[0] in self.fails:
            raise self.error(f"{job.name} has no power")
        fake(job, folder, self.bits_of)


def ladder(tmp_path, **fields):
    places = {"cells": tmp_path / "cells", "results": tmp_path / "results", "run": Counting()}
    places["pace"] = lambda job, to: 1.0
    return Ladder(scale="tiny", **{**places, **fields})


def cells_of(text, name, after=""):
    """The cells of a row of the first table after a heading of Markdown."""
    rest = text[text.index(after) :]
    line = next(line for line in rest.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def row(name, seconds):
    return Row(
        name, {s: Reached(1.0, 1.0, 10, 100, 1.0, t, 1.0, t + 2) for s, t in seconds.items()}
    )
