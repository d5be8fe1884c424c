"""Placement: which axis of which array lies on which axis of the mesh.

Parameters are laid out by strategies (`parallel.placement_strategies`) and by rules of the user's
own over their paths; optimizer state follows its parameter; activations are laid out by the names
of their axes, and the batch by its shape. Nothing is boxed or annotated: a layout is a tree of
`NamedSharding` beside the parameters, for `jit`, `device_put` and restoring checkpoints.

`Auto` meshes are meant: the compiler finds the collectives that these layouts ask for.

Shapes: B batch, T time, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.rules import Rules, leaf_paths, match, path_of, shadowed
from parallel.mesh import AXES, BATCH_AXES
from parallel.placement_strategies import Strategy
from parallel.vocabulary import TABLES

PyTree = Any
Parts = tuple[tuple[str, ...], ...]
"""For each axis of an array, the mesh axes that divide it."""


ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": ("context",),  # of the residual stream
    "branch": ("context",),  # time inside attention and feed-forward
    "width": (),
    "heads": (),
    "head_width": (),
    "ffn": (),
}
"""Logical axis name of an activation -> mesh axes that divide it whatever the strategies are."""

# Where two mesh axes divide one axis of a parameter, the inner one comes first, so that what is
# gathered over `fsdp` is exactly what a device of `tensor` works with.
_INNERMOST_FIRST = AXES[::-1]

_NO_RULE = object()  # of the user's own


def param_specs(params: PyTree, strategies: Sequence[Strategy] = (), rules: Rules = ()) -> PyTree:
    """Returns the `PartitionSpec` of each parameter.

    Args:
      params: the parameters, or their shapes.
      strategies: their union holds for what `rules` leaves open.
      rules: the user's own ordered `(regex, PartitionSpec)`, which win.

    Raises:
      ValueError: a rule that matches nothing, or nothing that earlier ones leave; a spec longer
        than its parameter has axes; or one mesh axis on two axes of a parameter.

    >>> from parallel.placement_strategies import fsdp, tensor
    >>> params = {"head": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}
    >>> param_specs(params, [fsdp(params), tensor(params)])
    {'head': {'kernel': P('fsdp', 'tensor')}}
    """
    return _specs(params, [s.parameters for s in strategies], rules)


def optimizer_specs(
    params: PyTree, strategies: Sequence[Strategy] = (), rules: Rules = ()
) -> PyTree:
    """Returns, for each parameter, the `PartitionSpec` of optimizer state of its shape.

    Args and Raises: as `param_specs`.
    """
    by_strategy = [s.parameters for s in strategies] + [s.optimizer for s in strategies]
    return _specs(params, by_strategy, rules)


def param_shardings(
    mesh: Mesh, params: PyTree, strategies: Sequence[Strategy] = (), rules: Rules = ()
) -> PyTree:
    """Returns the `NamedSharding` of each parameter, for `out_shardings`, restore and `device_put`.

    Args:
      mesh: from `parallel.mesh.make_mesh`.
      params: the parameters, or their shapes.
      strategies: see `param_specs`.
      rules: see there.

    Raises:
      ValueError: as `param_specs`, or an axis that its part of the mesh does not divide.

    >>> from parallel.mesh import make_mesh
    >>> from parallel.placement_strategies import fsdp
    >>> params = {"head": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> param_shardings(mesh, params, [fsdp(params)])["head"]["kernel"].spec
    P('fsdp',)
    """
    return _shardings(mesh, params, param_specs(params, strategies, rules))


def state_shardings(
    mesh: Mesh, state: Any, strategies: Sequence[Strategy] = (), rules: Rules = ()
) -> Any:
    """Returns the `NamedSharding` of each leaf of a training state.

    A leaf of the optimizer state or of `extra` belongs to the parameter whose path ends its own and
    whose shape it has (moments, momenta, masks, residuals), and is laid out with it; all other
    leaves are replicated (counts, keys, factored moments). Optimizer state also gets the
    `optimizer` rules of the strategies.

    Args:
      mesh: from `parallel.mesh.make_mesh`.
      state: `train.plugs.State`, or its shapes (`jax.eval_shape`): anything with `params`,
        `optimizer` and other fields.
      strategies: see `param_specs`.
      rules: see there.

    Raises:
      ValueError: as `param_shardings`.

    A step on a mesh, divided as the strategies say:

    >>> import jax.numpy as jnp, optax
    >>> from model.build import build_model
    >>> from model.presets import gpt2_tiny
    >>> from parallel.mesh import make_mesh
    >>> from parallel.placement_strategies import fsdp, tensor
    >>> from train.losses import cross_entropy
    >>> from train.step import init_state, make_train_step
    >>> mesh = make_mesh(devices=jax.devices()[:1])  # or make_mesh(fsdp=4, tensor=2) of eight
    >>> tokens = jnp.arange(16).reshape(2, 8)
    >>> params = build_model(gpt2_tiny()).init(jax.random.key(0), tokens)["params"]
    >>> strategies = [fsdp(params), tensor(params)]
    >>> model = build_model(gpt2_tiny(), constrain=constrain(mesh, strategies))
    >>> state = init_state(jax.random.key(1), params, optax.adam(1e-3))
    >>> shardings = state_shardings(mesh, state, strategies)
    >>> shardings.optimizer[0].mu["blocks"]["mlp"]["up"]["kernel"].spec
    P(None, 'fsdp', 'tensor')
    >>> state = jax.device_put(state, shardings)
    >>> step = make_train_step(model, [cross_entropy()], optax.adam(1e-3))
    >>> step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    >>> batch = {"tokens": tokens, "targets": tokens + 1, "weights": jnp.ones((2, 8))}
    >>> state, metrics = step(state, {}, place_batch(mesh, batch))
    >>> int(state.step)
    1
    """
    params = state.params
    whole = NamedSharding(mesh, P())
    of_params = _by_path(params, param_shardings(mesh, params, strategies, rules))
    of_optimizer = _by_path(
        params, _shardings(mesh, params, optimizer_specs(params, strategies, rules))
    )

    def of(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        field, _, path = path_of(key_path).partition("/")
        table = of_optimizer if field == "optimizer" else of_params
        # The longest ending first: `head/kernel` may be a parameter beside `a/head/kernel`.
        parts = path.split("/")
        for start in range(len(parts)):
            shape_and_sharding = table.get("/".join(parts[start:]))
            if shape_and_sharding is not None:
                shape, sharding = shape_and_sharding
                if shape == tuple(leaf.shape):
                    return sharding
                if field == "extra" and shape == tuple(leaf.shape[1:]):  # a history of it
                    return NamedSharding(mesh, P(None, *sharding.spec))
                return whole
        return whole

    return jax.tree_util.tree_map_with_path(of, state)


def batch_shardings(mesh: Mesh, batch: dict[str, Any]) -> dict[str, NamedSharding]:
    """Returns the `NamedSharding` of each array of a batch.

    Rows lie over `data` and `fsdp`, time over `context`; only arrays that begin like `tokens`
    [B, T] have time.

    >>> import numpy as np
    >>> from parallel.mesh import make_mesh
    >>> batch = {"tokens": np.zeros((2, 4)), "values": np.zeros(2)}
    >>> shardings = batch_shardings(make_mesh(devices=jax.devices()[:1]), batch)
    >>> [shardings[name].spec for name in batch]
    [P(('data', 'fsdp'), 'context'), P(('data', 'fsdp'),)]
    """
    by_position = tuple(batch["tokens"].shape)
    both, rows = P(BATCH_AXES, "context"), P(BATCH_AXES)
    return {
        name: NamedSharding(mesh, both if array.shape[:2] == by_position else rows)
        for name, array in batch.items()
    }


def place_batch(
    mesh: Mesh, batch: dict[str, Any], first: int = 0, rows: int | None = None
) -> dict[str, jax.Array]:
    """Returns the batch as global arrays on the mesh.

    Every process gives the global batch, or those rows of it that its own devices hold
    (`parallel.agreement.local_rows`); no process speaks to another.

    Args:
      mesh: from `make_mesh`.
      batch: arrays of [rows, ...].
      first: number of the first of these rows in the global batch.
      rows: of the global batch; by default those that are given.

    >>> import numpy as np
    >>> from parallel.mesh import make_mesh
    >>> batch = {"tokens": np.zeros((2, 4))}
    >>> place_batch(make_mesh(devices=jax.devices()[:1]), batch)["tokens"].shape
    (2, 4)
    """
    shardings = batch_shardings(mesh, batch)

    def put(name: str, array: Any) -> jax.Array:
        shape = (array.shape[0] if rows is None else rows, *array.shape[1:])

        def part(index: Any) -> Any:
            start, stop, _ = index[0].indices(shape[0])
            return array[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, shardings[name], part)

    return {name: put(name, array) for name, array in batch.items()}


def constrain(
    mesh: Mesh, strategies: Sequence[Strategy] = ()
) -> Callable[[jax.Array, tuple[str, ...]], jax.Array]:
    """Returns the `constrain` of `Transformer(config, constrain=...)`: activations, once a layer.

    Without it the compiler, which sees parameters divided along D, divides activations along D as
    well and moves them between devices instead of the parameters. Inside a `shard_map` the axes
    that it has taken over are left out.

    Raises (when called): ValueError on a logical axis that has no entry in `ACTIVATIONS`.

    >>> import jax.numpy as jnp
    >>> from parallel.mesh import make_mesh
    >>> laid_out = constrain(make_mesh(devices=jax.devices()[:1]))
    >>> laid_out(jnp.ones((2, 4, 8)), ("batch", "time", "width")).sharding.spec
    P(('data', 'fsdp'), 'context')
    """
    axes_of = activation_axes(strategies)

    def apply(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if unknown := [name for name in axes if name not in axes_of]:
            raise ValueError(f"no layout for the axis {unknown[0]!r}; known are {list(axes_of)}")
        current = jax.sharding.get_abstract_mesh()
        manual = set(current.manual_axes)
        parts = tuple(tuple(a for a in axes_of[name] if a not in manual) for name in axes)
        on: Any = current if manual else mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(on, _spec(parts)))

    return apply


def activation_axes(strategies: Sequence[Strategy] = ()) -> dict[str, tuple[str, ...]]:
    """Returns, by logical axis of an activation, the mesh axes that divide it.

    >>> from parallel.placement_strategies import sequence
    >>> activation_axes([sequence({})])["time"]
    ('context', 'tensor')
    """
    axes_of = dict(ACTIVATIONS)
    for strategy in strategies:
        for name, more in strategy.activations:
            axes_of[name] = _union(axes_of[name], more)
    return axes_of


def _specs(params: PyTree, by_strategy: Sequence[Rules], rules: Rules) -> PyTree:
    for each in (rules, *by_strategy):
        if hidden := shadowed(each, params):
            raise ValueError(
                f"the rule {hidden[0]!r} has no effect: earlier rules match all that it does; "
                "move it before them, or leave it out"
            )
    trees = [match(r, params, default=P()) for r in by_strategy]
    # Not None, which is an empty node of a tree: a quantized matrix without offsets holds one.
    own = match(rules, params, default=_NO_RULE)
    columns = [jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P)) for tree in (own, *trees)]
    merged = []
    leaves = jax.tree.leaves(params)
    for path, leaf, (mine, *specs) in zip(
        leaf_paths(params), leaves, zip(*columns, strict=True), strict=True
    ):
        parts: Parts = ((),) * len(leaf.shape)
        for spec in specs if mine is _NO_RULE else [mine]:
            if unknown := [n for part in _parts(spec, len(spec)) for n in part if n not in AXES]:
                raise ValueError(
                    f"the layout {spec} of {path!r} names a mesh axis {unknown[0]!r}; the axes are "
                    f"{', '.join(AXES)}"
                )
            if len(spec) > len(leaf.shape):
                raise ValueError(
                    f"{path!r} of shape {tuple(leaf.shape)} cannot be laid out by {spec}, which "
                    f"has {len(spec)} axes"
                )
            parts = tuple(map(_union, parts, _parts(spec, len(leaf.shape))))
        if mine is _NO_RULE:
            parts = tuple(tuple(sorted(part, key=_INNERMOST_FIRST.index)) for part in parts)
        names = [name for part in parts for name in part]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{path!r} of shape {tuple(leaf.shape)} would have {twice[0]!r} on two axes, "
                f"{_spec(parts)}; give it a rule of its own"
            )
        merged.append(_spec(parts))
    return jax.tree.unflatten(jax.tree.structure(params), merged)


def _shardings(mesh: Mesh, params: PyTree, specs: PyTree) -> PyTree:
    """Specs as shardings, after a look at whether the mesh divides the axes."""

    def sharding(key_path: tuple[Any, ...], leaf: Any, spec: P) -> NamedSharding:
        for axis, names in enumerate(_parts(spec, len(leaf.shape))):
            size, length = math.prod(mesh.shape[name] for name in names), leaf.shape[axis]
            if length % size:
                by = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
                path = path_of(key_path)
                words = any(f"/{path}".endswith(f"/{t}") and TABLES[t] == axis for t in TABLES)
                raise ValueError(
                    f"{path!r} of shape {tuple(leaf.shape)} has {length} along axis {axis}, which "
                    f"{by} does not divide; the next multiple of {size} is "
                    f"{-(-length // size) * size}"
                    + (f": pad the vocabulary with --vocabulary-multiple {size}" if words else "")
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params, specs)


def _by_path(params: PyTree, shardings: PyTree) -> dict[str, tuple[tuple[int, ...], NamedSharding]]:
    rows = zip(leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    return {path: (tuple(leaf.shape), sharding) for path, leaf, sharding in rows}


def _parts(spec: P, ndim: int) -> Parts:
    entries = tuple(spec) + (None,) * (ndim - len(spec))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def _spec(parts: Parts) -> P:
    """The shortest spec that says this, as JAX compares specs by how they are written."""
    entries = [None if not p else p[0] if len(p) == 1 else p for p in parts]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _union(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return a + tuple(name for name in b if name not in a)
