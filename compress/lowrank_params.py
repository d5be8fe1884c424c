"""Factors for the parameters of a model by rules: instead of weights, or beside compressed ones.

    params = factorize_params(params, [("blocks/.*/mlp/.*/kernel", 64)])
    params = compensate_params(params, quantize_params(params, rules), [("blocks/.*/kernel", 16)])

With a model and calibration tokens, `factorize_on` and `compensate_on` keep the outputs of each
layer, on what the layers before it give by then, rather than its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from compress.calibrate import check_finite, sequential
from compress.lowrank import LowRank, Sum, compensate, factorize, is_weight
from compress.observed import ByPath
from compress.quantization.quantize import contraction_axis
from model.rules import STACK, Rules, is_stacked, leaf_paths, match, path_of
from model.transformer import Transformer

PyTree = Any


def rank_for(shape: tuple[int, ...], share: float) -> int:
    """Returns the largest rank whose factors hold at most `share` of the weights, at least 1.

    Args:
      shape: [..., I, O].
      share: of I * O; the factors hold R * (I + O).

    >>> rank_for((768, 3072), 0.5)
    307
    """
    if not 0 < share <= 1:
        raise ValueError(f"factors hold a share of the weights in (0, 1], not {share}")
    inputs, outputs = shape[-2:]
    return max(1, int(share * inputs * outputs / (inputs + outputs)))


def ranks_by_path(params: PyTree, rules: Rules) -> dict[str, int]:
    """Returns path -> rank of every matrix that gets factors.

    Args:
      params: parameters, plain or compressed, or their shapes.
      rules: ordered (regex, rank); 0 and no match give none. A float is a share of the
        weights, see `rank_for`.

    Raises:
      ValueError: a rule matches nothing or only some layers of a stack; a rank that does not fit;
        what shall have factors is no matrix, or has them; or nothing gets any.

    >>> import jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    >>> ranks_by_path(params, [("kernel", 0.5)])
    {'up/kernel': 2}
    """
    chosen = jax.tree.leaves(match(rules, params, 0, is_leaf=is_weight))
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    ranks: dict[str, int] = {}
    for path, leaf, rank in zip(leaf_paths(params, is_weight), leaves, chosen, strict=True):
        if not rank:
            continue
        shape = tuple(leaf.shape)
        if len(shape) - is_stacked(path) != 2 or isinstance(leaf, LowRank | Sum):
            raise ValueError(
                f"a rule gives {path!r} factors, but that is no matrix or has them already (its "
                f"shape is {shape}); write rules for kernels and embeddings"
            )
        ranks[path] = rank_for(shape, rank) if isinstance(rank, float) else rank
        if not 1 <= ranks[path] <= min(shape[-2:]):
            raise ValueError(
                f"{path!r} of shape {shape} has ranks from 1 to {min(shape[-2:])}, not {rank!r}"
            )
    if not ranks:
        raise ValueError("the rules give no weight any factors; give at least one a rank")
    return ranks


def factorize_params(params: PyTree, rules: Rules) -> PyTree:
    """Returns parameters with `LowRank` weights in place of matrices, chosen by rules.

    Args:
      params: plain parameters.
      rules: see `ranks_by_path`.

    Raises:
      ValueError: as `ranks_by_path` and `factorize`.

    >>> import jax.numpy as jnp
    >>> params = factorize_params({"up": {"kernel": jnp.ones((8, 4))}}, [("up", 2)])
    >>> params["up"]["kernel"].shape, params["up"]["kernel"].a.shape
    ((8, 4), (8, 2))
    """
    ranks = ranks_by_path(params, rules)
    _check_plain(params, ranks)
    return _map_chosen(
        lambda path, w: factorize(w, ranks[path], axis=contraction_axis(path)), ranks, params
    )


def compensate_params(params: PyTree, compressed: PyTree, rules: Rules) -> PyTree:
    """Returns compressed parameters with factors of what they lack, chosen by rules.

    Args:
      params: what they stand for, plain parameters.
      compressed: quantized or pruned parameters, with weights at the same paths.
      rules: see `ranks_by_path`.

    Raises:
      ValueError: as `ranks_by_path` and `compensate`.

    >>> import jax.numpy as jnp
    >>> plain = {"up": {"kernel": jnp.ones((8, 4))}}
    >>> pruned = {"up": {"kernel": jnp.eye(8, 4)}}
    >>> compensate_params(plain, pruned, [("up", 4)])["up"]["kernel"].full().sum().round()
    Array(32., dtype=float32)
    """
    ranks = ranks_by_path(compressed, rules)
    _check_plain(params, ranks)
    return _map_chosen(
        lambda path, base, w: compensate(base, w, ranks[path], axis=contraction_axis(path)),
        ranks,
        compressed,
        params,
    )


def factorize_on(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    rules: Rules,
    *,
    damping: float = 0.01,
) -> PyTree:
    """Returns parameters with `LowRank` kernels that keep the outputs on calibration tokens.

    Args:
      model: the Transformer.
      params: plain parameters.
      batches: token ids, int [B, T] each (see `compress.calibrate.windows`).
      rules: see `ranks_by_path`; of kernels in the blocks.
      damping: see `compress.lowrank.factorize`.

    Raises:
      ValueError: as `factorize_params` and `sequential`, or a rule for what is not in the blocks.

    >>> import jax.numpy as jnp
    >>> from model.presets import gpt2_tiny
    >>> model, tokens = Transformer(gpt2_tiny()), jnp.arange(16).reshape(2, 8)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> low = factorize_on(model, params, [tokens], [("mlp/up/kernel", 4)])
    >>> low["blocks"]["mlp"]["up"]["kernel"].a.shape
    (2, 32, 4)
    """
    ranks = ranks_by_path(params, rules)
    _check_plain(params, ranks)

    def one(path: str, number: int, leaf: Any, hessian: jax.Array) -> Any:
        return factorize(leaf, ranks[path], hessian, damping=damping)

    return _layer_by_layer(model, params, batches, ranks, one)


def compensate_on(
    model: Transformer,
    params: PyTree,
    compressed: PyTree,
    batches: Iterable[Any],
    rules: Rules,
    *,
    damping: float = 0.01,
) -> PyTree:
    """Like `compensate_params`, with the factors that correct outputs on calibration tokens best.

    Args:
      model: the Transformer.
      params: what the compressed parameters stand for, plain.
      compressed: quantized or pruned parameters.
      batches: token ids, int [B, T] each.
      rules: see `ranks_by_path`; of kernels in the blocks.
      damping: see `compress.lowrank.factorize`.

    Raises:
      ValueError: as `compensate_params` and `sequential`, or a rule for what is not in the blocks.
    """
    ranks = ranks_by_path(compressed, rules)
    _check_plain(params, ranks)
    check_finite(params)
    plain = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))

    def one(path: str, number: int, leaf: Any, hessian: jax.Array) -> Any:
        return compensate(leaf, plain[path][number], ranks[path], hessian, damping=damping)

    return _layer_by_layer(model, compressed, batches, ranks, one)


def _layer_by_layer(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    ranks: dict[str, int],
    one: Callable[[str, int, Any, jax.Array], Any],
) -> PyTree:
    for path in ranks:
        if not (is_stacked(path) and path.endswith("/kernel")):
            raise ValueError(
                f"{path!r} is no kernel of a block, the only weights whose inputs are known here; "
                "give it factors without calibration, or narrow the rule"
            )

    def replace_layer(number: int, layer: PyTree, seen: ByPath) -> PyTree:
        def change(key_path, leaf):
            inside = path_of(key_path)
            path = f"{STACK}/{inside}"
            if path not in ranks:
                return leaf
            return one(path, number, leaf, seen[inside]["hessian"])

        return jax.tree_util.tree_map_with_path(change, layer, is_leaf=is_weight)

    inside = [path.removeprefix(f"{STACK}/") for path in ranks]
    return sequential(model, params, batches, ("hessian",), replace_layer, kernels=inside).params


def _check_plain(params: PyTree, ranks: dict[str, int]) -> None:
    paths = set(leaf_paths(params))
    if missing := [path for path in ranks if path not in paths]:
        raise ValueError(f"{', '.join(missing)} is no plain array among the parameters given")


def _map_chosen(
    change: Callable[..., Any], ranks: dict[str, int], tree: PyTree, *others: PyTree
) -> PyTree:
    def one(key_path: tuple[Any, ...], leaf: Any, *rest: Any) -> Any:
        path = path_of(key_path)
        if path not in ranks:
            return leaf
        try:
            return change(path, leaf, *rest)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error

    return jax.tree_util.tree_map_with_path(one, tree, *others, is_leaf=is_weight)
