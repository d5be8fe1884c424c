"""SentencePiece: train a byte-pair vocabulary on the corpus, or open a ``.model`` file.

SentencePiece writes a space as U+2581 inside its pieces and so takes a real U+2581 for a space; its
trainer drops sentences that are too long or that hold U+2585. Both are worked around here, so that
a vocabulary trained here gives back any valid Unicode text exactly and sees all the text it was
given. Source: Kudo and Richardson, "SentencePiece", 2018, arXiv:1808.06226.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.tokenizers.pieces import PieceTokenizer, require_unicode, sha256, table_join

MODEL = "tokenizer.model"
SPACE = "\u2581"  # how SentencePiece writes a space
# Characters that the trainer must not see: it reads U+2581 as a space, and skips the whole
# sentence at U+2585, its internal mark for unknown characters.
_RESERVED = re.compile("[\u2581\u2585]")
# Characters per training sentence. Newlines stay inside, so that pieces such as ":\n" are learned
# (6 % fewer tokens on Python source than one sentence per line).
_SENTENCE = 4096
_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # indentation: 35 % fewer tokens on Python source
    "max_sentence_length": 4 * _SENTENCE,  # in bytes; a character has at most four
    "num_threads": 1,  # one thread, so that nothing depends on the number of cores
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "minloglevel": 2,
}
_FIXED_PIECES = 4 + 256  # the special ids above and the byte pieces


def train_sentencepiece(
    texts: Iterable[str], vocabulary_size: int, *, sample_characters: int = 4_000_000
) -> PieceTokenizer:
    """Train a byte-pair vocabulary on documents; the same documents give the same pieces anywhere.

    One pass over ``texts`` keeps every k-th stretch of 4,096 characters, k being the least power
    of two with which they fit into ``sample_characters``: no randomness, memory bounded by the
    sample, all of the corpus represented, nothing left out of a corpus that fits.

    Args:
        texts: documents, read once.
        vocabulary_size: number of ids, the 4 special and 256 byte pieces included.
        sample_characters: most characters to train on. 4 million take about a second of one core
            for Python source, and about five for text without spaces between words.

    Raises:
        ValueError: too little text for so many pieces (the message says how many it gives), too
            few pieces for the text's characters, or a lone surrogate.

    >>> tokenizer = train_sentencepiece(["to be or not to be, that is the question"] * 9, 290)
    >>> ids = tokenizer.encode("to be\u2581")
    >>> [tokenizer.decode_bytes([index]) for index in ids]
    [b'to', b' be', b'\xe2', b'\x96', b'\x81']
    """
    import sentencepiece

    if vocabulary_size <= _FIXED_PIECES:
        raise ValueError(
            f"vocabulary_size={vocabulary_size} leaves no room beside the {_FIXED_PIECES} special"
            " and byte pieces: ask for 512 or more, or use the tokenizer 'bytes'"
        )
    sample = _sample(texts, sample_characters)
    sentences = [part for text in sample for part in _RESERVED.split(text) if part]
    characters = sum(map(len, sentences))
    if not sentences:
        raise ValueError("there is no text to train SentencePiece on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocabulary_size,
            **_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocabulary_size, characters)) from None
    return open_sentencepiece(model.getvalue())


def open_sentencepiece(model: bytes) -> PieceTokenizer:
    """The tokenizer of a serialized SentencePiece model.

    Models trained here are exact for any valid Unicode text. For others it is what the model
    gives: its normalization, its dummy prefix (one leading space, taken off again when decoding),
    its unknown piece where it has no byte pieces.

    Raises:
        ValueError: not a SentencePiece model, or one that marks spaces at the end of words.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = processor.vocab_size() if model else 0
        # The wrapper knows what the processor does not tell: the normalization settings.
        normalizer = sentencepiece.SentencePieceNormalizer(model_proto=model) if size else None
    except RuntimeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    if normalizer is None:
        raise ValueError("not a SentencePiece model: it holds no pieces")
    prefixed = processor.normalize("a")
    if prefixed not in ("a", SPACE + "a") or processor.normalize("a b") != prefixed + SPACE + "b":
        raise ValueError(
            "this SentencePiece model does not mark spaces with a leading U+2581, the only way"
            " that is supported: convert it to a tokenizer.json"
        )
    dummy_prefix = prefixed != "a"

    ids = list(range(size))
    pieces: list[str] = processor.id_to_piece(ids)
    scores: list[float] = processor.get_score(ids)
    control, byte = processor.is_control(ids), processor.is_byte(ids)
    unknown, unused = processor.is_unknown(ids), processor.is_unused(ids)
    byte_ids = {int(pieces[index][3:5], 16): index for index in ids if byte[index]}  # "<0x41>"
    byte_fallback = len(byte_ids) == 256

    def piece_bytes(index: int) -> bytes:
        if control[index] or (unknown[index] and byte_fallback):
            return b""
        if unknown[index]:  # stands for some text here, so it is shown: usually as U+2047
            return processor.decode([index]).encode()
        if byte[index]:
            return bytes([int(pieces[index][3:5], 16)])
        return pieces[index].replace(SPACE, " ").encode()

    exact = (
        byte_fallback
        and processor.normalize(" a  b ") == f"{SPACE}a{SPACE}{SPACE}b{SPACE}"
        and _is_identity(normalizer)
    )
    escape = np.array([byte_ids[value] for value in SPACE.encode()] if exact else [], np.int32)

    def encode_parts(parts: list[str]) -> list[np.ndarray]:
        if not exact or not any(SPACE in part for part in parts):
            return processor.encode(parts, return_type="numpy", num_threads=-1)
        # A real U+2581 goes in as its three byte pieces, between the texts on either side of it.
        split = [part.split(SPACE) for part in parts]
        flat = [text for texts in split for text in texts]
        arrays = iter(processor.encode(flat, return_type="numpy", num_threads=-1))
        return [
            np.concatenate([next(arrays), *(x for _ in texts[1:] for x in (escape, next(arrays)))])
            for texts in split
        ]

    encoding = {
        "kind": "sentencepiece",
        "pieces": pieces,
        "scores": [float(score).hex() for score in scores],
        "types": [control, byte, unknown, unused],
        "normalizer": normalizer.serialized_normalizer_spec().hex(),
        "end": processor.eos_id(),
    }
    return PieceTokenizer(
        kind="sentencepiece",
        vocabulary_size=size,
        encode_parts=encode_parts,
        join=table_join(
            [piece_bytes(index) for index in ids], stripped_prefix=b" " if dummy_prefix else b""
        ),
        digest=sha256(json.dumps(encoding).encode()),
        end=processor.eos_id() if processor.eos_id() >= 0 else None,
        # Whole scores are ranks of merges: byte-pair, where what a piece cannot span does not
        # matter beyond it. A unigram model compares sums over the whole text, which round.
        cuttable=exact
        and all(score.is_integer() for score in scores)
        and not any(SPACE in piece.lstrip(SPACE) for piece in pieces),
        files={MODEL: model},
    )


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Every k-th stretch of the texts, k the least power of two with which they fit the budget."""
    if isinstance(texts, str):
        raise TypeError("train_sentencepiece takes an iterable of documents, not one string")
    if budget < _SENTENCE:
        raise ValueError(f"sample_characters={budget} must be at least {_SENTENCE}")
    kept: list[str] = []
    size, stride, seen = 0, 1, 0
    for document, text in enumerate(texts):
        for start in range(0, len(text), _SENTENCE):
            if seen % stride == 0:
                stretch = text[start : start + _SENTENCE]
                require_unicode(stretch, where=f"document {document}", offset=start)
                kept.append(stretch)
                size += len(stretch)
                while size > budget:
                    kept = kept[::2]
                    size, stride = sum(map(len, kept)), stride * 2
            seen += 1
    return kept


def _is_identity(normalizer: Any) -> bool:
    try:
        return not normalizer.decompile()
    except RuntimeError:  # how it says that there is no character map
        return True


def _explain(error: str, vocabulary_size: int, characters: int) -> str:
    """SentencePiece's two failed assertions, put as what was asked and what would fit."""
    if found := re.search(r"too high .*<= (\d+)", error):
        return (
            f"vocabulary_size={vocabulary_size} is more than {characters} characters of text give:"
            f" ask for {found[1]} or fewer (sentencepiece:{found[1]}), or train on more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocabulary_size={vocabulary_size} does not hold the special and byte pieces and the"
            f" characters of this text: ask for more than {found[1]}, or use 'bytes'"
        )
    return f"SentencePiece could not be trained: {error}"
