"""Replay as a method: `--method replay --replay.data old.bin`, for tasks.

    python -m experiments.replay --run runs/first --out old.bin
    python -m experiments.finetune --task classification --start runs/first \\
        --data train=train.tsv valid=dev.tsv --method replay --replay.data old.bin \\
        --forgetting old.txt --out runs/sentiment

Each row has a stretch of old text beside it, whose loss is the language model's (`train.replay`).
A run on text needs no method: its text is mixed with the old one, `--data '9*new.txt' old.bin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from model.config import EncoderDecoderConfig
from model.transformer import Transformer
from train.corpus import Corpus, build_corpus
from train.methods import Plugs, Setup
from train.plugs import LossTerm
from train.replay import NAME, replay, with_old_text
from train.settings import Phase, Settings
from train.text.sources import open_source
from train.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Replay:
    """Goes over old text again beside the rows of a task (see `train.replay`).

    Attributes:
      data: a source of text as in `--data` of `experiments.pretrain`; its train split is read.
      length: tokens of it beside each row; by default as many as a row has, which makes a step
        about twice as long.
      weight: of its mean loss beside the task's.
    """

    name: ClassVar[str] = NAME
    data: str = ""
    length: int | None = None
    weight: float = 0.25

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is {self.length}; it must be at least 1")
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be above 0, or leave replay out")

    def build(self, setup: Setup) -> Plugs:
        """Adds the term.

        Raises:
          ValueError: the model is no language model.
        """
        config = setup.config
        if isinstance(config, EncoderDecoderConfig):
            raise ValueError(
                "an encoder-decoder is no language model of old text; leave replay out"
            )
        model = Transformer(config)

        def terms(so_far: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
            return (*so_far, replay(model, self.weight))

        return Plugs(terms=terms)


def replay_of(settings: Settings) -> Replay | None:
    """Returns the settings of the replay of a run, None for none."""
    return next((method for method in settings.methods if isinstance(method, Replay)), None)


def refuse_replay(settings: Settings) -> None:
    """Raises ValueError if a run on text has it as a method."""
    if (method := replay_of(settings)) is not None:
        raise ValueError(
            "replay is for the rows of a task; a run on text reads old text among the new: leave "
            f"the method out and give --data '9*NEW' '{method.data or 'OLD'}'"
        )


def old_text(settings: Settings, tokenizer: Tokenizer) -> Corpus | None:
    """Returns the old text of a run in its tokens, None where it replays none.

    Raises:
      ValueError: there is no such source, or it is shorter than a row; more tokens of it than the
        model has positions.
    """
    if (method := replay_of(settings)) is None:
        return None
    model, length = settings.phases[0].model, _length(method, settings.phases[0])
    if not method.data:
        raise ValueError("replay needs old text: --replay.data SOURCE, see experiments.replay")
    if model.positions == "learned" and length > model.max_length:
        raise ValueError(
            f"{length} tokens of old text do not fit the {model.max_length} learned positions; "
            "lower --replay.length"
        )
    corpus = build_corpus(open_source(method.data), tokenizer)
    tokens = len(corpus.split("train").tokens)
    if tokens < length + 1:
        raise ValueError(
            f"{corpus.name} has {tokens} tokens to replay, fewer than a row of {length} and the "
            "one after; give more text, or lower --replay.length"
        )
    return corpus


def replayed(dataset: Any, settings: Settings, old: Corpus, phase: Phase, own: slice | None) -> Any:
    """Returns the batches of a task with the old text beside them."""
    method = replay_of(settings)
    assert method is not None
    return with_old_text(
        dataset,
        old.split("train"),
        seed=settings.seed,
        length=_length(method, phase),
        batch_size=phase.batch_size,
        rows=own,
    )


def _length(method: Replay, phase: Phase) -> int:
    return phase.sequence_length if method.length is None else method.length
