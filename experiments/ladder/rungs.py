"""The rungs: each a name and a function from the recipe of the rung below to its own.

A rung that is not kept stays in the table, with its loss; the next one builds on the last that is.
What is kept is decided by seconds of training to the target over three seeds: see `kept` of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.baselines.tune import BATCHES
from experiments.ladder.formats import formats
from experiments.ladder.recipe import Ramp, Recipe
from experiments.ladder.scales import Choices, Scale
from experiments.methods.multi_token import MultiToken
from model.presets import modern
from train.optimizers import Adam
from train.schedules import Constant, Linear

PART_ROWS = 2
"""See docs/cpu-throughput.md: gradients of parts are added up, and a step is the same."""

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


def _same(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe


def _rate(recipe: Recipe, scale: Scale) -> Recipe:
    chosen = scale.choices
    tuned = dataclasses.replace(
        recipe, optimizer=chosen.adamw, schedule=Linear(), warmup=chosen.adamw_warmup
    )
    return tuned.with_model(dropout=0.0)


def _rate_trials(scale: Scale) -> dict[str, Choices]:
    """Rates, with the betas, decay, clipping and warmup that were found for the baseline.

    It is the same model under the same optimizer; without them the rungs up to Muon would stand
    below a baseline that has them.
    """
    chosen = scale.choices
    return {
        f"rate {rate:g}": dataclasses.replace(
            chosen,
            adamw=dataclasses.replace(chosen.torch_adamw, learning_rate=rate),
            adamw_warmup=chosen.torch_warmup,
        )
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    }


def _batch(recipe: Recipe, scale: Scale) -> Recipe:
    chosen = scale.choices
    fitted = dataclasses.replace(recipe, rows=chosen.rows)
    return fitted.with_optimizer(learning_rate=chosen.rows_rate)


def _batch_trials(scale: Scale) -> dict[str, Choices]:
    """From a sixteenth to a half of the baseline's batch, each at its rate and at half of it.

    And the whole one; all for as many seconds.
    """
    found = {}
    for factor, factors in BATCHES:
        rows = max(1, round(scale.rows * factor))
        for times in factors:
            rate = scale.choices.adamw.learning_rate * times
            choices = dataclasses.replace(scale.choices, rows=rows, rows_rate=rate)
            found[f"{rows} rows, rate {rate:g}"] = choices
    return found


def _parts(recipe: Recipe, scale: Scale) -> Recipe:
    return dataclasses.replace(recipe, part_rows=PART_ROWS)


def _block(recipe: Recipe, scale: Scale) -> Recipe:
    """Everything of `model.presets.modern` but the soft-cap, which has a rung of its own."""
    new, plain = modern(), scale.model
    shape = ("vocabulary_size", "max_length", "layers", "width", "heads", "dtype")
    changes = {
        f.name: getattr(new, f.name)
        for f in dataclasses.fields(new)
        if f.name not in (*shape, "logit_softcap")
        and getattr(new, f.name) != getattr(plain, f.name)
    }
    modern_block = recipe.with_model(**{**changes, "dropout": 0.0})
    return modern_block.with_optimizer(learning_rate=scale.choices.block_rate)


def _block_trials(scale: Scale) -> dict[str, Choices]:
    rates = [scale.choices.rows_rate * times for times in (0.25, 0.5, 1.0, 2.0)]
    return {f"rate {rate:g}": dataclasses.replace(scale.choices, block_rate=rate) for rate in rates}


def _muon(recipe: Recipe, scale: Scale) -> Recipe:
    return dataclasses.replace(recipe, optimizer=scale.choices.muon, warmup=0.0)


def _muon_trials(scale: Scale) -> dict[str, Choices]:
    muon = scale.choices.muon
    found = {}
    for rate in (0.0025, 0.005, 0.01, 0.02, 0.04):
        for adam in (0.004, 0.008, 0.016):
            changed = dataclasses.replace(muon, learning_rate=rate, adam_learning_rate=adam)
            choices = dataclasses.replace(scale.choices, muon=changed)
            found[f"rate {rate:g}, AdamW's {adam:g}"] = choices
    return found


def _muon_rows(recipe: Recipe, scale: Scale) -> Recipe:
    """Its step costs as much whatever the batch, so that a larger one is cheaper by the token."""
    chosen, muon = scale.choices, scale.choices.muon
    rates = {
        name: chosen.muon_factor * getattr(muon, name)
        for name in ("learning_rate", "adam_learning_rate")
    }
    fitted = dataclasses.replace(recipe, rows=chosen.muon_rows)
    return fitted.with_optimizer(**rates)


def _muon_rows_trials(scale: Scale) -> dict[str, Choices]:
    """Once to eight times AdamW's batch, at Muon's rates; larger ones at higher ones too."""
    found = {}
    for times, factors in ((1, (1.0,)), (2, (1.0, 1.4)), (4, (1.0, 1.4, 2.0)), (8, (1.4, 2.0))):
        rows = times * scale.choices.rows
        for factor in factors:
            choices = dataclasses.replace(scale.choices, muon_rows=rows, muon_factor=factor)
            found[f"{rows} rows, rates x{factor:g}"] = choices
    return found


def _softcap(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_model(logit_softcap=15.0)


def _shortcuts(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_model(embedding_norm=True, embedding_shortcut=0.1)


def _values(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_model(value_embeddings=True)


def _groups(recipe: Recipe, scale: Scale) -> Recipe:
    rules = (
        ("token_embedding", scale.choices.embedding_rate),
        ("head", scale.choices.head_rate),
    )
    return recipe.with_optimizer(learning_rate_rules=rules)


def _group_trials(scale: Scale) -> dict[str, Choices]:
    return {
        f"embeddings x{embedding:g}, head x{head:g}": dataclasses.replace(
            scale.choices, embedding_rate=embedding, head_rate=head
        )
        for embedding in (1.0, 2.0, 4.0)
        for head in (0.5, 1.0)
    }


def _cautious(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_optimizer(cautious_decay=True)


def _length(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("length", ((0.3, 0.25), (0.6, 0.5))))


def _window(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("window", ((0.3, scale.length // 4), (0.6, scale.length // 2))))


def _layer_drop(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("layer_drop", ((0.6, 0.2),)))


def _token_drop(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("token_drop", ((0.6, 0.5),)))


def _momentum(recipe: Recipe, scale: Scale) -> Recipe:
    return dataclasses.replace(recipe, optimizer_shares={"momentum_warmup_steps": 0.15})


def _iterations(recipe: Recipe, scale: Scale) -> Recipe:
    """Dion's last three bring singular values from 0.03 of the norm up nearer 1 than Jordan's five.

    Smaller ones, which are mostly noise, stay smaller.
    """
    return recipe.with_optimizer(newton_schulz_steps=3, newton_schulz_coefficients="dion")


def _depth(recipe: Recipe, scale: Scale) -> Recipe:
    fewer = max(1, scale.model.layers // 4)
    return recipe.with_ramp(Ramp("layers", ((0.3, fewer),)))


def _untie(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("tied_head", ((0.66, True),)))


def _mtp(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_more(methods=(*recipe.more.get("methods", ()), MultiToken()))


def _tail(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_optimizer(tail_fraction=0.2)


def _batch_warmup(recipe: Recipe, scale: Scale) -> Recipe:
    return recipe.with_ramp(Ramp("rows", ((0.15, 0.25), (0.4, 0.5))))


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


def _vocabulary(recipe: Recipe, scale: Scale) -> Recipe:
    return dataclasses.replace(recipe, tokenizer=scale.choices.vocabulary)


def _off(rung: Rung) -> Rung:
    """The rung stays in the table, and nothing builds on it."""
    return dataclasses.replace(rung, kept=False)


RUNGS: tuple[Rung, ...] = (
    Rung("jax", "the first baseline's learning in our step", _same),
    Rung("rate", "AdamW, tuned rate, linearly to zero, no dropout", _rate, trials=_rate_trials),
    Rung("parts", f"the batch in parts of {PART_ROWS} rows, of which caches hold all", _parts),
    Rung(
        "batch",
        "a batch that fits the budget",
        _batch,
        trials=_batch_trials,
        with_rows=lambda choices, rows: dataclasses.replace(choices, rows=rows),
    ),
    Rung(
        "block",
        "rotary, RMSNorm, no biases, squared ReLU, QK-norm, zero-init, an untied head",
        _block,
        trials=_block_trials,
        trial_share=0.6,
    ),
    Rung("muon", "Muon on the kernels of the blocks", _muon, trials=_muon_trials, trial_share=0.3),
    Rung(
        "muon-batch",
        "a batch that fits Muon",
        _muon_rows,
        trials=_muon_rows_trials,
        trial_share=0.3,
        with_rows=lambda choices, rows: dataclasses.replace(choices, muon_rows=rows),
    ),
    Rung("softcap", "logits capped at 15", _softcap),
    Rung("shortcuts", "the embedding mixed into every block", _shortcuts),
    Rung("values", "value embeddings in every second block", _values),
    Rung(
        "groups",
        "rates of their own for embeddings and head",
        _groups,
        trials=_group_trials,
        trial_share=0.3,
    ),
    Rung("cautious", "weight decay only where it goes the way of the step", _cautious),
    _off(Rung("length", "sequences of a quarter and a half of the length first", _length)),
    # On the CPU it saves no time: blocks of keys are computed whole, and only what counts is less.
    _off(Rung("window", "attention over a quarter and a half of the length first", _window)),
    _off(Rung("momentum", "Muon's momentum from 0.85 up over the first 15 %", _momentum)),
    _off(
        Rung(
            "iterations",
            "Muon orthogonalises in three iterations in place of five",
            _iterations,
        )
    ),
    _off(Rung("depth", "a quarter of the blocks for the first 30 %, then all", _depth)),
    _off(Rung("untie", "head and embedding one matrix up to two thirds of the run", _untie)),
    _off(Rung("tail", "weights averaged over the last fifth", _tail)),
    _off(Rung("multi-token", "tokens after the next one predicted as well", _mtp)),
    _off(Rung("batch-warmup", "a quarter and a half of the batch first", _batch_warmup)),
    _off(Rung("layer-drop", "up to a fifth of the blocks left out at first", _layer_drop)),
    _off(Rung("token-drop", "half of the tokens pass by the inner blocks first", _token_drop)),
    _off(Rung("vocabulary", "a vocabulary of another size, in bits per byte", _vocabulary)),
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
