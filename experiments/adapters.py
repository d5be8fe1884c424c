"""Adapters alone: low-rank factors saved without their base, and put onto it again.

    python -m experiments.adapters --run runs/adapted --out adapters/poems
    python -m experiments.adapters --run runs/first --onto adapters/poems 0.5*adapters/prose \\
        --out runs/merged
    python -m experiments.generate --run runs/first --adapters adapters/poems --prompt "..."

An adapter is `adapter.safetensors`, what trained, under its paths, and `adapter.json`: the settings
and what the base was, by content. Several adapters on one base add up, each times its weight:

    x @ w = x @ base + sum_i weight_i s_i (x @ a_i) @ b_i
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress.export.native import flat
from compress.lora import attach, merged
from compress.quantization.quantize import (
    dequantize_params,
    is_qtensor,
    quantize_params,
    weight_rules,
)
from experiments.cli import run_main
from experiments.compression.runs import write_run
from experiments.folders import check_free, made_at_once
from experiments.json_files import read_json, write_json
from experiments.methods.lora import Lora
from experiments.methods.lora_base import BASE
from experiments.methods.tuning import Unfreeze
from experiments.runs.assemble import (
    abstract_frozen,
    abstract_state,
    assemble,
    averages,
    read_frozen,
)
from experiments.runs.run import Run, averaged_weights, config_for, open_run, phase_at
from model.extras import from_extra
from model.heads import heads_of, without_heads
from model.safetensors_files import write_safetensors
from parallel.vocabulary import pad_vocabulary, strip_vocabulary
from train.checkpoints import Checkpoints
from train.methods import one_side
from train.mtp import KEY as MTP
from train.plugs import PyTree
from train.settings import differences
from train.tree_store import tree_hash

SPEC, WEIGHTS, VERSION = "adapter.json", "adapter.safetensors", 1


class Adapter(NamedTuple):
    """An adapter, opened.

    Attributes:
      folder: where it lies.
      method: the settings that it was trained with.
      spec: all that `adapter.json` says.
      params: what trained, in nested dicts.
    """

    folder: Path
    method: Lora
    spec: dict[str, Any]
    params: PyTree


def save_adapter(run_folder: Path, out: Path, step: int | None = None) -> list[str]:
    """Writes what a run with the method `lora` has trained, without its base.

    Args:
      run_folder: the run.
      out: folder to make.
      step: checkpoint; by default the newest, or of a task the best.

    Returns:
      Lines to print.

    Raises:
      ValueError: `out` exists, or the run has no such method, or others that shape its weights.
    """
    check_free(out)
    run = open_run(run_folder, step)
    method = _lora_of(run)
    settings = run.settings
    phase = settings.phases[phase_at(settings, run.step)[0]]
    parts = assemble(settings, config_for(phase, run.tokenizer))
    _check_alone(run, [transform.name for transform in parts.plugs.transforms])
    with Checkpoints(run.folder / "checkpoints", mode="read") as checkpoints:
        state = abstract_state(settings, parts)
        found = checkpoints.restore_part("params", state.params, run.step)
        if averages(settings):
            found = averaged_weights(checkpoints, state, found)
    frozen = read_frozen(run.folder, abstract_frozen(settings, parts), found.info.get("frozen"))
    trained = {name: tree for name, tree in found.state.items() if name != MTP}
    arrays = {path: np.asarray(leaf, order="C") for path, leaf in flat(trained).items()}
    alpha = 2.0 * method.rank if method.alpha is None else method.alpha
    with made_at_once(out) as folder:
        folder.mkdir(parents=True)
        write_safetensors(folder / WEIGHTS, arrays)
        spec = {
            "version": VERSION,
            "method": {**asdict(method), "alpha": alpha},
            "base": {
                "model": asdict(run.model.config),
                "tokenizer": run.tokenizer.fingerprint(),
                "vocabulary_multiple": settings.vocabulary_multiple,
                "hash": tree_hash(frozen["params" if method.base_run is None else BASE]),
            },
            "from": str(run_folder),
            "step": run.step,
        }
        write_json(folder / SPEC, spec)
    size = sum(array.nbytes for array in arrays.values())
    return [
        f"run          {run_folder} at step {run.step}",
        f"adapter      {len(arrays)} arrays, {size:,} bytes",
        f"folder       {out}",
    ]


def load_adapter(folder: Path) -> Adapter:
    """Opens an adapter.

    Raises:
      ValueError: no adapter, one of another version, or a damaged one.
    """
    safetensors = from_extra("safetensors", "hf")
    load_file = from_extra("safetensors.numpy", "hf").load_file
    if not (folder / SPEC).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} is no adapter: it lacks {SPEC} or {WEIGHTS}")
    spec = read_json(folder / SPEC)
    if spec.get("version") != VERSION:
        raise ValueError(f"{folder} is of version {spec.get('version')}; this reads {VERSION}")
    try:
        arrays = load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); put it back") from error
    params: PyTree = {}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        place = params
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = jnp.asarray(array)
    fields = {**spec["method"], "rules": tuple(map(tuple, spec["method"]["rules"]))}
    return Adapter(folder, Lora(**{**fields, "also": tuple(fields["also"])}), spec, params)


def apply_adapters(run: Run, adapters: Sequence[tuple[Adapter, float]]) -> PyTree:
    """Returns the parameters of a run with adapters on them, kept apart.

    Where an adapter was trained on a rounded base (QLoRA), the base is rounded alike first.

    Args:
      run: with plain parameters, the base.
      adapters: each with its weight.

    Raises:
      ValueError: an adapter for another base (the mismatch is named); adapters that want the base
        rounded differently; several of which one is DoRA or trained more than factors.
    """
    formats = {adapter.method.base for adapter, _ in adapters}
    if len(formats) > 1:
        named = ", ".join(f"{a.folder}: {a.method.base}" for a, _ in adapters)
        raise ValueError(f"the adapters want their base in different formats ({named})")
    for adapter, weight in adapters:
        whole = adapter.method.direction == "dora" or bool(adapter.method.also)
        if whole and (len(adapters) > 1 or weight != 1):
            raise ValueError(
                f"{adapter.folder} trained lengths or whole parameters, which do not add up: give "
                "it alone, with the weight 1"
            )
    params = run.params
    for adapter, _ in adapters:
        params = _checked(run, adapter)
    for adapter, weight in adapters:
        scale = functools.partial(_scale, adapter.method, weight)
        params = attach(_beside(params, adapter.params), scale)
    return {**heads_of(run.params), **params}


def _scale(method: Lora, weight: float, rank: int) -> float:
    return weight * method.scale(rank)


def adapted_run(folder: Path, step: int | None, specs: Sequence[str]) -> Run:
    """Opens a run with adapters, each "FOLDER" or "WEIGHT*FOLDER"; with none as it is."""
    run = open_run(folder, step)
    if not specs:
        return run
    adapters = [(load_adapter(path), weight) for path, weight in map(parse_adapter, specs)]
    return dataclasses.replace(run, params=apply_adapters(run, adapters))


def parse_adapter(text: str) -> tuple[Path, float]:
    """Splits "FOLDER" or "WEIGHT*FOLDER".

    >>> parse_adapter("0.5*adapters/a")
    (PosixPath('adapters/a'), 0.5)
    """
    weight, star, folder = text.partition("*")
    try:
        value = float(weight) if star else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(value):
        raise ValueError(f"the weight of {text!r} is {value}; give a number")
    return Path(folder if star else text), value


def _lora_of(run: Run) -> Lora:
    methods = [m for m in run.settings.methods if isinstance(m, Lora)]
    if not methods:
        raise ValueError(f"{run.folder} was trained without --method lora and has no adapter")
    return methods[0]


def _check_alone(run: Run, transforms: Sequence[str]) -> None:
    """Raises ValueError if other methods change the weights that the factors were trained with."""
    if others := [name for name in transforms if name not in (Lora.name, MTP, Unfreeze.name)]:
        raise ValueError(
            f"{run.folder} was trained with {' and '.join(others)} as well, which an adapter does "
            "not hold; keep the run"
        )


def _checked(run: Run, adapter: Adapter) -> PyTree:
    """The base as the adapter was trained on it.

    Raises:
      ValueError: the run is another base.
    """
    base = adapter.spec["base"]
    ours = json.loads(json.dumps(asdict(run.model.config)))
    # What only says how the model is computed, or what is dropped in training, may differ.
    free = ("scan_layers", "remat", "dropout", "layer_drop", "token_drop")
    old, new = ({k: v for k, v in c.items() if k not in free} for c in (base["model"], ours))
    if lines := differences(new, old):
        raise ValueError(
            f"{adapter.folder} was trained on another model than {run.folder}: {'; '.join(lines)}"
        )
    if run.tokenizer.fingerprint() != base["tokenizer"]:
        raise ValueError(
            f"{adapter.folder} was trained with another tokenizer than that of {run.folder}; give "
            "the run that it was trained from"
        )
    if adapter.method.base_run is not None:  # which is the run itself, quantized as it is
        _same_weights(run, adapter, run.params)
        return run.params
    # A run that starts from another leaves the head of that one's task out, or trains it on, and
    # the adapter holds it then.
    params = pad_vocabulary(without_heads(merged(run.params)), base["vocabulary_multiple"])
    if any(is_qtensor(w) for w in jax.tree.leaves(params, is_leaf=is_qtensor)):
        raise ValueError(f"{run.folder} is quantized; give the plain run that it was made of")
    also = jax.tree.map(lambda leaf: False, params)
    also = _marked(also, adapter.params)
    fixed = one_side(params, also, False)
    if adapter.method.base is not None:
        rules = weight_rules(fixed, adapter.method.base)
        # Compiled, as in the run that it was trained in: the same to the last bit.
        fixed = jax.jit(lambda params: quantize_params(params, rules))(fixed)
    _same_weights(run, adapter, fixed)
    return _filled(fixed, params)


def _same_weights(run: Run, adapter: Adapter, base: PyTree) -> None:
    wanted = adapter.spec["base"]["hash"]
    if (found := tree_hash(base)) != wanted:
        raise ValueError(
            f"{adapter.folder} was trained on other weights (hash {wanted[:12]}) than those "
            f"of {run.folder} at step {run.step} (hash {found[:12]}), though of the same shapes; "
            f"give the base of {adapter.spec['from']}"
        )


def _marked(also: PyTree, trained: PyTree) -> PyTree:
    """True where the adapter holds the whole parameter."""
    if not isinstance(also, dict):
        return True
    return {k: _marked(v, trained[k]) if k in trained else v for k, v in also.items()}


def _filled(fixed: PyTree, params: PyTree) -> PyTree:
    """The fixed leaves, and those of `params` where there is none."""
    if not isinstance(params, dict):
        return fixed
    return {k: _filled(fixed[k], v) if k in fixed else v for k, v in params.items()}


def _beside(params: PyTree, trained: PyTree) -> PyTree:
    """The parameters with what trained put over and beside them: factors, a prefix, a head."""
    if not isinstance(trained, dict) or not isinstance(params, dict):
        return trained
    new = {k: _beside(v, trained[k]) if k in trained else v for k, v in params.items()}
    return {**new, **{k: v for k, v in trained.items() if k not in params}}


@dataclass(frozen=True)
class Adapters:
    """What to do: save the adapter of a run, or put adapters onto one.

    Attributes:
      run: a run with an adapter, or, with --onto, the base.
      out: folder of the adapter, or run with the adapters merged, to make.
      onto: adapters to merge into the run, each "FOLDER" or "WEIGHT*FOLDER".
      step: checkpoint of the run; by default the newest, or of a task the best.
    """

    run: Path
    out: Path
    onto: tuple[str, ...] = ()
    step: int | None = None


def run_command(command: Adapters) -> list[str]:
    """Does what the command says; returns lines to print.

    Raises:
      ValueError: as `save_adapter` and `apply_adapters`.
    """
    if not command.onto:
        return save_adapter(command.run, command.out, command.step)
    check_free(command.out)
    run = adapted_run(command.run, command.step, command.onto)
    size = run.model.config.vocabulary_size
    params = strip_vocabulary(dequantize_params(merged(run.params)), size)
    left = []
    if run.settings.task is None and (heads := heads_of(params)):  # no task says what they are for
        params = without_heads(params)
        left = [f"left out     {', '.join(heads)}, the head of a task, which {command.run} has not"]
    facts = {"from": str(command.run), "from_step": run.step, "adapters": list(command.onto)}
    write_run(command.out, run.model.config, params, run.folder / "tokenizer", run.settings, facts)
    about = f"{command.out}, from {command.run} with {', '.join(command.onto)} merged"
    return [f"run          {about}", *left]


def main() -> None:
    """Parses the command line, saves or merges, says where things went."""
    import tyro

    print("\n".join(run_command(tyro.cli(Adapters, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
