"""Tokenizers: exact round trips, refusals, equal fingerprints, folders that survive a kill."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from train.tokenizers import pieces as tokenizers_pieces
from train.tokenizers import tokenizer as public
from train.tokenizers.bpe import byte_alphabet, open_tokenizer_json
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

END = "<|endoftext|>"


NASTY = [
    "",
    " ",
    "  double  spaces  ",
    "\t\ttabs\tinside \t",
    "\n\n\r\n\r",
    "\0",
    "a\0b \0 c",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581",
    "\u2581 leading, trailing \u2581",
    "\u2585 block \u2585x\u2585",
    "\u2047 \u2047",
    "<0x41><0xE2><0x0A>",
    "<s></s><pad><unk><bos>",
    f"{END}a{END}",
    "\ufeffbyte order mark",
    "\u00a0\u2003\u3000\u200b\u2028\u2029\x85\x1c",
    "\ufffd\ufffe\uffff\ufdd0\U0001fffe\U0010ffff",
    "e\u0301 \u00e9 \ufb01 \u2460 \uff21 \u0130 \u212b",  # what a normalization would change
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 日本語 हिन्दी עברית",
    "x" * 3000,
    " " * 3000,
    "don't we'll I've",
]


WORDS = "the quick brown fox jumps over a lazy dog while seven wizards can't forge their locks"


def random_texts(seed: int, count: int) -> list[str]:
    """Texts over all planes, with words, whitespace and U+2581 mixed in."""
    draw = random.Random(seed)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    usual = ["\u2581", " ", "  ", "\n", "\t", "\0", "\r\n", "<0x0A>", "</s>", END, *WORDS.split()]

    def part() -> str:
        if draw.random() < 0.6:
            return draw.choice(usual)
        return chr(draw.randrange(*draw.choice(planes)))

    return ["".join(part() for _ in range(draw.randrange(40))) for _ in range(count)]


def corpus() -> list[str]:
    draw = random.Random(0)
    words = [*WORDS.split(), "é", "日本", "def", "return", "self", "=", "(x):", "\n    "]
    return [" ".join(draw.choices(words, k=200)) for _ in range(20)]


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece(corpus(), 400)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A byte-level vocabulary of a few words in the two files of GPT-2."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("Ġ", "Ġ"), ("'", "t"), ("Ċ", "Ċ")]
    pieces = [*byte_alphabet(), *map("".join, merges), END]
    (folder / "vocab.json").write_text(json.dumps({p: index for index, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(params=["bytes", "sentencepiece", "gpt2"])
def tokenizer(request, sentencepiece, gpt2_folder):
    if request.param == "sentencepiece":
        return sentencepiece
    return load_tokenizer("bytes" if request.param == "bytes" else f"gpt2:{gpt2_folder}")


def test_round_trip_is_exact(tokenizer):
    texts = NASTY + random_texts(1, 2000)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        # Special ids never come out of a text.
        assert tokenizer.end_of_document not in ids
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size


def test_every_code_point_around_the_special_ones_round_trips(tokenizer):
    near = {*range(0x500), *range(0x2000, 0x2100), *range(0x2500, 0x2600), *range(0xFD00, 0x10000)}
    text = "".join(map(chr, sorted(near)))
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_bytes_join_one_id_at_a_time(tokenizer):
    text = "héllo  wörld \u2581 日本語 \U0001f600\n"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.decode_bytes([index]) for index in ids) == text.encode()


def test_a_cut_character_decodes_to_the_replacement_character(tokenizer):
    whole = tokenizer.encode("\U0001f600")  # in no vocabulary here, so one id a byte
    assert tokenizer.decode(whole[:-1]) == "\ufffd"


def test_batch_equals_single_whatever_the_cuts(tokenizer, monkeypatch):
    texts = [*corpus(), *NASTY, *random_texts(2, 50), "\n".join(corpus() + random_texts(3, 300))]
    calls = []

    def counted(parts):
        calls.append(len(parts))
        return tokenizer.encode_parts(parts)

    whole = dataclasses.replace(tokenizer, cuttable=False, encode_parts=counted)
    expected = [whole.encode(text) for text in texts]
    assert set(calls) == {1}
    calls.clear()
    monkeypatch.setattr(tokenizers_pieces, "PART", 3)
    monkeypatch.setattr(tokenizers_pieces, "CHARACTERS_PER_CALL", 500)
    cut = dataclasses.replace(tokenizer, encode_parts=counted)
    for text, one, ids in zip(texts, expected, cut.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, one, err_msg=repr(text[:80]))
    assert sum(calls) > 5 * len(texts), "the texts were not cut"
    assert len(calls) > 5, "one native call took everything"


def test_gpt2_agrees_with_the_library_on_random_text(gpt2_folder):
    library = pytest.importorskip("tokenizers")
    native = library.ByteLevelBPETokenizer.from_file(
        str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt")
    )
    tokenizer = load_tokenizer(gpt2_folder)
    for text in [*NASTY, *random_texts(5, 200)]:
        if END not in text:
            ids = native.encode(text).ids
            assert tokenizer.encode(text).tolist() == ids
            assert tokenizer.decode(ids) == native.decode(ids)


def test_empty_batch_and_empty_text(tokenizer):
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


def test_lone_surrogates_are_refused_with_their_position(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D83D at character 3"):
        tokenizer.encode("abc\ud83d")
    with pytest.raises(ValueError, match=r"text 1 has .* U\+DC00 at character 0"):
        tokenizer.encode_batch(["é", "\udc00\ud800"])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud83d\ude00")  # two halves in a str are not one character


def test_wrong_types_are_refused(tokenizer):
    with pytest.raises(TypeError, match="sequence of texts"):
        tokenizer.encode_batch("abc")
    with pytest.raises(TypeError, match="bytes, not str"):
        tokenizer.encode(b"abc")


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocabulary_size):
        with pytest.raises(ValueError, match=f"id {bad} is outside"):
            tokenizer.decode([0, bad])
    with pytest.raises(ValueError, match="integers"):
        tokenizer.decode_bytes([1.0])


def test_end_of_document_is_no_text(tokenizer):
    ids = tokenizer.encode("ab").tolist()
    end = tokenizer.end_of_document
    assert 0 <= end < tokenizer.vocabulary_size
    assert tokenizer.decode_bytes([end, *ids, end, end, *ids]) == b"abab"


def test_saved_folder_is_self_contained(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a" / "tokenizer")
    tokenizer.save(tmp_path / "a" / "tokenizer")  # again: nothing changes
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "moved")
    loaded = load_tokenizer(tmp_path / "moved")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.vocabulary_size == tokenizer.vocabulary_size
    assert loaded.end_of_document == tokenizer.end_of_document
    texts = NASTY + random_texts(4, 200)
    for one, other in zip(tokenizer.encode_batch(texts), loaded.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(one, other)
    record = (tmp_path / "moved" / "kind.json").read_text()
    assert str(tmp_path) not in record
    loaded.save(tmp_path / "second")
    for path in (tmp_path / "moved").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_kinds_and_vocabularies_have_different_fingerprints(sentencepiece, gpt2_folder):
    description = json.loads(load_tokenizer(gpt2_folder).files["tokenizer.json"])
    description["normalizer"] = {"type": "NFC"}
    others = [
        load_tokenizer("bytes"),
        load_tokenizer(gpt2_folder),
        sentencepiece,
        train_sentencepiece(corpus(), 401),
        open_tokenizer_json(json.dumps(description).encode()),
    ]
    assert len({other.fingerprint() for other in others}) == len(others)


def test_save_refuses_a_folder_of_another_tokenizer(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    for other in (load_tokenizer("bytes"), train_sentencepiece(corpus(), 401)):
        with pytest.raises(ValueError, match="belongs to another tokenizer"):
            other.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == sentencepiece.fingerprint()


def test_save_that_is_killed_leaves_no_record_and_can_be_repeated(
    sentencepiece, tmp_path, monkeypatch
):
    replace = os.replace

    def fail_at_the_record(source, target):
        if Path(target).name == "kind.json":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_record)
    with pytest.raises(OSError, match="disk full"):
        sentencepiece.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    monkeypatch.undo()
    sentencepiece.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == sentencepiece.fingerprint()


def test_many_may_save_the_same_folder_at_once(sentencepiece, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sentencepiece.save, [tmp_path] * 32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kind.json", "tokenizer.model"]
    assert load_tokenizer(tmp_path).fingerprint() == sentencepiece.fingerprint()


def test_damaged_folders_are_refused(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    model, record = tmp_path / "tokenizer.model", tmp_path / "kind.json"
    good_model, good_record = model.read_bytes(), record.read_text()
    flipped = bytearray(good_model)
    flipped[len(flipped) // 2] ^= 1
    model.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"tokenizer\.model was changed or damaged"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        load_tokenizer(tmp_path)
    model.write_bytes(good_model)
    for bad, message in [
        (good_record[:40], "not a tokenizer's record"),
        ("[]", "not a tokenizer's record"),
        (good_record.replace('"format": 1', '"format": 2'), "format 2"),
        (good_record.replace('"sentencepiece"', '"other"'), "kind 'other'; known are bytes"),
        (good_record.replace("tokenizer.model", "../tokenizer.model"), "outside its folder"),
    ]:
        record.write_text(bad)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_unknown_specs_list_what_is_possible(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    for spec in ("nothing", "gpt3:there", tmp_path, tmp_path / "notes.txt", tmp_path / "x.model"):
        with pytest.raises(ValueError, match="Possible are: bytes") as error:
            load_tokenizer(spec)
        for name in ("gpt2:FOLDER", "tokenizer.json", ".model", "vocab.json + merges.txt"):
            assert name in str(error.value)
    with pytest.raises(ValueError, match=r"vocab\.json \+ merges\.txt or encoder\.json"):
        load_tokenizer(f"gpt2:{tmp_path}")
    with pytest.raises(ValueError, match="no argument"):
        load_tokenizer("bytes:8")


def test_relative_paths_named_like_a_kind_are_paths(gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("gpt2", "gpt2:", "tokenizer.json"):
        with pytest.raises(ValueError, match="not there"):
            load_tokenizer(spec)
    Path("gpt2").symlink_to(gpt2_folder)
    assert load_tokenizer("gpt2").fingerprint() == load_tokenizer(gpt2_folder).fingerprint()
    Path("tokenizer.json").write_bytes(load_tokenizer("gpt2").files["tokenizer.json"])
    assert load_tokenizer("tokenizer.json").fingerprint() == load_tokenizer("gpt2").fingerprint()


def test_importing_the_module_imports_no_library():
    code = (
        "import sys, train.tokenizers.tokenizer;"
        "print([m for m in ('sentencepiece', 'tokenizers', 'google.protobuf') if m in sys.modules])"
    )
    root = Path(public.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
