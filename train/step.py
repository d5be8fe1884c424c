"""The training step: one pure function, whatever is plugged into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from model.rules import is_stacked, path_of
from model.transformer import Model
from train.collective_order import after
from train.losses import counts_of, loss_function
from train.optimizers.wide import widened
from train.plugs import (
    NONFINITE,
    Batch,
    Context,
    Gradient,
    GradientFunction,
    LossFunction,
    LossTerm,
    Metrics,
    PyTree,
    State,
    WeightTransform,
    check_batch,
    merge,
    whole,
    with_memory,
)

Step = Callable[[State, PyTree, Batch], tuple[State, Metrics]]


def init_state(
    key: jax.Array,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    transforms: Sequence[WeightTransform] = (),
    frozen: PyTree | None = None,
    gradient: GradientFunction | Gradient = whole,
) -> State:
    """Returns the state before the first step.

    Args:
      key: the run's key, from which every draw of training comes.
      params: the parameters that train.
      optimizer: its state is initialised for them.
      transforms: each puts what it carries into `extra`.
      frozen: what does not train.
      gradient: as in the step; what it remembers is initialised.

    Raises:
      ValueError: if two plugs have one name, or something is no plug.

    >>> state = init_state(jax.random.key(0), {"w": jnp.ones(2)}, optax.sgd(0.1))
    >>> int(state.step), sorted(state.extra)
    (0, ['gradient', 'nonfinite'])
    """
    _check_plugs(optimizer, transforms)
    plugs: list[WeightTransform | Gradient] = [*transforms, with_memory(gradient)]
    names = [plug.name for plug in plugs]
    if len(set(names)) < len(names) or NONFINITE in names:
        raise ValueError(f"weight transforms and gradient need names of their own, not {names}")
    frozen = {} if frozen is None else frozen
    extra = {plug.name: plug.init(params, frozen) for plug in plugs}
    extra[NONFINITE] = {"in_a_row": jnp.int32(0), "total": jnp.int32(0)}
    return State(jnp.int32(0), params, optimizer.init(params), key, extra)


def make_train_step(
    model: Model,
    terms: Sequence[LossTerm],
    optimizer: optax.GradientTransformation,
    *,
    transforms: Sequence[WeightTransform] = (),
    gradient: GradientFunction | Gradient = whole,
    micro_batches: int = 1,
    loss_chunk: int | None = None,
    max_nonfinite: int = 5,
    log_norms: bool = False,
) -> Step:
    """Returns `step(state, frozen, batch) -> (state, metrics)`, pure and not yet compiled.

    The loss is `sum_t weight_t * total_t / max(count_t, 1)` over the terms t, with counts
    taken over the whole batch before it is split: k micro-batches give the gradient of one batch of
    k times the size, whatever the padding.

    A step whose loss, gradient or update is not finite changes nothing but the step number and two
    counters. After `max_nonfinite` of them in a row the step does nothing at all, so that the
    caller, who learns of it later, still holds the parameters of the last good step.

    Args:
      model: the Transformer, or an encoder-decoder.
      terms: the loss.
      optimizer: any Optax transformation; it is also given `value=` (the loss) and `grads=` (the
        raw gradient).
      transforms: weight transforms.
      gradient: the gradient function, with a memory or without.
      micro_batches: parts that the batch is split into, one after the other.
      loss_chunk: see `train.losses.loss_function`.
      max_nonfinite: see above.
      log_norms: add the norms of gradient, update and weight of every parameter, by layer.

    Raises:
      ValueError: something is no plug or no term; and when traced: a batch that does not divide
        into the micro-batches, see also `train.plugs.check_batch`, or a state of other plugs.

    >>> from model.build import build_model
    >>> from model.presets import gpt2_tiny
    >>> from train.losses import cross_entropy
    >>> model, tokens = build_model(gpt2_tiny(dropout=0.0)), jnp.arange(8).reshape(1, 8)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> batch = {"tokens": tokens, "targets": tokens + 1, "weights": jnp.ones((1, 8))}
    >>> step = jax.jit(make_train_step(model, [cross_entropy()], optax.adam(1e-2)))
    >>> state, losses = init_state(jax.random.key(1), params, optax.adam(1e-2)), []
    >>> for _ in range(3):
    ...     state, metrics = step(state, {}, batch)
    ...     losses.append(float(metrics["loss"]))
    >>> losses[0] > losses[1] > losses[2]
    True
    """
    _check_plugs(optimizer, transforms)
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}; the batch is at least one part")
    loss = loss_function(model, terms, transforms, loss_chunk)
    optimizer = optax.with_extra_args_support(optimizer)
    plug = with_memory(gradient)
    carried = {*(transform.name for transform in transforms), plug.name, NONFINITE}

    def step(state: State, frozen: PyTree, batch: Batch) -> tuple[State, Metrics]:
        check_batch(batch)
        if set(state.extra) != carried:
            raise ValueError(
                f"the state carries {', '.join(sorted(state.extra))}, and the plugs of this step "
                f"are {', '.join(sorted(carried))}; give init_state and make_train_step the same "
                "transforms and gradient"
            )
        frozen = {} if frozen is None else frozen
        rng = jax.random.fold_in(state.rng, state.step)
        context = Context(state.step, rng, frozen, state.extra, counts_of(terms, batch))
        grads, metrics, carry = _accumulate(
            plug, loss, state.params, batch, context, state.extra[plug.name], micro_batches
        )

        # In float32 at least: squares of float16 overflow early, and vanish early.
        norm = optax.tree.norm(widened(grads))
        counters = state.extra[NONFINITE]
        stopped = counters["in_a_row"] >= max_nonfinite
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params, value=metrics["loss"], grads=grads
        )
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        finite &= jnp.isfinite(optax.tree.norm(widened(updates)))
        good = finite & ~stopped
        params = optax.apply_updates(state.params, updates)
        extra = {
            t.name: t.update(state.extra[t.name], state.params, grads, context) for t in transforms
        }
        extra[plug.name] = carry
        old = (state.params, state.optimizer, {name: state.extra[name] for name in extra})
        params, optimizer_state, extra = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, optimizer_state, extra), old
        )
        bad = (~finite & ~stopped).astype(jnp.int32)
        in_a_row = jnp.where(good, 0, counters["in_a_row"] + bad)
        extra[NONFINITE] = {"in_a_row": in_a_row, "total": counters["total"] + bad}

        metrics = {
            **metrics,
            "gradient_norm": norm,
            "tokens": batch["weights"].sum(),
            "skipped": ~good,
            "nonfinite_in_a_row": in_a_row,
        }
        if log_norms:
            trees = {"gradient": grads, "update": updates, "weight": state.params}
            metrics["norms"] = {name: layer_norms(tree) for name, tree in trees.items()}
        number = state.step + (~stopped).astype(jnp.int32)
        return State(number, params, optimizer_state, state.rng, extra), metrics

    return step


def _check_plugs(optimizer: object, transforms: Sequence[object]) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"the optimizer is {optimizer!r}; a step takes an Optax transformation, which "
            "train.optimizers.build makes of settings"
        )
    for transform in transforms:
        if not (hasattr(transform, "apply") and hasattr(transform, "update")):
            raise ValueError(
                f"{transform!r} is no weight transform; give WeightTransform(name, apply)"
            )


def make_evaluation_step(
    model: Model,
    terms: Sequence[LossTerm],
    transforms: Sequence[WeightTransform] = (),
    loss_chunk: int | None = None,
) -> Callable[[State, PyTree, Batch], dict[str, dict[str, jax.Array]]]:
    """Returns `(state, frozen, batch) -> {term: {"total", "count"}}`, without dropout.

    Sums, so that the mean over many batches weighs every position alike.
    """
    loss = loss_function(model, terms, transforms, loss_chunk)

    def evaluate(state: State, frozen: PyTree, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        check_batch(batch)
        ones = {term.name: jnp.float32(1) for term in terms}
        context = Context(state.step, None, frozen, state.extra, ones)
        counts = {term.name: term.count(batch) for term in terms}
        _, totals = loss(state.params, after(batch, counts), context)
        return {name: {"total": totals[name], "count": count} for name, count in counts.items()}

    return evaluate


def make_output_step(
    outputs: Callable[[PyTree, Batch], dict[str, jax.Array]],
    terms: Sequence[LossTerm],
    transforms: Sequence[WeightTransform] = (),
) -> Callable[[State, PyTree, Batch], dict[str, jax.Array]]:
    """Returns `(state, frozen, batch) -> arrays by row`, without dropout.

    Args:
      outputs: `(weights, batch) -> arrays`, of a task.
      terms: of the run, whose counts weight transforms may look at.
      transforms: weight transforms.
    """

    def apply(state: State, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        ones = {term.name: jnp.float32(1) for term in terms}
        context = Context(state.step, None, frozen, state.extra, ones)
        weights = merge(state.params, frozen.get("params", {}))
        for transform in transforms:
            weights = transform.apply(weights, context)
        return outputs(weights, batch)

    return apply


def in_parts(parts: int, gradient: GradientFunction = whole) -> GradientFunction:
    """Returns the gradient function that runs over `parts` of its batch, one after the other.

    For a gradient function around it that must run once a step, such as one that exchanges
    gradients between workers.

    >>> loss = lambda params, batch, context: (params * batch["tokens"].sum(), {})
    >>> context = Context(jnp.int32(0), None, {}, {}, {})
    >>> grads, _ = in_parts(2)(loss, jnp.float32(1), {"tokens": jnp.ones((4, 3))}, context)
    >>> float(grads)
    12.0
    """
    plug = with_memory(gradient)

    def apply(
        loss: LossFunction, params: PyTree, batch: Batch, context: Context
    ) -> tuple[PyTree, Metrics]:
        grads, metrics, _ = _accumulate(plug, loss, params, batch, context, {}, parts)
        return grads, metrics

    return apply


def layer_norms(tree: PyTree) -> dict[str, jax.Array]:
    """Returns the L2 norm of every leaf by path; of stacked leaves one norm a layer, [L].

    >>> layer_norms({"blocks": {"kernel": jnp.ones((2, 3, 3))}, "head": {"kernel": jnp.ones(4)}})
    {'blocks/kernel': Array([3., 3.], dtype=float32), 'head/kernel': Array(2., dtype=float32)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def norm(path: str, leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1 if is_stacked(path) else 0, leaf.ndim))
        return jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum(axis=axes))

    return {path_of(key_path): norm(path_of(key_path), leaf) for key_path, leaf in leaves}


def _accumulate(
    gradient: Gradient,
    loss: LossFunction,
    params: PyTree,
    batch: Batch,
    context: Context,
    carry: PyTree,
    parts: int,
) -> tuple[PyTree, Metrics, PyTree]:
    """Sums gradients and metrics over the parts of the batch (both are shares of global means)."""
    if parts == 1:
        return gradient.apply(loss, params, batch, context, carry)
    rows = batch["tokens"].shape[0]
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} rows does not divide into {parts} micro-batches; "
            f"make the batch a multiple of {parts}"
        )
    split = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)

    def part(number, batch, carry):
        rng = None if context.rng is None else jax.random.fold_in(context.rng, number)
        return gradient.apply(loss, params, batch, context._replace(rng=rng), carry)

    def add(so_far, numbered):
        sums, carry = so_far
        number, batch = numbered
        *new, carry = part(number, batch, carry)
        return (jax.tree.map(lambda s, n: s + n.astype(s.dtype), sums, new), carry), None

    # Sums are at least float32: bfloat16 would lose what late micro-batches add.
    first = jax.tree.map(lambda a: a[0], split)
    *shapes, _ = jax.eval_shape(part, jnp.int32(0), first, carry)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    ((grads, metrics), carry), _ = jax.lax.scan(add, (zeros, carry), (jnp.arange(parts), split))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), metrics, carry
