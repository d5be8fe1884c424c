"""From the data that settings name to a tokenizer and token windows, recorded by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.json_files import read_json, write_json
from experiments.runs.run import begin_start
from parallel.agreement import by_main, is_main, together, wait_until_seen
from train.cache import build_once, default_cache
from train.corpus import Corpus, build_corpus
from train.data import windows_per_epoch
from train.settings import differences
from train.text.sources import open_source, parse_mixture
from train.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

Corpora = list[tuple[Corpus, float]]


def open_data(data: tuple[str, ...], tokenizer_spec: str, out: Path) -> tuple[Tokenizer, Corpora]:
    """Returns the tokenizer (kept in `out`) and the tokenised sources with their weights.

    Of several processes, process 0 prepares, and the others then find its work (those on a machine
    with a cache of its own tokenise once more there, with the same tokenizer).

    Raises:
      ValueError: a source that cannot be read, or that has changed since the run in `out` began.
    """
    opened: list[tuple[Tokenizer, Corpora]] = []

    def prepare() -> None:
        begin_data(out)
        mixture = [(open_source(spec), weight) for spec, weight in parse_mixture(data)]
        first = mixture[0][0]
        tokenizer = keep_tokenizer(
            tokenizer_spec, out, first.documents, lambda: first.fingerprint(_fingerprints())
        )
        corpora = [(build_corpus(source, tokenizer), weight) for source, weight in mixture]
        record_facts(facts_of(corpora), out)
        opened.append((tokenizer, corpora))

    by_main(prepare)
    together(lambda: None if opened else prepare())
    return opened[0]


def steps_per_epoch(corpora: Corpora, *, batch_size: int, sequence_length: int) -> int:
    """Returns the whole batches in one pass over the training split, at least 1."""
    splits = [(corpus.split("train"), weight) for corpus, weight in corpora]
    return max(1, windows_per_epoch(splits, sequence_length) // batch_size)


def check_lengths(corpora: Corpora, window: int, held_out: str = "validation") -> None:
    """Raises ValueError for a source that has no window to train on, or nothing to measure on."""
    for corpus, _ in corpora:
        tokens = len(corpus.split("train").tokens)
        if tokens < window + 1:
            raise ValueError(
                f"{corpus.name} has {tokens} tokens to train on, fewer than a window of {window} "
                "and the one after; give more text, or a shorter sequence_length"
            )
        corpus.split(held_out)


def describe(corpora: Corpora) -> list[str]:
    """Returns a line for each source: name, start of its hash, tokens by split."""
    lines = []
    for corpus, weight in corpora:
        sizes = (f"{name} {len(split.tokens):,}" for name, split in corpus.splits.items())
        share = "" if len(corpora) == 1 else f"  weight {weight:.3g}"
        lines.append(
            f"{corpus.name} (sha256 {corpus.fingerprint[:12]})  tokens: {', '.join(sizes)}{share}"
        )
    return lines


def begin_data(out: Path) -> None:
    """Before anything is prepared: process 0 marks a new run, the others wait for its work."""
    if is_main() and not (out / "settings.json").exists():
        begin_start(out)
    if not is_main():
        wait_until_seen(out / "data.json")


def record_facts(facts: list[dict[str, Any]], out: Path) -> None:
    """Writes what the data is, by content, or compares with what was written at the start.

    Raises:
      ValueError: it has changed.
    """
    path = out / "data.json"
    if not path.exists():
        write_json(path, facts)
        return
    before = read_json(path)
    ours, theirs = ({f"source {i + 1}": f for i, f in enumerate(e)} for e in (facts, before))
    if lines := differences(ours, theirs):
        raise ValueError(
            f"the data has changed since the run in {out} began; give it back as it was, or choose "
            "another folder:\n  " + "\n  ".join(lines)
        )


def keep_tokenizer(
    spec: str,
    out: Path,
    documents: Callable[[], Iterable[str]],
    fingerprint: Callable[[], str] | None = None,
) -> Tokenizer:
    """Returns the run's tokenizer, and keeps it in `out`.

    Args:
      spec: "sentencepiece:N", or what `train.tokenizers.tokenizer.load_tokenizer` takes.
      out: folder of the run.
      documents: what one of N pieces is trained on: once for a text and size, on this machine.
      fingerprint: hash of that text; by default it is made from the documents.

    Raises:
      ValueError: there is no such tokenizer.
    """
    folder = out / "tokenizer"
    if (folder / "kind.json").exists():
        return load_tokenizer(folder)
    kind, _, size = spec.partition(":")
    if kind == "sentencepiece" and size.isdecimal():
        content = _hash(documents()) if fingerprint is None else fingerprint()
        trained = default_cache() / "tokenizers" / f"{content[:32]}-{size}"

        def write(folder: Path) -> None:
            train_sentencepiece(documents(), int(size)).save(folder)

        tokenizer = build_once(trained, load_tokenizer, write)
    else:
        tokenizer = load_tokenizer(spec)
    tokenizer.save(folder)
    return tokenizer


def facts_of(corpora: Corpora) -> list[dict[str, Any]]:
    """Returns what sources are, by content, for `record_facts`."""
    return [
        {
            "name": corpus.name,
            "sha256": corpus.fingerprint,
            "tokenizer": corpus.tokenizer,
            "tokens": {name: len(split.tokens) for name, split in corpus.splits.items()},
        }
        for corpus, _ in corpora
    ]


def _fingerprints() -> Path:
    return default_cache() / "fingerprints"


def _hash(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(f"{len(text)}\n{text}".encode())
    return digest.hexdigest()
