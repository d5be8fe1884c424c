"""stories260K taught to write plays: what it forgets, with and without replay; and grown deeper.

A foreign model (karpathy/tinyllamas: 5 layers of width 64, 512 pieces, children's stories) goes on
with tiny Shakespeare, every row for as many steps of as many tokens. With replay a tenth of the
rows are old text: its own stories, drawn from it before (`experiments.replay`), as its pre-training
text is not at hand. Plays are measured on the last tenth of the file, which no row trains on and no
rate was chosen by. Forgetting is measured on other stories of its own: what their loss rises by is
the divergence from the model that it was. Optimizer and rate are the best of as many trials a way,
in `experiments.ablate.transfer_stories_tuning`.

Data: a folder with `stories260K.bin` and `tok512.bin`, and the file of tiny Shakespeare.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablate.steps import memory_of_step, step_times
from experiments.ablate.subjects import STORIES_FILES
from experiments.folders import made_at_once
from experiments.grid import Cell, Measurement
from experiments.methods.lora import Lora
from experiments.replay import samples, write_tokens
from experiments.runs.phases import grown_config
from experiments.runs.run import Run, open_run
from experiments.starts import from_llama2c
from experiments.tables.table import Item, Request
from experiments.task_report import sizes
from model.build import build_model
from model.config import TransformerConfig
from model.grow import grow
from model.llama2c import load
from train.corpus import Split
from train.data import evaluation_batches
from train.evaluate import evaluate
from train.loop import LoopSettings
from train.losses import cross_entropy
from train.optimizers import AdamW, Muon
from train.optimizers.settings import OptimizerSettings
from train.plugs import State
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.step import make_evaluation_step
from train.tasks.rows import content_hash
from train.tokenizers.tokenizer import Tokenizer

ROWS, LENGTH = 8, 128
STEPS, EVERY = 400, 10
BLOCK = 2000  # characters of a document of plays: enough documents for a split by their hash
STORY = 256  # tokens of a story; most are about as long
STORIES, HELD_OUT = 512, 96  # so many are replayed, and so many measured on
REPLAY = "a tenth of old text"
REPEATS = 12

BEFORE = "before"


class Way(NamedTuple):
    """How a row is trained.

    Attributes:
      optimizer: with its rates.
      rank: of low-rank factors; None trains everything.
      replay: whether a tenth of the rows is old text.
      deeper: whether the model has twice the layers.
      scratch: whether it starts from drawn parameters.
    """

    optimizer: OptimizerSettings
    rank: int | None = None
    replay: bool = False
    deeper: bool = False
    scratch: bool = False


LORA, FULL = "LoRA, rank 8", "full"
LORA_REPLAY, FULL_REPLAY = f"{LORA}, {REPLAY}", f"{FULL}, {REPLAY}"
GROWN, SCRATCH = "grown to twice the layers", "twice the layers from scratch"
GROWTH, COSTS = "logits after growth", "costs of a step"
# What the trials chose, see `experiments.ablate.transfer_stories_tuning`.
_FACTORS, _WHOLE = AdamW(learning_rate=1e-2, weight_decay=0.1), Muon(5e-3, 1e-3)
WAYS: dict[str, Way] = {
    LORA: Way(_FACTORS, 8),
    LORA_REPLAY: Way(_FACTORS, 8, replay=True),
    FULL: Way(_WHOLE),
    FULL_REPLAY: Way(_WHOLE, replay=True),
    GROWN: Way(_WHOLE, deeper=True),
    SCRATCH: Way(Muon(0.02, 0.004), deeper=True, scratch=True),
}
CURVES = (FULL, GROWN, SCRATCH)  # ways whose loss is followed, for the time that it takes


def config_of(way: Way, model: TransformerConfig) -> TransformerConfig:
    """Returns the model of a row."""
    return grown_config(model, f"layers={2 * model.layers}") if way.deeper else model


def settings_of(
    way: Way, model: TransformerConfig, seed: int, start: str, plays: str, old: str
) -> Settings:
    """Returns the run of a row.

    Args:
      way: how.
      model: of the start.
      seed: of everything that is drawn.
      start: the start as a run.
      plays: folder of the text to learn.
      old: folder of the text to replay.
    """
    return Settings(
        phases=(Phase(STEPS, config_of(way, model), ROWS, LENGTH),),
        data=(f"9*{plays}", f"1*{old}") if way.replay else (plays,),
        tokenizer=f"{start}/tokenizer",
        seed=seed,
        optimizer=way.optimizer,
        schedule=Linear(warmup_steps=STEPS // 20),
        methods=() if way.rank is None else (Lora(rank=way.rank),),
        parent=None if way.scratch else start,
    )


class Sources(NamedTuple):
    """What every run of these tables starts from.

    Attributes:
      model: of the start.
      items: the start as a run, and the plays to train on, each kept under its key.
    """

    model: TransformerConfig
    items: tuple[Measurement, Measurement]


def sources(cells: Path, folder: Path, shakespeare: Path) -> Sources:
    """Returns what all runs start from.

    Raises:
      ValueError: a file is not there, or is not what it is named after.
    """
    if missing := [name for name in STORIES_FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {' and '.join(missing)} of karpathy/tinyllamas")
    weights, pieces = (folder / name for name in STORIES_FILES)
    model, _ = load(weights)
    of_model = {"weights": content_hash(weights), "tokenizer": content_hash(pieces)}
    start = Measurement(
        "stories260K as a run",
        {"start": "llama2c", "end": 1, **of_model},  # an earlier one had 2, which it never read
        functools.partial(_keep_start, cells, weights, pieces),
    )
    plays = Measurement(
        "plays",
        {"text": "plays without the last tenth", **_of_plays(shakespeare)},
        functools.partial(_keep_plays, cells, shakespeare),
    )
    return Sources(model, (start, plays))


def _of_plays(path: Path) -> dict[str, Any]:
    return {"plays": content_hash(path), "block": BLOCK}


def missing(request: Request) -> list[str]:
    """Returns a line where the data is not given."""
    if request.stories is None or request.shakespeare is None:
        return ["Runs with the data at hand: `--stories FOLDER --shakespeare FILE`."]
    return []


def cells(request: Request) -> list[Item]:
    """Returns a measurement for every row, which needs its run; logits, and the costs of a step."""
    if request.stories is None or request.shakespeare is None:
        return []
    model, (start, plays) = sources(request.cells, request.stories, request.shakespeare)
    of_plays = _of_plays(request.shakespeare)
    run = str(request.cells / start.key)
    items: list[Item] = []
    for seed in range(request.seeds):
        sampled = {"length": STORY, "replayed": STORIES, "held out": HELD_OUT}
        stories = Measurement(
            "stories",
            {"text": "its own", "start": start.key, **sampled, "seed": seed},
            functools.partial(_keep_stories, request.cells),
            needs=(start,),
        )
        texts = {"plays": of_plays["plays"], "stories": stories.key, "seed": seed}
        measure = functools.partial(measured, request.cells, request.shakespeare)
        about = {"measured": "plays and stories", "run": start.key, **texts}
        items.append(Measurement(BEFORE, about, measure, needs=(stories,)))
        folders = [str(request.cells / text.key) for text in (plays, stories)]
        for name, way in WAYS.items():
            settings = settings_of(way, model, seed, run, *folders)
            loop = LoopSettings(EVERY, EVERY if name in CURVES else STEPS)
            cell = Cell(name, settings, loop, needs=(start, plays, stories))
            about = {"measured": "plays and stories", "run": cell.key, **texts}
            items.append(Measurement(name, about, measure, needs=(cell,)))
    about = {"measured": GROWTH, "start": start.key, **of_plays}
    logits = functools.partial(growth, request.cells, request.shakespeare)
    items.append(Measurement(GROWTH, about, logits, needs=(start,)))
    rows = [LORA, FULL, GROWN, SCRATCH]
    about = {"measured": COSTS, "start": start.key, "rows": rows, "repeats": REPEATS}
    about |= {"shape": [ROWS, LENGTH]}
    items.append(Measurement(COSTS, about, functools.partial(costs, request.cells), needs=(start,)))
    return items


def measured(cells: Path, shakespeare: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures a run, once, on the last tenth of the plays and on stories that none replays.

    Returns:
      Loss in nats a token and a byte by text; of a trained run, its sizes, and `curve`: (step,
      validation loss on plays) of each evaluation.
    """
    run = open_run(cells / settings["run"])
    text = last_tenth(shakespeare)
    ids = run.tokenizer.encode(text)
    plays = Split(ids, np.zeros(1, np.int64), len(text.encode()))
    stories = np.load(cells / settings["stories"] / "held_out.npy")
    found: dict[str, Any] = {
        "plays": _losses(run, list(_windows(plays)), plays.bytes),
        "stories": _losses(run, _whole(stories), _bytes_of(run.tokenizer, stories[:, 1:])),
    }
    if run.settings.data:
        rows = read_rows(run.folder / "metrics.jsonl")
        curve = [(row["step"], row["loss"]) for row in rows if row["kind"] == "evaluation"]
        found |= {**sizes(run), "curve": curve}
    return found


def growth(cells: Path, shakespeare: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the logits of the start and of what it grows into, on plays.

    Returns:
      The greatest difference, the greatest logit, parameters before and after.
    """
    run = open_run(cells / settings["start"])
    text = last_tenth(shakespeare)
    split = Split(run.tokenizer.encode(text), np.zeros(1, np.int64), len(text.encode()))
    small = run.model.config
    large = config_of(WAYS[GROWN], small)
    params = grow(run.params, small, large, key=jax.random.key(0))

    @jax.jit
    def compare(small_params: Any, large_params: Any, tokens: jax.Array) -> tuple[Any, Any]:
        old: Any = run.model.apply({"params": small_params}, tokens)
        new: Any = build_model(large).apply({"params": large_params}, tokens)
        return jnp.abs(old - new).max(), jnp.abs(old).max()

    pairs = [
        jax.device_get(compare(run.params, params, jnp.asarray(batch["tokens"])))
        for batch in _windows(split)
    ]
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (run.params, params)]
    return {
        "greatest difference": max(float(difference) for difference, _ in pairs),
        "greatest logit": max(float(logit) for _, logit in pairs),
        "parameters": count,
    }


def costs(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times a step of some rows in turn, and reads off what it holds in memory.

    Returns:
      Row -> seconds, ratios to a step of the whole model, bytes.
    """
    model = open_run(cells / settings["start"]).model.config
    runs = {}
    for name in settings["rows"]:
        made = settings_of(WAYS[name], model, 0, "", "", "")
        runs[name] = (made, config_of(WAYS[name], model))
    times = step_times(runs, settings["repeats"], FULL)
    return {name: {**times[name], "bytes": memory_of_step(*run)} for name, run in runs.items()}


def last_tenth(path: Path) -> str:
    """Returns the end of a text file, which is measured on, from a line's start."""
    return _parts(path)[1]


def blocks(text: str, size: int) -> list[str]:
    """Returns a text cut at empty lines into documents of at least `size` characters; the last may
    be shorter.

    >>> blocks("ab\\n\\ncd\\n\\nefg\\n\\nh", 4)
    ['ab\\n\\ncd', 'efg\\n\\nh']
    """
    found: list[str] = []
    for part in text.split("\n\n"):
        if found and len(found[-1]) < size:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return found


def _parts(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1
    return text[:cut], text[cut:]


def _windows(split: Split) -> Any:
    return evaluation_batches(split, sequence_length=LENGTH, batch_size=4 * ROWS)


def _whole(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Batches of rows that are each a text from its start, every token but the first predicted."""
    return [
        {
            "tokens": part[:, :-1],
            "targets": part[:, 1:],
            "weights": np.ones_like(part[:, 1:], np.float32),
        }
        for part in np.array_split(rows, -(-len(rows) // (2 * ROWS)))
    ]


def _bytes_of(tokenizer: Tokenizer, rows: np.ndarray) -> int:
    return sum(len(tokenizer.decode_bytes(row)) for row in rows)


def _losses(run: Run, batches: list[dict[str, np.ndarray]], text_bytes: int) -> dict[str, float]:
    state = State(jnp.int32(run.step), run.params, (), jax.random.key(0), {})
    step = jax.jit(make_evaluation_step(run.model, [cross_entropy()]))
    found = evaluate(step, state, {}, batches, text_bytes)
    nats = found["bits_per_byte"] * math.log(2)
    return {"token": found["loss"], "byte": nats, "tokens": found["tokens"]}


def _keep_start(
    cells: Path, weights: Path, pieces: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        from_llama2c(weights, out, str(pieces))
    return {"tokens": open_run(out).tokenizer.vocabulary_size}


def _keep_plays(cells: Path, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes all but the last tenth, cut into documents, under the key of what it was made from."""
    documents = blocks(_parts(path)[0], settings["block"])
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (folder / "plays.jsonl").write_text(lines, encoding="utf-8")
    return {"documents": len(documents)}


def _keep_stories(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes stories of the start, those to replay as a source, those to measure on beside it."""
    run = open_run(cells / settings["start"])
    keys = jax.random.split(jax.random.key(settings["seed"]))
    counts = (settings["replayed"], settings["held out"])
    old, held_out = (
        samples(run, rows, settings["length"], key=key)
        for rows, key in zip(counts, keys, strict=True)
    )
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            write_tokens(folder / "old.bin", old)
            np.save(folder / "held_out.npy", held_out)
    return {"tokens": int(old.size), "first": run.tokenizer.decode(held_out[0, 1:])[:100]}
