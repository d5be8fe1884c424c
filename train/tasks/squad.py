"""Extractive question answering: the answer is a stretch of a paragraph, told by start and end.

    {end} question {end} a window of the paragraph

    start = features W[:, 0],  end = features W[:, 1],  W under `span/kernel`, [D, 2]

The question comes first, so that a causal model reads the paragraph knowing what is asked. Such a
model sees the whole answer where it ends, but where it starts only the text up to there: it has to
guess from what leads up to an answer that one follows. `attention="full"` lets every token of a row
see all others, as in BERT, through the prefix of the attention (a prefix LM whose prefix is the
whole row); weights of a causal language model are a start for either.

With `mark` and `order` a small model is told what a large one has learned to see: which words
question and paragraph share, and which sentences share most, see `train.tasks.squad_reading`.

A paragraph that is longer than the row is read in windows that overlap. A window without the
answer is trained to point at the separator before it, so that the scores of all windows,
log-probabilities, can be compared: the answer is the best span of the best window. By
`most_windows=1` the first one alone is read: with `order="shared"` the sentences that share most.

Shapes: N examples, B rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.heads import SPAN, init_head
from model.linear import at_least_float32, linear
from model.transformer import Transformer, features
from train.losses_span import (
    best_spans,
    places_of,
    span_cross_entropy,
    span_log_probabilities,
    span_losses,
)
from train.plugs import Batch, Context, LossTerm, PyTree, View
from train.tasks.rows import BadRow, Row, RowFormat, content_hash, said_of
from train.tasks.squad_files import Answer, Question, article_splits, file_of, read_squad
from train.tasks.squad_reading import (
    ORDERS,
    Order,
    mark_ids,
    read_paragraph,
    read_question,
)
from train.tasks.task import (
    SPLITS,
    TEST,
    TRAIN,
    VALID,
    Examples,
    Outputs,
    TaskFiles,
    pad_rows,
    resolved,
    rows_used,
)
from train.tokenizers.piece_offsets import Pieces, pieces_of
from train.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Squad:
    """Answers questions by a stretch of their paragraph.

    Attributes:
      files: of the splits, in SQuAD's format: .json, .json.gz, or .zip. One file alone serves all
        three, and splits that name the same file share it, by article.
      shares: (split, share) of the articles of a file that splits share, which are ordered by the
        hash of their titles.
      articles: (title, split) of articles that are put into a split by name.
      fold: other articles for the last of the shares, see `article_splits`.
      attention: "causal" or "full", see the module.
      mark: mark the words that question and paragraph share; English.
      order: "text", or "shared": the sentences that share most with the question first; English.
      most_windows: of a question at most, the first ones; None for all.
      stride: tokens by which a window is behind the one before it; less where the row is shorter.
      question_length: tokens of a question at most; longer ones are cut, and counted.
      answer_length: tokens of an answer that is predicted, at most.
    """

    name: ClassVar[str] = "squad"
    watch: ClassVar[str] = "-f1"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    shares: tuple[tuple[str, float], ...] = ((TRAIN, 0.8), (VALID, 0.1), (TEST, 0.1))
    articles: tuple[tuple[str, str], ...] = ()
    fold: int = 0
    attention: Literal["causal", "full"] = "full"
    mark: bool = False
    order: Order = "text"
    most_windows: int | None = None
    stride: int = 128
    question_length: int = 64
    answer_length: int = 30

    def __post_init__(self) -> None:
        if self.attention not in ("causal", "full"):
            raise ValueError(f"attention is {self.attention!r}; it is 'causal' or 'full'")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; it is one of {', '.join(ORDERS)}")
        if self.most_windows is not None and self.most_windows < 1:
            raise ValueError(f"most_windows is {self.most_windows}; give at least 1, or None")
        for name in ("stride", "question_length", "answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 token")
        if unknown := sorted({split for split, _ in self.shares} - set(SPLITS)):
            raise ValueError(f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}")

    def resolve(self) -> Squad:
        """Returns the settings with a file for every split, and the hashes of the files.

        Raises:
          ValueError: a file is missing or has changed, splits of two files share an article, or
            no file is divided and it was said how.
        """
        form = self.files.form
        if form != RowFormat(bad_rows=form.bad_rows):
            raise ValueError(
                "a file of SQuAD names its fields itself; leave columns, separator and names out"
            )
        paths = self.files.paths
        if [split for split, _ in paths] == [TRAIN]:
            paths = tuple((split, paths[0][1]) for split, _ in self.shares)
        files = dataclasses.replace(self.files, paths=paths)
        alone = len({path for _, path in paths}) == len(paths)
        if alone and (self.articles or self.fold or self.shares != type(self).shares):
            raise ValueError(
                "shares, articles and fold divide a file that splits share, and here each split "
                "has its own; leave them out"
            )
        files = resolved(files, lambda path: content_hash(file_of(path)))
        task = dataclasses.replace(self, files=files)
        task._check_apart()
        return task

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns a matrix [D, 2]."""
        return {SPAN: init_head(key, config.width, 2, jnp.dtype(config.parameter_dtype))}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the cross-entropy of starts and ends.

        Raises:
          ValueError: a model with an encoder.
        """
        if not isinstance(model, Transformer):
            raise ValueError("question and paragraph are one row; give a model without an encoder")

        def logits(view: View, batch: Batch, context: Context) -> jax.Array:
            assert view.features is not None
            return span_logits(view.weights, view.features.final)

        return (span_cross_entropy(logits, label_smoothing),)

    def texts(self) -> Iterator[str]:
        """Yields the paragraphs and the questions of the training articles."""
        questions = self.questions(TRAIN)[0]
        yield from dict.fromkeys(question.paragraph for question in questions)
        for question in questions:
            yield question.text

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays, a window each.

        Beside those of `pad_rows`: `row`, the question; `first`, the place where the window begins
        in the row; `starts` and `ends`, places of the answer, both the separator where it is not in
        the window; `exact`, whether these pieces give the answer back as it is: int32 [N]. `pieces`
        int32 [N, T]: which piece of the paragraph stands at a place, -1 for none. `sentences` int32
        [N, T], where they are ordered: the rank of a place's sentence, 0 for none. `prefix` is the
        whole row under full attention.

        Raises:
          ValueError: a question that does not parse, unless skipped; a row too short.
        """
        questions, bad = self.questions(split)
        questions = rows_used(questions, self.files, split)
        arrays, cut = self.windows(questions, tokenizer, length)
        return Examples(arrays, [row_of(question) for question in questions], bad, cut)

    def windows(
        self, questions: Sequence[Question], tokenizer: Tokenizer, length: int
    ) -> tuple[dict[str, np.ndarray], int]:
        """Returns the windows of questions in arrays, see `examples`, and how many were cut.

        A question without answers has none in any window.
        """
        if length < 8:
            raise ValueError(f"rows of {length} tokens hold no paragraph; make them longer")
        paragraphs = paragraph_pieces(questions, tokenizer)
        asked = pieces_of([question.text for question in questions], tokenizer)
        most = min(self.question_length, length // 2)
        end = [tokenizer.end_of_document]
        told = mark_ids(tokenizer) if self.mark or self.order == "shared" else None
        marks = told if self.mark else None
        ids: list[list[int]] = []
        windows: list[_Window] = []
        places: dict[str, list[np.ndarray]] = {"pieces": [], "sentences": []}
        cut = 0
        for row, (question, question_pieces) in enumerate(zip(questions, asked, strict=True)):
            pieces = paragraphs[question.paragraph]
            question_ids = read_question(question, question_pieces, marks)
            cut += len(question_ids) > most
            read = read_paragraph(question, pieces, marks, self.order, told)
            head = [*end, *question_ids[:most].tolist(), *end]
            start, stop, exact = -1, -1, False
            if question.answers:
                first, last, exact = target_of(question, pieces)
                start, stop = read.place_of(first), read.place_of(last)
            whole = start < 0 or read.sentences[start] == read.sentences[stop]  # of one sentence
            found = windows_of(len(read.ids), length - len(head), self.stride)
            for at, behind in found[: self.most_windows]:
                inside = bool(whole) and at <= start and stop < behind
                starts, ends = (
                    (len(head) + p - at if inside else len(head) - 1) for p in (start, stop)
                )
                ids.append(head + read.ids[at:behind].tolist())
                windows.append(_Window(row, len(head), starts, ends, int(exact and inside)))
                pad = (len(head), length - len(ids[-1]))
                for name, none in (("pieces", -1), ("sentences", 0)):
                    array = getattr(read, name)[at:behind]
                    places[name].append(np.pad(array, pad, constant_values=none))
        arrays = pad_rows(ids, length)
        columns = np.array(windows, np.int32).T
        arrays |= dict(zip(_Window._fields, np.ascontiguousarray(columns), strict=True))
        arrays["pieces"] = np.stack(places["pieces"])
        if self.order == "shared":
            arrays["sentences"] = np.stack(places["sentences"])
        if self.attention == "full":
            arrays["prefix"] = arrays["lengths"].copy()
        return arrays, cut

    def outputs(self, model: Transformer) -> Outputs:
        """Returns the best span of each window: `start`, `stop` places, `score`; and its `loss`."""

        def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
            more: Any = {name: batch[name] for name in ("prefix",) if name in batch}
            out = features(model, weights, batch["tokens"], batch.get("positions"), **more)
            logits_BT2 = span_logits(weights, out.final)
            start_BT, end_BT = span_log_probabilities(logits_BT2, batch)
            if "positions" in batch:  # the rows of a mesh may be in another order
                order_BT = jnp.argsort(places_of(batch), axis=1)
                start_BT = jnp.take_along_axis(start_BT, order_BT, axis=1)
                end_BT = jnp.take_along_axis(end_BT, order_BT, axis=1)
                if "sentences" in batch:
                    ranks_BT = jnp.take_along_axis(batch["sentences"], order_BT, axis=1)
                    batch = {**batch, "sentences": ranks_BT}
            start, stop, score = best_spans(start_BT, end_BT, batch, self.answer_length)
            loss = span_losses(logits_BT2, batch)
            return {"start": start, "stop": stop, "score": score, "loss": loss}

        return apply

    def questions(self, split: str) -> tuple[list[Question], list[BadRow]]:
        """Returns the questions of a split, and those of its file that are none.

        Of a file that splits share, the first of them has those.

        Raises:
          ValueError: the file cannot be read, or a question is none and stops the run.
        """
        path = self.files.path(split)
        questions, bad = read_squad(path)
        if bad and self.files.form.bad_rows == "stop":
            raise ValueError(
                f"{path}: {bad[0].reason}. Correct it, or leave such questions out with "
                "--bad-rows skip"
            )
        if not questions:
            raise ValueError(
                f"{path} has no question to use" + (f"; {said_of(bad)}" if bad else "")
            )
        sharing = [name for name, other in self.files.paths if other == path]
        if len(sharing) > 1:
            shares = [pair for pair in self.shares if pair[0] in sharing]
            titles = [question.title for question in questions]
            belongs = article_splits(titles, shares, self.articles, self.fold)
            questions = [question for question in questions if belongs[question.title] == split]
            bad = bad if split == sharing[0] else []  # told once
        return questions, bad

    def _check_apart(self) -> None:
        """Raises ValueError where a paragraph of one split is in another, too."""
        seen: dict[str, tuple[str, str]] = {}
        for split, _ in self.files.paths:
            for question in self.questions(split)[0]:
                other, title = seen.setdefault(question.paragraph, (split, question.title))
                if other != split:
                    raise ValueError(
                        f"a paragraph of {question.title} is in {split} and, under {title}, in "
                        f"{other}; splits need articles of their own"
                    )


class _Window(NamedTuple):
    row: int
    first: int
    starts: int
    ends: int
    exact: int


def span_logits(weights: PyTree, final_BTD: jax.Array) -> jax.Array:
    """Returns [B, T, 2], at least float32, by the head under `span`."""
    logits_BT2 = linear(final_BTD, weights[SPAN]["kernel"])
    return logits_BT2.astype(at_least_float32(logits_BT2.dtype))


def windows_of(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Returns (first, behind the last) of the windows that cover `count` pieces.

    >>> windows_of(10, 6, 3), windows_of(4, 6, 3)
    ([(0, 6), (3, 9), (6, 10)], [(0, 4)])
    """
    stride, found = min(stride, room), [(0, min(room, count))]
    while found[-1][1] < count:
        at = found[-1][0] + stride
        found.append((at, min(at + room, count)))
    return found


def target_of(question: Question, pieces: Pieces) -> tuple[int, int, bool]:
    """Returns first and last piece of a question's answer, and whether they give it back.

    Of several references the most frequent is taken, the first of those of one frequency.
    """
    answer = Counter(question.answers).most_common(1)[0][0]
    return span_of(answer, question.paragraph, pieces)


def span_of(answer: Answer, paragraph: str, pieces: Pieces) -> tuple[int, int, bool]:
    """Returns first and last piece of an answer, and whether they give back its text."""
    text = answer.text.strip()
    start = answer.start + answer.text.index(text)
    begin = len(paragraph[:start].encode())
    first, last = pieces.span_of(begin, begin + len(text.encode()))
    return first, last, pieces.text_of(first, last) == text


def paragraph_pieces(questions: Sequence[Question], tokenizer: Tokenizer) -> dict[str, Pieces]:
    """Returns the pieces of each paragraph that the questions are about.

    Raises:
      ValueError: the tokenizer does not give a paragraph back.
    """
    texts = list(dict.fromkeys(question.paragraph for question in questions))
    return dict(zip(texts, pieces_of(texts, tokenizer), strict=True))


def row_of(question: Question) -> Row:
    """Returns a question as a row: what stands beside its prediction; the answers as JSON."""
    columns = {
        "id": question.id,
        "title": question.title,
        "question": question.text,
        "paragraph": question.paragraph,
        "answers": json.dumps([answer.text for answer in question.answers], ensure_ascii=False),
    }
    return Row(question.number, columns)
