"""Looks at a mesh, a model and a batch before anything expensive is done with them.

Each check raises a `ValueError` with the numbers and what would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from model.config import TransformerConfig
from model.flops import abstract_params
from model.rules import Rules
from parallel.mesh import BATCH_AXES
from parallel.placement import activation_axes, optimizer_specs, param_shardings
from parallel.placement_strategies import Strategy
from parallel.vocabulary import pad_vocabulary, padded_size


def check_placement(
    mesh: Mesh,
    config: TransformerConfig,
    strategies: Sequence[Strategy],
    *,
    rows: int,
    time: int,
    micro_batches: int = 1,
    vocabulary_multiple: int = 1,
    rules: Rules = (),
) -> None:
    """Checks all of it.

    Args:
      mesh: from `parallel.mesh.make_mesh`.
      config: of the model.
      strategies: how parameters and activations are divided.
      rows: B of the global batch.
      time: T of a row.
      micro_batches: parts that each batch is accumulated over.
      vocabulary_multiple: what the vocabulary is padded to a multiple of.
      rules: the user's own, see `parallel.placement.param_specs`.

    Raises:
      ValueError: heads, layers, batch, time or vocabulary that the mesh does not divide; an axis of
        the mesh that divides nothing; a strategy whose axes are of size 1; rules that do not fit
        the parameters.

    >>> from model.presets import gpt2_tiny
    >>> from parallel.mesh import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> check_placement(mesh, gpt2_tiny(), [], rows=2, time=16)
    """
    check_model(mesh, config, vocabulary_multiple)
    check_batch(mesh, strategies, rows=rows, time=time, micro_batches=micro_batches)
    params = jax.eval_shape(
        lambda tree: pad_vocabulary(tree, vocabulary_multiple), abstract_params(config)
    )
    check_strategies_used(mesh, strategies)
    param_shardings(mesh, params, strategies, rules)
    check_axes_used(mesh, params, strategies, rules)


def check_model(mesh: Mesh, config: TransformerConfig, vocabulary_multiple: int = 1) -> None:
    """Checks that the parts of the model can be divided.

    Raises:
      ValueError: query or key/value heads, feed-forward width or vocabulary not divisible by
        `tensor`, layers not by `pipeline`; pairs of tokens on a mesh that divides rows.
    """
    if config.bigram_rows is not None and mesh.shape["context"] > 1:
        raise ValueError(
            f"a model with bigram_rows reads the token before each, and context="
            f"{mesh.shape['context']} divides rows between devices; give those devices to data or "
            "fsdp, or train without bigram_rows"
        )
    tensor, pipeline = mesh.shape["tensor"], mesh.shape["pipeline"]
    for name, number in (("heads", config.heads), ("key/value heads", config.kv_heads_)):
        if number % tensor:
            both = [n for n in _divisors(config.heads) if config.kv_heads_ % n == 0]
            raise ValueError(
                f"{number} {name} do not divide over tensor={tensor}; for {config.heads} heads and "
                f"{config.kv_heads_} key/value heads tensor can be {_listed(both)}"
            )
    if config.ffn_width_ % tensor:
        raise ValueError(
            f"a feed-forward width of {config.ffn_width_} does not divide over tensor={tensor}; "
            f"the next that does is {padded_size(config.ffn_width_, tensor)}"
        )
    rows = padded_size(config.vocabulary_size, vocabulary_multiple)
    if rows % tensor:
        raise ValueError(
            f"a vocabulary of {rows} does not divide over tensor={tensor}; pad it to "
            f"{padded_size(config.vocabulary_size, tensor)} with --vocabulary-multiple {tensor}"
        )
    if config.layers % pipeline:
        raise ValueError(
            f"{config.layers} layers do not divide over pipeline={pipeline}; pipeline can be "
            f"{_listed(_divisors(config.layers))}"
        )


def check_batch(
    mesh: Mesh, strategies: Sequence[Strategy], *, rows: int, time: int, micro_batches: int = 1
) -> None:
    """Checks that a batch [rows, time], or each of its micro-batches, can be divided.

    Raises:
      ValueError: rows not divisible by `data * fsdp`, or time not by the axes that divide it.
    """
    axes = activation_axes(strategies)
    parts = _product(mesh, axes["batch"])
    if rows % micro_batches or rows // micro_batches % parts:
        least = padded_size(rows, parts * micro_batches)
        in_parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"a batch of {rows} rows{in_parts} does not divide over {_sizes(mesh, BATCH_AXES)} = "
            f"{parts}; make it a multiple of {parts * micro_batches}, for instance {least}"
        )
    parts = _product(mesh, axes["time"])
    if time % parts:
        raise ValueError(
            f"rows of {time} tokens do not divide over {_sizes(mesh, axes['time'])} = {parts}; "
            f"make the length a multiple of {parts}, for instance {padded_size(time, parts)}"
        )


def check_axes_used(
    mesh: Mesh, params: Any, strategies: Sequence[Strategy], rules: Rules = ()
) -> None:
    """Checks that every axis above 1 divides something that it is there for.

    `data` divides the batch and `context` its rows; the others must divide parameters or optimizer
    state, as a batch divided over `fsdp` alone is data parallelism under another name.

    Raises:
      ValueError: an axis of size above 1 that divides nothing.

    >>> from parallel.mesh import make_mesh
    >>> check_axes_used(make_mesh(devices=jax.devices()[:1]), {}, [])
    """
    used = {"data", "context"}
    specs = optimizer_specs(params, strategies, rules)
    for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)):
        for entry in spec:
            used |= {entry} if isinstance(entry, str) else set(entry or ())
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            names = [s.name for s in strategies] or ["none"]
            raise ValueError(
                f"{name}={size} divides no parameter (strategies: {', '.join(names)}): {size} "
                f"devices would do the same work. Add a strategy that uses it, or set {name}=1 and "
                f"data={size * mesh.shape['data']}"
            )


def check_strategies_used(mesh: Mesh, strategies: Sequence[Strategy]) -> None:
    """Checks that every strategy has an axis above 1 to divide something over.

    Raises:
      ValueError: a strategy that would have no effect.

    >>> from parallel.mesh import make_mesh
    >>> from parallel.placement_strategies import sequence
    >>> check_strategies_used(make_mesh(devices=jax.devices()[:1]), [sequence({})])
    Traceback (most recent call last):
    ...
    ValueError: the strategy 'sequence' has no effect on a mesh with tensor=1: give that axis \
devices, or leave the strategy out
    """
    for strategy in strategies:
        entries = [
            entry for _, spec in (*strategy.parameters, *strategy.optimizer) for entry in spec
        ]
        entries += [axes for _, axes in strategy.activations]
        names = {n for e in entries if e for n in ([e] if isinstance(e, str) else e)}
        if all(mesh.shape[name] == 1 for name in names):
            axes = _sizes(mesh, sorted(names)) or "any axes: no rule of it matches a parameter"
            raise ValueError(
                f"the strategy {strategy.name!r} has no effect on a mesh with {axes}: give that "
                "axis devices, or leave the strategy out"
            )


def _product(mesh: Mesh, axes: Sequence[str]) -> int:
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return size


def _sizes(mesh: Mesh, axes: Sequence[str]) -> str:
    return " * ".join(f"{name}={mesh.shape[name]}" for name in axes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
