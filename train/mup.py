"""Rates and initial scales that carry over from a small model to a wide or deep one."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from model.config import TransformerConfig
from model.rules import STACK, Rules, is_stacked, leaf_paths, match, match_per_layer
from train.optimizers.adam_mini import AdamMini
from train.optimizers.first_order import Adam, Adamax, AdamaxW, AdamW, Lion, NAdamW
from train.optimizers.muon import Muon
from train.optimizers.normuon import NorMuon
from train.optimizers.settings import OptimizerSettings
from train.optimizers.soap import Soap

Factors = tuple[tuple[str, float], ...]
Matrices = Literal["elementwise", "spectral"]

ELEMENTWISE: tuple[type, ...] = (Adam, AdamW, Adamax, AdamaxW, NAdamW, Lion, AdamMini, Soap)
SPECTRAL: tuple[type, ...] = (Muon, NorMuon)
"""Optimizers whose step of a kernel of the blocks is known to be of one size or the other."""


class Transfer(NamedTuple):
    """What a model needs so that the base model's settings hold for it.

    Attributes:
      learning_rate_rules: for the settings of its optimizer.
      init_rules: for `scale_init`, factors on its initial parameters.
    """

    learning_rate_rules: Factors
    init_rules: Factors


def transfer(
    config: TransformerConfig,
    base: TransformerConfig,
    *,
    matrices: Matrices = "elementwise",
    depth_exponent: float = 1.0,
) -> Transfer:
    """Factors on rates and initial scales, relative to a base model that was tuned.

    With n the ratio of a kernel's inputs, l that of layers, a the depth exponent::

                             initial scale            rate, elementwise    rate, spectral
        embeddings, vectors  1                        1                    1
        kernels of blocks    n^-1/2                   n^-1                 1
        attention/o, down    n^-1/2 * l^-a            n^-1 * l^-a          l^-a
        head                 n^-1                     n^-1                 n^-1

    and q with ``sqrt(base K / K)`` beside, for logits divided by K and not by its root. This is muP
    (Yang et al., arXiv 2203.03466, table 8) with the depth of CompleteP (Dey et al., arXiv
    2505.01618: a = 1, and a = 1/2 for Yang et al., arXiv 2310.02244). Their multipliers on
    the branches, ``l^-a``, and on the logits, ``1/n``, stand in the last kernel of the branch and
    in the head instead: for an update whose size does not depend on the gradient's, a multiplier c
    is the same as c times the initial scale and c times the rate. The rates of what lies within a
    branch get ``l^(a-1)`` on top. The blocks' own initial ``(2 layers)^-1/2`` is taken off.

    Weight decay goes with the rate; keep their product by giving kernels n times the decay where it
    matters. Adam's epsilon must stay far below the root mean square of the gradients.

    Args:
      config: the model to train.
      base: the model that was tuned; may differ in width, layers, heads and FFN width.
      matrices: how large the optimizer's step of a kernel of the blocks is: "elementwise" for about
        the rate in every element (Adam, Lion, SOAP, Shampoo with Adam's norm, Muon with
        ``consistent_rms`` times ``n^1/2``), "spectral" for about the rate times
        ``sqrt(out / in)`` in the spectral norm (Muon, Scion).
      depth_exponent: a; 0 for no account of depth.

    Raises:
      ValueError: a tied head, whose two roles need two scales; an unknown kind of step; a depth
        exponent outside [0, 1].

    >>> import dataclasses
    >>> base = TransformerConfig(width=64, heads=2, layers=2, tied_head=False)
    >>> wide = dataclasses.replace(base, width=256, heads=8)
    >>> transfer(wide, base).learning_rate_rules[-1]
    ('blocks/.*/kernel', 0.25)
    """
    for given in (config, base):
        if given.tied_head:
            raise ValueError(
                "a tied head cannot have the scales of an embedding and of a head; "
                "use tied_head=False"
            )
    if matrices not in ("elementwise", "spectral"):
        raise ValueError(f'matrices must be "elementwise" or "spectral", not {matrices!r}')
    if not 0.0 <= depth_exponent <= 1.0:
        raise ValueError(f"depth_exponent must lie between 0 and 1, not {depth_exponent}")
    width = config.width / base.width
    hidden = config.ffn_width_ / base.ffn_width_
    heads = config.heads * config.head_width_ / (base.heads * base.head_width_)
    layers = config.layers / base.layers
    query = (base.head_width_ / config.head_width_) ** 0.5
    branch = layers**-depth_exponent
    if config.qk_norm and not config.norm_scale and query != 1.0:
        raise ValueError(
            "heads are wider than those of the base, and norms of queries and keys without a scale "
            "undo what muP does about it; leave base_heads out, or train with norm_scale"
        )
    # A norm undoes a factor of what goes into it: there its own scale bears it.
    kernel, scale = (1.0, query) if config.qk_norm else (query, 1.0)
    within = layers ** (depth_exponent - 1.0) if depth_exponent else 1.0
    undo = layers**0.5  # the model's own scale of the last kernels of a branch

    def rate(inputs: float) -> float:
        return (1.0 / inputs if matrices == "elementwise" else 1.0) * within

    rates: Factors = (
        ("head/kernel", 1.0 / width),
        ("attention/o/kernel", rate(heads) * branch),
        ("mlp/down/kernel", rate(hidden) * branch),
        ("attention/q/kernel", rate(width) * kernel),
        *((("attention/q_norm/scale", within * scale),) if scale != 1.0 else ()),
        ("blocks/.*/kernel", rate(width)),
    )
    if within != 1.0:
        rates = (*rates, ("blocks/.*", within))
    if config.biases:
        # a branch's multiplier is on its bias too
        rates = (("attention/o/bias|mlp/down/bias", within * branch), *rates)
    scales = (
        ("head/kernel", 1.0 / width),
        ("attention/o/kernel", heads**-0.5 * branch * undo),
        ("mlp/down/kernel", hidden**-0.5 * branch * undo),
        ("attention/q/kernel", width**-0.5 * kernel),
        *((("attention/q_norm/scale", scale),) if scale != 1.0 else ()),
        ("blocks/.*/kernel", width**-0.5),
    )
    return Transfer(rates, scales)


@dataclass(frozen=True)
class MuP:
    """The base model that a run's rates were tuned at; see `transfer` for what becomes of them.

    Attributes:
      base_width: of the stream. FFN width and key/value heads are in proportion.
      base_heads: None for heads of the same width, as many as then fit.
      base_layers: None for as many as the model has.
      depth_exponent: as in `transfer`.
      matrices: as in `transfer`; "auto" knows it of the optimizers in `ELEMENTWISE` and `SPECTRAL`.

    >>> wide = TransformerConfig(width=256, heads=8, layers=2, tied_head=False)
    >>> MuP(base_width=64).rules(wide, AdamW()).learning_rate_rules[0]
    ('attention/o/bias|mlp/down/bias', 1.0)
    >>> dict(MuP(base_width=64).rules(wide, AdamW()).learning_rate_rules)["head/kernel"]
    0.25
    """

    base_width: int = 128
    base_heads: int | None = None
    base_layers: int | None = None
    depth_exponent: float = 1.0
    matrices: Literal["auto", "elementwise", "spectral"] = "auto"

    def __post_init__(self) -> None:
        for name in ("base_width", "base_heads", "base_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def base_of(self, config: TransformerConfig) -> TransformerConfig:
        """Returns the base model of a model.

        Raises:
          ValueError: its heads or FFN do not come out whole.
        """
        width = config.width
        hidden = config.ffn_width_ * self.base_width / width
        heads = self.base_heads or config.heads * self.base_width / width
        if hidden != int(hidden) or heads != int(heads):
            raise ValueError(
                f"a base of width {self.base_width} has {heads:g} heads and {hidden:g} hidden "
                f"features where a width of {width} has {config.heads} and {config.ffn_width_}; "
                "choose another base_width, or give base_heads"
            )
        return dataclasses.replace(
            config,
            width=self.base_width,
            heads=int(heads),
            kv_heads=None,
            head_width=config.head_width_ if self.base_heads is None else None,
            ffn_width=int(hidden),
            layers=self.base_layers or config.layers,
            window=None,
        )

    def rules(self, config: TransformerConfig, optimizer: OptimizerSettings) -> Transfer:
        """Returns the factors for a model under an optimizer.

        Raises:
          ValueError: as `transfer` and `base_of`; an optimizer that "auto" does not know.
        """
        kind = self.matrices if self.matrices != "auto" else kind_of(optimizer)
        base = self.base_of(config)
        found = transfer(config, base, matrices=kind, depth_exponent=self.depth_exponent)
        # Kernels of the heads of multi-token prediction, if there are any: as wide as the stream,
        # and no matrix of a block, so that the steps of every optimizer's AdamW are theirs.
        ahead = base.width / config.width
        return found._replace(
            learning_rate_rules=(*found.learning_rate_rules, ("mtp/.*/kernel", ahead))
        )


def kind_of(optimizer: OptimizerSettings) -> Matrices:
    """Returns how large an optimizer's step of a kernel of the blocks is, see `transfer`.

    Raises:
      ValueError: it is not known.

    >>> kind_of(Muon()), kind_of(AdamW())
    ('spectral', 'elementwise')
    """
    if type(optimizer) in ELEMENTWISE:
        return "elementwise"
    if type(optimizer) in SPECTRAL and getattr(optimizer, "consistent_rms", None) is None:
        return "spectral"
    raise ValueError(
        f"how a rate of {type(optimizer).__name__} goes with the width is not known; say matrices="
        '"elementwise" or "spectral" (see train.mup.transfer), or use one of '
        f"{', '.join(kind.__name__ for kind in (*ELEMENTWISE, *SPECTRAL))}"
    )


def with_factors(optimizer: OptimizerSettings, factors: Factors, params: Any) -> Any:
    """Returns an optimizer's settings whose learning-rate rules have the factors in them, too.

    Each parameter's own rule is multiplied by the first of the factors that matches it.

    Args:
      optimizer: settings.
      factors: of `Transfer.learning_rate_rules`.
      params: that train, or their shapes.

    Raises:
      ValueError: as `model.rules.match`.

    >>> params = {"head": {"kernel": jnp.ones((2, 3))}}
    >>> doubled = AdamW(learning_rate_rules=(("head", 2.0),))
    >>> with_factors(doubled, (("head/kernel", 0.25),), params).learning_rate_rules
    (('^head/kernel$', 0.5),)
    """
    given = match_per_layer(optimizer.learning_rate_rules, params, default=1.0)
    made = match_per_layer(_that_match(factors, params), params, default=1.0)
    rules: list[tuple[str, float]] = []
    pairs = zip(
        leaf_paths(params),
        jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(made, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    )
    for path, own, factor in pairs:
        if not is_stacked(path):
            rules.append((f"^{re.escape(path)}$", own * factor))
            continue
        rest = re.escape(path.removeprefix(STACK))
        products = [a * b for a, b in zip(own, factor, strict=True)]
        if len(set(products)) == 1:
            rules.append((f"^{STACK}{rest}$", products[0]))
        else:
            rules += [(f"^{STACK}/{i}{rest}$", value) for i, value in enumerate(products)]
    return dataclasses.replace(optimizer, learning_rate_rules=tuple(rules))


def _that_match(factors: Factors, params: Any) -> Factors:
    """The factors without those for parameters that do not train."""
    kept = []
    for rule in factors:
        try:
            match([rule], params, default=1.0)
        except ValueError:
            continue
        kept.append(rule)
    return tuple(kept)


def scale_init(params: Any, init_rules: Rules) -> Any:
    """The initial parameters times the factors of the rules, 1 where none matches.

    Raises:
      ValueError: as `model.rules.match`.

    >>> scale_init({"head": {"kernel": jnp.ones(2)}}, [("head/kernel", 0.5)])
    {'head': {'kernel': Array([0.5, 0.5], dtype=float32)}}
    """
    factors = match(init_rules, params, default=1.0)
    return jax.tree.map(lambda w, factor: w * jnp.asarray(factor, w.dtype), params, factors)
