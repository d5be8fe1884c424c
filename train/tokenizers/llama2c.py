"""The vocabulary that llama2.c keeps beside a model, as the SentencePiece model it was made of.

An int32, the longest piece; then for each id a float32 score, an int32 length and so many bytes, in
which a space stands for U+2581. Ids 0 to 2 are unknown, start and end, then come the 256 bytes.
The models of llama2.c read a start before every text and never an end: 1 is what stands between
documents, where a text begins, and where its programs stop.
"""

from __future__ import annotations

import struct
from typing import Any

from train.tokenizers.pieces import PieceTokenizer
from train.tokenizers.sentencepiece import SPACE, open_sentencepiece

_FIRST = ("<unk>", "<s>", "</s>")
_BYTES = range(3, 259)


def open_llama2c(content: bytes) -> PieceTokenizer:
    """The tokenizer of a llama2.c vocabulary: byte-pair merges by score, bytes where no piece fits.

    Encoding puts a space before the text, as Llama's own model does; decoding takes it off again.

    Raises:
        ValueError: not such a file.
        ImportError: SentencePiece or protobuf is not installed.
    """
    # Its type stubs know nothing of the messages, which are made at import.
    from sentencepiece import sentencepiece_model_pb2 as messages

    pb: Any = messages
    model = pb.ModelProto()
    kinds = pb.ModelProto.SentencePiece
    for index, (score, piece) in enumerate(_pieces(content)):
        entry = model.pieces.add()
        entry.score = score
        if index < len(_FIRST):
            entry.piece = _FIRST[index]
            entry.type = kinds.UNKNOWN if index == 0 else kinds.CONTROL
        else:
            entry.piece = piece.replace(" ", SPACE)
            entry.type = kinds.BYTE if index in _BYTES else kinds.NORMAL
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = pb.TrainerSpec.BPE, True
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.eos_piece = _FIRST[1]  # by whose name SentencePiece looks the end up
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces = False
    return open_sentencepiece(model.SerializeToString())


def _pieces(content: bytes) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    at = 4
    try:
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8
            if length < 0 or at + length > len(content):
                raise ValueError(f"piece {len(found)} is cut off")
            found.append((score, content[at : at + length].decode()))
            at += length
    except (struct.error, ValueError) as error:
        raise ValueError(f"not a vocabulary of llama2.c: {error}") from None
    if len(found) < 259 or [piece for _, piece in found[3:5]] != ["<0x00>", "<0x01>"]:
        raise ValueError("not a vocabulary of llama2.c: ids 3 to 258 are not the 256 bytes")
    return found
