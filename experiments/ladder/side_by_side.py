"""Seconds a token, rung and tuned baseline in turn: what a loaded machine cannot tilt.

Seconds of whole runs are those of the hour they ran in. Here the step of each rung and that of the
tuned baseline take turns, each in a process of its own, and their ratio is the median over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from experiments.bench.ratios import order
from experiments.bench.sides import REST, Side
from experiments.grid import Measurement
from experiments.ladder.child import job_to_json
from experiments.ladder.climb import (
    BASELINES,
    TORCH_TUNED,
    Site,
    data_name,
    job_of,
    recipe_for,
    recipe_key,
)
from experiments.ladder.scales import Scale
from experiments.machine import machine
from experiments.tables.ratios import paired
from train.tokenizers.tokenizer import load_tokenizer

ROUNDS, TOKENS = 9, 20_000  # of a turn, about: a second or two on two cores


def item_of(site: Site, name: str) -> Measurement:
    """Returns the measurement of a rung, or of a baseline against the tuned one."""
    jobs = [job_of(site.scale, each, site.scale.tokens, 0) for each in (name, TORCH_TUNED)]
    about = {"side by side": [job.key for job in jobs], "rounds": ROUNDS, "tokens": TOKENS}
    return Measurement(f"side by side, {name}", about, dict)


def measure(site: Site, name: str) -> None:
    """Takes in how many times as long the tuned baseline takes for a token as a rung does.

    Does nothing if that is known.
    """
    item = item_of(site, name)
    seeds = site.gathered.index.setdefault(_table(site), {}).setdefault(item.name, {})
    if not site.gathered.has(item):
        print(f"\n{item.name}")
        values = {**_take_turns(site, name), "recipes": _recipes(site.scale, name)}
        site.gathered.add(item, values, machine())
    seeds["0"] = item.key
    site.save()


def speed_of(site: Site, name: str) -> float | None:
    """Returns the ratio of seconds a token, above 1 for a rung faster than the tuned baseline.

    None if it has not been measured, or of other recipes than today's. It is the same on either
    split.
    """
    key = site.gathered.index.get(_table(site), {}).get(f"side by side, {name}", {}).get("0", "")
    cell = site.gathered.cells.get(key)
    if cell is None or cell["values"].get("recipes") != _recipes(site.scale, name):
        return None
    return float(cell["values"]["ratio"])


def speed_against(site: Site, name: str, baseline: str) -> float | None:
    """Returns the ratio of seconds a token of any baseline and a rung, each by the tuned one's."""
    mine = speed_of(site, name)
    theirs = 1.0 if baseline == TORCH_TUNED else speed_of(site, baseline)
    return None if mine is None or theirs is None else mine / theirs


def _recipes(scale: Scale, name: str) -> list[str]:
    return [recipe_key(scale, each) for each in (name, TORCH_TUNED)]


def _table(site: Site) -> str:
    return data_name(site.scale.at(held_out="validation"))


def _take_turns(site: Site, name: str) -> dict[str, Any]:
    scale = site.scale
    job = job_of(scale, name, scale.tokens, 0)
    other = job_of(scale, TORCH_TUNED, scale.tokens, 0)
    recipe = recipe_for(scale, name)
    phases = recipe.settings(scale.data, scale.tokens, 0).phases
    tokens = [phase.steps * phase.batch_size * phase.sequence_length for phase in phases]
    sizes = {each: _vocabulary(recipe_for(scale, each).tokenizer) for each in (name, "jax")}
    own = {"job": job_to_json(job), "vocabulary": sizes[name]}
    theirs = {"job": job_to_json(other), "vocabulary": sizes["jax"], "phase": 0}
    torch: Mapping[str, str] = {"JAX_PLATFORMS": "cpu"}
    seconds: list[list[float]] = []  # phase -> round -> seconds a token
    base: list[float] = []
    with Side("ladder", theirs, torch) as baseline:
        for index in range(len(phases)):
            environment = torch if name in BASELINES else {}
            with Side("ladder", {**own, "phase": index}, environment) as rung:
                turn = {"rung": rung, TORCH_TUNED: baseline}
                steps = {n: max(1, TOKENS // side.facts["tokens"]) for n, side in turn.items()}
                answers: dict[str, list[float]] = {n: [] for n in turn}
                for round_ in range(ROUNDS):
                    for n in order(list(turn), round_):
                        time.sleep(REST)
                        taken = turn[n].ask("time", steps=steps[n])
                        answers[n].append(taken / (steps[n] * turn[n].facts["tokens"]))
                found = paired(answers[TORCH_TUNED], answers["rung"])
                seconds.append([found["ratio"], *found["quartiles"]])
                base += answers[TORCH_TUNED]
    # Of a token of the run: each phase's share of the tokens takes 1 / ratio of the baseline's.
    whole = sum(tokens)
    ratio = 1.0 / sum(t / whole / r[0] for t, r in zip(tokens, seconds, strict=True))
    return {"ratio": ratio, "phases": seconds, "tokens": tokens, "seconds a token": base}


def _vocabulary(tokenizer: str) -> int:
    kind, _, number = tokenizer.partition(":")
    return int(number) if kind == "sentencepiece" else load_tokenizer(tokenizer).vocabulary_size
