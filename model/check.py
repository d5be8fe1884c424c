"""Whether parameters are those of a config, all of them and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import TransformerConfig
from model.flops import abstract_params
from model.mismatch import by_path, mismatches


def check_params(config: TransformerConfig, params: Mapping[str, Any]) -> None:
    """Refuses parameters of another config.

    A model reads its parameters by name as it runs, and says what it lacks and what has another
    shape; this also finds what it would pass over, such as a head of its own beside a tied one.

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
    if said := mismatches(by_path(params), shapes):
        raise ValueError(f"the parameters are not those of the config: they {'; '.join(said)}")
