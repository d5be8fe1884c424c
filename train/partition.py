"""Which parameters train, by path, and how far below the head each of them lies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.rules import is_stacked, leaf_paths, match, path_of
from train.plugs import PyTree

Split = Callable[[PyTree], tuple[PyTree, PyTree]]


def split_where(trains: Callable[[str], bool]) -> Split:
    """Returns the `split` (see `train.methods.Plugs`) that leaves those to train that are chosen.

    Args:
      trains: path of a leaf -> whether it trains. It is asked of whatever an earlier method has put
        beside the model as well.

    >>> split_where(lambda path: path.endswith("bias"))({"up": {"kernel": 1, "bias": 2}})
    ({'up': {'bias': 2}}, {'up': {'kernel': 1}})
    """

    def side(params: PyTree, wanted: bool, path: tuple[str, ...] = ()) -> PyTree:
        kept = {}
        for name, value in params.items():
            here = (*path, name)
            if isinstance(value, dict):
                if part := side(value, wanted, here):
                    kept[name] = part
            elif trains("/".join(here)) is wanted:
                kept[name] = value
        return kept

    return lambda params: (side(params, True), side(params, False))


def trains_also(params: PyTree, also: Sequence[str], chosen: Collection[str] = ()) -> Split:
    """Returns the split that freezes the model but for some of it.

    What an earlier method or a task has put beside the model trains as that asked for.

    Args:
      params: of the whole model, or their shapes.
      also: regexes of parameters that train (see `model.rules`).
      chosen: paths that train besides.

    Raises:
      ValueError: a rule that matches nothing, or only some layers of a stack.

    >>> split = trains_also({"up": {"kernel": 1, "bias": 2}}, ["bias"])
    >>> split({"up": {"kernel": 1, "bias": 2}, "score": 3})[0]
    {'up': {'bias': 2}, 'score': 3}
    """
    rules = match([(rule, True) for rule in also], params, default=False)
    trains = dict(zip(leaf_paths(params), jax.tree.leaves(rules), strict=True))
    return split_where(lambda path: trains.get(path, True) or path in chosen)


def below_head(tree: PyTree, layers: int) -> PyTree:
    """Returns how many steps below the head each leaf lies: an int, or int [L] of a stacked leaf.

    0 is the head, the last norm, and whatever a task has put beside the model; 1 the last block,
    L the first one, L + 1 the embeddings (a tied head is an embedding). Encoder and decoder are
    each counted from their own end.

    Args:
      tree: parameters, their gradients, or their shapes.
      layers: blocks of the model, L.

    >>> tree = {"token_embedding": {"embedding": 0}, "head": {"kernel": 0},
    ...         "blocks": {"up": {"bias": jnp.zeros((3, 2))}}}
    >>> found = below_head(tree, 3)
    >>> found["token_embedding"], found["blocks"], found["head"]
    ({'embedding': 4}, {'up': {'bias': array([3, 2, 1])}}, {'kernel': 0})
    """

    def of(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(key_path)
        if is_stacked(path):
            return np.arange(leaf.shape[0], 0, -1)
        return layers + 1 if any(name.endswith("_embedding") for name in path.split("/")) else 0

    return jax.tree_util.tree_map_with_path(of, tree)


def along_first(factor: Any, leaf: jax.Array) -> jax.Array:
    """Returns a number, or one for each layer, with the rank of a leaf.

    >>> along_first(np.array([1.0, 2.0]), jnp.ones((2, 3))).shape
    (2, 1)
    """
    factor = jnp.asarray(factor)
    return factor.reshape(*factor.shape, *[1] * (leaf.ndim - factor.ndim))
