"""Scaling the inputs of kernels without changing what a block computes.

Input j of a kernel may be divided by s_j where it is made and row j multiplied by s_j where it is
used. Where it is made is a norm (its scale and bias), or a kernel whose output reaches the next one
linearly: the values of attention, and the ungated half of a gated feed-forward layer.

Shapes: I inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.block import ACTIVATIONS
from model.config import TransformerConfig
from model.rules import path_of

PyTree = Any


class Site(NamedTuple):
    """A place to fold scales in.

    Attributes:
      source: path in the block of the norm or linear map that makes the inputs.
      kernels: paths of the kernels that use them.
    """

    source: str
    kernels: tuple[str, ...]


def sites_of(config: TransformerConfig) -> tuple[Site, ...]:
    """Returns the sites of a block; `attention/o` has one only where no values are shared.

    Raises:
      ValueError: the norms have no scales, which most would go into.

    >>> from model.presets import llama_tiny
    >>> [site.source for site in sites_of(llama_tiny())]
    ['attention_norm', 'mlp_norm', 'mlp/up']
    """
    if not config.norm_scale:
        raise ValueError(
            "scales are folded into those of the norms, and this model's have none (norm_scale is "
            "False); compress it by a method that folds nothing, such as nearest or gptq"
        )
    gated = ACTIVATIONS[config.activation][1]
    sites = [
        Site("attention_norm", tuple(f"attention/{name}/kernel" for name in ("q", "k", "v"))),
        Site("mlp_norm", ("mlp/up/kernel", "mlp/gate/kernel") if gated else ("mlp/up/kernel",)),
    ]
    if config.kv_heads_ == config.heads:
        sites.append(Site("attention/v", ("attention/o/kernel",)))
    if gated:
        sites.append(Site("mlp/up", ("mlp/down/kernel",)))
    return tuple(sites)


def fold(layer: PyTree, site: Site, scales_I: jax.Array) -> PyTree:
    """Returns the block with inputs of `site` divided by scales [I], its kernels' rows multiplied.

    Args:
      layer: plain parameters of one block.
      site: where.
      scales_I: positive.

    >>> layer = {"mlp_norm": {"scale": jnp.ones(2)}, "mlp": {"up": {"kernel": jnp.ones((2, 1))}}}
    >>> folded = fold(layer, Site("mlp_norm", ("mlp/up/kernel",)), jnp.array([2.0, 4.0]))
    >>> folded["mlp_norm"]["scale"].tolist(), folded["mlp"]["up"]["kernel"].tolist()
    ([0.5, 0.25], [[2.0], [4.0]])
    """

    def one(key_path, leaf):
        path = path_of(key_path)
        scales = scales_I.astype(leaf.dtype)
        if path.startswith(f"{site.source}/"):
            leaf = leaf / scales.reshape((1,) * (leaf.ndim - 1) + (-1,))
        if path in site.kernels:
            leaf = leaf * scales[:, None]
        return leaf

    return jax.tree_util.tree_map_with_path(one, layer)


def leaf_at(tree: PyTree, path: str) -> Any:
    """Returns what lies at a path of nested dicts.

    >>> leaf_at({"mlp": {"up": 1}}, "mlp/up")
    1
    """
    for name in path.split("/"):
        tree = tree[name]
    return tree


def at_least(scales_I: jax.Array, share: float = 1e-4) -> jax.Array:
    """Returns scales of at least that share of the largest; all 1 where there is none.

    >>> at_least(jnp.array([4.0, 0.0]), 0.5).tolist()
    [4.0, 2.0]
    """
    largest = scales_I.max()
    return jnp.where(largest > 0, jnp.maximum(scales_I, share * largest), jnp.float32(1))
