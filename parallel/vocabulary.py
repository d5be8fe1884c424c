"""A vocabulary that a mesh can divide: tables get rows that stand for no token.

`tensor` divides the token embedding and the head along the vocabulary, and few numbers divide
50,257. The tables are padded, the head leaves out the logits of the padding, so that it never gets
probability, and an export strips it again. Padding to the least multiple costs no communication:
each device's part of the true vocabulary is then the same as its part of the padded one.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.rules import path_of

# Where a parameter has the vocabulary, and along which axis.
TABLES: dict[str, int] = {
    "token_embedding/embedding": 0,
    "value_embedding/embedding": 0,
    "head/kernel": 1,
}


def padded_size(vocabulary_size: int, multiple: int) -> int:
    """Returns the least multiple that holds the vocabulary.

    Raises:
      ValueError: a multiple below 1.

    >>> padded_size(50257, 4), padded_size(50257, 128), padded_size(50256, 4)
    (50260, 50304, 50256)
    """
    if multiple < 1:
        raise ValueError(
            f"the vocabulary cannot be padded to a multiple of {multiple}; give at least 1"
        )
    return -(-vocabulary_size // multiple) * multiple


def pad_vocabulary(tree: Any, multiple: int) -> Any:
    """Returns the tree with its tables [V, D] and [D, V] padded with zeros to a multiple.

    Args:
      tree: parameters, or a whole state: moments that lie under the path of a table, and have its
        shape, are padded with it.
      multiple: what is to divide the vocabulary.

    Raises:
      ValueError: a multiple below 1.

    >>> pad_vocabulary({"head": {"kernel": jnp.ones((2, 5))}}, 4)["head"]["kernel"].shape
    (2, 8)
    """

    def pad(leaf: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, padded_size(leaf.shape[axis], multiple) - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    return _over_tables(pad, tree)


def strip_vocabulary(tree: Any, vocabulary_size: int) -> Any:
    """Returns the tree with the rows of its tables that stand for no token left out.

    Raises:
      ValueError: a table with fewer rows than the vocabulary has tokens.

    >>> params = {"token_embedding": {"embedding": jnp.ones((8, 2))}}
    >>> strip_vocabulary(params, 5)["token_embedding"]["embedding"].shape
    (5, 2)
    """

    def strip(leaf: jax.Array, axis: int) -> jax.Array:
        if leaf.shape[axis] < vocabulary_size:
            raise ValueError(
                f"a table of shape {leaf.shape} does not hold a vocabulary of {vocabulary_size}"
            )
        return jax.lax.slice_in_dim(leaf, 0, vocabulary_size, axis=axis)

    return _over_tables(strip, tree)


def _over_tables(change: Any, tree: Any) -> Any:
    def of(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = f"/{path_of(key_path)}"
        axes = [axis for name, axis in TABLES.items() if path.endswith(f"/{name}")]
        # Moments that are no matrix (factored, scalar) have no vocabulary axis to speak of.
        return change(leaf, axes[0]) if axes and leaf.ndim == 2 else leaf

    return jax.tree_util.tree_map_with_path(of, tree)
