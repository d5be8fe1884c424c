"""Byte-level BPE and tokenizer.json: GPT-2's own vectors, no forged document ends."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from train.tokenizers import pieces as tokenizers_pieces
from train.tokenizers.bpe import byte_alphabet, open_tokenizer_json
from train.tokenizers.tokenizer import load_tokenizer

END = "<|endoftext|>"


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


def test_gpt2_files_by_either_name_and_spec(gpt2_folder, tmp_path):
    (tmp_path / "encoder.json").write_bytes((gpt2_folder / "vocab.json").read_bytes())
    (tmp_path / "vocab.bpe").write_bytes((gpt2_folder / "merges.txt").read_bytes())
    specs = [f"gpt2:{gpt2_folder}", gpt2_folder, str(gpt2_folder), tmp_path, f"gpt2:{tmp_path}"]
    assert len({load_tokenizer(spec).fingerprint() for spec in specs}) == 1


def test_gpt2_pieces_are_merged(gpt2_folder):
    tokenizer = load_tokenizer(gpt2_folder)
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    assert tokenizer.encode(" the x").tolist() == [vocabulary["Ġthe"], *map(vocabulary.get, "Ġx")]
    assert tokenizer.end_of_document == vocabulary[END]


def test_a_text_cannot_forge_the_end_of_a_document(gpt2_folder, tmp_path):
    load_tokenizer(gpt2_folder).save(tmp_path)
    for tokenizer in (load_tokenizer(gpt2_folder), load_tokenizer(tmp_path)):
        ids = tokenizer.encode(f"a{END}b")
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids) == f"a{END}b"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"add_prefix_space": True}},
        {"pre_tokenizer": {"use_regex": False}},
        {"added_tokens": {"special": False, "content": "x y", "id": 264}},
    ],
    ids=["normalizer", "prefix space", "no words", "added token with a space"],
)
def test_only_what_is_split_like_gpt2_is_cut(gpt2_folder, change, monkeypatch):
    library = pytest.importorskip("tokenizers")
    plain = load_tokenizer(gpt2_folder)
    given = json.loads(plain.files["tokenizer.json"])
    if "normalizer" in change:
        given |= change
    elif "pre_tokenizer" in change:
        given["pre_tokenizer"] |= change["pre_tokenizer"]
    else:
        given["added_tokens"] += [given["added_tokens"][0] | change["added_tokens"]]
    content = json.dumps(given)
    monkeypatch.setattr(tokenizers_pieces, "PART", 3)
    tokenizer = open_tokenizer_json(content.encode())
    native = library.Tokenizer.from_str(content)
    text = "the quick brown x y fox jumps"
    assert tokenizer.encode(text).tolist() == native.encode(text).ids
    assert not tokenizer.cuttable
    assert plain.cuttable


def test_published_gpt2_vectors():
    """Set ACCELERANDO_DATA to a folder with gpt2_bpe/ (vocabulary and vectors) to run this."""
    if not (data := os.environ.get("ACCELERANDO_DATA")):
        pytest.skip("ACCELERANDO_DATA names no folder")
    folder = Path(data) / "gpt2_bpe" if (Path(data) / "gpt2_bpe").is_dir() else Path(data)
    (path,) = folder.glob("vectors*.json")
    vectors = json.loads(path.read_text(encoding="utf-8"))["vectors"]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocabulary_size == 50257
    assert tokenizer.end_of_document == 50256
    assert len(vectors) == 44
    for vector in vectors:
        assert tokenizer.encode(vector["text"]).tolist() == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == vector["text"]


def llama_json(**changes) -> bytes:
    """A tokenizer.json in the manner of Llama 2: U+2581 for spaces, byte fallback, dummy prefix."""
    library = pytest.importorskip("tokenizers")
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcde"]
    merges = [("\u2581", "a"), ("b", "c")]
    pieces += ["".join(merge) for merge in merges]
    native = library.Tokenizer(
        library.models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    native.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
    )
    native.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace("\u2581", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    native.add_special_tokens(special)
    return json.dumps({**json.loads(native.to_str()), **changes}).encode()


def test_llama_like_tokenizer_json(tmp_path):
    library = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(llama_json())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.fingerprint() == load_tokenizer(tmp_path / "tokenizer.json").fingerprint()
    assert tokenizer.end_of_document == 2
    assert not tokenizer.cuttable
    native = library.Tokenizer.from_str(llama_json().decode())
    for text in ("a bc  de", "  abc", "é \U0001f600", "\n", "a</s>b<s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert native.decode(ids.tolist()) == text
    smile = tokenizer.encode("\U0001f600")[1:]  # after the dummy prefix
    assert [tokenizer.decode_bytes([index]) for index in smile] == [
        bytes([byte]) for byte in "\U0001f600".encode()
    ]
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_truncation_padding_and_dropout_in_the_file_are_off():
    given = json.loads(llama_json())
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    spoiled = {
        **given,
        "truncation": truncation,
        "padding": padding,
        "model": {**given["model"], "dropout": 0.9},
    }
    tokenizer = open_tokenizer_json(json.dumps(spoiled).encode())
    plain = open_tokenizer_json(llama_json())
    assert tokenizer.fingerprint() == plain.fingerprint()
    for text in ("a", "a bc de " * 20):
        np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))


def test_what_changes_encoding_changes_the_fingerprint():
    plain = open_tokenizer_json(llama_json()).fingerprint()
    assert open_tokenizer_json(llama_json(normalizer=None)).fingerprint() != plain
    assert open_tokenizer_json(llama_json(post_processor=None)).fingerprint() == plain
    respaced = json.dumps(json.loads(llama_json()), indent=3).encode()
    assert open_tokenizer_json(respaced).fingerprint() == plain


def test_tokenizer_json_without_an_end_or_a_byte_decoder():
    library = pytest.importorskip("tokenizers")
    native = library.Tokenizer(
        library.models.WordPiece({"un": 0, "##like": 1, "##ly": 2, "[X]": 7}, unk_token="[X]")
    )
    native.pre_tokenizer = library.pre_tokenizers.Whitespace()
    native.decoder = library.decoders.WordPiece()
    tokenizer = open_tokenizer_json(native.to_str().encode())
    assert tokenizer.vocabulary_size == 8  # ids 3-6 are holes
    assert tokenizer.encode("unlikely dog un").tolist() == [0, 1, 2, 7, 0]
    assert tokenizer.decode([0, 1, 2, 0]) == "unlikely un"
    with pytest.raises(ValueError, match="no end-of-document"):
        _ = tokenizer.end_of_document


def test_added_tokens_that_are_text_stay_text():
    given = json.loads(llama_json())
    size = len(given["model"]["vocab"])
    added = {**given["added_tokens"][0], "id": size, "content": "é é", "special": False}
    tokenizer = open_tokenizer_json(
        llama_json(added_tokens=[*given["added_tokens"], added], normalizer=None)
    )
    assert size in tokenizer.encode("aé éb")
    assert tokenizer.decode_bytes(tokenizer.encode("aé éb")) == "aé éb".encode()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_what_is_no_tokenizer_json_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_bad_gpt2_files_are_refused(gpt2_folder, tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "merges.txt").read_bytes())
    with pytest.raises(ValueError, match="as BPE"):
        load_tokenizer(tmp_path)


def test_missing_library_names_the_extra(gpt2_folder, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(llama_json())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for spec in (gpt2_folder, tmp_path):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[hf\]'"):
            load_tokenizer(spec)
