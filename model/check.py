"""Whether parameters are those of a config, all of them and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import TransformerConfig
from model.flops import abstract_params
from model.mismatch import by_path, mismatches
from model.prefix import KEY as PREFIX
from model.rules import STACK

MODEL_PARTS = (
    *("token_embedding", "source_embedding", "position_embedding", "value_embedding"),
    *("bigram_embedding", STACK, "encoder", "decoder", "final_norm", "head"),
)
"""Names at the top of the parameters of any model."""


def check_params(config: TransformerConfig, params: Mapping[str, Any]) -> None:
    """Refuses parameters of another config.

    A model reads its parameters by name as it runs, and says what it lacks and what has another
    shape; this also finds what it would pass over, such as a head of its own beside a tied one.
    What is trained beside a model, under names that no model has (a prompt, scores of a task) or as
    a prefix, is not looked at.

    Args:
      config: of the model.
      params: nested dicts of arrays, or of weights that know their logical shape.

    Raises:
      ValueError: names that are missing or too many, or other shapes.

    >>> import dataclasses
    >>> from model.presets import gpt2_tiny
    >>> params = abstract_params(gpt2_tiny())
    >>> check_params(gpt2_tiny(), params)
    >>> check_params(dataclasses.replace(gpt2_tiny(), tied_head=False), params)
    Traceback (most recent call last):
    ...
    ValueError: the parameters are not those of the config: they lack head/kernel
    """
    shapes = {path: leaf.shape for path, leaf in by_path(abstract_params(config)).items()}
    beside = beside_model(params)
    own = {path: leaf for path, leaf in by_path(params).items() if path not in beside}
    if said := mismatches(own, shapes):
        raise ValueError(f"the parameters are not those of the config: they {'; '.join(said)}")


def beside_model(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns by path what lies beside the parameters of a model.

    >>> beside_model({"head": {"kernel": 0}, "prompt": {"vectors": 1}})
    {'prompt/vectors': 1}
    """
    return {
        path: leaf
        for path, leaf in by_path(params).items()
        if path.split("/")[0] not in MODEL_PARTS or PREFIX in path.split("/")
    }
