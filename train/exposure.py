"""How much a model has memorised of a secret: the exposure of planted canaries.

A canary is a sentence with a secret in it that was drawn at random from R candidates. The model is
asked for the probability of the sentence with each candidate; if r - 1 of them are likelier than
the one that was planted, its exposure is log2 |R| - log2 r (Carlini et al. 2019, arXiv:1802.08232,
section 4): 0 to 1 or so for a secret that is no better known than others, log2 |R| for one that
could be read out by search.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from model.transformer import Transformer
from train.tokenizers.tokenizer import Tokenizer


class Canary(NamedTuple):
    """A planted sentence.

    Attributes:
      template: with `{}` where the secret goes.
      secret: digits.
      copies: how often it was planted.
    """

    template: str
    secret: str
    copies: int

    @property
    def text(self) -> str:
        """The sentence.

        >>> Canary("the code is {}.", "0281", 3).text
        'the code is 0281.'
        """
        return self.template.format(self.secret)


def draw_canaries(
    key: jax.Array, templates: Sequence[str], copies: Sequence[int], digits: int
) -> list[Canary]:
    """Draws a secret for each template.

    Raises:
      ValueError: other numbers of templates and copies, a template without its one place, no
        digits.

    >>> draw_canaries(jax.random.key(0), ["a {}"], [2], 3)[0].copies
    2
    """
    if len(templates) != len(copies) or digits < 1:
        raise ValueError(
            f"{len(templates)} templates, {len(copies)} copies and {digits} digits were given; "
            "give one number of copies for each template, and at least 1 digit"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} needs {{}} once, where the secret goes")
    drawn = np.asarray(jax.random.randint(key, (len(templates), digits), 0, 10))
    secrets = ["".join(map(str, row)) for row in drawn]
    return [Canary(*each) for each in zip(templates, secrets, copies, strict=True)]


def plant(key: jax.Array, text: str, canaries: Iterable[Canary]) -> str:
    """Returns the text with each canary on lines of its own, at random places between lines.

    >>> canary = Canary("the code is {}.", "7", 2)
    >>> plant(jax.random.key(0), "a\\nb\\n", [canary]).count(canary.text)
    2
    """
    lines = text.splitlines(keepends=True)
    sentences = [canary.text + "\n" for canary in canaries for _ in range(canary.copies)]
    places = np.asarray(jax.random.randint(key, (len(sentences),), 0, len(lines) + 1))
    for number in np.argsort(-places, kind="stable"):  # from the end, so that places stay right
        lines.insert(int(places[number]), sentences[number])
    return "".join(lines)


def exposure(
    model: Transformer, params: Any, tokenizer: Tokenizer, canary: Canary, batch_size: int = 256
) -> float:
    """Returns the exposure of a canary among all secrets of as many digits, in bits.

    Candidates that are exactly as likely as the secret count as likelier: nothing is claimed of a
    model that cannot tell them apart.

    Args:
      model: the Transformer.
      params: its parameters.
      tokenizer: its tokenizer.
      canary: what was planted.
      batch_size: candidates at a time.

    Raises:
      ValueError: more than 10^6 candidates, or a sentence longer than the model's positions.
    """
    digits = len(canary.secret)
    if digits > 6:
        raise ValueError(f"there are 10^{digits} candidates to ask for; plant 6 digits at most")
    candidates = [f"{number:0{digits}d}" for number in range(10**digits)]
    rows = [tokenizer.encode("\n" + canary.template.format(c)).tolist() for c in candidates]
    length = max(map(len, rows))
    config = model.config
    if config.positions == "learned" and length > config.max_length:
        raise ValueError(
            f"the canary has {length} tokens and the model {config.max_length} positions; plant a "
            "shorter sentence"
        )
    ids = np.zeros((-(-len(rows) // batch_size) * batch_size, length), np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for n, row in enumerate(rows):
        ids[n, : len(row)], weights[n, 1 : len(row)] = row, 1
    scores = [
        np.asarray(
            _log_likelihood(model, params, ids[i : i + batch_size], weights[i:][:batch_size])
        )
        for i in range(0, len(ids), batch_size)
    ]
    found = np.concatenate(scores)[: len(rows)]
    rank = int((found >= found[int(canary.secret)]).sum())
    return math.log2(len(rows)) - math.log2(rank)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(model: Transformer, params: Any, ids_BT: Any, weights_BT: Any) -> jax.Array:
    """log p of the tokens of each row after its first, [B]."""
    logits_BTV = cast(jax.Array, model.apply({"params": params}, ids_BT[:, :-1]))
    logs_BTV = jax.nn.log_softmax(logits_BTV)
    picked_BT = jnp.take_along_axis(logs_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
    return (picked_BT * weights_BT[:, 1:].astype(picked_BT.dtype)).sum(axis=-1)
