"""Low rank from the start as a method: `--method low_rank --low-rank.share 0.5`.

Kernels are products of two factors from the first step to the last, and the factors are what
trains: fewer parameters, less optimizer state, fewer operations forward and backward.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from compress.lowrank import LowRank, factorize
from compress.lowrank_params import is_weight, ranks_by_path
from compress.quantization.quantize import contraction_axis
from model.rules import path_of
from train.methods import Plugs, Setup
from train.plugs import PyTree


@dataclass(frozen=True)
class LowRankKernels:
    """Trains factors in place of kernels.

    They begin as the best ones of the drawn kernel (Khodak et al. 2021, arXiv:2105.01029). Where
    that is zero, as the last kernel of a branch may be, the first factor is drawn and the second is
    zero: with both at zero neither would ever have a gradient.

    Attributes:
      share: of the weights of every kernel in the blocks that its factors hold.
      rules: `(regex, rank)` pairs in its place, over parameter paths; rank 0 leaves alone.
      seed: of what is drawn in place of zeros.
    """

    name: ClassVar[str] = "low_rank"
    share: float = 0.5
    rules: tuple[tuple[str, int], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")

    def build(self, setup: Setup) -> Plugs:
        """Puts factors in the place of kernels, among the parameters that train.

        Raises:
          ValueError: a rule that matches nothing, no matrix, or only some layers of a stack; a rank
            that does not fit.
        """
        rules = self.rules or (("blocks/.*/kernel", self.share),)
        ranks = ranks_by_path(setup.params, rules)

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            def one(key_path: tuple, w: jax.Array) -> jax.Array | LowRank:
                path = path_of(key_path)
                if path not in ranks:
                    return w
                key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
                return _factors(key, w, ranks[path], contraction_axis(path))

            return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight), {}

        return Plugs(split=split)


def _factors(key: jax.Array, w: jax.Array, rank: int, axis: int) -> LowRank:
    low = factorize(w, rank, axis=axis)
    drawn = jax.random.normal(key, low.a.shape, low.a.dtype) / math.sqrt(w.shape[-2])
    zero = jnp.all(w == 0, axis=(-2, -1), keepdims=True)
    return LowRank(jnp.where(zero, drawn, low.a), low.b)
