"""A corpus: nothing lost, nothing in two splits, intact whatever happens to its builders."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from train import byte_progress
from train import corpus as corpus_module
from train.corpus import SPLITS, build_corpus
from train.text.sources import open_source


class Bytes:
    """Bytes as ids; counts what it is asked to encode."""

    vocabulary_size = 257
    end_of_document = 256

    def __init__(self, shift=0):
        self.shift, self.encoded = shift, 0

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self.shift for t in texts]

    def decode_bytes(self, ids):
        return bytes(int(i) for i in ids if i < 256)

    def fingerprint(self):
        return f"bytes+{self.shift}"


def source_of(folder, texts, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_source(str(folder / name))


def documents(split):
    """Texts of a split, each without its separator."""
    ends = [*split.starts[1:], len(split.tokens)]
    assert split.starts[0] == 0
    for start, end in zip(split.starts, ends, strict=True):
        ids = np.asarray(split.tokens[start:end])
        assert ids[-1] == 256
        yield bytes(ids[:-1].astype(np.uint8)).decode()


def many(count=400):
    return [f"document {i} ä" * (1 + i % 5) for i in range(count)]


def test_every_document_is_in_one_split_in_order(tmp_path):
    texts = many()
    corpus = build_corpus(source_of(tmp_path, texts), Bytes(), tmp_path / "cache")
    found = {name: list(documents(corpus.split(name))) for name in SPLITS}
    assert sorted(itertools.chain(*found.values())) == sorted(texts)
    for name, mine in found.items():
        assert mine == [text for text in texts if text in set(mine)]
        assert corpus.split(name).bytes == sum(len(text.encode()) for text in mine)
    # Binomial(400, 0.05): 20 give or take 4.4; these bounds are five of those away.
    assert 2 <= len(found["validation"]) <= 42
    assert 2 <= len(found["test"]) <= 42
    assert corpus.split("train").tokens.dtype == np.uint16
    assert not corpus.split("train").tokens.flags.writeable


def test_a_document_goes_where_its_text_says_whatever_stands_around_it(tmp_path):
    """So copies are never split up, and another tokenizer or order holds out the same text."""
    texts = many(60)
    splits = {}
    for name, order in {"a": texts, "b": texts[::-1] + texts, "c": texts * 3}.items():
        corpus = build_corpus(source_of(tmp_path, order, f"{name}.jsonl"), Bytes(), tmp_path / "c")
        splits[name] = {split: set(documents(corpus.splits[split])) for split in corpus.splits}
    assert splits["a"] == splits["b"] == splits["c"]
    assert splits["a"]["train"].isdisjoint(splits["a"]["validation"])


def test_long_documents_are_whole_and_go_by_their_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("train.text.source_files.PIECE_BYTES", 64)
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 100)
    texts = [f"{i} " + "long\ntext " * (i % 30) for i in range(200)]
    source = source_of(tmp_path, texts)
    assert sum(1 for _ in source.pieces()) > 400
    corpus = build_corpus(source, Bytes(), tmp_path / "cache")
    assert sorted(t for n in SPLITS for t in documents(corpus.split(n))) == sorted(texts)


@pytest.mark.parametrize("count", [1, 3, 19])
def test_few_documents_hold_out_the_last_tenth(tmp_path, count):
    texts = [f"{i}: äöü世界😀" * 3 for i in range(count)]
    corpus = build_corpus(source_of(tmp_path, texts), Bytes(), tmp_path / "cache")
    train, validation = corpus.split("train"), corpus.split("validation")
    whole = [*train.tokens, *validation.tokens]
    assert whole == list(np.concatenate([[*text.encode(), 256] for text in texts]))
    assert len(train.starts) + len(validation.starts) in (count, count + 1)
    total = sum(len(text.encode()) for text in texts)
    assert train.bytes + validation.bytes == total
    assert 0 <= total * 9 // 10 - train.bytes <= 3  # at most the rest of a character
    for split in (train, validation):
        ids = np.asarray(split.tokens)
        bytes(ids[ids < 256].astype(np.uint8)).decode()
        assert np.array_equal(split.starts[1:], np.flatnonzero(ids[:-1] == 256) + 1)
    with pytest.raises(ValueError, match="no test split: it has fewer than 20 documents"):
        corpus.split("test")
    with pytest.raises(ValueError, match="splits are train, validation, test"):
        corpus.split("dev")


def test_copies_of_one_document_still_give_a_validation_split(tmp_path):
    corpus = build_corpus(source_of(tmp_path, ["the same"] * 50), Bytes(), tmp_path / "cache")
    assert len(corpus.split("validation").tokens) == 45
    with pytest.raises(ValueError, match="its 50 documents cannot be split by the hash"):
        corpus.split("test")


def test_shards_are_taken_as_they_are(tmp_path):
    pieces = [[*text.encode(), 256] for text in many(100)]
    np.concatenate(pieces).astype("<u2").tofile(tmp_path / "a.bin")
    tokenizer = Bytes()
    corpus = build_corpus(open_source(str(tmp_path / "a.bin")), tokenizer, tmp_path / "cache")
    assert tokenizer.encoded == 0
    found = [text for name in SPLITS for text in documents(corpus.split(name))]
    assert sorted(found) == sorted(many(100))
    assert sum(corpus.split(name).bytes for name in SPLITS) == sum(map(len, pieces)) - 100
    np.arange(50, dtype="<u2").tofile(tmp_path / "b.bin")  # no end of a document in it
    corpus = build_corpus(open_source(str(tmp_path / "b.bin")), tokenizer, tmp_path / "cache")
    assert corpus.split("train").tokens.tolist() == list(range(45))
    assert corpus.split("validation").tokens.tolist() == list(range(45, 50))


def test_wide_vocabularies_take_32_bits(tmp_path):
    class Wide(Bytes):
        vocabulary_size = 100_001
        end_of_document = 100_000

    corpus = build_corpus(source_of(tmp_path, ["0123456789"]), Wide(), tmp_path / "cache")
    assert corpus.split("train").tokens.dtype == np.uint32
    assert corpus.split("validation").tokens.tolist() == [ord("9"), 100_000]


# The cache


def test_it_is_tokenised_once_per_content_and_tokenizer(tmp_path):
    first, again, other = Bytes(), Bytes(), Bytes(shift=1)
    other.vocabulary_size = 300
    source = source_of(tmp_path, many())
    a = build_corpus(source, first, tmp_path / "cache")
    b = build_corpus(source_of(tmp_path, many(), "b.jsonl"), again, tmp_path / "cache")
    assert first.encoded == 400
    assert again.encoded == 0
    assert a.path == b.path
    assert build_corpus(source, other, tmp_path / "cache").path != a.path
    assert other.encoded == 400


@pytest.mark.parametrize("name", ["train.tokens", "test.starts", "metadata.json"])
def test_a_truncated_cache_is_noticed_and_built_anew(tmp_path, name):
    source = source_of(tmp_path, many())
    corpus = build_corpus(source, Bytes(), tmp_path / "cache")
    before = np.array(corpus.split("train").tokens)
    path = corpus.path / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(RuntimeWarning, match="damaged"):
        corpus = build_corpus(source, Bytes(), tmp_path / "cache")
    assert np.array_equal(corpus.split("train").tokens, before)
    assert [path.name for path in (tmp_path / "cache/corpora").iterdir()] == [corpus.path.name]


PROGRAM = """
import sys, time
from pathlib import Path
from train.corpus import build_corpus
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer

folder, start, slow = Path(sys.argv[1]), float(sys.argv[2]), len(sys.argv) > 3
tokenizer, source = load_tokenizer("bytes"), open_source(str(folder / "a.jsonl"))
class Slow:
    def __getattr__(self, name): return getattr(tokenizer, name)
    def encode_batch(self, texts):
        print("encoding", flush=True)
        time.sleep(60)
if not slow:
    time.sleep(max(0, start - time.time()))
corpus = build_corpus(source, Slow() if slow else tokenizer, folder / "cache")
print(hash(corpus.split("train").tokens.tobytes()), corpus.path)
"""


def run(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )


def test_processes_that_build_at_once_get_one_intact_corpus(tmp_path):
    import time

    source_of(tmp_path, many(20_000))
    start = str(time.time() + 1.0)
    processes = [run(tmp_path, start) for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(answers) == 1
    assert answers.pop().split()[1] == str(next((tmp_path / "cache/corpora").iterdir()))
    assert len(list((tmp_path / "cache/corpora").iterdir())) == 1


def test_a_build_that_is_killed_leaves_no_corpus(tmp_path):
    source_of(tmp_path, many())
    with run(tmp_path, "0", "slow") as process:
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGKILL)
    left = [path.name for path in (tmp_path / "cache/corpora").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".building-")
    with run(tmp_path, "0") as process:
        answer = process.communicate()[0]
    assert process.returncode == 0
    source = source_of(tmp_path, many())
    tokens = build_corpus(source, Bytes(), tmp_path / "mine").split("train").tokens
    assert (
        hashlib.sha256(tokens.tobytes()).digest()
        == hashlib.sha256(
            np.fromfile(f"{answer.split()[1]}/train.tokens", "<u2").tobytes()
        ).digest()
    )


# Not getrusage: what it tells of a child begins with what its parent held.
MEMORY = """
import re, sys
from pathlib import Path
from train.corpus import build_corpus
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer

build_corpus(open_source(sys.argv[1]), load_tokenizer("bytes"), Path(sys.argv[1]) / ".cache")
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="tells its memory on Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """With 48 MB more text, in one document or in many."""
    line = "some words of an endless text\n"
    megabytes = {}
    for kind, size in [("text", 24), ("text", 72), ("jsonl", 72)]:
        folder = tmp_path / f"{kind}{size}"
        folder.mkdir()
        with open(folder / ("a.txt" if kind == "text" else "a.jsonl"), "w") as file:
            record = line * 999 if kind == "text" else json.dumps({"text": line * 999}) + "\n"
            for _ in range(size * 1_000_000 // len(record)):
                file.write(record)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder)], stdout=subprocess.PIPE, text=True
        )
        megabytes[kind, size] = int(done.stdout)
    print(megabytes)
    # Kept whole, 48 MB would be as much as str and 192 MB as int32 ids.
    assert megabytes["text", 72] < megabytes["text", 24] + 32, megabytes
    assert megabytes["jsonl", 72] < megabytes["text", 24] + 32, megabytes


# Bad input


def test_errors_leave_nothing_behind(tmp_path):
    source = source_of(tmp_path, many())
    high = Bytes(shift=200)
    with pytest.raises(ValueError, match=r"ids from .* to 395, which are not all in \[0, 257\)"):
        build_corpus(source, high, tmp_path / "cache")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="0xff at offset 3"):
        build_corpus(open_source(str(tmp_path / "bad.txt")), Bytes(), tmp_path / "cache")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="too short to hold out"):
        build_corpus(open_source(str(tmp_path / "x.txt")), Bytes(), tmp_path / "cache")
    assert list((tmp_path / "cache/corpora").iterdir()) == []


def test_a_source_that_changes_while_it_is_read(tmp_path):
    source = source_of(tmp_path, many())

    class Meddler(Bytes):
        def encode_batch(self, texts):
            source_of(tmp_path, many(401))
            return super().encode_batch(texts)

    with pytest.raises(ValueError, match="changed while it was read"):
        build_corpus(source, Meddler(), tmp_path / "cache")


def test_progress_counts_all_bytes(tmp_path):
    seen = []

    def progress(description, total):
        seen.append(total)
        return Recorder()

    class Recorder:
        def __enter__(self):
            return seen.append

        def __exit__(self, *error):
            return None

    source = source_of(tmp_path, many())
    build_corpus(source, Bytes(), tmp_path / "cache", progress=progress)
    assert seen[0] == source.size == sum(seen[1:])


def test_a_bar_is_shown_only_for_long_work(tmp_path, monkeypatch, capsys):
    build_corpus(source_of(tmp_path, many()), Bytes(), tmp_path / "cache")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(byte_progress, "MOMENT", -1)
    build_corpus(source_of(tmp_path, many(401)), Bytes(), tmp_path / "cache")
    out, shown = capsys.readouterr()
    assert out == ""
    assert "tokenizing a.jsonl" in shown
