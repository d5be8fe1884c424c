"""Growth: a small model's parameters as the start of a wider or deeper one.

Wider keeps the function exactly, in exact arithmetic (Net2Net, Chen et al. 2016, arXiv:1511.05641):
features of the stream, heads and hidden units are copied, and what reads a copied one is divided
among its copies, by shares that sum to one:

    W'[j, :] = s_j W[m(j), :],   sum over {j: m(j) = i} of s_j = 1

The shares are drawn unevenly, or copies would have equal gradients and stay copies for ever. The
stream grows by whole multiples, each feature copied as often as the others, which leaves the means
that norms take where they were.

Deeper, in one of three ways:

    identity     each new block is a copy of the one above it whose output projections are zero: it
                 adds nothing at first, and the function is kept
    stack        the whole stack again on top of itself (G_stack, Du et al. 2024, arXiv:2405.15319):
                 another function, that of repeated layers
    interpolate  each block several times in a row (Gong et al. 2019): another function, too

A head that was tied becomes one of its own as a copy of the embedding: the function is kept.

How growth treats what an optimizer has learned is in `train.phases`; it takes its rows from the
same places.

Shapes: L layers, D width, V vocabulary; i of the old, j of the new model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from model.config import EncoderDecoderConfig, TransformerConfig
from model.flops import abstract_params

PyTree = Any
How = Literal["identity", "stack", "interpolate"]
HOWS: tuple[How, ...] = ("identity", "stack", "interpolate")

SIZES = ("layers", "width", "heads", "kv_heads", "ffn_width")
"""What grows; a head may become untied besides."""

FREE = (
    *("max_length", "logit_softcap", "window", "zero_init_projections", "init_std", "dropout"),
    *("layer_drop", "token_drop", "dtype", "scan_layers", "remat", "norm_epsilon", "rotary_base"),
)
"""What may differ besides, as no parameter depends on it; the new config says how it runs."""


class Source(NamedTuple):
    """Where a parameter of the grown model comes from.

    Attributes:
      path: of the old parameter.
      transposed: whether it is transposed first.
      places: for each axis the places it is taken from, None for all.
      factors: for each axis what its entries are multiplied by, None for nothing.
      plus: for the first axis what is added, None for nothing.
    """

    path: str
    transposed: bool = False
    places: tuple[np.ndarray | None, ...] = ()
    factors: tuple[np.ndarray | None, ...] = ()
    plus: np.ndarray | None = None

    @property
    def same(self) -> bool:
        """Whether the leaf stays as it is."""
        changed = (*self.places, *self.factors, self.plus)
        return not self.transposed and all(part is None for part in changed)

    def take(self, old: jax.Array) -> jax.Array:
        """Returns the entries as they are in the old leaf: what moments of the optimizer get."""
        old = old.T if self.transposed else old
        for axis, places in enumerate(self.places):
            if places is not None:
                old = jnp.take(old, jnp.asarray(places), axis=axis)
        return old

    def grown(self, old: jax.Array) -> jax.Array:
        """Returns the new weight."""
        new = self.take(old)
        for axis, factor in enumerate(self.factors):
            if factor is not None:
                shape = [1] * new.ndim
                shape[axis] = -1
                new = new * jnp.asarray(factor, new.dtype).reshape(shape)
        if self.plus is not None:
            new = new + jnp.asarray(self.plus, new.dtype).reshape(-1, *[1] * (new.ndim - 1))
        return new


class Axis(NamedTuple):
    """An axis of a parameter: where each new place comes from, and what it is multiplied by."""

    places: np.ndarray | None = None
    factor: np.ndarray | None = None


def grow(
    params: PyTree,
    config: TransformerConfig,
    to: TransformerConfig,
    how: How = "identity",
    *,
    key: jax.Array,
) -> PyTree:
    """Returns parameters for `to` made of those of `config`; see the module for what is kept.

    Under jit, take `sources` outside of it and `grown` inside.

    Args:
      params: of a model of `config`.
      config: the small model.
      to: the larger one: more `layers`, a multiple of `width`, more `heads`, `kv_heads` and
        `ffn_width` at one head width, a head of its own.
      how: what new layers are made of; of no effect where there are none.
      key: of the uneven shares.

    Raises:
      ValueError: something shrinks, or differs that growth does not change.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> small, large = gpt2_tiny(), gpt2_tiny(layers=3, ffn_width=160)
    >>> tokens = jnp.zeros((1, 4), jnp.int32)
    >>> params = jax.jit(Transformer(small).init)(jax.random.key(0), tokens)["params"]
    >>> grown = grow(params, small, large, key=jax.random.key(1))
    >>> logits = [Transformer(c).apply({"params": p}, tokens)
    ...           for c, p in ((small, params), (large, grown))]
    >>> bool(jnp.abs(logits[0] - logits[1]).max() < 1e-5)
    True
    """
    return grown(params, sources(config, to, how, key=key))


def grown(params: PyTree, made_of: dict[str, Source]) -> PyTree:
    """Returns the parameters that `sources` tells of; traceable."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    new = {path: source.grown(flat[source.path]) for path, source in made_of.items()}
    return flax.traverse_util.unflatten_dict(new, sep="/")


def keeps_function(config: TransformerConfig, to: TransformerConfig, how: How) -> bool:
    """Whether the grown model computes what the small one does, window and soft-cap aside.

    >>> small = TransformerConfig(layers=2)
    >>> keeps_function(small, dataclasses.replace(small, layers=4), "stack")
    False
    """
    return how == "identity" or config.layers == to.layers


def sources(
    config: TransformerConfig, to: TransformerConfig, how: How = "identity", *, key: jax.Array
) -> dict[str, Source]:
    """Returns, by path, where each parameter of a model of `to` comes from; see `grow`."""
    check_growth(config, to, how)
    axes = _axes(config, to, how, key)
    shapes = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    made: dict[str, Source] = {}
    for path in flax.traverse_util.flatten_dict(abstract_params(to), sep="/"):
        untied = path == "head/kernel" and config.tied_head
        old = "token_embedding/embedding" if untied else path
        entry = [axes[name] for name in _axes_of(path)]
        lengths = shapes[old].shape[::-1] if untied else shapes[old].shape
        places = tuple(_unless_all(a.places, n) for a, n in zip(entry, lengths, strict=True))
        source = Source(old, untied, places, tuple(_unless_ones(a.factor) for a in entry))
        if path == "blocks/shortcut/stream_scale" and axes["writers"].factor is not None:
            source = source._replace(plus=1 - axes["writers"].factor)  # 0 x + 1
        made[path] = source
    return made


def check_growth(config: TransformerConfig, to: TransformerConfig, how: How = "identity") -> None:
    """Raises ValueError if a model of `config` does not grow into one of `to`.

    >>> check_growth(TransformerConfig(layers=4), TransformerConfig(layers=2))
    Traceback (most recent call last):
    ...
    ValueError: layers 4 cannot become 2: models only grow; to make one smaller, prune or distil it
    """
    if how not in HOWS:
        raise ValueError(f"growth is {how!r}; choose one of {', '.join(HOWS)}")
    if any(isinstance(each, EncoderDecoderConfig) for each in (config, to)):
        raise ValueError("an encoder-decoder does not grow; keep its model, or train it anew")
    sizes = {name: (_size(config, name), _size(to, name)) for name in SIZES}
    for name, (old, new) in sizes.items():
        if new < old:
            raise ValueError(
                f"{name} {old} cannot become {new}: models only grow; to make one smaller, prune "
                "or distil it"
            )
    if to.width % config.width:
        raise ValueError(
            f"width {config.width} cannot become {to.width}: norms stay what they were only if "
            f"every feature is copied as often; make it a multiple, such as {2 * config.width}"
        )
    if to.width > config.width and to.tied_head and not to.norm_scale:
        raise ValueError(
            "a tied head has its inputs divided by the scale of the norm before it, and this "
            "model's norms have none; untie the head (tied_head=False), or keep the width"
        )
    if to.head_width_ != config.head_width_:
        raise ValueError(
            f"head_width {config.head_width_} cannot become {to.head_width_}: scores and rotary "
            f"angles depend on it; grow the number of heads, or set head_width={config.head_width_}"
        )
    if to.tied_head and not config.tied_head:
        raise ValueError("a head of its own cannot become tied: it differs from the embedding")
    free = {*SIZES, *FREE, "head_width", "tied_head"}
    if config.positions == "learned":
        free -= {"max_length"}
    for field in dataclasses.fields(TransformerConfig):
        old, new = getattr(config, field.name), getattr(to, field.name)
        if field.name == "embedding_shortcut":  # what it starts at is of the past
            old, new = old is None, new is None
        if field.name not in free and old != new:
            raise ValueError(
                f"{field.name} {getattr(config, field.name)!r} cannot become "
                f"{getattr(to, field.name)!r} by growth, which changes {', '.join(SIZES)} and a "
                "tied head; use the same value in both models"
            )
    _query_sources(config, to)
    _value_tables(config, to, *_layer_sources(config.layers, to.layers, how), how)


def layer_sources(config: TransformerConfig, to: TransformerConfig, how: How) -> np.ndarray:
    """Returns which layer of the old stack each of the new one is made of, int [L'].

    >>> two, five = TransformerConfig(layers=2), TransformerConfig(layers=5)
    >>> [layer_sources(two, five, how).tolist() for how in ("stack", "interpolate")]
    [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
    """
    return _layer_sources(config.layers, to.layers, how)[0]


def _layer_sources(old: int, new: int, how: How) -> tuple[np.ndarray, np.ndarray]:
    """Which layer each comes from, and whether it is that layer rather than a new one."""
    if how == "stack":
        from_L = np.arange(new) % old
        return from_L, np.arange(new) < old
    from_L = np.arange(new) * old // new
    last_of_each = np.append(from_L[1:] != from_L[:-1], True)
    return from_L, last_of_each


def _axes(
    config: TransformerConfig, to: TransformerConfig, how: How, key: jax.Array
) -> dict[str, Axis]:
    """What becomes of each kind of axis."""
    keys = iter(jax.random.split(key, 8))
    K = config.head_width_
    width, ffn = np.arange(to.width) % config.width, np.arange(to.ffn_width_) % config.ffn_width_
    query_H, group_G = _query_sources(config, to)
    gate_C = np.arange(to.value_gate_inputs) % config.width
    from_L, original_L = _layer_sources(config.layers, to.layers, how)
    table_n, used_n = _value_tables(config, to, from_L, original_L, how)
    gates = (table_n[:, None] * config.kv_heads_ + group_G).ravel()
    used_gates = np.repeat(used_n, to.kv_heads_)
    shares_D = _shares(width, next(keys))
    query_shares = _shares(query_H, next(keys))
    return {
        "all": Axis(),
        "layers": Axis(from_L),
        "writers": Axis(from_L, original_L.astype(np.float32) if how == "identity" else None),
        "width": Axis(width),
        "width_in": Axis(width, shares_D),
        # A tied head cannot divide its rows, which are the embedding's, so the norm before it does.
        "final": Axis(width, shares_D if to.tied_head else None),
        "queries": Axis(_spans(query_H, K)),
        "queries_in": Axis(
            _spans(query_H, K), None if query_shares is None else np.repeat(query_shares, K)
        ),
        "groups": Axis(_spans(group_G, K)),
        "ffn": Axis(ffn),
        "ffn_in": Axis(ffn, _shares(ffn, next(keys))),
        "tables": Axis(_spans(gates, K), np.repeat(used_gates, K)),
        "gates": Axis(gates, used_gates),
        "gate_in": Axis(gate_C, _shares(gate_C, next(keys))),
    }


def _axes_of(path: str) -> tuple[str, ...]:
    """The kinds of the axes of the parameter at a path."""
    name = path.removeprefix("blocks/")
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    part, leaf = name.rsplit("/", 1)
    if part == "shortcut":
        return ("writers",)
    if part.endswith("norm"):
        return ("layers", "all" if part.startswith("attention/") else "width")
    rows, columns = _LINEARS[part]
    layers = "writers" if columns == "width" else "layers"
    return (layers, rows, columns) if leaf == "kernel" else (layers, columns)


_OUTSIDE: dict[str, tuple[str, ...]] = {
    "token_embedding/embedding": ("all", "width"),
    "position_embedding/embedding": ("all", "width"),
    "value_embedding/embedding": ("all", "tables"),
    "value_embedding/gate": ("gate_in", "gates"),
    "bigram_embedding/embedding": ("all", "all"),
    "bigram_embedding/kernel": ("all", "width"),
    "final_norm/scale": ("final",),
    "final_norm/bias": ("final",),
    "head/kernel": ("width_in", "all"),
}
_LINEARS: dict[str, tuple[str, str]] = {
    "attention/q": ("width_in", "queries"),
    "attention/k": ("width_in", "groups"),
    "attention/v": ("width_in", "groups"),
    "attention/o": ("queries_in", "width"),
    "mlp/up": ("width_in", "ffn"),
    "mlp/gate": ("width_in", "ffn"),
    "mlp/down": ("ffn_in", "width"),
}


def _query_sources(
    config: TransformerConfig, to: TransformerConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The old query head of each new one, and the old key/value head of each new one.

    A query must go on reading keys of its own group: the new group takes some of the queries of an
    old one, as many as it has room for.
    """
    old, new = config.heads // config.kv_heads_, to.heads // to.kv_heads_
    if new < old and old % new:
        raise ValueError(
            f"{old} query heads of a key/value head cannot be divided among groups of {new}; keep "
            f"heads / kv_heads at {old}, raise it, or make it a divisor"
        )
    parts = max(1, old // new)  # new groups that it takes to hold the queries of an old one
    if to.kv_heads_ < config.kv_heads_ * parts:
        raise ValueError(
            f"{config.heads} query heads of {config.kv_heads_} groups do not all find a place in "
            f"{to.kv_heads_} groups of {new}; give at least {config.kv_heads_ * parts} kv_heads"
        )
    unit_G = np.arange(to.kv_heads_) % (config.kv_heads_ * parts)
    group_G, part_G = unit_G // parts, unit_G % parts
    within = (part_G[:, None] * new + np.arange(new)) % old
    return (group_G[:, None] * old + within).ravel(), group_G


def _value_tables(
    config: TransformerConfig,
    to: TransformerConfig,
    from_L: np.ndarray,
    original_L: np.ndarray,
    how: How,
) -> tuple[np.ndarray, np.ndarray]:
    """The old value embedding of each new one, and 1.0 where it has one to come from, else 0.0."""
    held = config.value_layers
    lost = [j for j in np.flatnonzero(original_L) if from_L[j] in held and j not in to.value_layers]
    if lost and how == "identity":
        raise ValueError(
            f"layers with value embeddings come to lie at {lost} of {to.layers}, where there are "
            f"none; grow to a multiple of {config.layers} layers"
        )
    wanted = from_L[list(to.value_layers)] if to.value_layers else np.zeros(0, int)
    table_n = np.searchsorted(held, wanted) if held else np.zeros(0, int)
    return table_n, np.asarray(np.isin(wanted, held), np.float32)


def _shares(index: np.ndarray, key: jax.Array) -> np.ndarray | None:
    """Uneven shares that sum to one over the copies of each place; None if nothing is copied."""
    if len(set(index.tolist())) == len(index):
        return None
    draw = np.asarray(jax.random.uniform(key, index.shape, jnp.float32, 0.5, 1.5))
    total = np.zeros(index.max() + 1, np.float64)
    np.add.at(total, index, draw)
    return draw / total[index]


def _unless_all(index: np.ndarray | None, length: int) -> np.ndarray | None:
    return None if np.array_equal(index, np.arange(length)) else index  # type: ignore[arg-type]


def _unless_ones(factor: np.ndarray | None) -> np.ndarray | None:
    return None if factor is None or (factor == 1).all() else factor


def _spans(index: np.ndarray, width: int) -> np.ndarray:
    """Places of blocks of `width` neighbours."""
    return (index[:, None] * width + np.arange(width)).ravel()


def _size(config: TransformerConfig, name: str) -> int:
    return int(getattr(config, name + "_", None) or getattr(config, name))
