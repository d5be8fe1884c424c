"""From settings to what a run is made of: plugs, optimizer, first state, what is frozen."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.build import build_model
from model.config import TransformerConfig
from model.rules import match_per_layer
from parallel.vocabulary import pad_vocabulary, strip_vocabulary
from train.losses import cross_entropy, z_loss
from train.methods import OpenRun, Plugs, Setup, combine
from train.mup import scale_init, with_factors
from train.optimizers import build
from train.optimizers.averaging import average_of
from train.plugs import Context, LossTerm, PyTree, State, merge
from train.plugs import whole as whole_gradient
from train.settings import Settings
from train.step import init_state
from train.tree_store import load_tree, save_tree, tree_hash

_HEAD = 0x4EAD  # folded into the seed, for the head of a task


class Parts(NamedTuple):
    """What a phase of a run is made of.

    Attributes:
      config: of the model.
      plugs: of all methods together.
      terms: the loss.
      optimizer: wrapped by the methods.
    """

    config: TransformerConfig
    plugs: Plugs
    terms: tuple[LossTerm, ...]
    optimizer: optax.GradientTransformation


def assemble(settings: Settings, config: TransformerConfig, workers: int = 1) -> Parts:
    """Builds the parts of the phase that trains a model of `config`.

    Args:
      settings: of the run.
      config: of the phase, vocabulary size included.
      workers: places along the mesh axis `data`, see `train.methods.Setup`.

    Raises:
      ValueError: settings that do not fit the model or each other.
    """
    whole = abstract_whole(settings, config)
    setup = Setup(config, whole, settings.steps, settings.micro_batches, workers)
    methods = [method.build(setup) for method in settings.methods]
    terms = combine(methods).terms(_terms(settings, config))
    plugs = combine([*methods, *_of_task(settings, config, terms)])
    trained, _ = jax.eval_shape(plugs.split, setup.params)
    if not jax.tree.leaves(trained):
        raise ValueError("nothing is left that trains; freeze less")
    optimizer = _optimizer_here(settings, config, trained)
    if settings.mup is not None:
        factors = settings.mup.rules(config, optimizer).learning_rate_rules
        optimizer = with_factors(optimizer, factors, trained)
    further = (*plugs.updates, *plugs.places)
    tx = build(optimizer, settings.schedule, settings.steps, trained, further)
    tx = plugs.optimizer(tx)
    if averages(settings):
        _check_average(settings, plugs, tx, trained)
    return Parts(config, plugs, terms, tx)


def _terms(settings: Settings, config: TransformerConfig) -> tuple[LossTerm, ...]:
    """The loss, before methods add to it."""
    terms: tuple[LossTerm, ...] = (cross_entropy(settings.label_smoothing),)
    if settings.task is not None:
        terms = settings.task.terms(build_model(config), settings.label_smoothing)
    if settings.z_loss:
        if all(term.over != "logits" for term in terms):
            raise ValueError("z_loss is for logits of tokens, and this task has none; leave it out")
        terms += (z_loss(weight=settings.z_loss),)
    return terms


def _of_task(
    settings: Settings, config: TransformerConfig, terms: tuple[LossTerm, ...]
) -> tuple[Plugs, ...]:
    """The head of the task, which no method sees.

    It takes the place of the language model's own where that has no part in the loss, which then
    stays as it is: weight decay would wear it off.
    """
    if settings.task is None:
        return ()
    used = any(term.over == "logits" or term.reads_head for term in terms)

    def split(params: PyTree) -> tuple[PyTree, PyTree]:
        key = jax.random.fold_in(jax.random.key(settings.seed), _HEAD)
        idle = {} if used else {name: params[name] for name in params if name == "head"}
        trained = {name: tree for name, tree in params.items() if name not in idle}
        return {**trained, **settings.task.head(key, config)}, idle

    return (Plugs(split=split),)


def _optimizer_here(settings: Settings, config: TransformerConfig, trained: PyTree) -> Any:
    """The optimizer's settings without the rules that only parameters of other phases match.

    A rule for the head is no mistake in a run whose head is still tied; one that no phase needs is
    left for the optimizer to refuse. Nor is a rule that the optimizer has by itself, for kernels,
    where a method leaves biases alone to train.
    """
    vocabulary: Any = {"vocabulary_size": config.vocabulary_size}
    models = {dataclasses.replace(phase.model, **vocabulary) for phase in settings.phases}
    whole = abstract_whole(settings, config)
    others = [abstract_whole(settings, model) for model in models - {config}]
    changes: dict[str, Any] = {}
    by_itself = {field.name: field.default for field in dataclasses.fields(settings.optimizer)}
    for name in ("learning_rate_rules", "decay_rules", "matrix_rules"):
        rules = getattr(settings.optimizer, name, ())
        elsewhere = [*others, *([] if rules != by_itself.get(name) else [whole])]
        here = tuple(
            rule
            for rule in rules
            if _finds(rule, trained) or not any(_finds(rule, other) for other in elsewhere)
        )
        if here != rules:
            changes[name] = here
    return dataclasses.replace(settings.optimizer, **changes)


def _finds(rule: tuple[str, Any], params: PyTree) -> bool:
    try:
        match_per_layer([rule], params, default=None)
    except ValueError:
        return False
    return True


def averages(settings: Settings) -> bool:
    """Whether it is the average of the weights over the end of the run that counts.

    Evaluations, and whoever opens the run, then see that average in place of the last weights.
    """
    return settings.optimizer.tail_fraction is not None


def _check_average(
    settings: Settings, plugs: Plugs, tx: optax.GradientTransformation, trained: PyTree
) -> None:
    if plugs.around is not None:
        raise ValueError(
            "tail_fraction averages the weights of one optimizer, and here each worker has its "
            "own; leave it out, or train without the method that makes workers"
        )
    share = settings.optimizer.tail_fraction
    assert share is not None
    if (begin := settings.steps - round(share * settings.steps)) < plugs.settled:
        raise ValueError(
            f"tail_fraction {share:g} averages from update {begin} on, and up to {plugs.settled} "
            "weights still move to other places, so that the average is not as sparse as they are; "
            f"give at most {1 - plugs.settled / settings.steps:g}, or let moves end earlier"
        )
    _, average = average_of(jax.eval_shape(tx.init, trained))
    seen, shown = (jax.tree.map(jnp.shape, tree) for tree in (average, trained))
    if seen != shown:
        raise ValueError(
            "tail_fraction needs an optimizer that sees every parameter that trains, and a method "
            "of this run hides some from it; leave it out, or train without that method"
        )


def initial_params(settings: Settings, config: TransformerConfig) -> PyTree:
    """Draws the parameters of the whole model from the seed; traceable."""
    key, _ = jax.random.split(jax.random.key(settings.seed))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = build_model(config).init(key, tokens)["params"]
    if settings.mup is not None:
        params = scale_init(params, settings.mup.rules(config, settings.optimizer).init_rules)
    return pad_vocabulary(params, settings.vocabulary_multiple)


@functools.lru_cache(maxsize=16)  # a run asks a dozen times, and tracing a deep model takes seconds
def abstract_whole(settings: Settings, config: TransformerConfig) -> PyTree:
    """Shapes of the parameters of the whole model, as they are in the state."""
    return jax.eval_shape(lambda: initial_params(settings, config))


def first_state(settings: Settings, parts: Parts, params: PyTree, frozen: PyTree) -> State:
    """The state before the first step, for the parameters that train; traceable."""
    _, key = jax.random.split(jax.random.key(settings.seed))
    plugs = parts.plugs
    gradient = plugs.gradient or whole_gradient
    state = init_state(key, params, parts.optimizer, plugs.transforms, frozen, gradient)
    return state if plugs.around is None else plugs.around.init(state)


def abstract_state(settings: Settings, parts: Parts) -> State:
    """Shapes of the state, for a checkpoint to be read into; computes nothing."""
    trained, _ = jax.eval_shape(parts.plugs.split, abstract_whole(settings, parts.config))
    start = functools.partial(first_state, settings, parts)
    return jax.eval_shape(start, trained, abstract_frozen(settings, parts))


def abstract_frozen(settings: Settings, parts: Parts) -> PyTree:
    """Shapes of everything that does not train, {} where everything does."""
    _, fixed = jax.eval_shape(parts.plugs.split, abstract_whole(settings, parts.config))
    trees = {name: tree.abstract for name, tree in parts.plugs.frozen.items()}
    return {**trees, **({"params": fixed} if jax.tree.leaves(fixed) else {})}


def first_frozen(parts: Parts, fixed: PyTree, open_run: OpenRun) -> PyTree:
    """Everything that does not train, at the start of a run; `fixed` is what `split` left out."""
    trees = {name: tree.load(open_run) for name, tree in parts.plugs.frozen.items()}
    return {**trees, **({"params": fixed} if jax.tree.leaves(fixed) else {})}


def keep_frozen(out: Path, frozen: PyTree) -> str | None:
    """Saves what does not train, once a run; returns its hash, which checkpoints name."""
    return save_tree(out / "frozen", frozen) if jax.tree.leaves(frozen) else None


def read_frozen(out: Path, abstract: PyTree, expected: str | None) -> PyTree:
    """Reads what does not train, of the shapes and to the places that `abstract` says.

    Raises:
      FileNotFoundError, ValueError: it is missing, damaged, or not what the checkpoint was made
        with (`expected`, its hash).
    """
    if not jax.tree.leaves(abstract):
        return {}
    frozen = load_tree(out / "frozen", abstract)
    if (found := tree_hash(frozen)) != expected:
        raise ValueError(
            f"{out / 'frozen'} has the hash {found[:12]}, and the checkpoint was made with "
            f"{str(expected)[:12]}; put the folder back that belongs to it"
        )
    return frozen


def effective_weights(
    parts: Parts, step: int, params: PyTree, frozen: PyTree, extra: dict[str, Any]
) -> PyTree:
    """What the model runs with: everything merged, and the weight transforms applied."""
    counts = {term.name: jnp.float32(1) for term in parts.terms}
    context = Context(jnp.int32(step), None, frozen, extra, counts)
    weights = merge(params, frozen.get("params", {}))
    for transform in parts.plugs.transforms:
        weights = transform.apply(weights, context)
    return strip_vocabulary(weights, parts.config.vocabulary_size)
