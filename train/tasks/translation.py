"""Translation of sentences: by an encoder and a decoder, or by a decoder that sees a prefix.

    encoder-decoder   reads {source} end; after end {target} comes {target} end
    prefix LM         after end {source} end {target} comes {target} end

Training pairs are packed, several a row, and do not see each other; held-out pairs have a row each,
and are translated by beam search.

Shapes: N rows, B rows of a batch, T target tokens, S source tokens, P prompt, K beams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.beam import Beam, Found, beam_search
from model.config import EncoderDecoderConfig, TransformerConfig
from model.transformer import Transformer, features, head
from train.losses import MODEL_INPUTS, cross_entropy
from train.packing import alone, fill, pack
from train.plugs import Batch, LossTerm, PyTree
from train.tasks.rows import BadRow, Row, content_hash, keep_good, read_rows
from train.tasks.task import TRAIN, Examples, Outputs, TaskFiles, resolved, rows_of_split, rows_used
from train.text.parallel_text import SIDES, SOURCE, both_files, read_parallel
from train.tokenizers.tokenizer import Tokenizer

MULTIPLE = 8  # held-out rows are as long as the longest of them, rounded up


@dataclass(frozen=True)
class Translation:
    """Translates from one language into another.

    Attributes:
      files: of the splits: "SOURCE,TARGET", two files of aligned lines (plain or .gz); or one with
        columns `source` and `target`.
      form: "encoder_decoder" needs such a model, "prefix_lm" a decoder-only one.
      beams: of the search when held-out pairs are translated; 1 is greedy.
      alpha: its length penalty, see `model.beam`.
    """

    name: ClassVar[str] = "translation"
    watch: ClassVar[str] = "-bleu"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    form: Literal["encoder_decoder", "prefix_lm"] = "encoder_decoder"
    beams: int = 1
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.form not in ("encoder_decoder", "prefix_lm"):
            raise ValueError(f"form is {self.form!r}; it is 'encoder_decoder' or 'prefix_lm'")
        Beam(self.beams, self.alpha)  # refuses what is none

    def resolve(self) -> Translation:
        """Returns the settings with the hashes of the files.

        Raises:
          ValueError: a file is missing or has changed, or a split is none.
        """
        return dataclasses.replace(self, files=resolved(self.files, _hash))

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns nothing: the model's own head predicts the target."""
        return {}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the cross-entropy of the target.

        Raises:
          ValueError: a model of the other form.
        """
        check_form(self, model.config)
        return (cross_entropy(label_smoothing),)

    def texts(self) -> Iterator[str]:
        """Yields the training texts of both sides, for one vocabulary."""
        rows, _ = self.rows(TRAIN)
        for row in rows:
            yield from (row.columns[name] for name in SIDES)

    def rows(self, split: str) -> tuple[list[Row], list[BadRow]]:
        """Returns the pairs of a split, and what was left out.

        Raises:
          ValueError: bad rows, unless they are to be skipped; files that do not belong together.
        """
        text, form = self.files.path(split), self.files.form
        both = both_files(text)
        if both is not None:
            found = keep_good(Path(text), read_parallel(*both), form, lambda row: row)
            return rows_of_split(found, self.files, split, [SOURCE])

        def parse(row: Row) -> Row:
            if empty := [name for name in SIDES if not row.columns[name].strip()]:
                raise ValueError(f"the {' and the '.join(empty)} is empty")
            return Row(row.line, {name: row.columns[name].strip() for name in SIDES})

        found = keep_good(Path(text), read_rows(Path(text), form, SIDES), form, parse)
        return rows_of_split(found, self.files, split, [SOURCE])

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays.

        In training N packed rows of T = S = `length`. Held out, a row for each pair, as long as the
        longest of them: also `prompt` int32 [N, P] and `prompt_lengths` [N], what the translation
        follows on. `source`, `source_segments` and `source_positions` [N, S] for an
        encoder-decoder, `prefix` for a prefix LM.

        Raises:
          ValueError: bad rows; rows too short for a token of each.
        """
        rows, bad = self.rows(split)
        rows = rows_used(rows, self.files, split)
        sources, targets = (
            tokenizer.encode_batch([row.columns[name] for row in rows]) for name in SIDES
        )
        end = tokenizer.end_of_document
        pairs = [_cut(s, t, length, self.form) for s, t in zip(sources, targets, strict=True)]
        cut = sum(
            len(s) + len(t) < len(whole_s) + len(whole_t)
            for (s, t), whole_s, whole_t in zip(pairs, sources, targets, strict=True)
        )
        ended = [len(t) == len(whole) for (_, t), whole in zip(pairs, targets, strict=True)]
        make = _two_sides if self.form == "encoder_decoder" else _one_row
        arrays = make(pairs, ended, end, length, split == TRAIN)
        return Examples(arrays, rows, bad, cut)

    def outputs(self, model: Transformer) -> Outputs:
        """Returns `nats` and `count` [B] of the target, and its translation.

        `translation` int32 [B, T'], `translation_lengths` [B] with the end token, `score` [B].
        """
        check_form(self, model.config)

        def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
            return {
                **target_loss(model, weights, batch),
                **translate(model, self.beams, self.alpha, weights, batch),
            }

        return apply


def check_form(task: Translation, config: TransformerConfig) -> None:
    """Raises ValueError for a model of the other form."""
    two = isinstance(config, EncoderDecoderConfig)
    if two != (task.form == "encoder_decoder"):
        raise ValueError(
            "translation in the form prefix_lm needs a decoder-only model; leave --task.form out"
            if two
            else "translation in the form encoder_decoder needs such a model, and this one is "
            "decoder-only; give --model encoder_decoder_mini, or --task.form prefix_lm"
        )


def target_loss(model: Transformer, weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
    """Returns `nats`, the sum of -log p of the weighted targets of each row, and their `count`."""
    more: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    more |= {"positions_BT": batch.get("positions"), "segments_BT": batch.get("segments")}
    final_BTD = features(model, weights, batch["tokens"], **more).final
    logits_BTV = jax.vmap(lambda final_TD: head(model, weights, final_TD))(final_BTD)
    logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    logp_BT = jnp.take_along_axis(logp_BTV, batch["targets"][..., None], axis=-1)[..., 0]
    nats_B = -jnp.where(batch["weights"] > 0, logp_BT * batch["weights"], 0).sum(axis=1)
    return {"nats": nats_B, "count": batch["weights"].sum(axis=1)}


def translate(
    model: Transformer, beams: int, alpha: float, weights: PyTree, batch: Batch
) -> dict[str, jax.Array]:
    """Returns the best continuation of each prompt; a row of zeros gives anything."""
    source = batch.get("source", batch["prompt"])
    end = batch["prompt"][0, 0]  # rows of padding come last
    names = ("source", "source_segments")
    inputs = {name: batch[name] for name in names if name in batch}
    # Room for translations half as long again as the longest source: the reference is not asked.
    tokens = source.shape[1] * 3 // 2 + 8
    if model.config.positions == "learned":
        whole = model.config.max_length
        tokens = min(tokens, max(whole - batch["prompt"].shape[1], whole // 3))
        batch = batch | _shortened(batch, whole - tokens, end)
    if "source" not in batch:
        inputs["prefix"] = batch["prompt_lengths"]
    found = search(model, beams, alpha, tokens, weights, batch, end, inputs)
    return {
        "translation": found.tokens[:, 0],
        "translation_lengths": found.lengths[:, 0],
        "score": found.scores[:, 0],
    }


def _shortened(batch: Batch, most: int, end: jax.Array) -> Batch:
    """Prompts of at most so many tokens each: what is too long loses its end, and is closed."""
    prompt_BP, lengths_B = batch["prompt"][:, :most], batch["prompt_lengths"]
    closed_BP = prompt_BP.at[:, -1].set(end)
    cut_B = lengths_B > most
    return {
        "prompt": jnp.where(cut_B[:, None], closed_BP, prompt_BP),
        "prompt_lengths": jnp.minimum(lengths_B, most),
    }


def search(
    model: Transformer,
    beams: int,
    alpha: float,
    tokens: int,
    weights: PyTree,
    batch: Batch,
    end: jax.Array,
    inputs: Batch,
) -> Found:
    """Returns the continuations of each `prompt` of a batch; rows of padding give anything."""
    lengths_B = jnp.maximum(batch["prompt_lengths"], 1)
    beam = Beam(beams, alpha, tokens)
    return beam_search(
        model, weights, batch["prompt"], lengths_B, beam=beam, end_token=end, inputs=inputs
    )


def _hash(text: str) -> str:
    both = both_files(text)
    return "+".join(content_hash(path) for path in ((Path(text),) if both is None else both))


def _cut(
    source: np.ndarray, target: np.ndarray, length: int, form: str
) -> tuple[np.ndarray, np.ndarray]:
    """The pair with what does not fit left out at the end of each side."""
    if form == "encoder_decoder":
        if length < 2:
            raise ValueError(f"rows of {length} token hold no sentence; make them longer")
        return source[: length - 1], target[: length - 1]
    if length < 4:
        raise ValueError(f"rows of {length} tokens hold no pair of sentences; make them longer")
    over = len(source) + len(target) + 2 - length
    if over <= 0:
        return source, target
    half = (length - 2) // 2
    kept = max(half, length - 2 - len(target))
    source = source[:kept]
    return source, target[: length - 2 - len(source)]


def _rounded(sizes: list[int], most: int) -> int:
    return min(most, -(-max(sizes) // MULTIPLE) * MULTIPLE)


def _two_sides(
    pairs: list[tuple[np.ndarray, np.ndarray]],
    ended: list[bool],
    end: int,
    length: int,
    packed: bool,
) -> dict[str, np.ndarray]:
    """Arrays for an encoder-decoder."""
    stop = np.array([end], np.int32)
    sources = [np.concatenate([s, stop]) for s, _ in pairs]
    tokens = [np.concatenate([stop, t]) for _, t in pairs]
    targets = [np.concatenate([t, stop]) for _, t in pairs]
    weights = [np.append(np.ones(len(t)), e) for (_, t), e in zip(pairs, ended, strict=True)]
    sizes = [(len(s), len(t)) for s, t in zip(sources, tokens, strict=True)]
    if packed:
        rows = pack(sizes, length)
        S = T = length
    else:
        rows = [[number] for number in range(len(pairs))]
        S, T = (_rounded([size[side] for size in sizes], length) for side in (0, 1))
    source, target = fill(rows, sources, S), fill(rows, tokens, T)
    arrays = {
        **target,
        "targets": fill(rows, targets, T)["tokens"],
        "weights": _weights(rows, weights, T),
        "lengths": (target["segments"] > 0).sum(axis=1).astype(np.int32),
        "source": source["tokens"],
        "source_segments": source["segments"],
        "source_positions": source["positions"],
    }
    if not packed:
        arrays["prompt"] = np.full((len(pairs), 1), end, np.int32)
        arrays["prompt_lengths"] = np.ones(len(pairs), np.int32)
    return arrays


def _one_row(
    pairs: list[tuple[np.ndarray, np.ndarray]],
    ended: list[bool],
    end: int,
    length: int,
    packed: bool,
) -> dict[str, np.ndarray]:
    """Arrays for a prefix LM."""
    stop = np.array([end], np.int32)
    prompts = [np.concatenate([stop, s, stop]) for s, _ in pairs]
    tokens = [np.concatenate([p, t]) for p, (_, t) in zip(prompts, pairs, strict=True)]
    targets = [np.append(row[1:], end) for row in tokens]
    weights = [
        np.concatenate([np.zeros(len(p) - 1), np.ones(len(t)), [e]])
        for p, (_, t), e in zip(prompts, pairs, ended, strict=True)
    ]
    before = [np.ones(len(p), np.int32) for p in prompts]
    if packed:
        rows, T = pack([(len(row),) for row in tokens], length), length
    else:
        rows = [[number] for number in range(len(pairs))]
        T = _rounded([len(row) for row in tokens], length)
    target = fill(rows, tokens, T)
    after = [
        np.concatenate([b, np.zeros(len(t) - len(b), np.int32)])
        for b, t in zip(before, tokens, strict=True)
    ]
    arrays = {
        **target,
        "targets": fill(rows, targets, T)["tokens"],
        "weights": _weights(rows, weights, T),
        "lengths": (target["segments"] > 0).sum(axis=1).astype(np.int32),
        "prefix": fill(rows, after, T)["tokens"],
    }
    if not packed:
        lengths = [len(p) for p in prompts]
        arrays["prompt"] = alone(prompts, _rounded(lengths, length))["tokens"]
        arrays["prompt_lengths"] = np.array(lengths, np.int32)
    return arrays


def _weights(rows: list[list[int]], weights: list[np.ndarray], length: int) -> np.ndarray:
    found = np.zeros((len(rows), length), np.float32)
    for at, row in enumerate(rows):
        values = np.concatenate([weights[number] for number in row])
        found[at, : len(values)] = values
    return found
