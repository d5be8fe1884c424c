"""The methods that a run may be given, by name: what `--method NAME` knows.

Each is a frozen dataclass that builds its plugs (see `train.methods`); what they are made of lies
in `compress/`, `parallel/` and `train/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from experiments.methods.compression import COMPRESS_METHODS
from experiments.methods.distill import Distil
from experiments.methods.distill_cached import DistilCached
from experiments.methods.lora import Lora
from experiments.methods.lowrank import LowRankKernels
from experiments.methods.multi_token import MultiToken
from experiments.methods.on_policy import OnPolicyDistil
from experiments.methods.parallel import PARALLEL_METHODS
from experiments.methods.privacy import DpSgd
from experiments.methods.prompts import PROMPT_METHODS
from experiments.methods.replay import Replay
from experiments.methods.tuning import TUNING_METHODS
from model.rules import leaf_paths, match
from train.methods import OpenRun, Plugs, Reading, Setup
from train.partition import split_where
from train.settings import Settings
from train.tokenizers.tokenizer import Tokenizer


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
        paths = zip(leaf_paths(setup.params), jax.tree.leaves(chosen), strict=True)
        fixed = {path for path, yes in paths if yes}
        return Plugs(split=split_where(lambda path: path not in fixed))


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
            DpSgd,
            Replay,
        )
    },
    **COMPRESS_METHODS,
    **PARALLEL_METHODS,
    **TUNING_METHODS,
    **PROMPT_METHODS,
}


def resolve(settings: Settings, saved: Settings | None, open_run: OpenRun) -> Settings:
    """Returns the settings with all filled in that methods and the task learn from elsewhere.

    Args:
      settings: as given.
      saved: those that the run began with, or None.
      open_run: see `train.methods.OpenRun`.

    Raises:
      ValueError: a method or a task that lacks what it needs.
    """
    check_task(settings.methods, settings.task)
    before = {} if saved is None else {method.name: method for method in saved.methods}
    methods = tuple(
        method.resolve(before.get(method.name), open_run) if hasattr(method, "resolve") else method
        for method in settings.methods
    )
    task = None if settings.task is None else settings.task.resolve()
    return dataclasses.replace(settings, methods=methods, task=task)


def check_task(methods: Sequence[Any], task: Any) -> None:
    """Raises ValueError if a method cannot work with a task, as it was given."""
    for method in methods:
        if hasattr(method, "check_task"):
            method.check_task(task)


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


def closing(settings: Settings, sources: Sequence[tuple[int, float]], steps: int) -> dict[str, Any]:
    """Returns what the methods have to say of a run at its end, for `result.json`.

    Args:
      settings: of the run.
      sources: examples of each source that it trained on, and its share of the rows.
      steps: that were made.
    """
    facts: dict[str, Any] = {}
    for method in settings.methods:
        if hasattr(method, "closing"):
            facts |= method.closing(settings, sources, steps)
    return facts
