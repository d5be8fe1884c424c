"""Following instructions: conversations by a template, with the loss on the answers alone.

    end  User: {question}\\nAssistant:  {answer} end  User: ...

Training conversations are packed, several a row, and do not see each other. A held-out one has a
row to itself; the model also writes the last answer anew.

Shapes: N rows, T tokens, P prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from model.config import EncoderDecoderConfig, TransformerConfig
from model.transformer import Transformer
from train.losses import cross_entropy
from train.packing import alone, fill, pack
from train.plugs import Batch, LossTerm, PyTree
from train.tasks.rows import BadRow, Row, RowFormat, keep_good, read_rows
from train.tasks.task import TRAIN, Examples, Outputs, TaskFiles, resolved, rows_of_split, rows_used
from train.tasks.translation import search, target_loss
from train.tokenizers.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
PROMPT, ANSWER, MESSAGES = "prompt", "answer", "messages"
MULTIPLE = 8  # held-out rows are as long as the longest of them, rounded up


class Message(NamedTuple):
    """What one side says."""

    role: str
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written; {text} is what is said, and an answer ends with an end.

    Attributes:
      system: what stands before all.
      user: a question.
      before_answer: what an answer follows on.
      answer: an answer.
    """

    system: str = "{text}\n"
    user: str = "User: {text}\n"
    before_answer: str = "Assistant:"
    answer: str = " {text}"

    def __post_init__(self) -> None:
        for name in ("system", "user", "answer"):
            if "{text}" not in getattr(self, name):
                raise ValueError(f"the template {name} has no {{text}}, as in 'User: {{text}}\\n'")


class Encoded(NamedTuple):
    """A conversation in ids.

    Attributes:
      ids: of all of it, int32.
      scored: which of them an answer consists of, its end included.
      last: where the last answer begins.
    """

    ids: np.ndarray
    scored: np.ndarray
    last: int


@dataclass(frozen=True)
class Instructions:
    """Answers questions and follows instructions.

    Attributes:
      files: of the splits: `.jsonl` with `messages`, each with `role` (system, user, assistant) and
        `content`; or any with columns `prompt` and `answer`.
      template: how conversations are written.
      answer_tokens: of the answers that are written to held-out questions, at most.
    """

    name: ClassVar[str] = "instructions"
    watch: ClassVar[str] = "loss"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    template: ChatTemplate = ChatTemplate()
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is {self.answer_tokens}; it must be at least 1")

    def resolve(self) -> Instructions:
        """Returns the settings with the hashes of the files.

        Raises:
          ValueError: a file is missing or has changed, or a split is none.
        """
        return dataclasses.replace(self, files=resolved(self.files))

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns nothing: the model's own head writes the answers."""
        return {}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the cross-entropy of the answers.

        Raises:
          ValueError: an encoder-decoder.
        """
        if isinstance(model.config, EncoderDecoderConfig):
            raise ValueError("instructions are for a decoder-only model; give another --model")
        return (cross_entropy(label_smoothing),)

    def texts(self) -> Iterator[str]:
        """Yields what is said in the training conversations."""
        rows, _ = self._rows(TRAIN)
        for row in rows:
            yield from (message.text for message in messages_of(row))

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays.

        In training N packed rows of T = `length`. Held out, a row for each conversation, as long as
        the longest of them: also `prompt` int32 [N, P] and `prompt_lengths` [N], all up to the last
        answer. Longer conversations lose their end, and count as cut; of a held-out one the prompt
        loses its beginning.

        Raises:
          ValueError: bad rows; conversations whose every answer is cut off.
        """
        rows, bad = self._rows(split)
        rows = rows_used(rows, self.files, split)
        whole = [encode(self.template, messages_of(row), tokenizer) for row in rows]
        kept = [each._replace(ids=each.ids[: length + 1]) for each in whole]
        inputs = [each.ids[:-1] for each in kept]
        targets = [each.ids[1:] for each in kept]
        weights = [each.scored[1 : len(each.ids)] for each in kept]
        if not any(w.any() for w in weights):
            raise ValueError(f"no answer fits into rows of {length} tokens; make them longer")
        if split == TRAIN:
            places, T = pack([(len(ids),) for ids in inputs], length), length
        else:
            places = [[number] for number in range(len(rows))]
            T = min(length, -(-max(map(len, inputs)) // MULTIPLE) * MULTIPLE)
        laid = fill(places, inputs, T)
        arrays = {
            **laid,
            "targets": fill(places, targets, T)["tokens"],
            "weights": fill(places, weights, T)["tokens"].astype(np.float32),
            "lengths": (laid["segments"] > 0).sum(axis=1).astype(np.int32),
        }
        if split != TRAIN:
            prompts = [each.ids[: each.last][-max(1, length - 1) :] for each in whole]
            arrays["prompt"] = alone(prompts, max(map(len, prompts)))["tokens"]
            arrays["prompt_lengths"] = np.array([len(p) for p in prompts], np.int32)
            end = tokenizer.end_of_document
            arrays["end"] = np.full(len(rows), end, np.int32)
        cut = sum(len(each.ids) > length + 1 for each in whole)
        return Examples(arrays, rows, bad, cut)

    def outputs(self, model: Transformer) -> Outputs:
        """Returns `nats` and `count` [B] of the answers, and the last one written anew.

        `answer` int32 [B, T'], `answer_lengths` [B] with the end token.
        """

        def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
            tokens, asked = self.answer_tokens, batch
            if model.config.positions == "learned":
                whole = model.config.max_length
                tokens = min(tokens, max(whole - batch["prompt"].shape[1], whole // 2))
                asked = batch | shortened(batch, whole - tokens)
            found = search(model, 1, 0.0, tokens, weights, asked, batch["end"][0], {})
            return {
                **target_loss(model, weights, batch),
                "answer": found.tokens[:, 0],
                "answer_lengths": found.lengths[:, 0],
            }

        return apply

    def _rows(self, split: str) -> tuple[list[Row], list[BadRow]]:
        path, form = Path(self.files.path(split)), self.files.form

        def parse(row: Row) -> Row:
            said = messages_of(row)
            check_messages(said)
            if said[-1].role != "assistant":
                raise ValueError("the last message is no answer of the assistant")
            return row

        if path.suffix.lower() in (".jsonl", ".ndjson") and _has_messages(path):
            if form != RowFormat(bad_rows=form.bad_rows):
                raise ValueError(
                    f"{path} has messages, whose parts have names of their own; leave columns, "
                    "separator and names out"
                )
            found = keep_good(path, _read_messages(path), form, parse)
            return rows_of_split(found, self.files, split, [PROMPT])
        found = keep_good(path, read_rows(path, form, (PROMPT, ANSWER)), form, parse)
        return rows_of_split(found, self.files, split, [PROMPT])


def messages_of(row: Row) -> list[Message]:
    """Returns what is said in a row.

    >>> messages_of(Row(1, {"prompt": "2 + 2?", "answer": "4"}))[1]
    Message(role='assistant', text='4')
    """
    if MESSAGES in row.columns:
        return [Message(role, text) for role, text in json.loads(row.columns[MESSAGES])]
    return [Message("user", row.columns[PROMPT]), Message("assistant", row.columns[ANSWER])]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError for what is no conversation."""
    for place, (role, text) in enumerate(messages):
        if role not in ROLES:
            raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}")
        if not text.strip():
            raise ValueError(f"message {place + 1}, of the {role}, is empty")
        if role == "system" and place:
            raise ValueError(f"message {place + 1} is of the system, which speaks first")
        before = messages[place - 1].role if place else None
        if role == before or (role == "assistant" and before != "user"):
            raise ValueError(f"message {place + 1}, of the {role}, follows on the {before}'s")


def encode(template: ChatTemplate, messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """Returns a conversation in ids; one that ends with a question is ready for its answer.

    Each message is encoded by itself, so that a conversation is the same ids however far it is.

    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> said = [Message("user", "a"), Message("assistant", "b")]
    >>> bare = ChatTemplate("{text}", "{text}", ">", "{text}")
    >>> found = encode(bare, said, load_tokenizer("bytes"))
    >>> found.ids.tolist(), found.scored.tolist(), found.last
    ([256, 97, 62, 98, 256], [0, 0, 0, 1, 1], 3)
    """
    end = np.array([tokenizer.end_of_document], np.int32)
    parts, scored, last, size = [end], [0], 1, 1
    for role, text in messages:
        written = getattr(template, "answer" if role == "assistant" else role)
        written = written.replace("{text}", text)
        if role == "user":
            written += template.before_answer
        ids = tokenizer.encode(written)
        if role == "assistant":
            ids, last = np.concatenate([ids, end]), size
        parts.append(ids)
        scored += [int(role == "assistant")] * len(ids)
        size += len(ids)
    if messages and messages[-1].role == "user":
        last = size
    return Encoded(np.concatenate(parts).astype(np.int32), np.array(scored, np.int32), last)


def _has_messages(path: Path) -> bool:
    """Whether the first row of a file that parses has messages."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError:
                    continue  # a bad row says nothing of the others
                if isinstance(value, dict):
                    return MESSAGES in value
    return False


def _read_messages(path: Path) -> Iterator[Row | BadRow]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8-sig"))[MESSAGES]
            said = [(each["role"], each["content"]) for each in found]
            json.dumps(said, ensure_ascii=False).encode()  # lone surrogates have none
        except UnicodeError:
            yield BadRow(number, "bytes that are no UTF-8: another encoding")
            continue
        except (ValueError, KeyError, TypeError):
            yield BadRow(number, "no JSON object with messages of role and content")
            continue
        if not said or not all(isinstance(part, str) for pair in said for part in pair):
            yield BadRow(number, "messages without text")
            continue
        # By what is said before the first answer a row is divided, as a row of a prompt is: answers
        # to one question lie in one split.
        asked = itertools.takewhile(lambda pair: pair[0] != "assistant", said)
        prompt = "\n".join(text for _, text in asked)
        yield Row(number, {MESSAGES: json.dumps(said, ensure_ascii=False), PROMPT: prompt})


def shortened(batch: Batch, most: int) -> Batch:
    """Returns `prompt` [B, P] and `prompt_lengths` of at most so many tokens each, the last ones.

    >>> batch = {"prompt": jnp.array([[1, 2, 3], [4, 0, 0]]), "prompt_lengths": jnp.array([3, 1])}
    >>> shortened(batch, 2)["prompt"].tolist()
    [[2, 3], [4, 0]]
    """
    prompt_BP, lengths_B = batch["prompt"], batch["prompt_lengths"]
    if prompt_BP.shape[1] <= most:
        return {"prompt": prompt_BP, "prompt_lengths": lengths_B}
    left_out_B = jnp.maximum(lengths_B - most, 0)
    places_BP = left_out_B[:, None] + jnp.arange(most)[None]
    return {
        "prompt": jnp.take_along_axis(prompt_BP, places_BP, axis=1),
        "prompt_lengths": lengths_B - left_out_B,
    }
