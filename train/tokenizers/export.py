"""A run's tokenizer as the files that `transformers.AutoTokenizer` opens, without transformers.

Read is the folder that a tokenizer's `save` wrote, not the object: what kind it is stands there.
The files split text as ours do, with two exceptions that lie in that library: the text of a special
token (`</s>`) becomes that token, and SentencePiece takes U+2581 for a space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.tokenizers.bpe import byte_alphabet
from train.tokenizers.pieces import read_saved
from train.tokenizers.sentencepiece import MODEL, SPACE
from train.tokenizers.tokenizer import load_tokenizer

CONFIG = "tokenizer_config.json"
END_OF_BYTES = "<|endoftext|>"  # what id 256 of the raw bytes is called there


def export_files(folder: Path) -> dict[str, bytes]:
    """Returns name -> content of the files that hold a saved tokenizer for transformers.

    Args:
      folder: what `Tokenizer.save` wrote.

    Raises:
      ValueError: the folder is damaged, or the tokenizer is one that transformers cannot open.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     load_tokenizer("bytes").save(Path(name))
    ...     sorted(export_files(Path(name)))
    ['tokenizer.json', 'tokenizer_config.json']
    """
    kind, files = read_saved(folder)
    end = load_tokenizer(folder).end_of_document
    if kind not in _EXPORTS:
        raise ValueError(f"no file of transformers holds a tokenizer of kind {kind!r}")
    exported, config = _EXPORTS[kind](files, end)
    return exported | {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


Export = tuple[dict[str, bytes], dict[str, Any]]


def _from_bytes(files: Mapping[str, bytes], end: int) -> Export:
    """Raw bytes are GPT-2's byte-level BPE without a single merge."""
    alphabet = byte_alphabet()
    vocabulary = {character: alphabet[character] for character in alphabet} | {END_OF_BYTES: end}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": end, "content": END_OF_BYTES, **special, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return _from_json({"tokenizer.json": json.dumps(content).encode()}, end)


def _from_json(files: Mapping[str, bytes], end: int) -> Export:
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    name = next(token["content"] for token in added if token["id"] == end)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": name,
        "clean_up_tokenization_spaces": False,  # decoding must not move spaces
    }
    return dict(files), config


def _from_sentencepiece(files: Mapping[str, bytes], end: int) -> Export:
    """`LlamaTokenizer` reads byte-pair models with byte fallback, like those that we train.

    Raises:
      ValueError: the model is of another type, which that class would split wrongly.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL])
    ids = list(range(processor.vocab_size()))
    # Whole scores are ranks of merges; a unigram model has logarithms of probabilities.
    if not all(score.is_integer() for score in processor.get_score(ids)):
        raise ValueError(
            "the SentencePiece model is no byte-pair one, and transformers opens no other as a "
            "tokenizer.model: convert it to a tokenizer.json there"
        )
    if sum(processor.is_byte(ids)) != 256:
        raise ValueError(
            "the SentencePiece model has no byte pieces, with which transformers reckons: convert "
            "it to a tokenizer.json there"
        )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,  # our documents are told apart by their end alone
        "add_prefix_space": processor.normalize("a") == SPACE + "a",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": processor.id_to_piece(end),
    }
    for name, index in (("bos_token", processor.bos_id()), ("unk_token", processor.unk_id())):
        if index >= 0:
            config[name] = processor.id_to_piece(index)
    if processor.pad_id() >= 0:
        config["pad_token"] = processor.id_to_piece(processor.pad_id())
    return {MODEL: files[MODEL]}, config


# By the kind that a saved tokenizer records.
_EXPORTS: dict[str, Callable[[Mapping[str, bytes], int], Export]] = {
    "bytes": _from_bytes,
    "tokenizer.json": _from_json,
    "sentencepiece": _from_sentencepiece,
}
