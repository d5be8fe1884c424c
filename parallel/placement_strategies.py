"""Strategies: the ways to divide a Transformer, as rules that compose.

A strategy is a list of ordered `(regex, PartitionSpec)` rules over parameter paths
(`model.rules`), with what it asks of optimizer state and activations beside it. A parameter's
layout is the union, axis by axis, of what each strategy says of it: `[fsdp(params),
tensor(params)]` puts `fsdp` on one axis of a kernel and `tensor` on the other. With no strategy at
all parameters are replicated and the batch alone is divided, which is data parallelism; context
parallelism, too, divides activations alone.

Shapes: L layers, D width, V vocabulary; a kernel is [L, in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from model.rules import Rules, match

PyTree = Any


class Strategy(NamedTuple):
    """One way to divide a model; see `fsdp`, `zero1`, `tensor`, `sequence` and `pipeline`.

    Attributes:
      name: for messages.
      parameters: ordered `(regex, PartitionSpec)`; parameters that no rule matches are left alone.
      optimizer: what optimizer state gets besides the layout of its parameter.
      activations: logical axis name -> mesh axes that divide it besides those of
        `parallel.placement.ACTIVATIONS`.
    """

    name: str
    parameters: Rules = ()
    optimizer: Rules = ()
    activations: tuple[tuple[str, tuple[str, ...]], ...] = ()


def fsdp(params: PyTree, axis: str = "fsdp") -> Strategy:
    """Every matrix divided, most along D: ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054).

    The token embedding is divided along V: for a lookup in a table of which each device holds some
    columns, the compiler would gather the activations of the whole batch. Vectors stay whole: they
    are thousands of times smaller, and gathering each would cost a message.

    Args:
      params: the parameters, or their shapes: rules for what is not there are left out.
      axis: mesh axis to divide over.

    >>> import jax
    >>> fsdp({"head": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}).parameters
    [('head/kernel', P('fsdp',))]
    """
    rules = [("(token|value)_embedding/embedding", P(axis)), *_along_width(axis)]
    return Strategy("fsdp", present(rules, params))


def zero1(params: PyTree, axis: str = "data") -> Strategy:
    """Parameters whole, their optimizer state divided along D: ZeRO-1 (arXiv:1910.02054).

    Each device updates its part, and the updates are gathered.

    >>> import jax
    >>> zero1({"head": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}).optimizer
    [('head/kernel', P('data',))]
    """
    rules = [("(token|value)_embedding/embedding", P(None, axis)), *_along_width(axis)]
    return Strategy("zero1", (), present(rules, params))


def tensor(params: PyTree, axis: str = "tensor") -> Strategy:
    """Heads, feed-forward and vocabulary divided (Shoeybi et al. 2019, arXiv:1909.08053).

    Columns of q, k, v, up and gate with their biases, rows of o and down, so that a branch needs
    one sum over devices at its end; rows of the token embedding and columns of the head.

    >>> import jax
    >>> tensor({"head": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}).parameters
    [('head/kernel', P(None, 'tensor'))]
    """
    rules = [
        (r"blocks/(cross_)?attention/(q|k|v)/kernel", P(None, None, axis)),
        (r"blocks/(cross_)?attention/(q|k|v)/bias", P(None, axis)),
        (r"blocks/(cross_)?attention/o/kernel", P(None, axis, None)),
        (r"blocks/mlp/(up|gate)/kernel", P(None, None, axis)),
        (r"blocks/mlp/(up|gate)/bias", P(None, axis)),
        (r"blocks/mlp/down/kernel", P(None, axis, None)),
        (r"(token|value)_embedding/embedding", P(axis, None)),
        (r"head/kernel", P(None, axis)),
    ]
    activations = (("heads", (axis,)), ("ffn", (axis,)))
    return Strategy("tensor", present(rules, params), activations=activations)


def sequence(params: PyTree, axis: str = "tensor") -> Strategy:
    """Between blocks, time divided over `tensor` (Korthikanti et al. 2022, arXiv:2205.05198).

    Norms, dropout and residual sums are then computed once instead of on every device, and the sum
    over devices becomes a reduce-scatter and an all-gather of the same bytes.

    >>> sequence({}).activations
    (('time', ('tensor',)),)
    """
    return Strategy("sequence", activations=(("time", (axis,)),))


def pipeline(params: PyTree, axis: str = "pipeline") -> Strategy:
    """Layers divided into consecutive stages, with their optimizer state.

    >>> import jax
    >>> pipeline({"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((2, 4, 8), "float32")}}})[1]
    [('blocks', P('pipeline',))]
    """
    return Strategy("pipeline", present([("blocks", P(axis))], params))


STRATEGIES: dict[str, Callable[[PyTree], Strategy]] = {
    "fsdp": fsdp,
    "zero1": zero1,
    "tensor": tensor,
    "sequence": sequence,
    "pipeline": pipeline,
}
"""Strategies by the names that a command line uses."""


def strategies_for(mesh: Mesh, params: PyTree, more: Sequence[str] = ()) -> list[Strategy]:
    """Returns the strategy of each axis above 1 that has one, then those of the names `more`.

    Raises:
      ValueError: a name that is none of `STRATEGIES`.

    >>> from parallel.mesh import make_mesh
    >>> import jax
    >>> strategies_for(make_mesh(devices=jax.devices()[:1]), {})
    []
    """
    names = [name for name in STRATEGIES if mesh.shape.get(name, 1) > 1]
    if unknown := [name for name in more if name not in STRATEGIES]:
        raise ValueError(f"no strategy is called {unknown[0]!r}; there are {', '.join(STRATEGIES)}")
    names += [name for name in more if name not in names]
    return [STRATEGIES[name](params) for name in names]


def present(rules: Rules, params: PyTree) -> list[tuple[str, Any]]:
    """Returns those rules that match some parameter: not every model has a gate, or biases."""

    def matches(rule: tuple[str, Any]) -> bool:
        try:
            match([rule], params, default=None)
        except ValueError:
            return False
        return True

    return [rule for rule in rules if matches(rule)]


def _along_width(axis: str) -> list[tuple[str, Any]]:
    """Rules that divide the matrices, but for the token embedding, along the residual width D."""
    return [
        (r"blocks/(cross_)?attention/(q|k|v)/kernel", P(None, axis)),
        (r"blocks/(cross_)?attention/o/kernel", P(None, None, axis)),
        (r"blocks/mlp/(up|gate)/kernel", P(None, axis)),
        (r"blocks/mlp/down/kernel", P(None, None, axis)),
        (r"(position|source)_embedding/embedding", P(None, axis)),
        (r"head/kernel", P(axis)),
    ]
