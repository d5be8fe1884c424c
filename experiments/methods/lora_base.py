"""A run that `experiments.compress` wrote as the base under low-rank factors, its numbers kept."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import jax

from compress.export.stored import abstract_from, describe
from experiments.run_names import folder_of
from model.config import TransformerConfig
from model.flops import abstract_params
from train.methods import OpenRun
from train.plugs import PyTree
from train.settings import differences
from train.tokenizers.tokenizer import Tokenizer

BASE = "lora_base"
"""Name of the base in `frozen`."""


@dataclass(frozen=True)
class Base:
    """What is known of a base without its folder.

    Attributes:
      model: its config, vocabulary size included.
      step: of the checkpoint.
      tokenizer: fingerprint of its tokenizer.
      weights: which of its weights are no plain arrays, as `compress.export.stored.describe` says
        it, in JSON: settings are hashed.
    """

    model: TransformerConfig
    step: int
    tokenizer: str
    weights: str

    @property
    def abstract(self) -> PyTree:
        """Shapes and types of the parameters."""
        return abstract_from(abstract_params(self.model), json.loads(self.weights))


def known_base(spec: str, open_run: OpenRun) -> Base:
    """Returns what is known of a run, "RUN" or "RUN@STEP".

    Raises:
      ValueError: its products are of integers, through which no gradient goes.
      FileNotFoundError: it is no run.
    """
    run = open_run(spec)
    weights = describe(run.params)
    if weights["products"]:
        raise ValueError(
            f"{spec} takes integer products ({next(iter(weights['products']))}), through which no "
            "gradient goes; compress with float products, such as --method gptq"
        )
    known = json.dumps(weights, sort_keys=True)
    return Base(run.model.config, run.step, run.tokenizer.fingerprint(), known)


def load_base(spec: str, known: Base, open_run: OpenRun) -> PyTree:
    """Returns the parameters of a base, quantized as they are.

    Raises:
      ValueError: it is another model than it was when the run was set up.
    """
    run = open_run(f"{folder_of(spec)}@{known.step}")
    if run.model.config != known.model or jax.eval_shape(lambda: run.params) != known.abstract:
        raise ValueError(
            f"{spec} is not what it was when this run was set up; begin in another folder"
        )
    return run.params


def check_base(spec: str, known: Base, config: TransformerConfig) -> None:
    """Raises ValueError unless the model that trains has the config of its base."""
    if known.model != config:
        lines = differences(dataclasses.asdict(config), dataclasses.asdict(known.model))
        raise ValueError(f"the base {spec} has another model: {'; '.join(lines)}")


def check_tokens(spec: str, known: Base, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a base that reads other tokens."""
    if tokenizer.fingerprint() != known.tokenizer:
        raise ValueError(
            f"the base {spec} reads with another tokenizer; give this run the base's: "
            f"--tokenizer {folder_of(spec)}/tokenizer"
        )
