"""Turns a run into a Hugging Face folder, or a Hugging Face folder into a run.

    python -m experiments.convert --run runs/first --out first-hf
    python -m experiments.convert --hf first-hf --out runs/again

What comes out opens like any other of its kind: `AutoModelForCausalLM` and `AutoTokenizer` read the
folder; `experiments.generate`, `experiments.evaluate` and `experiments.pretrain --from` the run.
A run of a classification or regression becomes a folder for `AutoModelForSequenceClassification`,
and such a folder a run with that task.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from compress.export.onnx import HOLD_ANY
from compress.lora import adapted_paths, merged
from compress.quantization.quantize import dequantize_params
from experiments.beside import check_nothing_beside
from experiments.cli import run_main
from experiments.folders import check_free, made_at_once
from experiments.json_files import read_json, write_json
from experiments.runs.run import open_run
from experiments.tasks.labels import MEAN, PLAIN, ROWS, in_own_units, labels_of, task_of
from model import huggingface, huggingface_files
from model.config import TransformerConfig
from model.heads import heads_of, without_heads
from model.huggingface_classifier import is_classifier, load_classifier, save_classifier
from model.huggingface_config import write_config
from parallel.vocabulary import strip_vocabulary
from train.checkpoints import Checkpoints
from train.settings import Phase, Settings, to_json
from train.step import init_state
from train.tasks.regression import Regression
from train.tasks.rowwise import template_for
from train.tokenizers.export import export_files
from train.tokenizers.tokenizer import Tokenizer, load_tokenizer

# Rows of an embedding that no token uses: people round vocabularies up to a multiple of 64 to 512.
MOST_PADDING = 512
# Window that a run made from a folder is measured on by default, where its positions allow it.
WINDOW = 1024


@dataclass(frozen=True)
class Convert:
    """What to convert: give --run or --hf.

    Attributes:
      out: folder to make; it must not exist.
      run: run to turn into a Hugging Face folder.
      hf: Hugging Face folder to turn into a run.
      step: checkpoint of the run; by default the newest, or of a task the best.
      tokenizer: for --hf: "bytes", "gpt2:FOLDER" or a path, by default the folder's own.
      dtype: what parameters are written as; by default a folder gets the run's, a run float32.
    """

    out: Path
    run: Path | None = None
    hf: Path | None = None
    step: int | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def to_huggingface(
    run_folder: Path, out: Path, step: int | None = None, dtype: huggingface.DType | None = None
) -> list[str]:
    """Writes a run as a folder that transformers opens, its tokenizer included where that can be.

    Args:
      run_folder: the run.
      out: the folder to make.
      step: checkpoint; None takes the newest that is intact.
      dtype: type of the weights; None keeps that of the run.

    Returns:
      Lines to print: what was written, and what was left out and why.

    Raises:
      ValueError: `out` exists, the checkpoint is damaged, or no format of transformers holds the
        model.
      FileNotFoundError: the run, or its checkpoint, is not there.
    """
    check_free(out)
    run = open_run(run_folder, step)
    check_nothing_beside(run.params, "transformers")
    try:
        with warnings.catch_warnings():  # `save` gives them
            warnings.simplefilter("ignore")
            write_config(run.model.config)
    except ValueError as error:
        raise ValueError(f"{error}. {HOLD_ANY}") from None
    params, notes = plain_params(run.params, run.model.config.vocabulary_size)
    try:
        files = export_files(run.folder / "tokenizer")
        about = f"tokenizer    {', '.join(files)}"
    except ValueError as error:
        files, about = {}, f"tokenizer    left out: {error}"
    end = run.tokenizer.end_of_document  # starts a document as well: there is nothing before it
    with made_at_once(out) as folder:
        extra: dict[str, Any] = {"eos_token_id": end, "bos_token_id": end}
        if (labels := labels_of(run.settings.task)) is None:
            if heads := heads_of(params):
                word = " and ".join(heads)
                notes = [*notes, f"             without its {word}: transformers has no such head"]
            params = without_heads(params)
            huggingface.save(folder, run.model.config, params, dtype=dtype, extra=extra)
        else:
            # No row may end with the token that fills rows up: see model.huggingface_classifier.
            template = extra[ROWS] = template_for(run.settings.task)
            pad = end if not template.endswith("{end}") else int(end == 0)
            if isinstance(run.settings.task, Regression):
                params, extra[MEAN], about_mean = in_own_units(run.settings.task, params)
                notes = [*notes, about_mean]
            args = (folder, run.model.config, params, labels)
            save_classifier(*args, pad_token=pad, dtype=dtype, extra=extra)
            notes = [
                *notes,
                f"             of rows {template!r} ({ROWS} in config.json), each part encoded by",
                f"             itself, filled up with token {pad}",
            ]
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return [
        f"run          {run.folder} at step {run.step}",
        f"model        {huggingface_files.CONFIG}, {huggingface_files.WEIGHTS}: {_size(params)}",
        *notes,
        about,
        f"folder       {out}",
    ]


def from_huggingface(
    folder: Path, out: Path, tokenizer: str | None = None, dtype: huggingface.DType = "float32"
) -> list[str]:
    """Writes a Hugging Face folder as a run with one checkpoint, of step 0.

    The run has no data and no optimizer state: it is there to be opened and to start others from.

    Args:
      folder: `config.json` and safetensors of a GPT-2, Llama, Qwen3 or nanochat model.
      out: the run to make.
      tokenizer: see `train.tokenizers.tokenizer.load_tokenizer`; None looks into `folder`.
      dtype: type of the parameters.

    Returns:
      Lines to print: what was written.

    Raises:
      ValueError: `out` exists, the folder holds no model that we compute, no tokenizer is there, or
        it is that of another model.
    """
    check_free(out)
    pieces = _tokenizer(folder, tokenizer)
    task = None
    if is_classifier(folder):
        config, params, labels, _ = load_classifier(folder, dtype=dtype)
        said = read_json(folder / huggingface_files.CONFIG)
        task = task_of(labels, float(said.get(MEAN, 0.0)), str(said.get(ROWS, PLAIN)))
    else:
        config, params = huggingface.load(folder, dtype=dtype)
    kept, params = _without_padding(config, params, pieces, folder)
    phase = Phase(1, kept, batch_size=1, sequence_length=min(WINDOW, kept.max_length))
    settings = Settings(phases=(phase,), data=(), tokenizer=tokenizer or str(folder), task=task)
    write_converted(out, settings, params, pieces, folder)
    lines = [
        f"folder       {folder}",
        f"model        {_size(params)}",
        f"tokenizer    {pieces.vocabulary_size:,} pieces, from {tokenizer or folder}",
        f"run          {out} at step 0",
    ]
    if task is not None:
        lines.insert(2, f"task         {task.name}: {', '.join(labels)}; rows {task.template!r}")
    if padding := config.vocabulary_size - kept.vocabulary_size:
        lines.insert(2, f"             without {padding} rows that no piece of the tokenizer uses")
    return lines


def write_converted(
    out: Path, settings: Settings, params: Any, pieces: Tokenizer, origin: Path
) -> None:
    """Writes parameters from elsewhere as a run with one checkpoint, of step 0.

    Args:
      out: the run to make, all of it at once.
      settings: of the run, which has no data.
      params: of its model.
      pieces: the tokenizer.
      origin: where they come from.
    """
    result = {"reason": "converted", "from": str(origin), "step": 0, "evaluation": None}
    with made_at_once(out) as run:
        run.mkdir(parents=True)
        pieces.save(run / "tokenizer")
        state = init_state(jax.random.key(settings.seed), params, optax.identity())
        with Checkpoints(run / "checkpoints") as checkpoints:
            checkpoints.save(0, state, {"phase": 0, "seconds": {}}, wait=True)
        (run / "metrics.jsonl").touch()
        write_json(run / "result.json", result)
        write_json(run / "settings.json", to_json(settings))


def plain_params(params: Any, vocabulary_size: int) -> tuple[Any, list[str]]:
    """Returns the parameters with low-rank factors merged, and lines that say so.

    A quantized base of such factors becomes floats; a run without factors stays as it is.
    """
    if not (paths := adapted_paths(params)):
        return params, []
    plain = strip_vocabulary(dequantize_params(merged(params)), vocabulary_size)
    return plain, [
        f"             the low-rank factors of {len(paths)} weights are merged into them"
    ]


def _tokenizer(folder: Path, spec: str | None) -> Tokenizer:
    try:
        found = load_tokenizer(folder if spec is None else spec)
    except ValueError as error:
        if spec is not None or not folder.is_dir():
            raise
        raise ValueError(f"{error}. Name the one of {folder} with --tokenizer") from None
    _ = found.end_of_document  # a run cannot do without: refused before the weights are read
    return found


def _without_padding(
    config: TransformerConfig, params: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> tuple[TransformerConfig, dict[str, Any]]:
    """The model with as many ids as the tokenizer has.

    Raises:
      ValueError: the tokenizer is that of another model.
    """
    size = tokenizer.vocabulary_size
    if not 0 <= config.vocabulary_size - size <= MOST_PADDING:
        raise ValueError(
            f"the model in {folder} has {config.vocabulary_size} ids and the tokenizer has {size}: "
            "it is not the one that the model was trained with; name that with --tokenizer"
        )
    embedding = params["token_embedding"]["embedding"][:size]
    params = params | {"token_embedding": {"embedding": embedding}}
    if "head" in params:
        params = params | {"head": jax.tree.map(lambda leaf: leaf[..., :size], params["head"])}
    return replace(config, vocabulary_size=size), params


def _size(params: Any) -> str:
    leaves = jax.tree.leaves(params)
    return f"{sum(leaf.size for leaf in leaves):,} parameters"


def main() -> None:
    """Parses the command line, converts, says where things went."""
    import tyro

    command = tyro.cli(Convert, description=__doc__)
    if command.run is not None and command.hf is None:
        if command.tokenizer is not None:
            raise ValueError("a run has its own tokenizer; leave --tokenizer out")
        lines = to_huggingface(command.run, command.out, command.step, command.dtype)
    elif command.hf is not None and command.run is None:
        if command.step is not None:
            raise ValueError("a Hugging Face folder has no steps; leave --step out")
        kind = command.dtype or "float32"
        lines = from_huggingface(command.hf, command.out, command.tokenizer, kind)
    else:
        given = "both" if command.run is not None else "neither"
        raise ValueError(f"{given} of --run and --hf were given; name one, to convert from")
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
