"""Pieces and the bytes they lie at, for tokenizers of every kind."""

import numpy as np
import pytest

from train.tokenizers.piece_offsets import pieces_of
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

TEXTS = ["Zoë paid 24→10 euros (in 2016).", "  two  spaces\nand a line", "", "日本 → x"]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return train_sentencepiece([text * 3 for text in TEXTS] + ["and a line paid in euros"], 310)


def test_pieces_tile_the_text(tokenizer):
    for text, pieces in zip(TEXTS, pieces_of(TEXTS, tokenizer), strict=True):
        assert pieces.text == text.encode()
        ends = pieces.ends.tolist()
        assert ends == sorted(ends)
        assert len(ends) == len(pieces.ids)
        assert (ends or [0])[-1] == len(pieces.text)
        for at in range(len(ends)):  # what is before a cut is what those pieces alone give
            assert pieces.text[: ends[at]].endswith(tokenizer.decode_bytes(pieces.ids[: at + 1]))


def test_spans_are_the_least_that_cover(tokenizer):
    for text, pieces in zip(TEXTS, pieces_of(TEXTS, tokenizer), strict=True):
        begins = [0, *pieces.ends.tolist()]
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                a, b = (len(text[:at].encode()) for at in (start, end))
                first, last = pieces.span_of(a, b)
                assert begins[first] <= a < begins[first + 1]
                assert begins[last] < b <= begins[last + 1]
                assert text[start:end].strip() in pieces.text_of(first, last)
                if len(pieces.ids) == len(pieces.text):  # bytes: nothing more than asked for
                    assert text[start:end].strip() == pieces.text_of(first, last)


def test_a_part_of_a_character_is_taken_whole():
    pieces = pieces_of(["aë→"], load_tokenizer("bytes"))[0]
    assert pieces.text_of(2, 3) == "ë→"


def test_a_tokenizer_that_changes_text_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    from train.tokenizers.bpe import open_tokenizer_json

    model = tokenizers.models.WordLevel({"ann": 0, "paid": 1, "a": 2, "[UNK]": 3}, "[UNK]")
    native = tokenizers.Tokenizer(model)
    native.normalizer = tokenizers.normalizers.Lowercase()
    native.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="does not give 'Ann paid'"):
        pieces_of(["Ann paid"], open_tokenizer_json(native.to_str().encode()))


def test_ids_are_those_of_the_whole_text(tokenizer):
    for text, pieces in zip(TEXTS, pieces_of(TEXTS, tokenizer), strict=True):
        np.testing.assert_array_equal(pieces.ids, tokenizer.encode(text))
