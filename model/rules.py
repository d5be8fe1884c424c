"""Rules over parameter paths: ordered ``(regex, value)`` pairs, first match wins.

One implementation for everything that is chosen by parameter: placement, freezing, learning rates,
weight decay, pruning, quantization.

**Paths** are the keys from the root joined with ``/``. All blocks are stacked: what lies under the
top-level key ``blocks`` (``encoder/blocks`` and ``decoder/blocks`` where there are both) has a
leading layer axis, and a rule sees it once per layer, as the virtual paths
``blocks/0/attention/q/kernel``, ``blocks/1/attention/q/kernel``, ...

**A regex matches whole path components**, anywhere in the path (``re.search`` with both ends at a
``/`` or at an end of the path). So ``kernel`` finds every kernel but no ``kernel_scale``,
``attention/q`` finds all that lies under it, ``blocks/1`` finds layer 1 and not layers 10 to 19,
and part of a name is written ``.*norm``. ``^`` and ``$`` mean the ends of the path.

**The layer number may be left out**: a regex that matches no virtual path of a leaf, whatever the
layer number, is tried on its stacked path ``blocks/attention/q/kernel`` and then holds for all
layers. ``blocks/.*/kernel``, ``attention/q/kernel`` and ``blocks/attention/q/kernel`` mean all
layers; ``blocks/(0|3)/.*`` means two of them and ``blocks/(?!0/).*`` all but the first.

A rule that matches nothing is an error, so a misspelt rule never silently has no effect. Whether
rules that earlier ones hide altogether are an error too is for the caller to say: `shadowed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

STACK = "blocks"
"""Key whose leaves carry a leading layer axis, at the top or under `encoder` or `decoder`."""
_STACKED = re.compile(rf"(?:encoder/|decoder/)?{STACK}(?=/|$)")

Rules = Sequence[tuple[str, Any]]
IsLeaf = Callable[[Any], bool]

# Stands for "some layer": a rule that matches it was written for virtual paths even where none of
# the layers there are matches, as in `blocks/(?!0/).*` for a model of one layer.
_ANY_LAYER = 999_999

_REQUIRED = object()  # no default: every leaf must be matched
_NO_RULE = -1


def path_of(key_path: tuple[Any, ...]) -> str:
    """Path of a leaf, as the rules see it, from the key path that JAX gives.

    >>> path_of((jax.tree_util.DictKey("head"), jax.tree_util.DictKey("kernel")))
    'head/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def stack_of(path: str) -> str:
    """The stack of blocks that the leaf at this path belongs to, or "" for none.

    >>> stack_of("decoder/blocks/attention/q/kernel"), stack_of("head/kernel")
    ('decoder/blocks', '')
    """
    found = _STACKED.match(path)
    return "" if found is None else found[0]


def is_stacked(path: str) -> bool:
    """Whether the leaf at this path carries a leading layer axis.

    >>> is_stacked("decoder/blocks/attention/q/kernel"), is_stacked("head/kernel")
    (True, False)
    """
    return _STACKED.match(path) is not None


def leaf_paths(tree: Any, is_leaf: IsLeaf | None = None) -> list[str]:
    """Paths of all leaves, stacked ones once, in the order of ``jax.tree.leaves``.

    >>> leaf_paths({"head": {"kernel": 1.0}, "blocks": {"up": {"kernel": 2.0, "bias": 3.0}}})
    ['blocks/up/bias', 'blocks/up/kernel', 'head/kernel']
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [path_of(key_path) for key_path, _ in leaves]


def match(
    rules: Rules, tree: Any, default: Any = _REQUIRED, *, is_leaf: IsLeaf | None = None
) -> Any:
    """One value for each leaf: that of the first rule that matches it.

    Args:
      rules: ordered ``(regex, value)`` pairs.
      tree: parameters, or their shapes; leaves under ``blocks`` need a ``shape`` [layer, ...].
      default: value of the leaves that no rule matches; left out, every leaf must be matched.
      is_leaf: tells which pytree nodes are whole weights (a quantized kernel, say).

    Returns:
      A tree like ``tree`` with values for leaves.

    Raises:
      ValueError: a rule matches nothing; a leaf has no rule and there is no default; a regex is
        malformed; or the layers of one stacked leaf would get different values.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"q": {"kernel": jnp.zeros((3, 2, 2)), "bias": jnp.zeros((3, 2))}},
    ...           "head": {"kernel": jnp.zeros((2, 5))}}
    >>> match([("head", 0.1), ("kernel", 1.0)], params, default=0.0)
    {'blocks': {'q': {'bias': 0.0, 'kernel': 1.0}}, 'head': {'kernel': 0.1}}
    """
    treedef, leaves = _assign(rules, tree, default, is_leaf)
    values = []
    for path, layers, winners in leaves:
        candidates = [_value(rules, i, default) for i in winners]
        if any(not _same(candidates[0], other) for other in candidates[1:]):
            first = min(i for i in winners if i != _NO_RULE)
            held = [layer for layer, i in enumerate(winners) if i == first]
            raise ValueError(
                f"rule {rules[first][0]!r} holds for layers {held} of the {layers} of {path!r} and "
                "the others would get another value, but here all layers of a leaf share one. "
                f"Write the rule without a layer number, for instance {path!r}."
            )
        values.append(candidates[0])
    return jax.tree.unflatten(treedef, values)


def match_per_layer(
    rules: Rules, tree: Any, default: Any = _REQUIRED, *, is_leaf: IsLeaf | None = None
) -> Any:
    """Like `match`, but a stacked leaf gets a tuple with one value for each of its layers.

    Raises:
      ValueError: as `match`, but layers may differ.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"up": {"kernel": jnp.zeros((3, 2, 2))}},
    ...           "head": {"kernel": jnp.zeros((2, 5))}}
    >>> match_per_layer([("blocks/0/.*", "int8"), ("kernel", "int4")], params)
    {'blocks': {'up': {'kernel': ('int8', 'int4', 'int4')}}, 'head': {'kernel': 'int4'}}
    """
    treedef, leaves = _assign(rules, tree, default, is_leaf)
    values: list[Any] = []
    for _, layers, winners in leaves:
        per_layer = tuple(_value(rules, i, default) for i in winners)
        values.append(per_layer[0] if layers is None else per_layer[:layers])
    return jax.tree.unflatten(treedef, values)


def shadowed(rules: Rules, tree: Any, *, is_leaf: IsLeaf | None = None) -> list[str]:
    """Regexes that match something, but only where an earlier rule has already won.

    >>> shadowed([("kernel", 1), ("head/kernel", 2)], {"head": {"kernel": 0.0}})
    ['head/kernel']
    """
    hits, leaves = _hits_of(rules, tree, is_leaf)
    winning = {i for _, _, winners in leaves for i in winners}
    return [regex for i, (regex, _) in enumerate(rules) if hits[i] and i not in winning]


def _assign(
    rules: Rules, tree: Any, default: Any, is_leaf: IsLeaf | None
) -> tuple[Any, list[tuple[str, int | None, tuple[int, ...]]]]:
    """Tree structure, and (path, layers or None, index of the winning rule per layer) by leaf."""
    hits, leaves = _hits_of(rules, tree, is_leaf)
    idle = [regex for (regex, _), hit in zip(rules, hits, strict=True) if not hit]
    paths = [path for path, _, _ in leaves]
    if idle:
        raise ValueError(
            f"no parameter matches {', '.join(map(repr, idle))}. A regex matches whole path "
            f"components, and a layer number may follow {STACK!r}. The paths are: "
            f"{', '.join(paths) or '(none)'}."
        )
    if default is _REQUIRED:
        unmatched = [path for path, _, winners in leaves if _NO_RULE in winners]
        if unmatched:
            raise ValueError(
                f"no rule matches {', '.join(unmatched)}. Add a rule for it, or the rule '.*' at "
                "the end for all that is left."
            )
    return jax.tree.structure(tree, is_leaf=is_leaf), leaves


def _hits_of(
    rules: Rules, tree: Any, is_leaf: IsLeaf | None
) -> tuple[list[bool], list[tuple[str, int | None, tuple[int, ...]]]]:
    """Whether each rule matches anything, and by leaf (path, layers, winning rule per layer)."""
    patterns = [_compile(regex) for regex, _ in rules]
    hit_anywhere = [False] * len(patterns)
    leaves = []
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        path = path_of(key_path)
        layers = _layer_count(path, leaf)
        hits = [_hits(pattern, path, layers) for pattern in patterns]
        hit_anywhere = [old or any(new) for old, new in zip(hit_anywhere, hits, strict=True)]
        # A stack of no layers still has a value as a whole, hence at least one entry.
        winners = tuple(
            next((i for i, hit in enumerate(hits) if hit[layer]), _NO_RULE)
            for layer in range(layers or 1)
        )
        leaves.append((path, layers, winners))
    return hit_anywhere, leaves


def _layer_count(path: str, leaf: Any) -> int | None:
    """Length of the layer axis; None for a leaf outside the stack."""
    if not is_stacked(path):
        return None
    shape = getattr(leaf, "shape", ())
    if not shape:
        raise ValueError(
            f"{path!r} lies under {STACK!r} and so needs a leading layer axis, but it is "
            f"{leaf!r} without one. Pass arrays or jax.ShapeDtypeStruct leaves, and name pytree "
            "nodes that are whole weights through is_leaf."
        )
    return int(shape[0])


def _hits(pattern: re.Pattern[str], path: str, layers: int | None) -> tuple[bool, ...]:
    """Whether the pattern matches, for each layer (a single entry outside the stack)."""
    if layers is None:
        return (pattern.search(path) is not None,)
    found = _STACKED.match(path)
    assert found is not None
    stack, rest = path[: found.end()], path[found.end() :]
    hits = tuple(pattern.search(f"{stack}/{i}{rest}") is not None for i in range(layers))
    virtual = pattern.search(f"{stack}/{_ANY_LAYER}{rest}") is not None
    if layers == 0:
        return (virtual or pattern.search(path) is not None,)
    if any(hits) or virtual:
        return hits
    return (pattern.search(path) is not None,) * layers


def _compile(regex: str) -> re.Pattern[str]:
    """The regex, its match bound to begin and end beside a ``/`` or at an end of the path."""
    try:
        re.compile(regex)  # on its own first: an error then speaks of what was written
        return re.compile(rf"(?:(?<![^/])|(?=/))(?:{regex})(?:(?![^/])|(?<=/))")
    except re.error as error:
        raise ValueError(f"rule {regex!r} is not a regular expression: {error}") from error


def _value(rules: Rules, index: int, default: Any) -> Any:
    return default if index == _NO_RULE else rules[index][1]


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)
