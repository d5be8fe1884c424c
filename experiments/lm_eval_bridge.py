"""Runs of ours as a model of lm-evaluation-harness (Gao et al. 2021, doi:10.5281/zenodo.5371628).

The harness asks three things of a model: how probable a continuation is after a context, how
probable a whole text is, and what comes next up to a stop. The first two are sums of the same
log-probabilities that `experiments.evaluate` averages.

Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs.run import Run
from model.extras import from_extra
from model.generate import Sampling, generate
from model.transformer import Model, Transformer, features, head

SHORTEST = 32  # tokens of a row; longer ones double, so that few shapes are compiled
NEW_TOKENS = 256  # that the harness expects where a task does not say


class Scored(NamedTuple):
    """A continuation: its log-probability in nats; whether each token of it was the likeliest."""

    log_probability: float
    greedy: bool


def continuation_scores(
    run: Run,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    length: int | None = None,
    batch_size: int = 8,
) -> list[Scored]:
    """Returns the score of each continuation after its context.

    Args:
      run: with a decoder.
      pairs: ids of (context, continuation), a context of one id at least; what does not fit goes
        from its beginning.
      length: tokens that the model sees at most; by default its positions.
      batch_size: rows at a time; changes no figure.

    Raises:
      ValueError: an empty context, a continuation that does not fit, or a model without a decoder
        alone.
    """
    most = length_of(run, length)
    rows = []
    for context, continuation in pairs:
        if not context:
            raise ValueError("a continuation needs a context; the end of a document will do")
        if len(continuation) > most:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the {most} that the "
                "model sees"
            )
        rows.append([*context, *continuation][-(most + 1) :])
    scores = [Scored(0.0, True)] * len(rows)
    by_shape: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        if pairs[number][1]:
            by_shape.setdefault(_shape(len(row) - 1, most), []).append(number)
    for T, numbers in sorted(by_shape.items()):
        for at in range(0, len(numbers), batch_size):
            chosen = numbers[at : at + batch_size]
            ids = np.zeros((batch_size, T + 1), np.int32)
            counted = np.zeros((batch_size, T), bool)
            for place, number in enumerate(chosen):
                row, scored = rows[number], len(pairs[number][1])
                ids[place, : len(row)] = row
                counted[place, len(row) - 1 - scored : len(row) - 1] = True
            args = (run.params, ids[:, :-1], ids[:, 1:], counted)
            found, greedy = jax.device_get(_measure(run.model, *args))
            for place, number in enumerate(chosen):
                scores[number] = Scored(float(found[place]), bool(greedy[place]))
    return scores


def text_score(
    run: Run, ids: Sequence[int], *, length: int | None = None, batch_size: int = 8
) -> float:
    """Returns the log-probability of a text from the end of a document before it, in nats.

    Each token counts once. Windows lie side by side but for the last, which has a full context.

    Args:
      run: with a decoder.
      ids: of the text.
      length: tokens of a window; by default the model's positions.
      batch_size: windows at a time.
    """
    most = length_of(run, length)
    pairs = text_windows(ids, run.tokenizer.end_of_document, most)
    scores = continuation_scores(run, pairs, length=most, batch_size=batch_size)
    return sum(score.log_probability for score in scores)


def text_windows(ids: Sequence[int], before: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Returns (context, continuation) of the windows in which each token of a text counts once.

    >>> text_windows([1, 2, 3, 4, 5], 0, 3)
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    whole = [before, *ids]
    cuts = [(first, min(first + length, len(whole))) for first in range(1, len(whole), length)]
    return [(whole[max(0, last - length - 1) : first], whole[first:last]) for first, last in cuts]


def continue_text(
    run: Run, context: str, *, stops: Sequence[str], new_tokens: int, sampling: Sampling, seed: int
) -> str:
    """Returns what follows a context, up to and without the first of the stops."""
    positions = run.model.config.max_length
    new_tokens = min(new_tokens, positions // 2)
    end = run.tokenizer.end_of_document
    ids = run.tokenizer.encode(context).tolist()[-(positions - new_tokens) :] or [end]
    found = generate(
        run.model,
        run.params,
        [ids],
        key=jax.random.key(seed),
        max_new_tokens=new_tokens,
        sampling=sampling,
        stop_tokens=[end],
    )
    return until_stop(run.tokenizer.decode(found.new_tokens()[0]), stops)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """Returns the text up to the first of the stops.

    >>> until_stop("one. two\\n", ["\\n", ". "])
    'one'
    """
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=None)]


def length_of(run: Run, length: int | None = None) -> int:
    """Returns how many tokens the model sees.

    Raises:
      ValueError: a model that the harness cannot ask, or a length that it has no positions for.
    """
    if not isinstance(run.model, Transformer):
        raise ValueError(f"{run.folder} has an encoder; the harness asks models that have none")
    positions = run.model.config.max_length
    if length is not None and not 1 <= length <= positions:
        raise ValueError(f"length is {length}; the model has {positions} positions")
    return length or positions


def harness_model(run: Run, *, batch_size: int = 8) -> Any:
    """Returns the run as an `lm_eval.api.model.TemplateLM`.

    Args:
      run: with a decoder.
      batch_size: rows at a time.

    Raises:
      ImportError: the harness is not installed.
      ValueError: the model has an encoder.
    """
    from_extra("lm_eval", "eval", "tasks of lm-evaluation-harness need it")
    from lm_eval.api.model import TemplateLM

    length_of(run)

    class RunModel(TemplateLM):
        """A run of ours."""

        @property
        def eot_token_id(self) -> int:
            return run.tokenizer.end_of_document

        @property
        def max_length(self) -> int:
            return length_of(run)

        @property
        def tokenizer_name(self) -> str:
            return run.tokenizer.fingerprint()

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            return run.tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = continuation_scores(run, pairs, batch_size=batch_size)
            return [tuple(score) for score in found]  # type: ignore[misc]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            return [text_score(run, self.tok_encode(t), batch_size=batch_size) for t in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [
                continue_text(run, request.args[0], **generation_of(request.args[1], seed))
                for seed, request in enumerate(requests)
            ]

    return RunModel()


def generation_of(asked: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns what a task of the harness asks of a generation, as `continue_text` takes it.

    Raises:
      ValueError: something that is not known here.

    >>> found = generation_of({"until": "\\n", "max_gen_toks": 5}, 0)
    >>> found["stops"], found["new_tokens"], found["sampling"].temperature
    (['\\n'], 5, 0.0)
    """
    known = {
        "until",
        "max_gen_toks",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
    }
    if unknown := sorted(set(asked) - known):
        raise ValueError(f"a task asks for {', '.join(unknown)} in generation; known are {known}")
    stops = asked.get("until") or []
    samples = asked.get("do_sample", float(asked.get("temperature") or 0) > 0)
    temperature = float(asked.get("temperature", 1.0)) if samples else 0.0
    return {
        "stops": [stops] if isinstance(stops, str) else list(stops),
        "new_tokens": int(asked.get("max_gen_toks", asked.get("max_new_tokens", NEW_TOKENS))),
        "sampling": Sampling(temperature, asked.get("top_k"), asked.get("top_p")),
        "seed": seed,
    }


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    model: Model, params: Any, tokens_BT: Any, targets_BT: Any, counted_BT: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns sums of log-probabilities, and whether each was of the likeliest, [B] each.

    Compiled once for each model and shape, however many texts are asked for.
    """

    def row(part: Any) -> tuple[jax.Array, jax.Array]:
        final_TD, targets_T, counted_T = part
        logits_TV = head(model, params, final_TD)
        log_p_TV = jax.nn.log_softmax(logits_TV)
        log_p_T = jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=1)[:, 0]
        likeliest_T = logits_TV.argmax(axis=-1) == targets_T
        return jnp.where(counted_T, log_p_T, 0).sum(), (likeliest_T | ~counted_T).all()

    final_BTD = features(model, params, tokens_BT).final
    # A row at a time: [B, T, V] is never held.
    return jax.lax.map(row, (final_BTD, targets_BT, counted_BT))


def _shape(length: int, most: int) -> int:
    """Tokens of a padded row."""
    size = SHORTEST
    while size < length:
        size *= 2
    return min(size, most)
