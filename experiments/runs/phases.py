"""The phases of a run: what they may be, how one follows another, how a command line says it."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from compress.quantization.optimizer_state import EightBitState
from experiments.runs.assemble import (
    Parts,
    abstract_frozen,
    abstract_state,
    abstract_whole,
    assemble,
    first_state,
    initial_params,
)
from experiments.runs.layout import Division, lay_out, of_state
from experiments.runs.run import config_for
from model.config import TransformerConfig
from model.grow import SIZES, check_growth, keeps_function, sources
from model.rules import leaf_paths
from parallel.agreement import is_main
from train.phases import carried, check_carried, grown_params, grown_state, same_shapes
from train.plugs import State
from train.settings import Phase, Settings
from train.tokenizers.tokenizer import Tokenizer


def parse_phases(texts: Sequence[str], last: Phase) -> tuple[Phase, ...]:
    """Returns the phases that come before the last one, and that with the steps that are left.

    Args:
      texts: "STEPS:FIELD=VALUE,..." each: that many steps with some fields of the last phase, or of
        its model, changed.
      last: with the steps of the whole run.

    Raises:
      ValueError: no whole number of steps, too many of them, or fields that there are not.

    >>> from model.presets import gpt2_tiny
    >>> first, second = parse_phases(["10:layers=1,batch_size=8"], Phase(30, gpt2_tiny(), 4, 8))
    >>> (first.steps, first.model.layers, first.batch_size), (second.steps, second.model.layers)
    ((10, 1, 8), (20, 2))
    """
    phases = [_parse_phase(text, last) for text in texts]
    left = last.steps - sum(phase.steps for phase in phases)
    if left < 1:
        raise ValueError(
            f"the phases take {last.steps - left} steps, and the run has {last.steps}: leave at "
            "least one to the last phase, or raise steps"
        )
    return (*phases, dataclasses.replace(last, steps=left))


def _parse_phase(text: str, last: Phase) -> Phase:
    number, colon, rest = text.partition(":")
    if not (colon and number.strip().isdecimal()):
        raise ValueError(f"phase {text!r} is not STEPS:FIELD=VALUE,... as in 100:layers=2")
    own = {f.name for f in dataclasses.fields(Phase)} - {"steps", "model"}
    of_model = {f.name for f in dataclasses.fields(TransformerConfig)} - {"vocabulary_size"}
    changes = _changes(f"phase {text!r}", rest, own | of_model)
    model = {name: value for name, value in changes.items() if name in of_model}
    changed = {name: value for name, value in changes.items() if name in own}
    return dataclasses.replace(
        last, steps=int(number), model=dataclasses.replace(last.model, **model), **changed
    )


def grown_config(config: TransformerConfig, text: str) -> TransformerConfig:
    """Returns the config that FIELD=VALUE,... makes of that of a smaller model.

    Heads stay as wide as they are: their number follows the width where it is not given.

    Raises:
      ValueError: a field that does not grow, or a model that does not.

    >>> from model.presets import gpt2_tiny
    >>> config = grown_config(gpt2_tiny(), "layers=4,width=64")
    >>> config.heads, config.head_width_, config.ffn_width_
    (8, 8, 256)
    """
    changes = _changes("--grow", text, {*SIZES, "tied_head"})
    times = changes.get("width", config.width) / config.width
    for name in ("heads", "kv_heads", "ffn_width"):
        old = getattr(config, name)
        if times > 1 and old is not None and name not in changes:
            changes[name] = round(old * times)
    to = dataclasses.replace(config, head_width=config.head_width, **changes)
    check_growth(config, to)
    return to


def _changes(what: str, text: str, names: set[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in names:
            raise ValueError(
                f"{what} changes {name!r}; FIELD=VALUE is for {', '.join(sorted(names))}"
            )
        changes[name] = _value(value.strip())
    return changes


def _value(text: str) -> Any:
    """A number, a truth value or None as Python writes it; anything else is a word."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text


def check_phases(settings: Settings, tokenizer: Tokenizer) -> None:
    """Checks, before anything is computed, that each phase can follow the one before.

    Raises:
      ValueError: the model of one does not grow into that of the next, or a method of the run does
        not grow with it.
    """
    configs = [config_for(phase, tokenizer) for phase in settings.phases]
    for number, (old, new) in enumerate(itertools.pairwise(configs), 2):
        if same_shapes(abstract_whole(settings, old), abstract_whole(settings, new)):
            continue
        try:
            check_growth(old, new, settings.phases[number - 1].growth)
            parts = assemble(settings, new)
            _check_methods(settings, parts)
            _check_codes(settings, old, new)
            made_of = sources(
                old, new, settings.phases[number - 1].growth, key=jax.random.key(settings.seed)
            )
            state = abstract_state(settings, assemble(settings, old))
            check_carried(carried(state, abstract_state(settings, parts), made_of)[1])
        except ValueError as error:
            raise ValueError(f"phase {number} cannot follow phase {number - 1}: {error}") from error


def _check_methods(settings: Settings, parts: Parts) -> None:
    if parts.plugs.around is not None or jax.tree.leaves(abstract_frozen(settings, parts)):
        raise ValueError(
            "a run that freezes parameters, or in which workers hold several copies, does not "
            "grow; train without that method, or keep one shape in all phases"
        )
    extra = abstract_state(settings, parts).extra
    if carrying := [t.name for t in parts.plugs.transforms if jax.tree.leaves(extra[t.name])]:
        raise ValueError(
            f"{', '.join(carrying)} carries something for each parameter from step to step, which "
            "does not grow with the model; train without it, or keep one shape in all phases"
        )


def _check_codes(settings: Settings, old: TransformerConfig, new: TransformerConfig) -> None:
    """Codes of moments grow by whole layers alone: other rows and columns have other scales."""
    parts = assemble(settings, old)
    optimizer = abstract_state(settings, parts).optimizer
    nodes = jax.tree.leaves(optimizer, is_leaf=lambda node: isinstance(node, EightBitState))
    if not any(isinstance(node, EightBitState) for node in nodes):
        return
    before, after = (
        {path: leaf.shape[1:] for path, leaf in zip(leaf_paths(p), jax.tree.leaves(p), strict=True)}
        for p in (abstract_whole(settings, old), abstract_whole(settings, new))
    )
    if any(after[path] != shape for path, shape in before.items() if path in after):
        raise ValueError(
            "optimizer state in 8 bits grows in depth alone; train without eight_bit_state, or "
            "keep one width in all phases"
        )


def enter_phase(
    settings: Settings,
    tokenizer: Tokenizer,
    mesh: Mesh,
    division: Division,
    state: State,
    old: int,
    new: int,
) -> State:
    """Returns the state with which phase number `new` begins after phase `old`, counted from 0.

    It is a function of the settings and the old state alone, so that a run that is resumed between
    the two goes on as one that was not.
    """
    before = config_for(settings.phases[old], tokenizer)
    phase = settings.phases[new]
    config = config_for(phase, tokenizer)
    if same_shapes(abstract_whole(settings, before), abstract_whole(settings, config)):
        return state
    parts = assemble(settings, config, mesh.shape["data"])
    layout = lay_out(mesh, division, settings, phase, parts)
    key = jax.random.fold_in(jax.random.key(settings.seed), new)
    made_of = sources(before, config, phase.growth, key=key)

    def build(state: State) -> State:
        drawn, _ = parts.plugs.split(initial_params(settings, config))
        params = grown_params(state.params, drawn, made_of)
        return grown_state(state, first_state(settings, parts, params, {}), made_of)

    abstract = abstract_state(settings, parts)
    if is_main():
        _, report = carried(jax.eval_shape(lambda s: s, state), abstract, made_of)
        print(f"phase {new + 1} from step {int(state.step)}: {_change(before, config)}")
        kept = "kept" if keeps_function(before, config, phase.growth) else "not kept"
        print(f"  function {kept} ({phase.growth}); numbers of the optimizer: {report}")
    return jax.jit(build, out_shardings=of_state(layout, abstract))(state)


def _change(old: TransformerConfig, new: TransformerConfig) -> str:
    sizes = [(name, getattr(old, name), getattr(new, name)) for name in (*SIZES, "tied_head")]
    return ", ".join(f"{name} {a} -> {b}" for name, a, b in sizes if a != b)
