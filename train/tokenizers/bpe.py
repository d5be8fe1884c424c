"""Any ``tokenizer.json``, and GPT-2's byte-level BPE from its two files, by Hugging Face's library.

Text is only ever text: a literal ``<|endoftext|>`` in a document is encoded as its characters, so
a document cannot forge the end of one. Truncation, padding and BPE dropout that a file switches on
are switched off. Source of byte-level BPE: Radford et al., "Language models are unsupervised
multitask learners", 2019.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from model.extras import from_extra
from train.tokenizers.pieces import PieceTokenizer, sha256, table_join

# Names under which the end of a document is looked for among the special tokens, in this order.
END_OF_DOCUMENT = (
    "<|endoftext|>",  # GPT-2, GPT-NeoX, Qwen
    "<|end_of_text|>",  # Llama 3
    "</s>",  # Llama 2, Mistral, T5, RoBERTa
    "<eos>",  # Gemma
    "<｜end▁of▁sentence｜>",  # DeepSeek  # noqa: RUF001
    "[EOS]",
    "[SEP]",  # BERT
)


def open_tokenizer_json(content: bytes) -> PieceTokenizer:
    """The tokenizer of a ``tokenizer.json`` file's content.

    Whether a round trip is exact is what the file gives. ``decode_bytes`` is exact for byte-level
    and for byte-fallback tokenizers; other decoders (WordPiece, ...) yield text, encoded as UTF-8.

    Raises:
        ValueError: the library cannot read it.
        ImportError: the library ``tokenizers`` is not installed.
    """
    library = _library()
    try:
        given = json.loads(content)
        given |= {"truncation": None, "padding": None}
        if given["model"].get("dropout"):
            given["model"]["dropout"] = None  # encoding must be a function of the text
        native = library.Tokenizer.from_str(json.dumps(given))
    except Exception as error:  # what the library raises is a plain Exception
        raise ValueError(f"not a tokenizer.json that `tokenizers` can read: {error}") from None
    native.encode_special_tokens = True  # special tokens in a text are text

    description = json.loads(native.to_str())  # as the library understood it, defaults filled in
    vocabulary: dict[str, int] = native.get_vocab(with_added_tokens=True)
    special = {token["content"] for token in description["added_tokens"] if token["special"]}
    size = max(vocabulary.values(), default=-1) + 1
    ignored = ("version", "truncation", "padding", "post_processor", "decoder")
    encoding = {key: value for key, value in description.items() if key not in ignored}

    def encode_parts(parts: list[str]) -> list[np.ndarray]:
        encoded = native.encode_batch_fast(parts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    return PieceTokenizer(
        kind="tokenizer.json",
        vocabulary_size=size,
        encode_parts=encode_parts,
        join=_join(description, vocabulary, size, native),
        digest=sha256(json.dumps(encoding, sort_keys=True).encode()),
        end=next((vocabulary[name] for name in END_OF_DOCUMENT if name in special), None),
        cuttable=_is_gpt2_like(description),
        files={"tokenizer.json": content},
    )


def open_gpt2(vocabulary: Path, merges: Path) -> PieceTokenizer:
    """GPT-2's byte-level BPE from ``vocab.json`` + ``merges.txt`` (or OpenAI's own names for them).

    The first of ``END_OF_DOCUMENT`` that the vocabulary holds becomes its end of document.

    Raises:
        ValueError: the library cannot read the files.
        ImportError: the library ``tokenizers`` is not installed.
    """
    library = _library()
    try:
        model = library.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # what the library raises is a plain Exception
        raise ValueError(f"cannot read {vocabulary} and {merges} as BPE: {error}") from None
    native = library.Tokenizer(model)
    native.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = library.decoders.ByteLevel()
    ends = [name for name in END_OF_DOCUMENT if native.token_to_id(name) is not None]
    native.add_special_tokens(ends[:1])
    return open_tokenizer_json(native.to_str().encode())


def byte_alphabet() -> dict[str, int]:
    """GPT-2's visible characters for the 256 bytes: character -> byte.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100 and up.

    >>> alphabet = byte_alphabet()
    >>> len(alphabet), alphabet["A"], alphabet["Ġ"]
    (256, 65, 32)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _library() -> Any:
    what = "byte-level BPE and tokenizer.json need the library `tokenizers`"
    return from_extra("tokenizers", "hf", what)


def _join(
    description: dict[str, Any], vocabulary: dict[str, int], size: int, native: Any
) -> Callable[[list[int]], bytes]:
    """How ids become bytes: by a table where the decoder is one we know, else by the library."""
    decoder = description["decoder"] or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    names = {step["type"] for step in steps}
    prefix = b""
    if names == {"ByteLevel"}:
        alphabet = byte_alphabet()

        def piece_bytes(piece: str) -> bytes:
            if all(character in alphabet for character in piece):
                return bytes([alphabet[character] for character in piece])
            return piece.encode()
    elif "ByteFallback" in names and all(_is_space_step(step) for step in steps):
        prefix = b" " if "Strip" in names else b""

        def piece_bytes(piece: str) -> bytes:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode()
    else:
        return lambda ids: native.decode(ids, skip_special_tokens=True).encode()

    table = [b""] * size  # an id that the file leaves out gives nothing
    for piece, index in vocabulary.items():
        table[index] = piece_bytes(piece)
    for token in description["added_tokens"]:
        table[token["id"]] = b"" if token["special"] else token["content"].encode()
    return table_join(table, stripped_prefix=prefix)


def _is_space_step(step: dict[str, Any]) -> bool:
    """Whether a decoder step is one of those of Llama 2 and Gemma, which the table reproduces."""
    return (
        step["type"] in ("ByteFallback", "Fuse")
        or step == {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        or step == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    )


def _is_gpt2_like(description: dict[str, Any]) -> bool:
    """Whether words are split as GPT-2 splits them: no word spans a non-space and then a space."""
    before = description["pre_tokenizer"] or {}
    return (
        description["model"]["type"] == "BPE"
        and description["normalizer"] is None
        and before.get("type") == "ByteLevel"
        and before["use_regex"]
        and not before["add_prefix_space"]
        and all(token["special"] for token in description["added_tokens"])
    )
