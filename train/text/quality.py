"""Which documents are worth training on: length, language, duplicates, what evaluation data holds.

Each filter looks at one document at a time, in order, and names a reason to leave it out, or None.
Filters for duplicates remember what has passed (a hash, or a MinHash signature of half a kilobyte),
never the text, so that text of any size goes through; they are made anew for each pass. Of equal or
similar documents the first is kept. Nothing is drawn but by fixed seeds.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from model.extras import from_extra

Judge = Callable[[str], str | None]
"""Text of a document -> why it is left out, or None. May remember what it has seen."""

PERMUTATIONS = 128  # of a signature: the similarity is then known to 0.04 or so


class Filter(NamedTuple):
    """A reason to leave documents out.

    Attributes:
      name: for the table of counts.
      judge: see `Judge`.
    """

    name: str
    judge: Judge


class Judged(NamedTuple):
    """A document and its fate.

    Attributes:
      number: from 1.
      text: as it was.
      filter: the one that left it out, None for a document that is kept.
      reason: in words, "" for a document that is kept.
    """

    number: int
    text: str
    filter: str | None
    reason: str


def judged(documents: Iterable[str], filters: Sequence[Filter]) -> Iterator[Judged]:
    """Yields each document with the first reason to leave it out.

    A filter sees what those before it let pass, so that a document that is too short is no
    original of a later one.

    >>> [d.filter for d in judged(["a b", "", "A  b"], [length(1, None), exact()])]
    [None, 'length', 'exact']
    """
    for number, text in enumerate(documents, 1):
        found: tuple[str | None, str] = None, ""
        for each in filters:
            if (reason := each.judge(text)) is not None:
                found = each.name, reason
                break
        yield Judged(number, text, *found)


def length(least: int, most: int | None) -> Filter:
    """Leaves out documents of fewer or more characters, white space at the ends not counted.

    >>> length(3, None).judge(" ab ")
    '2 characters, fewer than 3'
    """

    def judge(text: str) -> str | None:
        size = len(text.strip())
        if size < least:
            return f"{size:,} characters, fewer than {least:,}"
        return f"{size:,} characters, more than {most:,}" if most and size > most else None

    return Filter("length", judge)


def language(wanted: Collection[str], least: float = 0.8) -> Filter:
    """Leaves out documents in other languages, by py3langid (Lui & Baldwin 2012).

    Args:
      wanted: two-letter codes (ISO 639-1), such as "en".
      least: probability that a document is in the language that is likeliest; below it, it is left
        out too. Only its first 10,000 characters are looked at.

    Raises:
      ValueError: codes that the library does not know.
      ImportError: it is not installed.
    """
    langid = _library("py3langid.langid", "py3langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if unknown := sorted(set(wanted) - set(identifier.nb_classes)):
        raise ValueError(
            f"no language is called {', '.join(unknown)}; there are "
            f"{', '.join(sorted(identifier.nb_classes))}"
        )

    def judge(text: str) -> str | None:
        found, probability = identifier.classify(text[:10_000])
        if found not in wanted:
            return f"language {found} ({probability:.2f})"
        return f"language {found} at {probability:.2f} only" if probability < least else None

    return Filter("language", judge)


def exact() -> Filter:
    """Leaves out documents that differ from an earlier one in case and white space at most."""
    seen: dict[bytes, int] = {}

    def judge(text: str) -> str | None:
        key = hashlib.blake2b(normal(text).encode(errors="surrogatepass"), digest_size=16).digest()
        if key in seen:
            return f"equal to original {seen[key]}"
        seen[key] = len(seen) + 1
        return None

    return Filter("exact", judge)


def near(threshold: float = 0.8, words: int = 5) -> Filter:
    """Leaves out documents that share most of their word n-grams with an earlier one.

    Similarity is |A & B| / |A | B| of the sets of n-grams, estimated by MinHash (Broder 1997) with
    the library datasketch; a banded index finds the few that are worth comparing.

    Args:
      threshold: similarity from which a document counts as the same.
      words: of an n-gram, n. A shorter document is one n-gram.

    Raises:
      ValueError: a threshold outside (0, 1], or n below 1.
      ImportError: the library is not installed.
    """
    if not 0 < threshold <= 1 or words < 1:
        raise ValueError(
            f"threshold is {threshold} and words {words}; they must be above 0 and at most 1, and "
            "at least 1"
        )
    datasketch = _library("datasketch", "datasketch")
    # Bands a little below the threshold, so that few of those above it are missed.
    index = datasketch.MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=PERMUTATIONS)
    kept: list[Any] = []

    def judge(text: str) -> str | None:
        signature = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        signature.update_batch([gram.encode(errors="surrogatepass") for gram in grams(text, words)])
        candidates = sorted(int(key) for key in index.query(signature))
        alike = [(kept[n].jaccard(signature), -n) for n in candidates]
        if alike and max(alike)[0] >= threshold:
            similarity, n = max(alike)
            return f"{similarity:.2f} like original {1 - n}"
        index.insert(len(kept), signature)
        kept.append(datasketch.LeanMinHash(signature))
        return None

    return Filter("near", judge)


class Held(NamedTuple):
    """Word n-grams of evaluation data.

    Attributes:
      grams: hash of an n-gram -> the documents (from 0) that hold it.
      words: n.
      documents: how many there are.
      too_short: of these, shorter than n words: they are not looked for.
    """

    grams: dict[int, list[int]]
    words: int
    documents: int
    too_short: int


def held_out_grams(documents: Iterable[str], words: int = 13) -> Held:
    """Returns the word n-grams of evaluation data; n = 13 as in Brown et al. 2020 (2005.14165, C).

    >>> held_out_grams(["one two three", "four"], 2).too_short
    1
    """
    if words < 1:
        raise ValueError(f"words is {words}; it must be at least 1")
    found: dict[int, list[int]] = {}
    number = short = 0
    for number, text in enumerate(documents, 1):
        here = _hashes(text, words)
        short += not here
        for gram in here:
            found.setdefault(gram, []).append(number - 1)
    return Held(found, words, number, short)


def contamination(held: Held, met: set[int]) -> Filter:
    """Leaves out documents that hold an n-gram of the evaluation data.

    Args:
      held: from `held_out_grams`.
      met: the evaluation documents that were found are added to it.
    """

    def judge(text: str) -> str | None:
        common = [gram for gram in _hashes(text, held.words) if gram in held.grams]
        if not common:
            return None
        theirs = {document for gram in common for document in held.grams[gram]}
        met.update(theirs)
        return f"{len(common)} n-grams of {len(theirs)} evaluation documents"

    return Filter("contaminated", judge)


def normal(text: str) -> str:
    """Returns text in one case, one form of Unicode, and with single spaces.

    >>> normal("  The\\n CAT ")
    'the cat'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str, words: int) -> set[str]:
    """Returns the n-grams of words, or the whole text where there are fewer.

    >>> sorted(grams("A b, c", 2))
    ['a b', 'b c']
    """
    found = re.findall(r"\w+", normal(text))
    if len(found) < words:
        return {" ".join(found) or normal(text)}
    return {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}


def _hashes(text: str, words: int) -> set[int]:
    """Hashes of the n-grams; none of a text of fewer words."""
    if len(re.findall(r"\w+", normal(text))) < words:
        return set()
    raw = b"".join(
        hashlib.blake2b(gram.encode(errors="surrogatepass"), digest_size=8).digest()
        for gram in grams(text, words)
    )
    return set(np.frombuffer(raw, np.uint64).tolist())


def _library(module: str, package: str) -> Any:
    return from_extra(module, "quality", f"this needs the library {package}")
