"""Writes a run in a format that other programs read.

    python -m experiments.export --run runs/small --format gguf --out small.gguf

The formats are

    native         safetensors and JSON, lossless
    gguf           for llama.cpp; q8_0, q4_0 and q4_1 keep every bit
    stablehlo      a compiled-anywhere forward pass of one shape, with its weights
    onnx           for ONNX Runtime; GPT-2's kind of model, int8 kernels as integer products
    huggingface    a folder for transformers; quantized weights become floats
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.export.gguf import Vocabulary, write_gguf
from compress.export.native import save_native
from compress.export.onnx import write_onnx
from compress.export.stablehlo import save_stablehlo
from experiments.beside import check_nothing_beside
from experiments.cli import run_main
from experiments.compress import check_finite
from experiments.convert import to_huggingface
from experiments.folders import check_free
from experiments.runs.run import Run, open_run, phase_at
from train.tokenizers.export import export_files


@dataclass(frozen=True)
class Export:
    """What to write, and how.

    Attributes:
      run: the run.
      format: see the top.
      out: file (gguf, onnx) or folder to make; it must not exist.
      step: checkpoint; by default the newest, or of a task the best.
      dtype: of matrices that are not quantized, for gguf and huggingface.
      batch: rows of tokens, for stablehlo.
      length: tokens of a row, for stablehlo; by default as in training.
    """

    run: Path
    format: Literal["native", "gguf", "stablehlo", "onnx", "huggingface"]
    out: Path
    step: int | None = None
    dtype: Literal["float32", "float16"] | None = None
    batch: int | None = None
    length: int | None = None


def vocabulary_of(folder: Path, end: int, size: int) -> Vocabulary:
    """Returns a run's tokenizer as GGUF has it.

    Args:
      folder: of the saved tokenizer.
      end: id of the end of a document.
      size: ids of the model; those that no token has are called `[unused 7]`.

    Raises:
      ValueError: no such file holds the tokenizer.
    """
    files = export_files(folder)
    if "tokenizer.json" in files:
        content = json.loads(files["tokenizer.json"])
        model = content["model"]
        if model["type"] != "BPE":
            raise ValueError(f"GGUF holds BPE and SentencePiece tokenizers, not {model['type']}")
        special = {token["id"]: token["content"] for token in content["added_tokens"]}
        named = {i: token for token, i in model["vocab"].items()} | special
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        tokens = [named.get(i, f"[unused {i}]") for i in range(size)]
        types = [3 if i in special else 1 if i in named else 5 for i in range(size)]
        return Vocabulary("gpt2", tokens, types, end, merges=merges)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    ids = range(pieces.vocab_size())
    kinds = (
        (pieces.is_unknown, 2),
        (pieces.is_control, 3),
        (pieces.is_unused, 5),
        (pieces.is_byte, 6),
    )
    types = [next((kind for asks, kind in kinds if asks(i)), 1) for i in ids]
    scores = [pieces.get_score(i) for i in ids]
    return Vocabulary("llama", [pieces.id_to_piece(i) for i in ids], types, end, scores=scores)


def _native(run: Run, command: Export) -> list[str]:
    save_native(command.out, run.model.config, run.params)
    return []


def _gguf(run: Run, command: Export) -> list[str]:
    check_nothing_beside(run.params, "GGUF")
    config, lines, vocabulary = run.model.config, [], None
    try:
        vocabulary = vocabulary_of(
            run.folder / "tokenizer", run.tokenizer.end_of_document, config.vocabulary_size
        )
    except ValueError as error:
        lines = [f"tokenizer    left out: {error}"]
    kind: Literal["f16", "f32"] = "f16" if command.dtype == "float16" else "f32"
    write_gguf(command.out, config, run.params, vocabulary, dtype=kind)
    return lines


def _stablehlo(run: Run, command: Export) -> list[str]:
    phase = run.settings.phases[phase_at(run.settings, run.step)[0]]
    length = command.length or min(phase.sequence_length, run.model.config.max_length)
    batch = command.batch or 1
    save_stablehlo(command.out, run.model, run.params, batch=batch, length=length)
    return [f"shape        tokens int32 [{batch}, {length}]"]


def _onnx(run: Run, command: Export) -> list[str]:
    check_nothing_beside(run.params, "ONNX")
    write_onnx(command.out, run.model.config, run.params)
    return []


def _huggingface(run: Run, command: Export) -> list[str]:
    return to_huggingface(command.run, command.out, command.step, command.dtype)[1:-1]


EXPORTS: dict[str, tuple[Callable[[Run, Export], list[str]], tuple[str, ...]]] = {
    "native": (_native, ()),
    "gguf": (_gguf, ("dtype",)),
    "stablehlo": (_stablehlo, ("batch", "length")),
    "onnx": (_onnx, ()),
    "huggingface": (_huggingface, ("dtype",)),
}
"""Format -> (what writes it, which settings it has)."""


def run_command(command: Export) -> list[str]:
    """Writes what the command says; returns lines to print.

    Raises:
      ValueError: `out` exists, a setting that the format does not have, weights that are not
        finite, or a model that it does not hold.
    """
    write, has = EXPORTS[command.format]
    for name in ("dtype", "batch", "length"):
        if getattr(command, name) is not None and name not in has:
            raise ValueError(f"the format {command.format} has no {name}; leave --{name} out")
    check_free(command.out)
    run = open_run(command.run, command.step)
    check_finite(run)
    lines = write(run, command)
    return [
        f"run          {command.run} at step {run.step}",
        *lines,
        f"{command.format:12} {command.out}",
    ]


def main() -> None:
    """Parses the command line, exports, prints."""
    import tyro

    print("\n".join(run_command(tyro.cli(Export, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
