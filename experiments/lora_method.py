"""Low-rank adaptation as a method: `--method lora --lora.rank 8`, on top of another run.

    python -m experiments.pretrain --from runs/first --data text.txt --method lora \\
        --lora.rank 8 --lora.rules 'attention/(q|v)/kernel' 8 --out runs/adapted

The whole model lies frozen in `frozen["params"]`, quantized if asked for; only factors train, so
gradients and optimizer state exist for them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax

from compress.formats import format_of
from compress.lora import SCALINGS, attach, init_adapters
from compress.lowrank_params import ranks_by_path
from compress.quantize import formats_by_path, quantize_params, weight_rules
from model.rules import match
from train.methods import Plugs, Setup, one_side
from train.plugs import Context, PyTree, WeightTransform, merge


@dataclass(frozen=True)
class Lora:
    """Trains low-rank factors beside frozen matrices, and nothing else.

    Give it before methods that look at the weights that the model runs with.

    Attributes:
      rank: of the factors of every kernel in the blocks.
      rules: `(regex, rank)` pairs in its place, over parameter paths; rank 0 leaves alone.
      alpha: numerator of the scale; by default twice the rank of `rank`.
      scaling: "lora" divides alpha by the rank, "rslora" by its root.
      direction: "dora" trains the length of every output's column as well.
      form: "apart" computes x @ base + s (x @ a) @ b, "merged" adds the factors to the base first,
        so that fake quantization or integer products see the sum.
      base: format that the frozen matrices are rounded to and kept in, such as "q4_0" (QLoRA);
        None keeps them as they are.
      also: regexes of parameters that train too, in full: biases, norms, a head.
      seed: of the factors.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    rules: tuple[tuple[str, int], ...] = ()
    alpha: float | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    direction: Literal["lora", "dora"] = "lora"
    form: Literal["apart", "merged"] = "apart"
    base: str | None = None
    also: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling is {self.scaling!r}; choose one of {', '.join(SCALINGS)}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if self.base is not None:
            format_of(self.base)

    def scale(self, rank: int) -> float:
        """Returns s for factors of a rank.

        >>> Lora(rank=4).scale(4), Lora(rank=4, alpha=4.0, scaling="rslora").scale(16)
        (2.0, 1.0)
        """
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return SCALINGS[self.scaling](alpha, rank)

    def build(self, setup: Setup) -> Plugs:
        """Freezes the parameters and puts factors beside them.

        Raises:
          ValueError: a rule that matches nothing, no matrix, or only some layers of a stack; a rank
            above the shorter side of a matrix; a format that does not fit.
        """
        rules = self.rules or (("blocks/.*/kernel", self.rank),)
        ranks = ranks_by_path(setup.params, rules)
        also = match([(rule, True) for rule in self.also], setup.params, default=False)
        if self.base is not None:
            formats_by_path(setup.params, weight_rules(setup.params, self.base))

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            # What a method before this one has put beside the model trains as it asked for.
            trained = {name: part for name, part in params.items() if name not in also}
            params = {name: part for name, part in params.items() if name in also}
            trained |= one_side(params, also, True)
            fixed = one_side(params, also, False)
            if self.base is not None:
                fixed = quantize_params(fixed, weight_rules(fixed, self.base))
            whole = merge(trained, fixed)
            drawn = init_adapters(jax.random.key(self.seed), whole, ranks, self.direction)
            return merge(drawn, trained), fixed

        def apply(weights: PyTree, context: Context) -> PyTree:
            return attach(weights, self.scale, self.form)

        return Plugs(transforms=(WeightTransform(self.name, apply),), split=split)
