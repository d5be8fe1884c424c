"""SQuAD's files: articles, paragraphs, questions and answers; `.json`, in `.gz` or in `.zip`.

Format of version 1.1: Rajpurkar et al. 2016, arXiv:1606.05250. Every question has an answer, which
is a stretch of its paragraph.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from train.tasks.rows import BadRow

MOST_BYTES = 1 << 30  # unpacked; the whole of SQuAD has 35 million


class Answer(NamedTuple):
    """A stretch of a paragraph: its text, and the character where it starts."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a paragraph.

    Attributes:
      number: its place in the file, from 1.
      id: that its prediction goes by.
      title: of its article.
      paragraph: text.
      text: of the question.
      answers: the references, at least one.
    """

    number: int
    id: str
    title: str
    paragraph: str
    text: str
    answers: tuple[Answer, ...]


def read_squad(path: str) -> tuple[list[Question], list[BadRow]]:
    """Returns the questions of a file in order, and those that are none, by their number.

    Args:
      path: a `.json` file, one in `.gz`, or a `.zip` with one `.json` in it; "FILE.zip#MEMBER"
        where there are several.

    Raises:
      ValueError: no such file, a damaged archive, or no file of SQuAD.
    """
    where, content = _content(path)
    try:
        articles = json.loads(content)["data"]
        found = list(_questions(articles))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no UTF-8 (byte {error.start}); convert it first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no file of SQuAD ({error!r}); it wants "
            '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": '
            '[{"text", "answer_start"}]}]}]}]}'
        ) from None
    good = [question for question in found if isinstance(question, Question)]
    return good, [question for question in found if isinstance(question, BadRow)]


def article_splits(
    titles: Sequence[str],
    shares: Sequence[tuple[str, float]],
    listed: Sequence[tuple[str, str]] = (),
    fold: int = 0,
) -> dict[str, str]:
    """Returns the split that each article of one file belongs to.

    Articles are ordered by the hash of their title and cut where the shares say, so that the order
    of the file plays no part.

    Args:
      titles: of the articles.
      shares: (split, share of the articles that are not listed); their sum is the whole.
      listed: (title, split) of those that are named.
      fold: turns the order by so many times the last share, whose articles are then others: those
        of fold f - 1 are last but one in fold f. No two folds share them as long as there are
        others left.

    Raises:
      ValueError: a share that is not positive, a fold below 0, a title or a split that there is
        not, or a split that is left without an article.

    >>> article_splits(["a", "b", "c"], [("train", 0.5), ("test", 0.5)], [("b", "test")])
    {'b': 'test', 'c': 'train', 'a': 'test'}
    >>> halves = [("train", 0.5), ("test", 0.5)]
    >>> [article_splits(["a", "b"], halves, fold=fold)["a"] for fold in (0, 1, 2)]
    ['test', 'train', 'test']
    """
    if fold < 0:
        raise ValueError(f"fold is {fold}; folds are counted from 0")
    names = [split for split, _ in shares]
    if not shares or min(share for _, share in shares) <= 0:
        raise ValueError(f"shares of articles are positive, not {dict(shares)}")
    unique = dict.fromkeys(titles)
    if unknown := [title for title, _ in listed if title not in unique]:
        raise ValueError(f"no article is called {unknown[0]!r}; there are {', '.join(unique)}")
    if unknown := [split for _, split in listed if split not in names]:
        raise ValueError(f"no split {unknown[0]!r} is read from this file; it has {names}")
    found = dict(listed)
    rest = sorted(
        (title for title in unique if title not in found),
        key=lambda title: hashlib.sha256(title.encode()).hexdigest(),
    )
    whole, before = sum(share for _, share in shares), 0.0
    last_share = len(rest) - round(len(rest) * (whole - shares[-1][1]) / whole)
    turn = fold * last_share % len(rest) if rest else 0
    rest = rest[turn:] + rest[:turn]
    for split, share in shares:
        first, last = (round(len(rest) * part / whole) for part in (before, before + share))
        found |= dict.fromkeys(rest[first:last], split)
        before += share
    if empty := [split for split in names if split not in found.values()]:
        raise ValueError(
            f"{len(unique)} articles leave none for {', '.join(empty)}; give that split a larger "
            "share, or a file of its own"
        )
    return found


def file_of(path: str) -> Path:
    """Returns the file itself of "FILE.zip#MEMBER".

    >>> file_of("a/b.zip#c.json").name
    'b.zip'
    """
    file, mark, _ = path.partition(".zip#")
    return Path(file + ".zip" if mark else path)


def _content(path: str) -> tuple[str, bytes]:
    """(name for errors, bytes); nothing is unpacked onto the disk."""
    file = file_of(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise ValueError(f"{file} {what}; give a file of SQuAD: .json, .json.gz or .zip")
    suffix = file.suffix.lower()
    try:
        if suffix == ".zip":
            return _member(file, path.partition(".zip#")[2])
        if suffix == ".gz":
            with gzip.open(file) as stream:
                content = stream.read(MOST_BYTES + 1)
        else:
            content = file.read_bytes()
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no intact {suffix} file ({error}); fetch it again") from None
    return str(file), _of_size(str(file), content)


def _member(file: Path, name: str) -> tuple[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        for member in infos:
            parts = PurePosixPath(member.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts:
                raise ValueError(f"{file} has a member {member!r}, out of its folder; mend it")
        json_names = [member for member in infos if member.endswith(".json")]
        chosen = [name] if name else json_names
        if len(chosen) != 1 or chosen[0] not in infos:
            what = f"no member {name!r}" if name else f"{len(json_names)} .json members"
            raise ValueError(
                f"{file} has {what}; name one of {', '.join(infos) or 'none'} as {file}#MEMBER"
            )
        where = f"{file}#{chosen[0]}"
        with archive.open(infos[chosen[0]]) as stream:
            return where, _of_size(where, stream.read(MOST_BYTES + 1))


def _of_size(where: str, content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise ValueError(f"{where} unpacks to more than {MOST_BYTES} bytes; cut it in parts")
    return content


def _questions(articles: Sequence[Mapping[str, Any]]) -> Iterator[Question | BadRow]:
    number, seen = 0, set()
    for article in articles:
        title = str(article.get("title", ""))
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            if not isinstance(context, str):
                raise TypeError("a context that is no text")
            for asked in paragraph["qas"]:
                number += 1
                name = str(asked["id"])
                try:
                    if name in seen:
                        raise ValueError("its id stands there twice")
                    answers = _answers(context, asked)
                    text = asked["question"].strip()
                    if not text:
                        raise ValueError("the question is empty")
                except ValueError as error:
                    yield BadRow(number, f"question {name}: {error}")
                    continue
                seen.add(name)
                yield Question(number, name, title, context, text, answers)


def _answers(context: str, asked: Mapping[str, Any]) -> tuple[Answer, ...]:
    found = tuple(Answer(answer["text"], answer["answer_start"]) for answer in asked["answers"])
    if not found:
        raise ValueError("no answer, and only questions with one are read (SQuAD 1.1)")
    for text, start in found:
        if not text.strip():
            raise ValueError("the answer is empty")
        if text not in context:
            raise ValueError(f"the answer {text!r} does not occur in its paragraph")
        if not isinstance(start, int) or start < 0 or not context.startswith(text, start):
            at = context.index(text)
            raise ValueError(f"the answer {text!r} is not at {start}; the first is at {at}")
    return found
