"""The zigzag layout: which tokens each device of the context axis holds.

Cut plainly, the device with the end of a causal row has many times the work of the one with its
start. So the row is cut into 2n chunks, and device i of n holds chunks i and 2n - 1 - i: an early
one and a late one, the same work for all. (Striped Attention, Brandon et al. 2023,
arXiv:2311.09431, balances the ring token by token; chunks keep the products dense.)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def zigzag_order(time: int, devices: int) -> np.ndarray:
    """Returns int [T]: the true place of the token in each slot.

    Args:
      time: tokens T of a row.
      devices: size n of the ring.

    Raises:
      ValueError: if the row does not divide into two chunks for each device.

    >>> zigzag_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    check_time(time, devices)
    chunks = np.arange(time).reshape(2 * devices, -1)
    pairs = [(i, 2 * devices - 1 - i) for i in range(devices)]
    return chunks[np.array(pairs).ravel()].ravel()


def zigzag(batch: dict[str, Any], devices: int) -> dict[str, Any]:
    """Returns the batch with the tokens of every row laid out for `ring_attention`.

    Every array of shape [B, T, ...] is permuted alike: tokens, targets, weights, segments. Where
    there are no `positions` they are added, since the model would otherwise count slots. What the
    model returns has the same order; `natural_order` puts it back. A loss that sums over positions
    does not change.

    Args:
      batch: `tokens` int32 [B, T] and whatever lies beside it.
      devices: size n of the ring; 2n must divide T.

    Raises:
      ValueError: if it does not.

    >>> batch = {"tokens": jnp.array([[10, 11, 12, 13]])}
    >>> {name: array.tolist() for name, array in zigzag(batch, 2).items()}
    {'tokens': [[10, 13, 11, 12]], 'positions': [[0, 3, 1, 2]]}
    """
    shape = batch["tokens"].shape
    order = zigzag_order(shape[1], devices)
    if "positions" not in batch:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
        batch = {**batch, "positions": positions}
    return {
        name: array[:, order] if array.shape[:2] == shape else array
        for name, array in batch.items()
    }


def natural_order(time: int, devices: int) -> np.ndarray:
    """Returns int [T]: the slot that holds each place, the inverse of `zigzag_order`.

    >>> y_BT = jnp.array([[10, 13, 11, 12]])
    >>> y_BT[:, natural_order(4, 2)].tolist()
    [[10, 11, 12, 13]]
    """
    return np.argsort(zigzag_order(time, devices))


def check_time(time: int, devices: int) -> None:
    """Raises ValueError if a row of `time` tokens does not divide into 2n chunks.

    >>> check_time(10, 2)
    Traceback (most recent call last):
    ...
    ValueError: a row of 10 tokens does not divide into 2 chunks for each of 2 devices; \
make it a multiple of 4
    """
    if time % (2 * devices):
        raise ValueError(
            f"a row of {time} tokens does not divide into 2 chunks for each of {devices} devices; "
            f"make it a multiple of {2 * devices}"
        )
