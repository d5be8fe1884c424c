"""The teacher of a run: what is known of it from the settings, and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from compress.distillation.logits import check_vocabularies
from experiments.run_names import folder_of
from model.config import TransformerConfig
from model.flops import abstract_params
from train.methods import OpenRun
from train.plugs import PyTree
from train.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Teacher:
    """What is known of a teacher without its folder.

    Attributes:
      model: its config, vocabulary size included.
      step: of the checkpoint.
      tokenizer: fingerprint of its tokenizer.
    """

    model: TransformerConfig
    step: int
    tokenizer: str


def load_teacher(spec: str, known: Teacher, open_run: OpenRun) -> PyTree:
    """Returns the parameters of a teacher.

    Args:
      spec: "RUN" or "RUN@STEP".
      known: what it was when the run was set up.
      open_run: see `train.methods.OpenRun`.

    Raises:
      ValueError: it is another model now, or its parameters are no plain arrays.
    """
    run = open_run(f"{folder_of(spec)}@{known.step}")
    wanted = abstract_params(known.model)
    found = jax.eval_shape(lambda: run.params)
    if run.model.config != known.model or found != wanted:
        raise ValueError(
            f"{spec} does not hold plain parameters of the model that it was when this run was set "
            "up; train a plain teacher, or begin in another folder"
        )
    return run.params


def resolve_teacher(
    settings: Any,
    saved: Any,
    open_run: OpenRun,
    flag: str,
    of: Callable[[Any], Teacher] | None = None,
) -> Teacher:
    """Returns what is known of the teacher that the settings of a method name.

    Args:
      settings: with `teacher` and `resolved`.
      saved: those that the run began with, if it did; what they know of the same teacher is taken
        from them.
      open_run: see `train.methods.OpenRun`.
      flag: of the command line, for the message.
      of: run -> what is known of it; `known_of` by default.

    Raises:
      ValueError: no teacher was named.
      FileNotFoundError: it is no run.
    """
    if settings.resolved is not None:
        return settings.resolved
    if not settings.teacher:
        raise ValueError(f"distillation needs a teacher; name a run with {flag}")
    if saved is not None and saved.teacher == settings.teacher:
        return saved.resolved
    return (of or known_of)(open_run(settings.teacher))


def known_of(run: Any) -> Teacher:
    """Returns what is known of a run without its folder."""
    return Teacher(run.model.config, run.step, run.tokenizer.fingerprint())


def check_reads_alike(tokenizer: Tokenizer, teacher: Teacher, spec: str) -> None:
    """Raises ValueError for a teacher that reads other tokens.

    Args:
      tokenizer: of the student.
      teacher: what is known of it.
      spec: what it was called.
    """
    check_vocabularies(tokenizer.vocabulary_size, teacher.model.vocabulary_size)
    if tokenizer.fingerprint() != teacher.tokenizer:
        raise ValueError(
            f"the teacher {spec} reads with another tokenizer of the same size; give this run the "
            f"teacher's: --tokenizer {folder_of(spec)}/tokenizer"
        )
