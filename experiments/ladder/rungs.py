"""The rungs: each a name and a function from the recipe of the rung below to its own.

A rung that is not kept stays in the table, with its loss; the next one builds on the last that is.
What is kept is decided by seconds of training to the target over three seeds: see `kept` of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.ladder import techniques
from experiments.ladder.formats import formats
from experiments.ladder.recipe import Recipe
from experiments.ladder.scales import Choices, Scale
from train.optimizers import Adam
from train.schedules import Constant

Change = Callable[[Recipe, Scale], Recipe]
Trials = Callable[[Scale], Mapping[str, Choices]]


@dataclass(frozen=True)
class Rung:
    """One technique.

    Attributes:
      name: on the command line.
      about: a line for the table.
      change: the recipe of the rung below -> its own.
      kept: whether what comes after builds on it.
      trials: what `--tune` tries for it, by name.
      trial_share: of the baseline's budget, that a trial takes: about what the rung needs.
      with_rows: of trials of batches, see `experiments.ladder.trials.Group`.
    """

    name: str
    about: str
    change: Change
    kept: bool = True
    trials: Trials | None = None
    trial_share: float = 1.0
    with_rows: Callable[[Choices, int], Choices] | None = None


def first_recipe(scale: Scale) -> Recipe:
    """Returns the mission's: GPT-2's block with its dropout under Adam at a constant 1e-4."""
    return Recipe(
        model=scale.model,
        optimizer=Adam(learning_rate=1e-4),
        schedule=Constant(),
        rows=scale.rows,
        length=scale.length,
        tokenizer=scale.tokenizer,
    )


def _restricted(place: str) -> Change:
    """A change that starts over, with what a format holds of the kept rungs.

    Of the blocks that it holds the first is taken, in the order in which they train well by what
    others have found; a kept rung that the format has no place for is passed over.
    """

    def change(recipe: Recipe, scale: Scale) -> Recipe:
        held = first_recipe(scale)
        for rung in RUNGS:
            if not rung.kept:
                continue
            candidates = [rung.change(held, scale)]
            if rung.name == "block":
                candidates = [
                    candidates[0].with_model(**changes, **_width(changes, scale.model.width))
                    for changes in HELD_BLOCKS
                ]
            fits = (c for c in candidates if any(place in name for name in formats(c.model)))
            held = next(fits, held)
        return held

    return change


def _width(block: Mapping[str, Any], width: int) -> dict[str, int]:
    """Of a gated feed-forward layer: 8/3 of the model's, so that its three kernels cost what the
    two of a plain one of four times do (Shazeer, arXiv 2002.05202). In GGUF's blocks of 32."""
    return {"ffn_width": 32 * round(width / 12)} if block.get("activation") == "swiglu" else {}


HELD_BLOCKS: tuple[Mapping[str, Any], ...] = (
    {"norm_scale": False, "embedding_norm": True},  # transformers' nanochat
    {"activation": "swiglu"},  # Qwen3
    {"activation": "swiglu", "qk_norm": False},  # Llama
)
"""Blocks that formats of others may hold, as changes of the modern one."""


def _off(rung: Rung) -> Rung:
    """The rung stays in the table, and nothing builds on it."""
    return dataclasses.replace(rung, kept=False)


RUNGS: tuple[Rung, ...] = (
    Rung("jax", "the first baseline's learning in our step", techniques.same),
    Rung(
        "rate",
        "AdamW, tuned rate, linearly to zero, no dropout",
        techniques.rate,
        trials=techniques.rate_trials,
    ),
    Rung(
        "parts",
        f"the batch in parts of {techniques.PART_ROWS} rows, of which caches hold all",
        techniques.parts,
    ),
    Rung(
        "batch",
        "a batch that fits the budget",
        techniques.batch,
        trials=techniques.batch_trials,
        with_rows=lambda choices, rows: dataclasses.replace(choices, rows=rows),
    ),
    Rung(
        "block",
        "rotary, RMSNorm, no biases, squared ReLU, QK-norm, zero-init, an untied head",
        techniques.block,
        trials=techniques.block_trials,
        trial_share=0.6,
    ),
    Rung(
        "muon",
        f"Muon on the kernels of the blocks, {techniques.MUON_ROWS} times the rows",
        techniques.muon,
        trials=techniques.muon_trials,
        trial_share=0.3,
    ),
    Rung(
        "muon-batch",
        "a batch that fits Muon",
        techniques.muon_rows,
        trials=techniques.muon_rows_trials,
        trial_share=0.3,
        with_rows=lambda choices, rows: dataclasses.replace(choices, muon_rows=rows),
    ),
    Rung(
        "bigrams",
        "embeddings of pairs of tokens, hashed into a table",
        techniques.bigrams,
        trials=techniques.bigram_trials,
        trial_share=0.2,
    ),
    _off(
        Rung(
            "iterations",
            "Muon orthogonalises in three iterations in place of five",
            techniques.iterations,
        )
    ),
    _off(Rung("softcap", "logits capped at 15", techniques.softcap)),
    _off(Rung("shortcuts", "the embedding mixed into every block", techniques.shortcuts)),
    _off(Rung("values", "value embeddings in every second block", techniques.values)),
    _off(
        Rung(
            "groups",
            "rates of their own for embeddings and head",
            techniques.groups,
            trials=techniques.group_trials,
            trial_share=0.3,
        )
    ),
    _off(
        Rung("cautious", "weight decay only where it goes the way of the step", techniques.cautious)
    ),
    _off(
        Rung("window", "attention over a quarter and a half of the length first", techniques.window)
    ),
    _off(Rung("momentum", "Muon's momentum from 0.85 up over the first 15 %", techniques.momentum)),
    _off(Rung("depth", "a quarter of the blocks for the first 30 %, then all", techniques.depth)),
    _off(
        Rung("untie", "head and embedding one matrix up to two thirds of the run", techniques.untie)
    ),
    _off(Rung("tail", "weights averaged over the last fifth", techniques.tail)),
    _off(Rung("multi-token", "tokens after the next one predicted as well", techniques.mtp)),
    _off(Rung("batch-warmup", "a quarter and a half of the batch first", techniques.batch_warmup)),
    _off(
        Rung("layer-drop", "up to a fifth of the blocks left out at first", techniques.layer_drop)
    ),
    _off(
        Rung(
            "token-drop", "half of the tokens pass by the inner blocks first", techniques.token_drop
        )
    ),
    _off(
        Rung("vocabulary", "a vocabulary of another size, in bits per byte", techniques.vocabulary)
    ),
    Rung("length", "sequences of a quarter and a half of the length first", techniques.length),
    Rung("few-bits", "products of kernels on operands of half the bits", techniques.few_bits),
    _off(Rung("for-hf", "what transformers can hold of the kept rungs", _restricted("HF"))),
    _off(Rung("for-gguf", "what GGUF can hold of the kept rungs", _restricted("GGUF"))),
)
"""From the bottom up."""


def rung_named(name: str) -> Rung:
    """Returns a rung.

    Raises:
      ValueError: there is none of that name; the names are listed.
    """
    for rung in RUNGS:
        if rung.name == name:
            return rung
    raise ValueError(f"no rung is called {name!r}; there are {', '.join(r.name for r in RUNGS)}")


def recipe_of(name: str, scale: Scale) -> Recipe:
    """Returns the recipe of a rung: that of the kept ones below it, and its own change."""
    rung_named(name)
    recipe = first_recipe(scale)
    for rung in RUNGS:
        if rung.name == name:
            return rung.change(recipe, scale)
        if rung.kept:
            recipe = rung.change(recipe, scale)
    raise AssertionError("the rung is one of the ladder")


def below(name: str) -> str | None:
    """Returns the rung that another one builds on, None for the first.

    >>> below("jax"), below("rate")
    (None, 'jax')
    """
    rung_named(name)
    last = None
    for rung in RUNGS:
        if rung.name == name:
            return last
        if rung.kept:
            last = rung.name
    return last


def formats_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns the formats in which a rung's model can leave."""
    return formats(recipe.model)
