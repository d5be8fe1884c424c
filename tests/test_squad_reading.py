"""How questions and paragraphs are read: shared words, ranked sentences, marks and pieces."""

import numpy as np
import pytest

from train.tasks.squad_files import Answer, Question
from train.tasks.squad_reading import mark_ids, read_paragraph, read_question
from train.tasks.squad_words import ranked_sentences, sentences_of, shared_words, stem_of
from train.tokenizers.piece_offsets import pieces_of
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

TEXT = "The mill was old. Bob Lee sold mills in 1902! Zoë left it; it burned. Nobody cared."
ASKED = "Who sold the mill?"
QUESTION = Question(1, "1", "A", TEXT, ASKED, (Answer("Bob Lee", TEXT.index("Bob")),))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    words = [f"{a}{b} {TEXT}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    return train_sentencepiece(words, 320)


def test_words_are_shared_by_their_stems():
    assert [word.text for word in shared_words(TEXT, ASKED)] == ["mill", "sold", "mills"]
    assert [word.text for word in shared_words(ASKED, TEXT)] == ["sold", "mill"]
    assert shared_words("The who, and it.", "Who and it?") == []  # function words say nothing
    assert len({stem_of(word) for word in ("burn", "burns", "burned", "burning")}) == 1


def test_sentences_cover_the_text_and_are_ranked_by_what_they_share():
    found = sentences_of(TEXT)
    assert "".join(TEXT[a:b] for a, b in found) == TEXT
    assert [TEXT[a:b].split()[0] for a, b in found] == ["The", "Bob", "Zoë", "Nobody"]
    assert ranked_sentences(ASKED, TEXT) == [1, 0, 2, 3]
    # One rare word outweighs one that stands in every sentence; equals stay in order.
    text = "A mill. A mill and a mill. A mill that burned."
    assert ranked_sentences("Which mill burned?", text) == [2, 0, 1]
    assert ranked_sentences("Anything?", "") == [0]


def test_reading_in_another_order_loses_and_repeats_no_piece(tokenizer):
    (pieces,) = pieces_of([TEXT], tokenizer)
    marks = mark_ids(tokenizer)
    for told in (None, marks):
        plain = read_paragraph(QUESTION, pieces, told)
        turned = read_paragraph(QUESTION, pieces, told, "shared", marks)
        assert set(plain.sentences) == {1}
        for read in (plain, turned):
            places = [read.place_of(piece) for piece in range(len(pieces.ids))]
            np.testing.assert_array_equal(read.ids[places], pieces.ids)
            rest = np.delete(read.ids, places)
            assert np.isin(rest, marks).all()
        assert (plain.ids[plain.ids == marks[0]].size == 3) == (told is not None)
        first = turned.ids[turned.sentences == 1]
        assert first[0] == marks[1]
        kept = first[~np.isin(first, marks)]
        assert tokenizer.decode(kept).strip() == "Bob Lee sold mills in 1902!"
        assert sorted(set(turned.sentences.tolist())) == [1, 2, 3, 4]
        begins = turned.ids[np.isin(turned.ids, marks[1:])]
        np.testing.assert_array_equal(begins, marks[[1, 2, 3, 4]])
    (asked,) = pieces_of([ASKED], tokenizer)
    read = read_question(QUESTION, asked, marks)
    assert (read == marks[0]).sum() == 2
    np.testing.assert_array_equal(read[read != marks[0]], asked.ids)
    assert read_question(QUESTION, asked, None) is asked.ids


def test_a_tokenizer_without_control_characters_is_refused():
    class Without:
        def encode(self, text):
            return np.array([7])

        def decode_bytes(self, ids):
            return b"?" * len(ids)

    with pytest.raises(ValueError, match="no pieces for control characters"):
        mark_ids(Without())
