"""From features to logits, for every model that has a head.

Shapes: N positions (any number of axes), D width, V vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.config import TransformerConfig
from model.linear import Weight, at_least_float32, linear


def no_head_beside(module: nn.Module, tied: bool) -> None:
    """Refuses a head of its own among the parameters of a model that reads its embedding instead.

    Raises:
      ValueError: there is one, which would be passed over.
    """
    if tied and not module.is_initializing() and module.has_variable("params", "head"):
        raise ValueError(
            "the parameters hold a head of their own, and the config has tied_head=True, which "
            "would pass over it; set tied_head=False, or leave the head out"
        )


def logits_from(
    config: TransformerConfig, kernel_DV: Weight, final_ND: jax.Array, padded: bool = False
) -> jax.Array:
    """Returns logits [N, V], at least float32, for normalised features [N, D].

    Columns of a padded kernel stand for no token. Their logits are cut off, or with `padded` set to
    the lowest number there is: nothing to a softmax, and the others need not be copied.

    >>> config = TransformerConfig(vocabulary_size=2)
    >>> logits_from(config, jnp.ones((1, 4)), jnp.ones((1, 1))).tolist()
    [[1.0, 1.0]]
    >>> jax.nn.softmax(logits_from(config, jnp.ones((1, 4)), jnp.ones((1, 1)), True)).tolist()
    [[0.5, 0.5, 0.0, 0.0]]
    """
    logits_NV = linear(final_ND, kernel_DV)
    logits_NV = logits_NV.astype(at_least_float32(logits_NV.dtype))
    if config.logit_softcap is not None:
        logits_NV = config.logit_softcap * jnp.tanh(logits_NV / config.logit_softcap)
    V = config.vocabulary_size
    if padded and logits_NV.shape[-1] > V:
        real_V = jnp.arange(logits_NV.shape[-1]) < V
        return jnp.where(real_V, logits_NV, jnp.finfo(logits_NV.dtype).min)
    return logits_NV[..., :V]
