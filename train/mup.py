"""Rates and initial scales that carry over from a small model to a wide or deep one."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from model.config import TransformerConfig
from model.rules import Rules, match

Factors = tuple[tuple[str, float], ...]


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
    matrices: Literal["elementwise", "spectral"] = "elementwise",
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
    within = layers ** (depth_exponent - 1.0) if depth_exponent else 1.0
    undo = layers**0.5  # the model's own scale of the last kernels of a branch

    def rate(inputs: float) -> float:
        return (1.0 / inputs if matrices == "elementwise" else 1.0) * within

    rates: Factors = (
        ("head/kernel", 1.0 / width),
        ("attention/o/kernel", rate(heads) * branch),
        ("mlp/down/kernel", rate(hidden) * branch),
        ("attention/q/kernel", rate(width) * query),
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
        ("attention/q/kernel", width**-0.5 * query),
        ("blocks/.*/kernel", width**-0.5),
    )
    return Transfer(rates, scales)


def scale_init(params: Any, init_rules: Rules) -> Any:
    """The initial parameters times the factors of the rules, 1 where none matches.

    Raises:
      ValueError: as `model.rules.match`.

    >>> scale_init({"head": {"kernel": jnp.ones(2)}}, [("head/kernel", 0.5)])
    {'head': {'kernel': Array([0.5, 0.5], dtype=float32)}}
    """
    factors = match(init_rules, params, default=1.0)
    return jax.tree.map(lambda w, factor: w * jnp.asarray(factor, w.dtype), params, factors)
