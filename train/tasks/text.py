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
    parts = _parts(template)
    texts: list[str] = []
    plans: list[list[int | None]] = []  # of each row: places in `texts`, or None for an end

    def say(text: str, plan: list[int | None]) -> None:
        if text:
            plan.append(len(texts))
            texts.append(text)

    for row in rows:
        plan: list[int | None] = []
        text = ""
        for literal, name in parts:
            text += literal
            if name == END:
                say(text, plan)
                plan.append(None)
                text = ""
            elif name is not None:
                text += row.columns[name]
        say(text, plan)
        plans.append(plan)
    encoded = tokenizer.encode_batch(texts) if texts else []
    end = np.array([tokenizer.end_of_document], np.int32) if f"{{{END}}}" in template else None
    return [
        np.concatenate([end if at is None else encoded[at] for at in plan]).astype(np.int32)
        for plan in plans
    ]


def cut_ids(ids: np.ndarray, length: int, *, keep_last: int = 0) -> np.ndarray:
    """Returns at most `length` ids; of longer ones the first, and the last `keep_last` of all.

    >>> cut_ids(np.arange(6), 4, keep_last=1).tolist()
    [0, 1, 2, 5]
    """
    if len(ids) <= length:
        return ids
    return np.concatenate([ids[: length - keep_last], ids[len(ids) - keep_last :]])


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
