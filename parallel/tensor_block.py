"""A Transformer block with its tensor-parallel collectives written out.

The kernels that make heads and hidden units are cut by columns, those that lead back by rows, so
that one collective enters each half of the block and one leaves it (Shoeybi et al. 2019,
arXiv:1909.08053). Three forms of the same block:

    all_reduce   the stream is on every device; leave by all-reduce
    sequence     stream and norms are cut along time; enter by all-gather, leave by reduce-scatter
                 (Korthikanti et al. 2022, arXiv:2205.05198)
    overlapped   as `sequence`, with `parallel.ring_matmul` in place of collective and product

Shapes: B batch, T time, S = T or T / n, D width, F columns of this device, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from model.attention import Attention, Visibility, dot_product_attention
from model.block import ACTIVATIONS, norm
from model.config import TransformerConfig
from model.linear import Weight, along_last, linear
from model.norm import Norm
from model.positions import Rotation, rotate
from model.rules import match
from parallel.ring_matmul import all_gather_matmul, matmul_reduce_scatter

PyTree = Any
Form = Literal["all_reduce", "sequence", "overlapped"]
BlockFunction = Callable[[PyTree, jax.Array, Visibility, Rotation | None], jax.Array]


class Collectives(NamedTuple):
    """How a half of the block begins and ends.

    Attributes:
      cuts_time: whether the stream is sharded over the axis along time.
      enter: `(x_BSD, kernels, axis) -> [x @ kernel [B, T, F], ...]` on all of the time axis.
      leave: `(h_BTF, kernel, axis) -> [B, S, D]`, summed over the devices.
    """

    cuts_time: bool
    enter: Callable[[jax.Array, Sequence[Weight], str], list[jax.Array]]
    leave: Callable[[jax.Array, Weight, str], jax.Array]


def _enter_replicated(x_BTD: jax.Array, kernels: Sequence[Weight], axis: str) -> list[jax.Array]:
    # Marked varying once: the gradient is then summed once, not for each kernel.
    x_BTD = lax.pcast(x_BTD, axis, to="varying")
    return [linear(x_BTD, kernel) for kernel in kernels]


def _enter_gathered(x_BSD: jax.Array, kernels: Sequence[Weight], axis: str) -> list[jax.Array]:
    x_BTD = lax.all_gather(x_BSD, axis, axis=1, tiled=True)
    return [linear(x_BTD, kernel) for kernel in kernels]


def _leave_summed(h_BTF: jax.Array, kernel: Weight, axis: str) -> jax.Array:
    return lax.psum(linear(h_BTF, kernel), axis)


def _leave_scattered(h_BTF: jax.Array, kernel: Weight, axis: str) -> jax.Array:
    return lax.psum_scatter(linear(h_BTF, kernel), axis, scatter_dimension=1, tiled=True)


FORMS: dict[str, Collectives] = {
    "all_reduce": Collectives(False, _enter_replicated, _leave_summed),
    "sequence": Collectives(True, _enter_gathered, _leave_scattered),
    "overlapped": Collectives(True, all_gather_matmul, matmul_reduce_scatter),
}


def tensor_block(
    config: TransformerConfig,
    form: Form = "all_reduce",
    axis: str = "tensor",
    attention: Attention = dot_product_attention,
) -> BlockFunction:
    """Returns `(params, x [B, T, D], visibility, turn) -> [B, T, D]`, equal to `model.block.Block`.

    Parameters are those of one block as the model keeps them (no layer axis); heads and hidden
    units are cut over `axis` of the mesh of `jax.set_mesh`, all other axes stay automatic.

    Args:
      config: the model's; every part of a block is supported but dropout.
      form: which collectives; a key of `FORMS`.
      axis: the mesh axis n.
      attention: runs on the heads of one device.

    Raises:
      ValueError: for an unknown form, or dropout; when called, without that axis in the mesh, or if
        heads, hidden units or (where time is cut) tokens do not divide.

    >>> from model.block import Block
    >>> from model.presets import gpt2_tiny
    >>> config, x = gpt2_tiny(dropout=0.0), jnp.ones((1, 4, 32))
    >>> block = Block(config)
    >>> params = block.init(jax.random.key(0), x, Visibility(), None, None)["params"]
    >>> with jax.set_mesh(jax.make_mesh((1,), ("tensor",), (jax.sharding.AxisType.Auto,))):
    ...     y = jax.jit(tensor_block(config))(params, x, Visibility(), None)
    >>> plain, _ = block.apply({"params": params}, x, Visibility(), None, None)
    >>> bool(jnp.allclose(y, plain, atol=1e-5))
    True
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if config.dropout:
        raise ValueError(f"a tensor block has no dropout, but it is {config.dropout}; set it to 0")
    collectives = FORMS[form]
    stream = P(None, axis) if collectives.cuts_time else P()

    def run(params: PyTree, x_BSD: jax.Array, visibility: Visibility, turn: Rotation | None):
        y = _attend(config, collectives, axis, attention, params, x_BSD, visibility, turn)
        x_BSD = x_BSD + y
        return x_BSD + _feed_forward(config, collectives, axis, params, x_BSD)

    def block(
        params: PyTree, x_BTD: jax.Array, visibility: Visibility, turn: Rotation | None
    ) -> jax.Array:
        _check(config, collectives, axis, x_BTD.shape[1])
        if visibility.window is not None:
            visibility = visibility._replace(window=jnp.asarray(visibility.window))
        sharded = jax.shard_map(
            run,
            in_specs=(block_specs(config, params, axis), stream, P(), P()),
            out_specs=stream,
            axis_names={axis},
        )
        return sharded(params, x_BTD, visibility, turn)

    return block


def block_specs(config: TransformerConfig, params: PyTree, axis: str = "tensor") -> PyTree:
    """Returns the PartitionSpecs of one block's parameters (no layer axis).

    >>> from model.presets import llama_tiny
    >>> params = {"mlp": {"up": {"kernel": 0}, "down": {"kernel": 0}, "gate": {"kernel": 0}},
    ...           "attention": {name: {"kernel": 0} for name in "qkvo"}}
    >>> specs = block_specs(llama_tiny(), params)
    >>> specs["mlp"]["up"]["kernel"], specs["mlp"]["down"]["kernel"]
    (P(None, 'tensor'), P('tensor', None))
    """
    columns = "(attention/(q|k|v)|mlp/(up|gate))"
    rules = [(f"{columns}/kernel", P(None, axis)), ("(attention/o|mlp/down)/kernel", P(axis, None))]
    if config.biases:
        rules.append((f"{columns}/bias", P(axis)))
    return match(rules, params, default=P())


def _attend(config, collectives, axis, attention, params, x_BSD, visibility, turn):
    c, p = config, params["attention"]
    x_BSD = _norm(norm(c, "attention_norm"), params, x_BSD)
    products = collectives.enter(x_BSD, [p[name]["kernel"] for name in "qkv"], axis)
    q, k, v = (
        _bias(p[name], h_BTF).reshape(*h_BTF.shape[:2], -1, c.head_width_)
        for name, h_BTF in zip("qkv", products, strict=True)
    )
    if c.qk_norm:
        q = _norm(norm(c, "q_norm", "rmsnorm"), p, q)
        k = _norm(norm(c, "k_norm", "rmsnorm"), p, k)
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    y = attention(q, k, v, visibility, None)
    # The bias after the sum: it is on every device, and counts once.
    y_BSD = collectives.leave(y.reshape(*y.shape[:2], -1), p["o"]["kernel"], axis)
    return _bias(p["o"], y_BSD)


def _feed_forward(config, collectives, axis, params, x_BSD):
    c, p = config, params["mlp"]
    activate, gated = ACTIVATIONS[c.activation]
    x_BSD = _norm(norm(c, "mlp_norm"), params, x_BSD)
    names = ["up", "gate"] if gated else ["up"]
    products = collectives.enter(x_BSD, [p[name]["kernel"] for name in names], axis)
    up, *gate = (_bias(p[name], h) for name, h in zip(names, products, strict=True))
    h_BTF = activate(gate[0]) * up if gated else activate(up)
    return _bias(p["down"], collectives.leave(h_BTF, p["down"]["kernel"], axis))


def _norm(module: Norm, params: PyTree, x: jax.Array) -> jax.Array:
    """With its parameters among those of the block, if it has any."""
    return cast(jax.Array, module.apply({"params": params.get(module.name, {})}, x))


def _bias(p: PyTree, y: jax.Array) -> jax.Array:
    return y + along_last(p["bias"], y) if "bias" in p else y


def _check(config: TransformerConfig, collectives: Collectives, axis: str, time: int) -> None:
    shape = jax.sharding.get_abstract_mesh().shape
    if axis not in shape:
        raise ValueError(
            f"the block is cut over the mesh axis {axis!r}, but the mesh has "
            f"{dict(shape) or 'no axes'}; make one with that axis and enter jax.set_mesh(mesh)"
        )
    parts = {
        "heads": config.heads,
        "key/value heads": config.kv_heads_,
        "hidden units": config.ffn_width_,
    }
    if collectives.cuts_time:
        parts["tokens"] = time
    for name, count in parts.items():
        if count % shape[axis]:
            raise ValueError(
                f"{count} {name} do not divide over {shape[axis]} devices along {axis!r}; "
                f"choose a size of that axis that divides {count}"
            )
