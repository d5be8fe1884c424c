"""The techniques of the ladder: each a function from the recipe of the rung below to its own.

Beside those that have settings of their own stands what `--tune` tries for them.
"""

from __future__ import annotations

import dataclasses

from experiments.baselines.tune import BATCHES
from experiments.ladder.recipe import Ramp, Recipe
from experiments.ladder.scales import Choices, Scale
from experiments.methods.compression import LowPrecision
from experiments.methods.multi_token import MultiToken
from model.presets import modern
from train.schedules import Linear

PART_ROWS = 2
"""See docs/cpu-throughput.md: gradients of parts are added up, and a step is the same."""

OUTSIDE_TRIALS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "13 runs narrowed the sizes of the table of pairs of tokens",
        "6 with NorMuon and with Muon on the hyperball in the place of Muon found no gain",
    )
}
"""Runs of one seed that no group of a scale's trials has: ours, beside those that are listed."""

MUON_ROWS = 2
"""Times AdamW's batch, at which Muon is tuned."""


def same(recipe: Recipe, scale: Scale) -> Recipe:
    """Changes nothing: the first baseline in our step."""
    return recipe


def rate(recipe: Recipe, scale: Scale) -> Recipe:
    """AdamW at a tuned rate that falls to zero in a straight line, and no dropout."""
    chosen = scale.choices
    tuned = dataclasses.replace(
        recipe, optimizer=chosen.adamw, schedule=Linear(), warmup=chosen.adamw_warmup
    )
    return tuned.with_model(dropout=0.0)


def rate_trials(scale: Scale) -> dict[str, Choices]:
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


def batch(recipe: Recipe, scale: Scale) -> Recipe:
    """A batch that fits the budget, with its rate."""
    chosen = scale.choices
    fitted = dataclasses.replace(recipe, rows=chosen.rows)
    return fitted.with_optimizer(learning_rate=chosen.rows_rate)


def batch_trials(scale: Scale) -> dict[str, Choices]:
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


def parts(recipe: Recipe, scale: Scale) -> Recipe:
    """Gradients of parts of a batch, added up."""
    return dataclasses.replace(recipe, part_rows=PART_ROWS)


def block(recipe: Recipe, scale: Scale) -> Recipe:
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


def block_trials(scale: Scale) -> dict[str, Choices]:
    """Rates from a quarter of that of the batch to four times it."""
    rates = [scale.choices.rows_rate * times for times in (0.25, 0.5, 1.0, 2.0, 4.0)]
    return {f"rate {rate:g}": dataclasses.replace(scale.choices, block_rate=rate) for rate in rates}


def muon(recipe: Recipe, scale: Scale) -> Recipe:
    """Its step costs as much whatever the batch, so that it is tried at a larger one than AdamW."""
    chosen = scale.choices
    rows = MUON_ROWS * chosen.rows
    return dataclasses.replace(recipe, optimizer=chosen.muon, warmup=0.0, rows=rows)


def muon_trials(scale: Scale) -> dict[str, Choices]:
    """Rates of Muon, each with AdamW's for embeddings and head."""
    muon = scale.choices.muon
    found = {}
    for rate in (0.0025, 0.005, 0.01, 0.02, 0.04):
        for adam in (0.004, 0.008, 0.016):
            changed = dataclasses.replace(muon, learning_rate=rate, adam_learning_rate=adam)
            choices = dataclasses.replace(scale.choices, muon=changed)
            found[f"rate {rate:g}, AdamW's {adam:g}"] = choices
    return found


def muon_rows(recipe: Recipe, scale: Scale) -> Recipe:
    """A batch that fits Muon, with its rates: a larger one is cheaper by the token."""
    chosen, muon = scale.choices, scale.choices.muon
    rates = {
        name: chosen.muon_factor * getattr(muon, name)
        for name in ("learning_rate", "adam_learning_rate")
    }
    fitted = dataclasses.replace(recipe, rows=chosen.muon_rows)
    return fitted.with_optimizer(**rates)


def muon_rows_trials(scale: Scale) -> dict[str, Choices]:
    """Once to eight times the batch that it was tuned at, at its rates; larger ones at higher ones
    too."""
    found = {}
    for times, factors in ((1, (1.0,)), (2, (1.0, 1.4)), (4, (1.0, 1.4, 2.0)), (8, (1.4, 2.0))):
        rows = times * MUON_ROWS * scale.choices.rows
        for factor in factors:
            choices = dataclasses.replace(scale.choices, muon_rows=rows, muon_factor=factor)
            found[f"{rows} rows, rates x{factor:g}"] = choices
    return found


def bigrams(recipe: Recipe, scale: Scale) -> Recipe:
    """What each token says together with the one before it, looked up (modded-nanogpt, record 62).

    The optimizer goes over the whole table at every step, which a small batch does not pay for: on
    one core of an Intel Xeon steps took 1.17x as long with a table of a million numbers, and 1.35x
    with one of 4 million. Threes of tokens in the same table did not help. See `OUTSIDE_TRIALS`.
    """
    chosen = scale.choices
    return recipe.with_model(bigram_rows=chosen.bigram_rows, bigram_width=chosen.bigram_width)


def bigram_trials(scale: Scale) -> dict[str, Choices]:
    """Tables of two sizes, either in three forms: more rows, or wider ones."""
    found = {}
    for numbers in (2**18, 2**19):
        for width in (8, 16, 32):
            choices = dataclasses.replace(
                scale.choices, bigram_rows=numbers // width, bigram_width=width
            )
            found[f"{numbers // width:,} rows of {width}"] = choices
    return found


def softcap(recipe: Recipe, scale: Scale) -> Recipe:
    """Logits squeezed to 15 tanh(logit / 15) (Gemma 2, arXiv 2408.00118, there at 30)."""
    return recipe.with_model(logit_softcap=15.0)


def shortcuts(recipe: Recipe, scale: Scale) -> Recipe:
    """The normed embedding mixed into the stream before every block (modded-nanogpt)."""
    return recipe.with_model(embedding_norm=True, embedding_shortcut=0.1)


def values(recipe: Recipe, scale: Scale) -> Recipe:
    """Token embeddings mixed into the values of attention (Zhou et al., arXiv 2410.17897)."""
    return recipe.with_model(value_embeddings=True)


def groups(recipe: Recipe, scale: Scale) -> Recipe:
    """Factors on the rates of the embeddings and of the head."""
    rules = (
        ("token_embedding", scale.choices.embedding_rate),
        ("head", scale.choices.head_rate),
    )
    return recipe.with_optimizer(learning_rate_rules=rules)


def group_trials(scale: Scale) -> dict[str, Choices]:
    """Factors for the embeddings, each with two for the head."""
    return {
        f"embeddings x{embedding:g}, head x{head:g}": dataclasses.replace(
            scale.choices, embedding_rate=embedding, head_rate=head
        )
        for embedding in (1.0, 2.0, 4.0)
        for head in (0.5, 1.0)
    }


def cautious(recipe: Recipe, scale: Scale) -> Recipe:
    """Decay only of weights whose step goes the same way (Chen et al., arXiv 2510.12402)."""
    return recipe.with_optimizer(cautious_decay=True)


def length(recipe: Recipe, scale: Scale) -> Recipe:
    """Shorter sequences first (Li et al., arXiv 2108.06084), in batches of as many tokens."""
    return recipe.with_ramp(Ramp("length", ((0.3, 0.25), (0.6, 0.5))))


def window(recipe: Recipe, scale: Scale) -> Recipe:
    """Attention over less of the past first.

    It saves no time on a CPU: blocks of keys are computed whole, and only what counts is less.
    """
    return recipe.with_ramp(Ramp("window", ((0.3, scale.length // 4), (0.6, scale.length // 2))))


def layer_drop(recipe: Recipe, scale: Scale) -> Recipe:
    """Blocks left out at random at first (Zhang and He, arXiv 2010.13369)."""
    return recipe.with_ramp(Ramp("layer_drop", ((0.6, 0.2),)))


def token_drop(recipe: Recipe, scale: Scale) -> Recipe:
    """Tokens that pass by the inner blocks at first (Yao et al., arXiv 2211.11586)."""
    return recipe.with_ramp(Ramp("token_drop", ((0.6, 0.5),)))


def momentum(recipe: Recipe, scale: Scale) -> Recipe:
    """Muon's momentum from 0.85 up, while the gradient turns fast (modded-nanogpt)."""
    return dataclasses.replace(recipe, optimizer_shares={"momentum_warmup_steps": 0.15})


def iterations(recipe: Recipe, scale: Scale) -> Recipe:
    """Dion's last three bring singular values from 0.03 of the norm up nearer 1 than Jordan's five.

    Smaller ones, which are mostly noise, stay smaller.
    """
    return recipe.with_optimizer(newton_schulz_steps=3, newton_schulz_coefficients="dion")


def depth(recipe: Recipe, scale: Scale) -> Recipe:
    """Fewer blocks at first, and new ones that change nothing yet (Gong et al., ICML 2019)."""
    fewer = max(1, scale.model.layers // 4)
    return recipe.with_ramp(Ramp("layers", ((0.3, fewer),)))


def untie(recipe: Recipe, scale: Scale) -> Recipe:
    """Head and embedding are one matrix at first, then two (modded-nanogpt)."""
    return recipe.with_ramp(Ramp("tied_head", ((0.66, True),)))


def mtp(recipe: Recipe, scale: Scale) -> Recipe:
    """Tokens after the next one are predicted as well (Gloeckle et al., arXiv 2404.19737)."""
    return recipe.with_more(methods=(*recipe.more.get("methods", ()), MultiToken()))


def tail(recipe: Recipe, scale: Scale) -> Recipe:
    """Evaluated are weights averaged over the end of the run."""
    return recipe.with_optimizer(tail_fraction=0.2)


def batch_warmup(recipe: Recipe, scale: Scale) -> Recipe:
    """Smaller batches at first (McCandlish et al., arXiv 1812.06162)."""
    return recipe.with_ramp(Ramp("rows", ((0.15, 0.25), (0.4, 0.5))))


def few_bits(recipe: Recipe, scale: Scale) -> Recipe:
    """Products of kernels on operands of half the bits, with sums and all else as they were.

    Bfloat16 for float32, in the head as well; float8 for bfloat16, in the blocks and but for the
    kernels' own gradients (Micikevicius et al., arXiv 2209.05433).
    """
    products = LowPrecision("e4m3", "e5m2", "float")
    if recipe.model.dtype == "float32":
        head = () if recipe.model.tied_head else ("head/kernel",)
        rules = ("blocks/.*/kernel", *head)
        products = LowPrecision("bfloat16", "bfloat16", "bfloat16", rules=rules)
    return recipe.with_more(methods=(*recipe.more.get("methods", ()), products))


def vocabulary(recipe: Recipe, scale: Scale) -> Recipe:
    """Another tokenizer; rows are compared in bits per byte."""
    return dataclasses.replace(recipe, tokenizer=scale.choices.vocabulary)
