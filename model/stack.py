"""The stack of blocks: its parameters, and running them one after the other."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.mismatch import by_path, mismatches
from model.prefix import KEY as PREFIX
from model.rules import STACK

Body = Callable[[Any, Any], tuple[Any, Any]]
"""`(x, layer) -> (x, out)`."""
OverLayers = Callable[[Body, Any, Any], tuple[Any, Any]]
"""`(body, x, layers) -> (x, outs)`, leaves of layers [L, ...]."""


def stacked(
    module: nn.Module, init_of: Callable[..., Callable[[jax.Array], Any]], *arguments: Any
) -> Any:
    """Declares the stack of blocks of a module when initialising, and reads it otherwise.

    Args:
      module: the parameters of its blocks lie under `blocks`, every leaf [L, ...].
      init_of: `(*arguments) -> (key -> parameters)`.
      *arguments: config and what else the stack depends on, hashable.

    Raises:
      ValueError: the stack is missing, or parts from that of the config in names or shapes: what a
        block does not read would be passed over, and a stack of another depth run as it is.
    """
    if module.is_initializing():
        return module.param(STACK, init_of(*arguments))
    blocks: Any = module.get_variable("params", STACK)
    path = "/".join((*module.path, STACK))
    if blocks is None:
        raise ValueError(f"the parameters hold no {path}; were they made for another config?")
    if jax.sharding.get_abstract_mesh().manual_axes:
        return blocks  # inside a shard_map a device has its part alone
    # A prefix is trained beside the weights, and in no config.
    own = {path: leaf for path, leaf in by_path(blocks).items() if PREFIX not in path.split("/")}
    if said := mismatches(own, _shapes(init_of, *arguments)):
        raise ValueError(
            f"the parameters under {path} are not those of the config: they {'; '.join(said)}"
        )
    return blocks


@functools.lru_cache(maxsize=64)
def _shapes(init_of: Callable[..., Any], *arguments: Any) -> Mapping[str, tuple[int, ...]]:
    abstract = jax.eval_shape(init_of(*arguments), jax.random.key(0))
    return {path: leaf.shape for path, leaf in by_path(abstract).items()}


def over_layers(config: TransformerConfig) -> OverLayers:
    """Returns `lax.scan`, or its like in Python, as the config asks for."""
    return jax.lax.scan if config.scan_layers else loop


def loop(body: Body, x: Any, layers: Any) -> tuple[Any, Any]:
    """Like `lax.scan`, as a Python loop.

    Leaves are split, not indexed: the gradient of a split is one concatenation, that of indexing
    L leaf-sized additions.
    """
    leaves, structure = jax.tree.flatten(layers)
    length = leaves[0].shape[0]
    rows = zip(*(_unstack(leaf, length) for leaf in leaves), strict=True)
    saved = []
    for row in rows:
        x, out = body(x, jax.tree.unflatten(structure, row))
        saved.append(out)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *saved)


def ends_whole(
    run_layers: OverLayers, whole: Body, thin: Body, x: Any, layers: Any
) -> tuple[Any, Any]:
    """The first and the last layer by `whole`, all between by `thin`; saved as one stack."""
    length = jax.tree.leaves(layers)[0].shape[0]
    saved = []
    for body, first, last in ((whole, 0, 1), (thin, 1, length - 1), (whole, length - 1, length)):
        x, out = run_layers(body, x, jax.tree.map(lambda a: a[first:last], layers))  # noqa: B023
        saved.append(out)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *saved)


def _unstack(leaf: Any, length: int) -> list[Any]:
    if isinstance(leaf, np.ndarray):
        return list(leaf)
    # Keys cannot be split, and have no gradient.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return [leaf[i] for i in range(length)]
    return [part.squeeze(0) for part in jax.lax.split(leaf, [1] * length)]


def remat(body: Body, config: TransformerConfig) -> Body:
    """Returns the body with what the backward pass recomputes, as the config asks for."""
    if config.remat == "none":
        return body
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    # Inside a scan the loop already keeps XLA from merging the recomputation away.
    return jax.checkpoint(body, policy=policies[config.remat], prevent_cse=not config.scan_layers)


def apart(params: Any) -> Any:
    """Returns parameters with each stack as a list of layers, for programs that run token by token.

    A program that is given whole stacks would copy every weight out of them each time it runs.

    >>> apart({"blocks": {"up": jnp.ones((2, 3))}, "head": 1})["blocks"][1]["up"].shape
    (3,)
    """
    return _stacks(params, lambda stack: layers_of(stack, jax.tree.leaves(stack)[0].shape[0]))


def together(params: Any) -> Any:
    """Returns the inverse of `apart`. Where the model takes layers apart again, XLA cancels both.

    >>> together({"encoder": {"blocks": [{"up": jnp.ones(3)}]}})["encoder"]["blocks"]["up"].shape
    (1, 3)
    """
    return _stacks(params, stack_of)


def layers_of(stack: Any, layers: int) -> list[Any]:
    """Returns a tree of leaves [L, ...] as L trees."""
    return [jax.tree.map(operator.itemgetter(i), stack) for i in range(layers)]


def stack_of(layers: list[Any]) -> Any:
    """Returns the inverse of `layers_of`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _stacks(params: Any, change: Callable[[Any], Any]) -> Any:
    changed = dict(params)
    for name, part in params.items():
        if name == STACK:
            changed[name] = change(part)
        elif name in ("encoder", "decoder"):
            changed[name] = _stacks(part, change)
    return changed
