"""Prompt and prefix tuning as methods: `--method prompt --prompt.length 20`, `--method prefix`.

    python -m experiments.pretrain --from runs/first --data text.txt --method prompt --out runs/p
    python -m experiments.generate --run runs/p --prompt "..."

The run opens like any other: its vectors are in its weights, and generation and evaluation know
nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from model.prefix import KEY as PREFIX
from train.methods import Plugs, Setup
from train.partition import trains_also
from train.plugs import PyTree, merge
from train.prompts import (
    PROMPT,
    check_promptable,
    first_vectors,
    keys_and_values,
    prompting,
)


@dataclass(frozen=True)
class Prompt:
    """Trains vectors before the text, the model frozen: see `train.prompts`.

    After `lora`, both train: the vectors then pass through the adapted blocks.

    Attributes:
      length: vectors P.
      init: "vocabulary" or "random", see `train.prompts.first_vectors`.
      also: regexes of parameters that train besides; ".*" trains the whole model with them.
      seed: of the first vectors.
    """

    name: ClassVar[str] = "prompt"
    length: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"
    also: tuple[str, ...] = ()
    seed: int = 0

    def build(self, setup: Setup) -> Plugs:
        """Freezes the model and puts vectors beside it.

        Raises:
          ValueError: a model that they do not fit; a rule that matches nothing.
        """
        check_promptable(setup.config, self.length)
        own = trains_also(setup.params, self.also)

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            key = jax.random.key(self.seed)
            vectors = first_vectors(key, params, setup.config, self.length, self.init)
            trained, fixed = own(params)
            return {**trained, PROMPT: {"vectors": vectors}}, fixed

        return Plugs(transforms=(prompting(setup.config),), split=split)


@dataclass(frozen=True)
class Prefix:
    """Trains keys and values in every layer, the model frozen: see `train.prompts`.

    They lie where the model looks for them, `blocks/attention/prefix`, so that nothing is computed.

    Attributes:
      length: keys P of each layer.
      init: "vocabulary" begins as what the model makes of P tokens at random (real activations
        begin better than noise, Li & Liang, section 7.4); "random" as N(0, init_std^2).
      also: regexes of parameters that train besides.
      seed: of the first keys and values.
    """

    name: ClassVar[str] = "prefix"
    length: int = 10
    init: Literal["vocabulary", "random"] = "vocabulary"
    also: tuple[str, ...] = ()
    seed: int = 0

    def build(self, setup: Setup) -> Plugs:
        """Freezes the model and puts keys and values into it.

        Raises:
          ValueError: a model that they do not fit; a rule that matches nothing.
        """
        c = setup.config
        check_promptable(c, self.length)
        own = trains_also(setup.params, self.also)

        def drawn(params: PyTree) -> dict[str, jax.Array]:
            key, dtype = jax.random.key(self.seed), jnp.dtype(c.parameter_dtype)
            if self.init == "random":
                shape = (c.layers, self.length, c.kv_heads_, c.head_width_)
                std = jnp.asarray(c.init_std, dtype)
                k, v = (std * jax.random.normal(one, shape, dtype) for one in jax.random.split(key))
                return {"k": k, "v": v}
            vectors = first_vectors(key, params, c, self.length, self.init)
            found = keys_and_values(c, params, vectors)
            return {name: array.astype(dtype) for name, array in found.items()}

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            trained, fixed = own(params)
            prefix = {"blocks": {"attention": {PREFIX: drawn(params)}}}
            return merge(trained, prefix), fixed

        return Plugs(split=split)


PROMPT_METHODS: dict[str, type[Any]] = {m.name: m for m in (Prompt, Prefix)}
