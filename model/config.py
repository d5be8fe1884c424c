"""The one description of a Transformer: a frozen dataclass whose every field has one meaning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and parts of a decoder-only Transformer language model.

    GPT-2 and Llama are both settings of these fields (see `model.presets`); a variant is made with
    `dataclasses.replace`. All sizes count elements.

    Attributes:
      vocabulary_size: number of token ids V.
      max_length: positions that the model was made for; with learned positions a hard limit.
      layers: number of blocks L.
      width: residual stream D.
      heads: query heads H.
      kv_heads: key/value heads G, a divisor of `heads` (grouped-query attention, Ainslie et al.
        2023, arXiv:2305.13245); None means `heads`.
      head_width: width K of one head; None means `width // heads`.
      ffn_width: hidden width F of the feed-forward layer; None means `4 * width`.
      positions: "learned" adds a table to the embedding; "rotary" turns queries and keys
        (Su et al. 2021, arXiv:2104.09864).
      rotary_base: base of the rotary frequencies.
      norm: "layernorm" or "rmsnorm" (Zhang & Sennrich 2019, arXiv:1910.07467).
      norm_epsilon: added to the variance or mean square.
      norm_scale: whether norms have a learned scale, those of `qk_norm` among them. Without one, as
        in nanochat, a norm before positions is the same as one after: turning changes no length.
      biases: whether kernels and LayerNorms carry a bias.
      activation: "gelu" (tanh form), "gelu_exact", "relu_squared" (So et al. 2021,
        arXiv:2109.08668) or "swiglu" (Shazeer 2020, arXiv:2002.05202; adds a gate kernel).
      qk_norm: RMSNorm of each query and key head before positions (Henry et al. 2020,
        arXiv:2010.04245; learned scale as in Qwen3).
      logit_softcap: logits become `cap * tanh(logits / cap)`; None for none.
      tied_head: whether the head is the transposed token embedding.
      window: keys that a query sees, itself included; one number, one per layer, or None for all.
      zero_init_projections: start `attention/o` and `mlp/down` at zero, so that every block starts
        as the identity; otherwise they start at `init_std / sqrt(2 * layers)` as in GPT-2.
      init_std: standard deviation of the initial kernels and embeddings.
      embedding_norm: RMSNorm without a scale on what enters the first block.
      embedding_shortcut: before each block the stream x becomes `a x + b e`, e being what entered
        the first block, normalised as by `embedding_norm`; a and b are learned numbers of each
        layer, and this is what b starts at (a at 1; 0.1 in nanochat, 0 changes nothing at first).
        None for no shortcut. After Jordan et al., modded-nanogpt, record 9.
      value_embeddings: every second layer, the last among them, adds to its values those of a table
        of its own, looked up by token and gated by head with `2 sigmoid(.)` of the first 32
        features that the layer reads (Zhou et al. 2024, arXiv:2410.17897, in nanochat's form).
      bigram_rows: rows of a table that adds to the embedding of each token what the pair of it and
        the token before says, looked up by a hash (`model.bigrams`); None for no table.
      bigram_width: width of those rows, which a kernel brings to that of the stream.
      dropout: rate applied where GPT-2 does: embeddings, attention probabilities and the output of
        each branch. Like the next two active only when `apply` is given a "dropout" rng.
      layer_drop: rate at which the last block is left out for a whole batch; that of block l is
        `l / L` of it. What a block adds is divided by its chance to stay (Huang et al. 2016,
        arXiv:1603.09382; by the batch as in Zhang & He 2020, arXiv:2010.13369, to save its time).
      token_drop: share of the tokens of a row that pass by each block but the first and the last,
        drawn anew for each (random-LTD, Yao et al. 2022, arXiv:2211.11586).
      dtype: type of the computation ("float32", "bfloat16").
      parameter_dtype: type that parameters are kept in.
      scan_layers: run the blocks under `lax.scan` (compiles once per block) instead of a Python
        loop (faster on CPU and for shallow models). Parameters are the same.
      remat: what the backward pass recomputes: "none", "full" (everything inside a block) or
        "dots" (all but the matrix products without batch dimensions).

    >>> TransformerConfig(width=64, heads=4, layers=2).kv_heads_
    4
    >>> TransformerConfig(width=64, heads=3)
    Traceback (most recent call last):
    ...
    ValueError: width 64 does not divide into 3 heads; choose heads that divide it or set head_width
    """

    vocabulary_size: int = 50257
    max_length: int = 1024
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    norm_scale: bool = True
    biases: bool = True
    activation: Literal["gelu", "gelu_exact", "relu_squared", "swiglu"] = "gelu"
    qk_norm: bool = False
    logit_softcap: float | None = None
    tied_head: bool = True
    window: int | tuple[int, ...] | None = None
    zero_init_projections: bool = False
    init_std: float = 0.02
    embedding_norm: bool = False
    embedding_shortcut: float | None = None
    value_embeddings: bool = False
    bigram_rows: int | None = None
    bigram_width: int = 16
    dropout: float = 0.0
    layer_drop: float = 0.0
    token_drop: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    parameter_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    scan_layers: bool = False
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        for name in ("vocabulary_size", "max_length", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kv_heads", "head_width", "ffn_width"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1, or None")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}"
                )
        for name in ("bigram_rows", "bigram_width"):
            number = getattr(self, name)
            if number is not None and not 1 <= number < 2**31:
                raise ValueError(f"{name} is {number}; it must be at least 1 and below 2**31")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads; "
                "choose heads that divide it or set head_width"
            )
        if self.heads % self.kv_heads_:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads_} key/value heads; "
                "kv_heads must divide heads"
            )
        if self.positions == "rotary" and self.head_width_ % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width_}")
        for name in ("dropout", "layer_drop", "token_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and below 1"
                )
        if isinstance(self.window, list):  # JSON has no tuples
            object.__setattr__(self, "window", tuple(self.window))
        if isinstance(self.window, tuple) and len(self.window) != self.layers:
            raise ValueError(
                f"window has {len(self.window)} entries for {self.layers} layers; "
                "give one number, or one per layer"
            )
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(w is not None and w < 1 for w in windows):
            raise ValueError(f"window is {self.window}; a query must see at least itself (1)")

    @property
    def kv_heads_(self) -> int:
        """Key/value heads G, with the default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width_(self) -> int:
        """Width K of one head, with the default filled in."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def ffn_width_(self) -> int:
        """Feed-forward width F, with the default filled in."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    @property
    def random(self) -> bool:
        """Whether training draws anything at random: it then needs a "dropout" rng."""
        return bool(self.dropout or self.layer_drop or self.token_drop)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with a value embedding.

        >>> TransformerConfig(layers=5, value_embeddings=True).value_layers
        (0, 2, 4)
        """
        return tuple(range((self.layers - 1) % 2, self.layers, 2)) if self.value_embeddings else ()

    @property
    def value_gate_inputs(self) -> int:
        """Features that the gate of a value embedding reads."""
        return min(VALUE_GATE_INPUTS, self.width)


@dataclass(frozen=True)
class EncoderDecoderConfig(TransformerConfig):
    """Shape and parts of an encoder and a decoder made of the same blocks.

    `layers` counts the blocks of the decoder, and all other fields hold for both sides, but that
    there are no windows, shortcuts, tables of values or pairs, or layers and tokens left out.

    Attributes:
      encoder_layers: number of blocks of the encoder.
      tied_source: whether the source is embedded by the table of the target: one vocabulary.

    >>> EncoderDecoderConfig(layers=3, encoder_layers=3, dropout=0.1).random
    True
    """

    encoder_layers: int = 6
    tied_source: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.encoder_layers < 1:
            raise ValueError(f"encoder_layers is {self.encoder_layers}; it must be at least 1")
        plain = TransformerConfig()
        names = ("window", "embedding_shortcut", "value_embeddings", "bigram_rows")
        for name in (*names, "layer_drop", "token_drop"):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"an encoder-decoder has no {name}, and it is {getattr(self, name)!r}; leave "
                    "it out, or take a decoder-only model"
                )


VALUE_GATE_INPUTS = 32  # as in nanochat; a gate over all features trained no better there

_CHOICES: dict[str, tuple[str, ...]] = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_exact", "relu_squared", "swiglu"),
    "remat": ("none", "full", "dots"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "parameter_dtype": ("float32", "bfloat16", "float16", "float64"),
}


def config_from_dict(fields: dict[str, Any]) -> TransformerConfig:
    """Returns the config that `dataclasses.asdict` (and a trip through JSON) was made from.

    Raises:
      ValueError: on a field that no config has; the known ones are listed.

    >>> import dataclasses
    >>> config = TransformerConfig(layers=2, window=(8, 16))
    >>> config_from_dict(dataclasses.asdict(config)) == config
    True
    """
    kind = EncoderDecoderConfig if "encoder_layers" in fields else TransformerConfig
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown config fields {unknown}; known are {sorted(known)}")
    return kind(**fields)
