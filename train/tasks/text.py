"""From the columns of a row to ids: a template with text, columns and ends of documents.

    {end}{text}{end}                    a sentence
    {end}{text}{end}{text2}{end}        a pair
    {end}Question: {text} Answer:       a prompt

What lies between two ends is encoded as one text.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from train.tasks.rows import Row
from train.tokenizers.tokenizer import Tokenizer

END = "end"


def columns_of(template: str) -> tuple[str, ...]:
    """Returns the columns that a template names, in order.

    Raises:
      ValueError: it is no template, or names no column.

    >>> columns_of("{end}{text}{end}{text2}{end}")
    ('text', 'text2')
    """
    names = dict.fromkeys(name for _, name in _parts(template) if name not in (None, END))
    if not names:
        raise ValueError(f"the template {template!r} names no column, as in {{end}}{{text}}{{end}}")
    return tuple(str(name) for name in names)


def encode_rows(rows: Sequence[Row], template: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the ids of each row by the template, int32.

    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> encode_rows([Row(1, {"text": "ab"})], "{end}{text}!", load_tokenizer("bytes"))[0].tolist()
    [256, 97, 98, 33]
    """
    return [np.concatenate(parts) for parts in encode_parts(rows, template, tokenizer)]


def encode_parts(
    rows: Sequence[Row], template: str, tokenizer: Tokenizer
) -> list[list[np.ndarray]]:
    """Returns the ids of each row by its parts: ends of documents, and the texts between them.

    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> parts = encode_parts([Row(1, {"text": "ab"})], "{end}{text}!", load_tokenizer("bytes"))
    >>> [part.tolist() for part in parts[0]]
    [[256], [97, 98, 33]]
    """
    texts: list[str] = []
    plans: list[list[int | None]] = []  # of each row: places in `texts`, or None for an end
    for row in rows:
        plan: list[int | None] = []
        for text in written(row, template):
            plan.append(None if text is None else len(texts))
            texts += [] if text is None else [text]
        plans.append(plan)
    encoded = tokenizer.encode_batch(texts) if texts else []
    closing = f"{{{END}}}" in template
    end = np.array([tokenizer.end_of_document] if closing else [], np.int32)
    return [
        [end if at is None else np.asarray(encoded[at], np.int32) for at in plan] for plan in plans
    ]


def written(row: Row, template: str) -> list[str | None]:
    """Returns what a template makes of a row: texts, each to be encoded as one, and None for ends.

    >>> written(Row(1, {"text": "ab"}), "{end}so: {text}!{end}")
    [None, 'so: ab!', None]
    """
    found: list[str | None] = []
    text = ""
    for literal, name in _parts(template):
        text += literal
        if name == END:
            found += [text, None] if text else [None]
            text = ""
        elif name is not None:
            text += row.columns[name]
    return [*found, text] if text else found


def cut_parts(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Returns at most `length` ids; where parts are too long, their ends go, of the longest first.

    So each text of a pair is seen, and so is what marks their ends.

    Raises:
      ValueError: there are more parts than `length`.

    >>> cut_parts([np.array([0]), np.arange(1, 8), np.array([0]), np.arange(8, 10)], 7).tolist()
    [0, 1, 2, 3, 0, 8, 9]
    """
    if len(parts) > length:
        raise ValueError(
            f"rows of {length} tokens hold no text in {len(parts)} parts; make them longer"
        )
    room, kept = length, [0] * len(parts)
    # The shortest first: what they leave of their share is for the longer ones.
    for after, at in enumerate(sorted(range(len(parts)), key=lambda at: len(parts[at]))):
        kept[at] = min(len(parts[at]), room // (len(parts) - after))
        room -= kept[at]
    return np.concatenate([part[:n] for part, n in zip(parts, kept, strict=True)])


def _parts(template: str) -> list[tuple[str, str | None]]:
    """(literal text, name after it) of a template."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} is none: {error}") from None
    for _, name, spec, conversion in found:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ValueError(f"the template {template!r} has {{{name}}}, which names no column")
    return [(literal, name) for literal, name, _, _ in found]
