"""What methods and tasks put beside the weights of a model, and formats of others do not hold."""

from __future__ import annotations

from typing import Any

import jax

from model.prefix import KEY as PREFIX
from model.rules import path_of
from train.prompts import PROMPT
from train.tasks.grams import GRAMS

KINDS = {
    PROMPT: "a prompt's vectors",
    PREFIX: "a prefix's keys and values",
    GRAMS: "scores of n-grams",
}


def check_nothing_beside(params: Any, name: str) -> None:
    """Raises ValueError for a run with vectors or scores that another program would not read.

    Args:
      params: of the run.
      name: of the format.

    >>> check_nothing_beside({"prompt": {"vectors": jax.numpy.ones((2, 4))}}, "GGUF")
    Traceback (most recent call last):
    ...
    ValueError: GGUF has no place for a prompt's vectors (prompt/vectors); --format native and ...
    """
    for key_path, _ in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        for key in KINDS.keys() & set(path.split("/")):
            raise ValueError(
                f"{name} has no place for {KINDS[key]} ({path}); --format native and stablehlo of "
                "experiments.export hold any model, and without them it would be another one"
            )
