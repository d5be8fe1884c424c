"""An optimizer that looks at whole tensors, on stacked parameters: one layer at a time."""

from __future__ import annotations

from typing import Any

import jax
import optax

from model.rules import is_stacked, path_of, stack_of


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies ``tx`` to each layer of the stacked leaves by itself, and to all other leaves.

    For transformations that look at a whole tensor or several (factored moments, trust ratios,
    block-wise clipping, SOAP, Shampoo): they see one block at a time, as if it were not stacked.
    Every array of the stacked part's state has the layers along its leading axis, counts included;
    where encoder and decoder have a stack each, so has the state, by name.
    An extra argument with the structure of the parameters goes by layer too; any other is given
    whole to every layer.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"up": {"kernel": jnp.ones((3, 2, 2))}}}
    >>> tx = per_layer(optax.clip_by_global_norm(1.0))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["blocks"]["up"]["kernel"][:, 0, 0].tolist()  # each layer has norm 1
    [0.5, 0.5, 0.5]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        if not jax.tree.leaves(params):
            return tx.init(params)
        states = {stack: jax.vmap(tx.init)(part) for stack, part in _by_stack(params).items()}
        return _only(states)

    def update(updates, state, params=None, **extra_args):
        if not jax.tree.leaves(updates):
            return tx.update(updates, state, params, **extra_args)
        like_params: Any = jax.tree.structure(updates)
        by_layer = {k: v for k, v in extra_args.items() if jax.tree.structure(v) == like_params}
        whole = {k: v for k, v in extra_args.items() if k not in by_layer}

        def one_layer(updates, state, params, by_layer):
            return tx.update(updates, state, params, **by_layer, **whole)

        stacks = _by_stack(updates)
        states = state if len(stacks) > 1 else dict.fromkeys(stacks, state)
        made, after = {}, {}
        for stack, part in stacks.items():
            own = None if params is None else _by_stack(params)[stack]
            extra = {name: _by_stack(value)[stack] for name, value in by_layer.items()}
            made[stack], after[stack] = jax.vmap(one_layer)(part, states[stack], own, extra)
        return _together(updates, made), _only(after)

    def labels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda key_path, _: "stacked" if is_stacked(path_of(key_path)) else "rest", tree
        )

    stacked = optax.GradientTransformationExtraArgs(init, update)
    return optax.partition(
        {"stacked": stacked, "rest": tx}, labels, mask_compatible_extra_args=True
    )


def _by_stack(tree: Any) -> dict[str, Any]:
    """Returns stack -> the tree with its leaves alone: stacks may differ in their layers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    stacks = dict.fromkeys(stack_of(path_of(key_path)) for key_path, _ in leaves)

    def of(stack):
        return jax.tree_util.tree_map_with_path(
            lambda key_path, leaf: leaf if stack_of(path_of(key_path)) == stack else None, tree
        )

    return {stack: of(stack) for stack in stacks}


def _together(tree: Any, parts: dict[str, Any]) -> Any:
    """Returns the leaves of the parts in the structure of the tree."""
    left = {stack: iter(jax.tree.leaves(part)) for stack, part in parts.items()}
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: next(left[stack_of(path_of(key_path))]), tree
    )


def _only(states: dict[str, Any]) -> Any:
    """Returns the state of the only stack by itself, those of several by name."""
    return next(iter(states.values())) if len(states) == 1 else states
