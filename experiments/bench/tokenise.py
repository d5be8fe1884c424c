"""From text to packed tokens on disk, against the library `tokenizers` with the same pieces.

Ours is what a run does: the corpus is read, split by the hash of each document, tokenised, checked
and written. Theirs reads the same documents, encodes them in batches on all cores, and writes one
array of the same type.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.child import Subject
from experiments.bench.ratios import ratio
from experiments.bench.sides import Side, interleaved
from experiments.bench.table import Table, rows_of
from experiments.grid import Measured, Measurement

OURS, THEIRS = "ours", "tokenizers"
BATCH = 256  # documents that the library encodes at a time


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times both sides in turn.

    Args:
      settings: "data" and "tokenizer" as in `train.settings.Settings`, "rounds".

    Returns:
      Side -> "seconds" of each round and "tokens" written; and "bytes" of the text.

    Raises:
      ValueError: the sides did not write the same number of tokens.
    """
    from experiments.runs.prepare import open_data

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        open_data((settings["data"],), settings["tokenizer"], out)
        given = {"data": settings["data"], "tokenizer": str(out / "tokenizer")}
        with Side("tokenise.ours", given) as ours, Side("tokenise.tokenizers", given) as theirs:
            sides = {OURS: ours, THEIRS: theirs}
            interleaved(sides, 1, "time", [{}])
            found = interleaved(sides, settings["rounds"], "time", [{}])
    values: dict[str, Any] = {
        name: {
            "seconds": [answer["seconds"] for answer in answers],
            "tokens": answers[0]["tokens"],
        }
        for name, (answers,) in found.items()
    }
    a, b = values[OURS]["tokens"], values[THEIRS]["tokens"]
    # The library takes the text of a special token for that token: a few of a million differ.
    if abs(a - b) > 1e-4 * a:
        raise ValueError(f"ours wrote {a:,} tokens and tokenizers {b:,}: not the same pieces")
    return values | {"bytes": found[OURS][0][0]["bytes"]}


def ours(settings: Mapping[str, Any]) -> Subject:
    """Answers "time": seconds to build the corpus in an empty cache."""
    from train.corpus import build_corpus
    from train.text.sources import open_source
    from train.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(settings["tokenizer"]))

    @contextlib.contextmanager
    def silent(description: str, total: int) -> Iterator[Any]:
        yield lambda count: None

    def timed() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            start = time.perf_counter()
            source = open_source(settings["data"])
            corpus = build_corpus(source, tokenizer, Path(name), progress=silent)
            seconds = time.perf_counter() - start
            splits = corpus.splits.values()
            tokens = sum(len(split.tokens) for split in splits)
            return {
                "seconds": seconds,
                "tokens": tokens,
                "bytes": sum(split.bytes for split in splits),
            }

    return Subject({}, {"time": timed})


def theirs(settings: Mapping[str, Any]) -> Subject:
    """Answers "time": seconds to read, encode and write the same documents."""
    from transformers import AutoTokenizer  # which turns SentencePiece into a `tokenizers` one

    from train.text.sources import open_source
    from train.tokenizers.export import export_files
    from train.tokenizers.tokenizer import load_tokenizer

    folder = Path(settings["tokenizer"])
    with tempfile.TemporaryDirectory() as name:
        for file, content in export_files(folder).items():
            (Path(name) / file).write_bytes(content)
        library = AutoTokenizer.from_pretrained(name).backend_tokenizer
    own = load_tokenizer(folder)
    dtype = np.uint16 if own.vocabulary_size <= 1 << 16 else np.uint32
    end = np.array([own.end_of_document], dtype)

    def timed() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            start, tokens = time.perf_counter(), 0
            documents = list(open_source(settings["data"]).documents())
            with open(Path(name) / "tokens.bin", "wb") as file:
                for first in range(0, len(documents), BATCH):
                    batch = documents[first : first + BATCH]
                    found = library.encode_batch(batch, add_special_tokens=False)
                    arrays = [part for e in found for part in (np.array(e.ids, dtype), end)]
                    packed = np.concatenate(arrays)
                    packed.tofile(file)
                    tokens += len(packed)
            return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return Subject({}, {"time": timed})


def text(results: Sequence[Measured]) -> str:
    """Returns the ratio as Markdown."""
    rows = []
    for measured in results:
        values, settings = measured.values, measured.measurement.settings
        found = ratio(values[OURS]["seconds"], values[THEIRS]["seconds"])
        size = f"{values['bytes'] / 1e6:.1f} MB"
        rows.append([settings["tokenizer"], settings["data"], size, str(found)])
    names = ("pieces", "text", "size", "MB a second, ours / tokenizers")
    return (
        "From text to packed tokens on disk against the library `tokenizers` with the same pieces: "
        "median of the rounds and their quartiles. Ours also hashes and splits the "
        f"documents.\n\n{rows_of(names, rows)}"
    )


def tokenise_table() -> Table:
    """The default data and tokenizer of a run."""
    settings = {
        "table": "tokenise",
        "data": "stdlib",
        "tokenizer": "sentencepiece:4096",
        "rounds": 5,
    }
    return Table("Tokenise and pack", (Measurement("tokenise", settings, measure),), text)
