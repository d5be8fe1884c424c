"""The methods that a run may be given, by name: what `--method NAME` knows.

Each is a frozen dataclass that builds its plugs (see `train.methods`); what they are made of lies
in `compress/`, `parallel/` and `train/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.compress_methods import COMPRESS_METHODS
from experiments.distill_cached_method import DistilCached
from experiments.distill_method import Distil
from experiments.lora_method import Lora
from experiments.lowrank_method import LowRankKernels
from experiments.mtp_method import MultiToken
from experiments.on_policy_method import OnPolicyDistil
from experiments.parallel_methods import PARALLEL_METHODS
from model.rules import match
from train.methods import Plugs, Reading, Setup, one_side
from train.plugs import PyTree
from train.settings import Settings
from train.tokenizers import Tokenizer


@dataclass(frozen=True)
class Freeze:
    """Keeps the parameters whose path a rule matches as they are.

    They have no gradient, no optimizer state, and are saved once a run.

    Attributes:
      rules: regexes over parameter paths (see `model.rules`).
    """

    name: ClassVar[str] = "freeze"
    rules: tuple[str, ...] = ("token_embedding",)

    def build(self, setup: Setup) -> Plugs:
        """Splits the parameters by the rules.

        Raises:
          ValueError: a rule that matches nothing, or only some layers of a stack.
        """
        chosen = match([(rule, True) for rule in self.rules], setup.params, default=False)

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            return one_side(params, chosen, False), one_side(params, chosen, True)

        return Plugs(split=split)


METHODS: dict[str, type[Any]] = {
    **{
        method.name: method
        for method in (
            Freeze,
            Lora,
            LowRankKernels,
            MultiToken,
            Distil,
            DistilCached,
            OnPolicyDistil,
        )
    },
    **COMPRESS_METHODS,
    **PARALLEL_METHODS,
}


def resolve(settings: Settings, saved: Settings | None) -> Settings:
    """Returns the settings with all filled in that methods learn from elsewhere, once a run.

    Args:
      settings: as given.
      saved: those that the run began with, or None.

    Raises:
      ValueError: a method that lacks what it needs.
    """
    before = {} if saved is None else {method.name: method for method in saved.methods}
    methods = tuple(
        method.resolve(before.get(method.name)) if hasattr(method, "resolve") else method
        for method in settings.methods
    )
    return dataclasses.replace(settings, methods=methods)


def check_tokenizer(settings: Settings, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a method cannot work with the tokenizer of the run."""
    for method in settings.methods:
        if hasattr(method, "check_tokenizer"):
            method.check_tokenizer(tokenizer)


def batch_map(reading: Reading) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns `batch -> batch` with what the methods of the run put beside it, in their order."""
    maps = [m.read(reading) for m in reading.settings.methods if hasattr(m, "read")]

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        for each in maps:
            batch = each(batch)
        return batch

    return apply
