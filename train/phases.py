"""From one phase of a run to the next: a state for the larger model out of that of the smaller.

Parameters grow by `model.grow`. What the optimizer has learned goes with them: an entry of its
state that belongs to a parameter is taken from the same places as the parameter itself, undivided,
so that a copied unit has the moments of what it is a copy of. (Where what reads a copy is divided,
its gradient is, and adaptive steps do not see that factor.) State of another shape, such as the
factors of a preconditioner, starts anew together with all that lies in the same named tuple, its
count of updates included. Schedules count on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp  # noqa: F401 (doctests)
import numpy as np

from model.grow import Source, grown
from model.rules import is_stacked, path_of
from train.plugs import NONFINITE, PyTree, State

WEIGHTS = ("average", "z", "init_params", "params0", "x0")
"""Fields of optimizer states that hold weights, not moments: they grow as the weights do."""
OF_SIDES = ("left", "right", "left_root", "right_root", "left_basis", "right_basis")
"""Fields that hold something of a parameter's sides: never taken from its places, even where it is
square and they have its shape."""
STEPPED_FROM = ("init_particles",)
"""Fields of weights from which all others are recomputed, by what else the state holds: of a layer
that begins as nothing, what it was copied from would be made again. They start anew."""
OF_THE_NEW = ("radius",)
"""Fields that follow from the parameters alone, and so from the grown ones."""


NEVER_ANEW = {
    "masks": "which weights are pruned; let the rules prune what both models have, such as blocks",
    "average": "the average of the last weights; leave out tail_fraction, or the method whose own "
    "parameters do not grow",
    "scales": "the scales of moments in 8 bits; train without eight_bit_state, or keep one head",
}
"""Fields that a run must not lose on the way, each with what it holds and what to do."""


class Carried(NamedTuple):
    """How many numbers of the optimizer's state came from where.

    Attributes:
      kept: as they were.
      copied: from the places of the parameter that they belong to, or made anew of it.
      reset: at their start, by the field of the state that holds them.
    """

    kept: int
    copied: int
    reset: dict[str, int]

    def __str__(self) -> str:
        lines = f"{self.kept:,} kept, {self.copied:,} taken along with their parameters"
        names = ", ".join(f"{name} ({number:,})" for name, number in self.reset.items())
        return f"{lines}, {sum(self.reset.values()):,} reset" + (f": {names}" if names else "")


def same_shapes(old: PyTree, new: PyTree) -> bool:
    """Whether two trees have one structure, and leaves of one shape and type.

    >>> same_shapes({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    False
    """
    facts = [[(path_of(path), a.shape, a.dtype) for path, a in _leaves(t)] for t in (old, new)]
    return facts[0] == facts[1]


def grown_state(state: State, fresh: State, sources: dict[str, Source]) -> State:
    """Returns the state with which the larger model goes on; traceable.

    Args:
      state: of the smaller model.
      fresh: of the larger one as at the start of a run, its parameters those grown already.
      sources: from `model.grow.sources`.

    Raises:
      ValueError: a method carries something from step to step, and nobody knows how that grows; or
        the parameters of `fresh` are not those that the sources make.

    >>> import optax
    >>> from model.build import build_model
    >>> from model.grow import sources
    >>> from model.presets import gpt2_tiny
    >>> from train.step import init_state
    >>> small, large, tx = gpt2_tiny(layers=2), gpt2_tiny(layers=4), optax.adam(1e-3)
    >>> params = build_model(small).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> state = init_state(jax.random.key(1), params, tx)  # and trained for a while
    >>> made_of = sources(small, large, key=jax.random.key(2))
    >>> fresh = init_state(jax.random.key(1), grown(params, made_of), tx)
    >>> grown_state(state, fresh, made_of).optimizer[0].mu["blocks"]["mlp"]["up"]["bias"].shape
    (4, 128)
    """
    shapes = {path_of(path): leaf.shape for path, leaf in _leaves(fresh.params)}
    made = jax.eval_shape(lambda params: grown(params, sources), state.params)
    for path, leaf in _leaves(made):
        if shapes.get(path_of(path)) != leaf.shape:
            raise ValueError(
                f"the fresh state has {path_of(path)} of shape {shapes.get(path_of(path))} where "
                f"the grown model has {leaf.shape}; make it of model.grow.grown(params, sources)"
            )
    optimizer, _ = carried(state, fresh, sources)
    extra = {**fresh.extra, NONFINITE: state.extra[NONFINITE]}
    carrying = [n for n in extra if n != NONFINITE and jax.tree.leaves((state.extra[n], extra[n]))]
    if carrying:
        raise ValueError(
            f"{', '.join(carrying)} carries something for each parameter from step to step, which "
            "does not grow with the model; train without it, or keep one shape in all phases"
        )
    return replace(fresh, step=state.step, rng=state.rng, optimizer=optimizer, extra=extra)


def carried(state: State, fresh: State, sources: dict[str, Source]) -> tuple[PyTree, Carried]:
    """Returns the optimizer's state for the larger model, and what became of it.

    Arrays may be shapes: then only the second answer is of use.
    """
    old = {path_of(path): leaf for path, leaf in _leaves(state.optimizer)}
    params = {path_of(path): leaf for path, leaf in _leaves(state.params)}
    new_params = {path_of(path): leaf for path, leaf in _leaves(fresh.params)}
    L, from_L = _layers(params, sources)

    def became(path: str, field: str, leaf: Any) -> tuple[Any, str]:
        """Value of an entry and where it came from."""
        found = None if field in OF_SIDES else _parameter(path, new_params)
        # A method's own parameters do not grow.
        source = None if found is None else sources.get(found, Source(found))
        if found is not None and source is not None:
            if not source.same and field in OF_THE_NEW:
                return leaf, "copied"
            if not source.same and field in STEPPED_FROM:
                return leaf, "reset"
            before = old.get(path.removesuffix(found) + source.path)
            belonged = before is not None and before.shape == params[source.path].shape
            if belonged and leaf.shape == new_params[found].shape:
                taken = _apply(source.grown if field in WEIGHTS else source.take, before)
                if taken.shape != leaf.shape:
                    return leaf, "reset"
                return taken, "kept" if source.same else "copied"
        before = old.get(path)
        if before is None or before.dtype != leaf.dtype:
            return leaf, "reset"
        if before.shape == leaf.shape:
            return before, "kept"
        if before.shape[:1] == (L,) and leaf.shape == (len(from_L), *before.shape[1:]):
            return _apply(lambda a: a[from_L], before), "copied"
        return leaf, "reset"

    values: dict[str, Any] = {}
    nodes: dict[str, str] = {}
    fate: dict[str, str] = {}
    for key_path, leaf in _leaves(fresh.optimizer):
        path = path_of(key_path)
        nodes[path] = _named_tuple(key_path)
        values[path], fate[path] = became(path, _field(key_path), leaf)
    lost = {nodes[path] for path, what in fate.items() if what == "reset"}
    numbers: Counter[str] = Counter()
    reset: Counter[str] = Counter()
    leaves = []
    for key_path, leaf in _leaves(fresh.optimizer):
        path = path_of(key_path)
        if nodes[path] in lost:
            reset[_field(key_path)] += leaf.size
            leaves.append(leaf)
        else:
            numbers[fate[path]] += leaf.size
            leaves.append(values[path])
    made = jax.tree.unflatten(jax.tree.structure(fresh.optimizer), leaves)
    return made, Carried(numbers["kept"], numbers["copied"], dict(reset))


def check_carried(report: Carried) -> None:
    """Refuses a phase in which a run would lose what it cannot make again.

    Raises:
      ValueError: see `NEVER_ANEW`.

    >>> check_carried(Carried(8, 0, {"mu": 4}))
    >>> check_carried(Carried(8, 0, {"average": 4}))
    Traceback (most recent call last):
    ...
    ValueError: the optimizer's state would lose the average of the last weights; leave out \
tail_fraction, or the method whose own parameters do not grow
    """
    if lost := [said for field, said in NEVER_ANEW.items() if field in report.reset]:
        raise ValueError(f"the optimizer's state would lose {lost[0]}")


def grown_params(params: PyTree, fresh: PyTree, sources: dict[str, Source]) -> PyTree:
    """Returns the grown parameters, with those of `fresh` that the model itself does not have."""
    made = grown(params, sources)
    for name in set(fresh) - set(made):
        stays = name in params and same_shapes(params[name], fresh[name])
        made[name] = params[name] if stays else fresh[name]
    return {name: made[name] for name in fresh}


def _layers(params: dict[str, Any], sources: dict[str, Source]) -> tuple[int, np.ndarray]:
    """Length of the old stack, and the layer that each of the new one comes from."""
    source = next(s for name, s in sources.items() if is_stacked(name))
    L = params[source.path].shape[0]
    return L, np.arange(L) if source.places[0] is None else source.places[0]


def _apply(take: Any, leaf: Any) -> Any:
    return jax.eval_shape(take, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else take(leaf)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _parameter(path: str, params: dict[str, Any]) -> str | None:
    """The parameter that the end of a path names."""
    parts = path.split("/")
    for first in range(len(parts)):
        if (name := "/".join(parts[first:])) in params:
            return name
    return None


def _named_tuple(key_path: tuple[Any, ...]) -> str:
    """Path of the innermost named tuple that a leaf lies in."""
    fields = [i for i, k in enumerate(key_path) if isinstance(k, jax.tree_util.GetAttrKey)]
    return path_of(key_path[: fields[-1]]) if fields else ""


def _field(key_path: tuple[Any, ...]) -> str:
    """The field of that named tuple."""
    names = [k.name for k in key_path if isinstance(k, jax.tree_util.GetAttrKey)]
    return names[-1] if names else path_of(key_path)
