"""Cleans text before training: length, language, duplicates, what evaluation data holds.

    python -m experiments.quality --data 'texts/*.jsonl' --out clean --languages en \\
        --evaluation heldout.jsonl

`OUT/text.jsonl` has the documents that stay, in their order, and trains as a source
(`--data clean/text.jsonl`); `OUT/removed.jsonl` says of each other one why; `OUT/quality.json` has
the counts. Documents pass one by one: what stays in memory is a hash of each that is kept, and
half a kilobyte with `--near-duplicates`. Needs the extra `quality` for languages and near
duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli import run_main
from experiments.folders import check_free, made_at_once
from experiments.json_files import write_json
from train.text.quality import (
    Filter,
    Held,
    contamination,
    exact,
    held_out_grams,
    judged,
    language,
    length,
    near,
)
from train.text.sources import open_source

SHOWN = 80  # characters of a removed document


@dataclass(frozen=True)
class Quality:
    """What to clean and how; filters run in the order of the fields.

    Attributes:
      data: sources (see `train.text.sources`), one after the other: duplicates are found across
        them.
      out: folder to make.
      min_characters: shorter documents are left out.
      max_characters: longer ones too; None for no end.
      languages: two-letter codes; empty lets all pass.
      language_probability: below it a document is of no certain language, and left out.
      exact_duplicates: leave out what differs in case and white space alone.
      near_duplicates: similarity (of word n-grams) from which a document counts as another one's
        copy; None leaves near duplicates in.
      shingle: words of such an n-gram.
      evaluation: sources that will be evaluated on: training documents with an n-gram of theirs
        are left out.
      overlap: words of such an n-gram.
    """

    data: tuple[str, ...]
    out: Path
    min_characters: int = 1
    max_characters: int | None = None
    languages: tuple[str, ...] = ()
    language_probability: float = 0.8
    exact_duplicates: bool = True
    near_duplicates: float | None = 0.8
    shingle: int = 5
    evaluation: tuple[str, ...] = ()
    overlap: int = 13


class Counts(NamedTuple):
    """Documents and characters."""

    documents: int
    characters: int

    def with_text(self, text: str) -> Counts:
        """One document more."""
        return Counts(self.documents + 1, self.characters + len(text))


def run_command(command: Quality) -> list[str]:
    """Cleans; returns the table of counts.

    Raises:
      ValueError: `out` exists, a source that cannot be read, settings out of range, or nothing is
        left.
      ImportError: a library is missing.
    """
    check_free(command.out)
    met: set[int] = set()
    held = None
    if command.evaluation:
        held = held_out_grams(_documents(command.evaluation), command.overlap)
    filters = _filters(command, held, met)
    counts = {name: Counts(0, 0) for name in ("read", *(f.name for f in filters), "kept")}
    with made_at_once(command.out) as folder:
        folder.mkdir(parents=True)
        with (
            (folder / "text.jsonl").open("w", encoding="utf-8") as text,
            (folder / "removed.jsonl").open("w", encoding="utf-8") as removed,
        ):
            for found in judged(_documents(command.data), filters):
                fate = found.filter or "kept"
                for name in ("read", fate):
                    counts[name] = counts[name].with_text(found.text)
                if found.filter is None:
                    text.write(json.dumps({"text": found.text}) + "\n")
                    continue
                about = {"document": found.number, "filter": fate, "reason": found.reason}
                removed.write(json.dumps({**about, "text": found.text[:SHOWN]}) + "\n")
        if not counts["kept"].documents:
            raise ValueError("no document is left; loosen the filters")
        facts: dict[str, Any] = {
            "settings": {**asdict(command), "out": str(command.out)},
            "counts": {name: each._asdict() for name, each in counts.items()},
        }
        if held is not None:
            facts["evaluation"] = {
                "documents": held.documents,
                "too_short": held.too_short,
                "met_in_training_data": len(met),
            }
        write_json(folder / "quality.json", facts)
    return [*table(counts), *_about_evaluation(held, met, command.overlap)]


def table(counts: dict[str, Counts]) -> list[str]:
    """Returns lines with documents and characters by fate, and their shares.

    >>> table({"read": Counts(2, 30), "exact": Counts(1, 10), "kept": Counts(1, 20)})[-1]
    'kept                    1   50.0 %              20   66.7 %'
    """
    all_documents, all_characters = (max(n, 1) for n in counts["read"])
    lines = [f"{'':<14}{'documents':>11}{'':>9}{'characters':>16}"]
    for name, (documents, characters) in counts.items():
        shares = 100 * documents / all_documents, 100 * characters / all_characters
        lines.append(
            f"{name:<14}{documents:>11,}{shares[0]:>7.1f} %{characters:>16,}{shares[1]:>7.1f} %"
        )
    return lines


def _documents(specs: tuple[str, ...]) -> Iterator[str]:
    for spec in specs:
        yield from open_source(spec).documents()


def _filters(command: Quality, held: Held | None, met: set[int]) -> list[Filter]:
    filters = [length(command.min_characters, command.max_characters)]
    if command.languages:
        filters.append(language(command.languages, command.language_probability))
    if command.exact_duplicates:
        filters.append(exact())
    if command.near_duplicates is not None:
        filters.append(near(command.near_duplicates, command.shingle))
    if held is not None:
        filters.append(contamination(held, met))
    return filters


def _about_evaluation(held: Held | None, met: set[int], words: int) -> list[str]:
    if held is None:
        return []
    return [
        f"{len(met):,} of {held.documents:,} evaluation documents share {words} words in a row "
        f"with the training data ({held.too_short:,} are too short to tell)"
    ]


def main() -> None:
    """Parses the command line, cleans, prints the counts."""
    import tyro

    print("\n".join(run_command(tyro.cli(Quality, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
