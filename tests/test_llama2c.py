"""llama2.c files: read as what they say, refused as what they are not."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.flops import abstract_params
from model.llama2c import load
from model.transformer import Transformer
from train.tokenizers.tokenizer import load_tokenizer

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 16, 24, 2, 4, 2, 11, 8
K = WIDTH // HEADS


def tensors_of(draw, tied):
    kv = KV_HEADS * K
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "rms_attention": (LAYERS, WIDTH),
        "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, kv, WIDTH),
        "wv": (LAYERS, kv, WIDTH),
        "wo": (LAYERS, WIDTH, WIDTH),
        "rms_ffn": (LAYERS, WIDTH),
        "w1": (LAYERS, HIDDEN, WIDTH),
        "w2": (LAYERS, WIDTH, HIDDEN),
        "w3": (LAYERS, HIDDEN, WIDTH),
        "rms_final": (WIDTH,),
        "angles": (2, POSITIONS, K // 2),
    }
    if not tied:
        shapes["head"] = (VOCABULARY, WIDTH)
    return {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, tied):
    header = (WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY if tied else -VOCABULARY)
    content = struct.pack("<7i", *header, POSITIONS)
    path.write_bytes(content + b"".join(t.tobytes() for t in tensors.values()))
    return path


def reference(t, tied, tokens):
    """The forward pass of run.c, position by position, pairs of neighbours turned."""

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + 1e-5) * scale

    def turned(x, position):
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = position * 10000.0 ** (-(i % K) / K)
            a, b = x[i], x[i + 1]
            x[i] = a * np.cos(angle) - b * np.sin(angle)
            x[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    keys, values, logits = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)], []
    for position, token in enumerate(tokens):
        x = t["embedding"][token].astype(np.float64)
        for layer in range(LAYERS):
            y = norm(x, t["rms_attention"][layer])
            q = turned(t["wq"][layer] @ y, position)
            keys[layer].append(turned(t["wk"][layer] @ y, position))
            values[layer].append(t["wv"][layer] @ y)
            out = np.zeros(WIDTH)
            for head in range(HEADS):
                own = slice(head * K, (head + 1) * K)
                group = head // (HEADS // KV_HEADS)
                shared = slice(group * K, (group + 1) * K)
                scores = np.array([q[own] @ k[shared] for k in keys[layer]]) / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[own] = sum(w * v[shared] for w, v in zip(weights, values[layer], strict=True))
            x = x + t["wo"][layer] @ out
            y = norm(x, t["rms_ffn"][layer])
            gate = t["w1"][layer] @ y
            x = x + t["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (t["w3"][layer] @ y))
        logits.append(t["embedding" if tied else "head"] @ norm(x, t["rms_final"]))
    return np.array(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_run_c_computes(tmp_path, tied, strict):
    tensors = tensors_of(np.random.default_rng(0), tied)
    config, params = load(write(tmp_path / "model.bin", tensors, tied))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(config))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == shapes
    tokens = np.array([1, 5, 3, 3, 10, 0])
    ours = Transformer(config).apply({"params": params}, jnp.asarray(tokens)[None])[0]
    theirs = reference(tensors, tied, tokens)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "model.bin", tensors_of(np.random.default_rng(0), True), True)
    content = path.read_bytes()
    cases = {
        content[:20]: "fewer than a header",
        content[:-4]: r"bytes, but \d+ belong to its header",
        content + b"\0" * 4: "copy it again",
        b"24ka" + content: "--version 0",
        struct.pack("<7i", 0, *[1] * 6) + content: "no llama2.c file",
    }
    for changed, message in cases.items():
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            load(path)


def vocabulary(words):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    pieces += [f"<0x{value:02X}>".encode() for value in range(256)]
    scores = [0.0] * len(pieces) + [-float(i) for i in range(len(words))]
    pieces += [word.encode() for word in words]
    body = b"".join(
        struct.pack("<fi", score, len(piece)) + piece
        for score, piece in zip(scores, pieces, strict=True)
    )
    return struct.pack("<i", max(map(len, pieces))) + body


def test_its_vocabulary_merges_by_score_and_falls_back_to_bytes(tmp_path):
    path = tmp_path / "tok.bin"
    path.write_bytes(vocabulary(["ab", " ab", "abab", " ", "a", "b"]))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocabulary_size == 265
    assert tokenizer.end_of_document == 1  # what its models read before every text
    first = 259
    assert tokenizer.encode("ab").tolist() == [first + 1]
    assert tokenizer.encode("ab\n").tolist() == [first + 1, 3 + 10]
    for text in ("ab abé\n b", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes([0, 1, 2, first]) == b"ab"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint() == tokenizer.fingerprint()


def test_other_vocabularies_are_refused(tmp_path):
    path = tmp_path / "tok.bin"
    for content in (b"", b"text", vocabulary(["a"])[:-1], vocabulary([])[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a vocabulary of llama2\.c"):
            load_tokenizer(path)
