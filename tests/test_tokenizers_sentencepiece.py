"""SentencePiece: the same pieces anywhere, no text dropped, errors that say what would fit."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.tokenizers import tokenizer as public
from train.tokenizers.sentencepiece import _sample, open_sentencepiece
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards can't forge their locks"


def corpus() -> list[str]:
    draw = random.Random(0)
    words = [*WORDS.split(), "é", "日本", "def", "return", "self", "=", "(x):", "\n    "]
    return [" ".join(draw.choices(words, k=200)) for _ in range(20)]


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece(corpus(), 400)


def test_training_is_the_same_in_another_process(sentencepiece, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(corpus()))
    code = (
        "import json, sys; from train.tokenizers.tokenizer import train_sentencepiece as train;"
        "print(train(iter(json.load(open(sys.argv[1]))), 400).fingerprint())"
    )
    root = Path(public.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "corpus.json")],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == sentencepiece.fingerprint()
    assert train_sentencepiece(corpus()[:-1], 400).fingerprint() != sentencepiece.fingerprint()


def test_special_ids_of_a_trained_vocabulary(sentencepiece):
    assert sentencepiece.vocabulary_size == 400
    assert sentencepiece.end_of_document == 3
    assert [sentencepiece.decode_bytes([index]) for index in range(4)] == [b""] * 4
    assert sentencepiece.encode("\u2581").size == 3  # its bytes, not a space
    assert sentencepiece.encode(" the").size == 1


def test_indentation_and_line_ends_become_pieces():
    tokenizer = train_sentencepiece(["def f(x):\n        return x\n\n"] * 50, 298)
    assert tokenizer.encode(":\n").size == 1
    assert tokenizer.encode("        ").size == 1


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("pad " * 50_000 + "zanzibar " * 3000, " zanzibar"),  # far beyond the trainer's own limit
        ("zanzibar\u2585" * 3000, "zanzibar"),  # the trainer drops sentences with U+2585
        ("zanzibar\0" * 3000, "zanzibar"),
        (("пингвинариум " * 3000)[: 8 * 4096], " пингвинариум"),  # two bytes a character
    ],
    ids=["long line", "U+2585", "NUL", "long line in bytes"],
)
def test_no_training_text_is_dropped(line, piece):
    assert train_sentencepiece([line], 287).encode(piece).size == 1


def test_training_text_cannot_learn_a_special_or_byte_piece():
    tokenizer = train_sentencepiece(["<0x41></s><s><pad>\u2581x " * 500], 273)
    for text in ("<0x41>", "</s>", "<s>", "<pad>", "a</s>b", "\u2581x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode("</s><s><pad><unk>")) & {0, 1, 2, 3}


def test_sample_is_bounded_spread_and_read_once():
    read = []

    def documents():
        for index in range(100):
            read.append(index)
            yield (f"w{'abcdefghij'[index // 10]}zq " * 2000)[:8192]

    tokenizer = train_sentencepiece(documents(), 330, sample_characters=1 << 17)
    assert read == list(range(100))
    # The word of each tenth of the corpus was in the sample.
    assert all(tokenizer.encode(f" w{letter}zq").size == 1 for letter in "abcdefghij")


def test_sample_keeps_everything_that_fits():
    texts = ["a" * 5000, "", "b" * 3, "c" * 9000]
    assert "".join(_sample(texts, 20_000)) == "".join(texts)
    many = [f"{index:04d}" * 1024 for index in range(1000)]
    kept = _sample(iter(many), 100_000)
    assert 50_000 <= sum(map(len, kept)) <= 100_000
    stride = many.index(kept[1])
    assert kept == many[::stride]
    assert stride.bit_count() == 1


def test_training_errors_say_what_would_fit():
    with pytest.raises(
        ValueError, match=r"4096 is more than 11 characters .* ask for 286 or fewer"
    ):
        train_sentencepiece(["hello world"], 4096)
    assert train_sentencepiece(["hello world"], 286).vocabulary_size == 286
    many_characters = "".join(map(chr, range(0x4E00, 0x5200)))
    with pytest.raises(ValueError, match=r"does not hold .* ask for more than 1\d\d\d"):
        train_sentencepiece([many_characters], 300)
    with pytest.raises(ValueError, match="leaves no room"):
        train_sentencepiece(corpus(), 260)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", "\u2581"], 400)
    with pytest.raises(ValueError, match="at least"):
        train_sentencepiece(corpus(), 400, sample_characters=10)
    with pytest.raises(TypeError, match="iterable of documents"):
        train_sentencepiece("one string", 400)
    with pytest.raises(ValueError, match=r"document 1 has .* U\+D800 at character 5000"):
        train_sentencepiece(["fine", "x" * 5000 + "\ud800"], 400)


def foreign_model(**settings) -> bytes:
    import sentencepiece as library

    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        vocab_size=400,
        hard_vocab_limit=False,
        **settings,
    )
    return model.getvalue()


def test_foreign_models_do_what_the_library_does(tmp_path):
    import sentencepiece as library

    for settings in (
        {},  # unigram, NFKC, dummy prefix, no byte pieces
        {"model_type": "bpe", "byte_fallback": True, "split_digits": True},
        {  # all as ours but NFKC
            "model_type": "bpe",
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
    ):
        model = foreign_model(**settings)
        (tmp_path / "any.model").write_bytes(model)
        tokenizer = load_tokenizer(tmp_path / "any.model")
        assert not tokenizer.cuttable
        native = library.SentencePieceProcessor(model_proto=model)
        for text in ["the quick  brown fox", " lazy dog", "ﬁ wizards é", "jumps\u2581over"]:
            ids = native.encode(text)
            assert tokenizer.encode(text).tolist() == ids
            assert tokenizer.decode(ids) == native.decode(ids)
        ids = native.encode("the dog \U0001f600")
        assert tokenizer.decode(ids) == native.decode(ids)


def test_model_without_an_end_or_with_other_spaces():
    tokenizer = open_sentencepiece(foreign_model(eos_id=-1))
    with pytest.raises(ValueError, match="no end-of-document"):
        _ = tokenizer.end_of_document
    with pytest.raises(ValueError, match="leading U\\+2581"):
        open_sentencepiece(foreign_model(treat_whitespace_as_suffix=True))


@pytest.mark.parametrize("content", [b"", b"junk" * 50, b"{}"])
def test_what_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_scores_are_in_the_fingerprint(sentencepiece):
    model = sentencepiece.files["tokenizer.model"]
    marked = b"\x15" + np.float32(-3).tobytes()  # field 2 of a piece: its score
    assert model.count(marked) == 1
    changed = open_sentencepiece(model.replace(marked, b"\x15" + np.float32(-3.5).tobytes()))
    assert changed.fingerprint() != sentencepiece.fingerprint()


def test_sentencepiece_with_a_number_asks_for_a_corpus():
    with pytest.raises(ValueError, match=r"4096 pieces trained on a corpus.*train_sentencepiece"):
        load_tokenizer("sentencepiece:4096")
