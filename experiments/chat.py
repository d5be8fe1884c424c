"""Talks with a trained run in the terminal: token by token, a line in, an answer out.

    python -m experiments.chat --run runs/first                      continues each line
    python -m experiments.chat --run runs/helper --mode chat         a conversation
    python -m experiments.chat --run runs/en-de --mode translation   translates each line
    python -m experiments.chat --run runs/en-de --beams 4 < a.en > a.de

Lines come from standard input, so a file may be piped in; an empty line in a chat begins anew. The
mode is that of the task that the run was trained for, and a chat is written by its template.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adapters import adapted_run
from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.runs.run import Run
from model.beam import Beam, beam_search
from model.config import EncoderDecoderConfig
from model.generate import Sampling
from model.heads import without_heads
from model.stack import apart
from model.stream import Decoding, begin, draw, read
from train.tasks.chat import ChatTemplate, Instructions, Message, encode
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.squad import Squad
from train.tasks.translation import Translation
from train.tokenizers.tokenizer import Tokenizer

MODES = ("continuation", "chat", "translation")
SOURCE_MULTIPLE = 32  # a source is padded to a multiple, so that few lengths are compiled


@dataclass(frozen=True)
class Chat:
    """Settings of a talk.

    Attributes:
      run: folder of the run.
      mode: what is done with a line; by default what the run was trained for.
      step: checkpoint; by default the newest, or of a task the best.
      max_new_tokens: of an answer, at most.
      temperature: 0 for greedy; by default 0 for translations, 0.8 otherwise.
      top_k: keep the k most probable tokens.
      top_p: keep the most probable tokens up to this probability.
      seed: of the draws.
      beams: of a search for the best translation, which is shown when it is whole; 1 for none.
      alpha: its length penalty, see `model.beam`.
      system: what stands before a chat.
      adapters: folders of `experiments.adapters`, put onto the run, as in `experiments.generate`.
    """

    run: Path
    mode: Literal["continuation", "chat", "translation"] | None = None
    step: int | None = None
    max_new_tokens: int = 200
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0
    beams: int = 1
    alpha: float = 0.6
    system: str = ""
    adapters: tuple[str, ...] = ()


class Talk(NamedTuple):
    """A run that answers.

    Attributes:
      run: opened.
      weights: of its model, by layer.
      sampling: how tokens are drawn.
      max_new_tokens: of an answer.
      key: of the draws.
      beam: of a search in place of draws, or None.
    """

    run: Run
    weights: Any
    sampling: Sampling
    max_new_tokens: int
    key: jax.Array
    beam: Beam | None = None


def open_talk(run: Run, sampling: Sampling, max_new_tokens: int, seed: int = 0) -> Talk:
    """Returns a run that answers.

    Raises:
      ValueError: no tokens are to be written.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    weights = apart(without_heads(run.params))
    return Talk(run, weights, sampling, max_new_tokens, jax.random.key(seed))


_ANSWERED_BY = {
    Classification: "experiments.predict",
    Regression: "experiments.predict",
    Squad: "experiments.open_qa",
}


def mode_of(run: Run, asked: str | None) -> str:
    """Returns the mode of a talk.

    Raises:
      ValueError: one that the model cannot do, or a model whose task is no talk.
    """
    task = run.settings.task
    trained = {Translation: "translation", Instructions: "chat"}.get(type(task), "continuation")
    mode = trained if asked is None else asked
    if asked is None and (other := _ANSWERED_BY.get(type(task))):
        raise ValueError(
            f"{run.folder} was trained for {task.name}, which {other} does; "
            "--mode continuation lets it go on with a text all the same"
        )
    two = isinstance(run.model.config, EncoderDecoderConfig)
    if two and mode != "translation":
        raise ValueError(f"{run.folder} is an encoder-decoder, which translates; leave --mode out")
    if mode == "translation" and trained != "translation":
        raise ValueError(
            f"{run.folder} was not trained to translate; choose --mode continuation or chat, or "
            "train it with experiments.finetune --task translation"
        )
    return mode


def continuations(talk: Talk, lines: Iterable[str]) -> Iterator[Iterator[str]]:
    """Yields the continuation of each line, piece by piece; an empty one begins a document."""
    tokenizer = talk.run.tokenizer
    for number, line in enumerate(lines):
        ids = tokenizer.encode(line).tolist() or [tokenizer.end_of_document]
        yield written(_numbered(talk, number), ids, {})


def translations(talk: Talk, lines: Iterable[str]) -> Iterator[Iterator[str]]:
    """Yields the translation of each line, piece by piece."""
    task, tokenizer = talk.run.settings.task, talk.run.tokenizer
    end = tokenizer.end_of_document
    for number, line in enumerate(lines):
        ids = tokenizer.encode(line.strip()).tolist()
        if not ids:
            yield iter(())
            continue
        if task.form == "encoder_decoder":
            source_1S, segments_1S = padded([*ids, end])
            prompt = [end]
            inputs = {"source": source_1S, "source_segments": segments_1S}
        else:
            prompt = [end, *ids, end]
            inputs = {"prefix": jnp.array([len(prompt)], jnp.int32)}
        if talk.beam is None:
            yield written(_numbered(talk, number), prompt, inputs)
        else:
            yield iter([searched(talk, talk.beam, prompt, inputs)])


def conversation(
    talk: Talk, lines: Iterable[str], template: ChatTemplate, system: str = ""
) -> Iterator[Iterator[str]]:
    """Yields the answer to each line of one conversation, piece by piece.

    What was said before is read again from the cache of the model alone. Where its positions end,
    the oldest questions are forgotten with their answers. An empty line begins anew.
    """
    tokenizer = talk.run.tokenizer
    start = [Message("system", system)] if system else []
    said, decoding, known = list(start), None, 0
    for number, line in enumerate(lines):
        if not line.strip():
            said, decoding, known = list(start), None, 0
            yield iter(())
            continue
        said.append(Message("user", line))
        ids = encode(template, said, tokenizer).ids.tolist()
        slots = talk.run.model.config.max_length
        # An answer is to have room: a quarter of all at most.
        room = max(1, min(talk.max_new_tokens, slots // 4))
        while len(ids) > slots - room and len(said) > len(start) + 1:
            said = [*start, *said[len(start) + 2 :]]
            decoding, known = None, 0
            ids = encode(template, said, tokenizer).ids.tolist()
        pieces: list[str] = []
        state: list[tuple[Decoding, list[int]]] = []
        new = ids if decoding is None else ids[known:]

        def heard(
            new: Sequence[int] = new,
            before: Decoding | None = decoding,
            pieces: list[str] = pieces,
            state: list[tuple[Decoding, list[int]]] = state,
            number: int = number,
        ) -> Iterator[str]:
            for piece in written(_numbered(talk, number), new, {}, before, state.append):
                pieces.append(piece)
                yield piece

        yield heard()
        said.append(Message("assistant", "".join(pieces).strip()))
        # The answer as the template has it may be other ids than those that were drawn.
        decoding, drawn = state[-1]
        anew = encode(template, said, tokenizer).ids.tolist()
        known = len(anew)
        if anew != [*ids, *drawn] or not said[-1].text:
            decoding, known = None, 0
        if not said[-1].text:
            said = said[:-2]


def written(
    talk: Talk,
    ids: Sequence[int],
    inputs: dict[str, jax.Array],
    decoding: Decoding | None = None,
    at_end: Callable[[tuple[Decoding, list[int]]], None] = lambda ended: None,
) -> Iterator[str]:
    """Yields what follows on ids, as text, as soon as it is whole characters.

    Args:
      talk: the run.
      ids: that are read first.
      inputs: see `model.stream.read`.
      decoding: of what stands before them, or None.
      at_end: is given the decoding at the end, in which the answer has been read, and the ids
        that were drawn.

    Raises:
      ValueError: the ids leave no room for an answer.
    """
    run, slots = talk.run, talk.run.model.config.max_length
    decoding = begin(run.model, slots) if decoding is None else decoding
    if decoding.length + len(ids) >= slots:
        raise ValueError(
            f"the text has {decoding.length + len(ids)} tokens and the model {slots} positions, "
            "which leaves none for an answer; give a shorter one"
        )
    end = run.tokenizer.end_of_document
    decoding = read(run.model, talk.weights, decoding, ids, inputs)
    new: list[int] = []
    ended: list[int] = []
    shown = ""
    while len(new) < talk.max_new_tokens and decoding.length < slots:
        token = draw(decoding, jax.random.fold_in(talk.key, len(new)), talk.sampling)
        decoding = read(run.model, talk.weights, decoding, [token])
        if token == end:
            ended.append(token)
            break
        new.append(token)
        piece, shown = fresh(run.tokenizer, new, shown)
        if piece:
            yield piece
    whole = run.tokenizer.decode(new)
    if whole[len(shown) :]:
        yield whole[len(shown) :]
    at_end((decoding, new + ended))


def searched(talk: Talk, beam: Beam, ids: Sequence[int], inputs: dict[str, jax.Array]) -> str:
    """Returns the best continuation of ids that a beam search finds."""
    run = talk.run
    prompt_1P, _ = padded(ids)
    if len(ids) == 1:
        prompt_1P = prompt_1P[:, :1]
    room = run.model.config.max_length - prompt_1P.shape[1]
    if room < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, which leaves no room for a translation; shorten it"
        )
    beam = dataclasses.replace(beam, max_new_tokens=min(beam.max_new_tokens, room))
    lengths_1, end = jnp.array([len(ids)], jnp.int32), run.tokenizer.end_of_document
    params = without_heads(run.params)
    found = beam_search(
        run.model, params, prompt_1P, lengths_1, beam=beam, end_token=end, inputs=inputs
    )
    return run.tokenizer.decode(np.asarray(found.tokens)[0, 0, : int(found.lengths[0, 0])])


def fresh(tokenizer: Tokenizer, ids: Sequence[int], shown: str) -> tuple[str, str]:
    """Returns the text that is new since `shown`, and all of it; half a character waits."""
    whole = tokenizer.decode(ids)
    if whole.endswith("\ufffd") or not whole.startswith(shown):
        return "", shown
    return whole[len(shown) :], whole


def padded(ids: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Returns a source and its segments, [1, S], padded to one of few lengths.

    >>> padded([7, 8])[1].sum()
    Array(2, dtype=int32)
    """
    length = -(-len(ids) // SOURCE_MULTIPLE) * SOURCE_MULTIPLE
    row = np.zeros((2, length), np.int32)
    row[0, : len(ids)], row[1, : len(ids)] = ids, 1
    return jnp.asarray(row[:1]), jnp.asarray(row[1:])


def answers(talk: Talk, mode: str, lines: Iterable[str], system: str = "") -> Any:
    """Returns an iterator of answers, each an iterator of pieces, for lines in a mode."""
    if mode == "chat":
        task = talk.run.settings.task
        template = task.template if isinstance(task, Instructions) else ChatTemplate()
        return conversation(talk, lines, template, system)
    return (translations if mode == "translation" else continuations)(talk, lines)


def main() -> None:
    """Parses the command line; reads, answers, prints."""
    import tyro

    command = tyro.cli(Chat, description=__doc__)
    use_compilation_cache()
    run = adapted_run(command.run, command.step, command.adapters)
    mode = mode_of(run, command.mode)
    if command.system and mode != "chat":
        raise ValueError("--system stands before a chat; give --mode chat")
    default = 0.0 if mode == "translation" else 0.8
    temperature = default if command.temperature is None else command.temperature
    sampling = Sampling(temperature, command.top_k, command.top_p)
    talk = open_talk(run, sampling, command.max_new_tokens, command.seed)
    if command.beams != 1:
        if mode != "translation":
            raise ValueError("--beams searches for a translation; give --mode translation")
        talk = talk._replace(beam=Beam(command.beams, command.alpha, command.max_new_tokens))
    for answer in answers(talk, mode, _lines(mode), command.system):
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)


def _lines(mode: str) -> Iterator[str]:
    """The lines of standard input, after a prompt where a person types them."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print(f"{mode}> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n").removesuffix("\r")


def _numbered(talk: Talk, number: int) -> Talk:
    """The talk with draws of its own for line `number`."""
    return talk._replace(key=jax.random.fold_in(talk.key, number))


if __name__ == "__main__":
    run_main(main)
