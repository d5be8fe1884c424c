"""Small files of SQuAD, made up."""

import json

import numpy as np

COLOURS = ("red", "blue", "green", "grey", "pink", "gold")
NAMES = ("Ann", "Bob", "Eve", "Jim", "Zoë", "Tom")


def article(title, paragraphs):
    """An article; paragraphs are (context, [(id, question, [answer, ...])])."""
    return {
        "title": title,
        "paragraphs": [
            {
                "context": context,
                "qas": [
                    {
                        "id": name,
                        "question": question,
                        "answers": [{"text": a, "answer_start": context.index(a)} for a in answers],
                    }
                    for name, question, answers in asked
                ],
            }
            for context, asked in paragraphs
        ],
    }


def colours(seed, paragraphs=3, people=3):
    """An article of who likes which colour, "Zoë likes red."."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(paragraphs):
        names = draw.permutation(NAMES)[:people].tolist()
        chosen = draw.permutation(COLOURS)[:people].tolist()
        pairs = list(zip(names, chosen, strict=True))
        context = f"{seed}.{number} " + " ".join(f"{a} likes {b}." for a, b in pairs)
        asked = [(f"{seed}-{number}-{a}", f"What does {a} like?", [b]) for a, b in pairs]
        found.append((context, asked))
    return article(f"Colours {seed}", found)


def write_squad(path, articles):
    """Writes a `.json` file."""
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path
