"""How parameters differ from those that a config describes: in names, and in logical shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax


def by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what nested dicts hold by path; a weight that is not an array counts as one.

    >>> by_path({"head": {"kernel": 1}, "table": 2})
    {'head/kernel': 1, 'table': 2}
    """
    nested = flax.core.unfreeze(dict(params))
    return dict(flax.traverse_util.flatten_dict(nested, sep="/"))


def mismatches(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns what parts from the shapes, ready to follow "they"; empty if nothing does.

    Args:
      found: weights by path, arrays or such as know their logical `shape`.
      shapes: logical shapes by path.

    >>> import jax.numpy as jnp
    >>> mismatches({"up": jnp.ones(2), "bias": jnp.ones(3)}, {"up": (2,), "down": (2,)})
    ['lack down', 'hold what such a model does not have: bias']
    >>> mismatches({"up": jnp.ones(2)}, {"up": (3,)})
    ['hold wrong shapes: up [2] instead of [3]']
    """
    problems = {
        "lack": sorted(set(shapes) - set(found)),
        "hold what such a model does not have:": sorted(set(found) - set(shapes)),
        "hold wrong shapes:": [
            f"{path} {list(found[path].shape)} instead of {list(shape)}"
            for path, shape in shapes.items()
            if path in found and tuple(found[path].shape) != tuple(shape)
        ],
    }
    return [f"{what} {some(names)}" for what, names in problems.items() if names]


def some(names: Iterable[str], most: int = 8) -> str:
    """Returns the first few names, and how many more there are.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
