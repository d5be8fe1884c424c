"""Writes compressed parameters as a run: `generate` and `evaluate` open it like any other.

weights.json says which parameters are no plain arrays; the checkpoint holds what is stored of them.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import optax

from compress.export.stored import describe
from compress.lowrank import plain_array
from experiments.folders import made_at_once
from experiments.json_files import write_json
from experiments.runs.assemble import abstract_frozen, assemble, keep_frozen
from experiments.runs.run import WEIGHTS
from model.config import TransformerConfig
from train.checkpoints import Checkpoints
from train.plugs import PyTree
from train.prompts import refuse_prefix
from train.settings import Settings, to_json
from train.step import init_state


def write_run(
    out: Path,
    config: TransformerConfig,
    params: PyTree,
    tokenizer: Path,
    source: Settings,
    facts: dict[str, Any],
) -> None:
    """Writes a run with one checkpoint, of step 0, in one piece or not at all.

    The run has no optimizer state: it is there to be opened, measured and exported.

    Args:
      out: the run to make; it must not exist.
      config: of the model, with the vocabulary size of the tokenizer.
      params: its parameters; quantized matrices stay what they are.
      tokenizer: folder of a run's tokenizer, which is copied.
      source: settings of the run that the parameters come from: its data and window are kept, its
        methods, which are in the parameters now, are not.
      facts: for result.json: where this comes from and what was done.

    Raises:
      ValueError: `out` exists; the parameters hold a trained prompt or prefix.
    """
    refuse_prefix(params, "the run")
    length = source.phases[-1].sequence_length
    if config.positions == "learned":
        length = min(length, config.max_length)
    phase = dataclasses.replace(
        source.phases[-1], steps=1, model=config, batch_size=1, sequence_length=length
    )
    settings = dataclasses.replace(
        source, phases=(phase,), methods=(), vocabulary_multiple=1, micro_batches=1, parent=None
    )
    # What is saved has been averaged already, if it was to be.
    optimizer = dataclasses.replace(settings.optimizer, tail_fraction=None)
    settings = dataclasses.replace(settings, optimizer=optimizer)
    with made_at_once(out) as run:
        run.mkdir()
        shutil.copytree(tokenizer, run / "tokenizer")
        params, fixed = _apart(settings, config, params)
        state = init_state(jax.random.key(settings.seed), params, optax.identity())
        info = {"phase": 0, "seconds": {}, "frozen": keep_frozen(run, fixed)}
        with Checkpoints(run / "checkpoints") as checkpoints:
            checkpoints.save(0, state, info, wait=True)
        (run / "metrics.jsonl").touch()
        if any((description := describe(params)).values()):
            write_json(run / WEIGHTS, description)
        write_json(
            run / "result.json", {"reason": "compressed", "step": 0, "evaluation": None, **facts}
        )
        write_json(run / "settings.json", to_json(settings))


def _apart(settings: Settings, config: TransformerConfig, params: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters as a run of these settings holds them: what trains, and what lies beside it.

    That is the head of a language model whose task has one of its own. It is kept in plain numbers,
    those that the method made of it.
    """
    abstract = abstract_frozen(settings, assemble(settings, config)).get("params", {})
    plain = {name: jax.tree.map(_plain, abstract[name], params[name]) for name in abstract}
    rest = {name: tree for name, tree in params.items() if name not in abstract}
    return rest, {"params": plain} if plain else {}


def _plain(wanted: Any, leaf: Any) -> jax.Array:
    return plain_array(leaf, wanted.dtype)
