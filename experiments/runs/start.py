"""Where a run starts: at its newest intact checkpoint, at another run, or at drawn parameters."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from compress.export.stored import is_packed
from compress.lora import adapted_paths, merged
from experiments.runs.assemble import (
    Parts,
    abstract_frozen,
    abstract_state,
    abstract_whole,
    assemble,
    first_frozen,
    first_state,
    initial_params,
    keep_frozen,
    read_frozen,
)
from experiments.runs.layout import (
    Division,
    Layout,
    lay_out,
    of_frozen,
    of_moved_state,
    of_params,
    of_state,
    placed,
)
from experiments.runs.phases import enter_phase
from experiments.runs.run import config_for, open_run, phase_at
from model.config import TransformerConfig
from model.grow import check_growth, grown, keeps_function, sources
from model.heads import heads_of, without_heads
from parallel.agreement import is_main, spread
from parallel.vocabulary import pad_vocabulary
from train.checkpoints import Checkpoints
from train.loop import reset_nonfinite
from train.phases import same_shapes
from train.plugs import NONFINITE, PyTree, State
from train.prompts import refuse_prefix
from train.settings import Settings, differences
from train.tokenizers.tokenizer import Tokenizer


class Start(NamedTuple):
    """Where a run begins or goes on."""

    state: State
    frozen: PyTree
    frozen_hash: str | None
    seconds: dict[str, float]


def start_of(
    settings: Settings,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    out: Path,
    division: Division,
    mesh: Mesh,
) -> Start:
    """Returns the newest intact state, or the first one, and what does not train.

    Args:
      settings: of the run.
      tokenizer: its own.
      checkpoints: open for writing.
      out: folder of the run.
      division: what of the layout the mesh leaves open.
      mesh: where everything goes.
    """
    workers = mesh.shape["data"]

    @functools.cache
    def parts_of(index: int, workers: int = workers) -> Parts:
        return assemble(settings, config_for(settings.phases[index], tokenizer), workers)

    @functools.cache
    def layout_of(index: int) -> Layout:
        return lay_out(mesh, division, settings, settings.phases[index], parts_of(index))

    def index_of(info: dict[str, Any]) -> int:
        return int(info.get("phase", 0))

    def moves(info: dict[str, Any]) -> bool:
        redistributes = bool(parts_of(index_of(info)).plugs.redistribute)
        return redistributes and info.get("workers", 1) != workers

    def wanted(info: dict[str, Any]) -> PyTree:
        index = index_of(info)
        layout = layout_of(index)
        if not moves(info):
            shapes = abstract_state(settings, parts_of(index))
            return placed(shapes, of_state(layout, shapes))
        old = abstract_state(settings, parts_of(index, info.get("workers", 1)))
        return placed(old, of_moved_state(layout, old))

    try:
        found = checkpoints.restore(wanted)
    except FileNotFoundError:
        return _begin(settings, tokenizer, parts_of(0), layout_of(0), out)
    index = index_of(found.info)
    parts, layout = parts_of(index), layout_of(index)
    shardings = of_state(layout, abstract_state(settings, parts))
    for step, reason in found.skipped:
        _say(f"The checkpoint of step {step} is damaged and was passed over: {reason}")
    _say(f"Going on from step {found.step} of {settings.steps}")
    state, expected = found.state, found.info.get("frozen")
    if moves(found.info):
        _say(f"What {found.info.get('workers', 1)} workers had for themselves goes to {workers}")
        state = jax.jit(lambda state: _for_workers(state, workers, parts), out_shardings=shardings)(
            state
        )
    if int(state.extra[NONFINITE]["in_a_row"]) >= settings.max_nonfinite:
        state = jax.device_put(reset_nonfinite(state), shardings)
    shapes = abstract_frozen(settings, parts)
    if (now := phase_at(settings, found.step)[0]) != index:  # saved at the end of the one before
        state = enter_phase(settings, tokenizer, mesh, division, state, index, now)
    frozen = read_frozen(out, placed(shapes, of_frozen(layout, shapes)), expected)
    return Start(state, frozen, expected, found.info.get("seconds", {}))


def _for_workers(state: State, workers: int, parts: Parts) -> State:
    """The state for another number of workers, by the rule of each method."""
    moved = {
        name: rule(state.extra[name], workers) for name, rule in parts.plugs.redistribute.items()
    }
    return replace(state, extra={**state.extra, **moved})


def _begin(
    settings: Settings, tokenizer: Tokenizer, parts: Parts, layout: Layout, out: Path
) -> Start:
    """Returns the start of a new run: parameters drawn, or taken from the parent."""
    split = parts.plugs.split
    whole = abstract_whole(settings, parts.config)
    heads: PyTree = {}
    if settings.parent is None:
        given = jax.jit(
            lambda: initial_params(settings, parts.config), out_shardings=of_params(layout, whole)
        )()
    else:
        adopted, heads = _adopt(settings, tokenizer, parts.config)
        adopted = pad_vocabulary(adopted, settings.vocabulary_multiple)
        given = spread(adopted, of_params(layout, whole))
    frozen = abstract_frozen(settings, parts)
    trained, fixed = jax.eval_shape(split, whole)
    params, fixed = jax.jit(
        split,
        out_shardings=(of_params(layout, trained), of_frozen(layout, {"params": fixed})["params"]),
    )(given)
    for name, head in heads.items():
        if name in trained and same_shapes(head, trained[name]):
            params[name] = spread(head, of_params(layout, trained)[name])
        else:
            _say(f"its {name} is of other shapes than this run's and left out")
    frozen = spread(first_frozen(parts, fixed, open_run), of_frozen(layout, frozen))
    state = jax.jit(
        lambda p, f: first_state(settings, parts, p, f),
        out_shardings=of_state(layout, abstract_state(settings, parts)),
    )(params, frozen)
    return Start(state, frozen, keep_frozen(out, frozen), {})


def _adopt(
    settings: Settings, tokenizer: Tokenizer, config: TransformerConfig
) -> tuple[PyTree, PyTree]:
    """Returns the parameters of another run, grown if they are of a smaller model, and its heads.

    Heads are kept where the task is the same, with the same labels.

    Raises:
      ValueError: the parent's model has another config, into which it does not grow, or it reads
        other pieces.
    """
    parent = settings.parent
    assert parent is not None
    run = open_run(parent)
    if run.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(
            f"{parent} was trained with another tokenizer, whose ids mean other pieces; give this "
            f"run that one: {run.folder / 'tokenizer'}"
        )
    growth = settings.phases[0].growth
    # What is dropped in training belongs to no parameter, and may be chosen anew.
    dropped = {name: getattr(config, name) for name in ("dropout", "layer_drop", "token_drop")}
    theirs = replace(run.model.config, **dropped)
    if theirs != config:
        try:
            check_growth(theirs, config, growth)
        except ValueError as error:
            lines = differences(asdict(config), asdict(theirs))
            raise ValueError(f"{parent} has another model: {'; '.join(lines)} ({error})") from error
    params = without_heads(merged(run.params))
    refuse_prefix(params, parent)
    if any(is_packed(w) for w in jax.tree.leaves(params, is_leaf=is_packed)):
        raise ValueError(
            f"{parent} is quantized and does not train; start from the run that it was made of"
        )
    if theirs != config:
        key = jax.random.fold_in(jax.random.key(settings.seed), 0)
        made_of = sources(theirs, config, growth, key=key)
        params = jax.jit(lambda p: grown(p, made_of))(params)
        kept = "kept" if keeps_function(theirs, config, growth) else "not kept"
        lines = differences(asdict(config), asdict(theirs))
        _say(f"The model grows ({growth}, function {kept}): {'; '.join(lines)}")
    _say(f"From {run.folder} at step {run.step}: parameters and tokenizer are kept;")
    _say("optimizer state, schedule, step number and data order start anew")
    if adapted := adapted_paths(run.params):
        _say(f"the low-rank factors of {len(adapted)} weights are merged into them")
    heads = heads_of(run.params)
    if heads and (why := _unlike(settings.task, run.settings.task)):
        _say(f"its head ({', '.join(heads)}) is left out: {why}")
        heads = {}
    if heads and (lines := _read_otherwise(settings.task, run.settings.task)):
        _say(f"its head was trained on rows that were written otherwise: {'; '.join(lines)}")
    return params, heads


def _unlike(ours: Any, theirs: Any) -> str:
    """What keeps the head of one task from being one of another: other meaning, other reading."""
    if type(ours) is not type(theirs):
        kinds = (getattr(task, "name", "no task") for task in (theirs, ours))
        return "it is for {}, and this is {}".format(*kinds)
    fields = {"labels": (), "by": "head", "pool": "last", "mean": None, "scale": None}
    names = [k for k, v in fields.items() if getattr(ours, k, v) != getattr(theirs, k, v)]
    if not names:
        return ""
    lines = [f"{k} {getattr(theirs, k)!r} there, {getattr(ours, k)!r} here" for k in names]
    hint = " (--task.rename NAME LABEL ... maps those of the files)" if "labels" in names else ""
    hint += " (--task.pool)" if "pool" in names else ""
    return "; ".join(lines) + hint


def _read_otherwise(ours: Any, theirs: Any) -> list[str]:
    """What is other in how two tasks of one kind write their rows, where a head is kept."""
    names = ("attention", "mark", "order", "most_windows", "question_length")
    return [
        f"{name} {getattr(theirs, name)!r} there, {getattr(ours, name)!r} here"
        for name in names
        if getattr(ours, name, None) != getattr(theirs, name, None)
    ]


def _say(text: str) -> None:
    if is_main():
        print(text)
