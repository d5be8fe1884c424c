"""In which formats of others a model can leave, found by asking those that write them."""

from __future__ import annotations

import contextlib
import functools
import warnings

from compress.export.gguf_layouts import architecture_of
from model.config import TransformerConfig
from model.huggingface_config import write_config


@functools.cache
def formats(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the formats that hold a model, each with the kind that it is there.

    The native and the StableHLO format hold any model and are not named.

    >>> from model.presets import gpt2_tiny, llama_tiny
    >>> formats(gpt2_tiny()), formats(llama_tiny(logit_softcap=15.0))
    (('HF gpt2', 'GGUF gpt2'), ())
    >>> formats(llama_tiny(qk_norm=True))
    ('HF qwen3', 'GGUF qwen3')
    """
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what matters for training only
        with contextlib.suppress(ValueError):
            found.append(f"HF {write_config(config)[0].model_type}")
        with contextlib.suppress(ValueError):
            found.append(f"GGUF {architecture_of(config)}")
    return tuple(found)
