"""Low-rank adaptation as a method: `--method lora --lora.rank 8`, on top of another run.

    python -m experiments.pretrain --from runs/first --data text.txt --method lora \\
        --lora.rank 8 --lora.rules 'attention/(q|v)/kernel' 8 --out runs/adapted

The whole model lies frozen in `frozen["params"]`, quantized if asked for; only factors train, so
gradients and optimizer state exist for them alone. A run that `experiments.compress` wrote can be
the base as it is, GPTQ's numbers for instance:

    python -m experiments.pretrain --from runs/first --data text.txt --method lora \\
        --lora.base-run runs/small --out runs/adapted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from compress.lora import SCALINGS, attach, init_adapters
from compress.lowrank_params import ranks_by_path
from compress.quantization.formats import format_of
from compress.quantization.quantize import formats_by_path, quantize_params, weight_rules
from experiments.methods.lora_base import (
    BASE,
    Base,
    check_base,
    check_tokens,
    known_base,
    load_base,
)
from model.config import config_from_dict
from train.methods import FrozenTree, OpenRun, Plugs, Setup
from train.partition import trains_also
from train.plugs import Context, PyTree, WeightTransform, merge
from train.tokenizers.tokenizer import Tokenizer


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
      base_run: run, "RUN" or "RUN@STEP", whose weights are the base, quantized as they are, in
        place of those that this run starts from; of the same model.
      also: regexes of parameters that train too, in full: biases, norms, a head.
      seed: of the factors.
      resolved: filled in at the start of the run, so that it does not need the base's folder again.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    rules: tuple[tuple[str, int], ...] = ()
    alpha: float | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    direction: Literal["lora", "dora"] = "lora"
    form: Literal["apart", "merged"] = "apart"
    base: str | None = None
    base_run: str | None = None
    also: tuple[str, ...] = ()
    seed: int = 0
    resolved: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.resolved, dict):  # from JSON
            fields = self.resolved | {"model": config_from_dict(self.resolved["model"])}
            object.__setattr__(self, "resolved", Base(**fields))
        if self.base_run is not None:
            given = {"base": self.base is not None, "also": bool(self.also)}
            given["direction dora"] = self.direction == "dora"
            if wrong := [name for name, there in given.items() if there]:
                raise ValueError(
                    f"{' and '.join(wrong)} would need the plain weights of {self.base_run}, which "
                    "is kept as it is; leave that out, or leave base_run out and start from a "
                    "plain run"
                )
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

    def resolve(self, saved: Lora | None, open_run: OpenRun) -> Lora:
        """Returns the settings with the base known, if a run is the base.

        Args:
          saved: those that the run began with, if it did; what they know of the same base is taken
            from them.
          open_run: see `train.methods.OpenRun`.

        Raises:
          ValueError: a base that does not fit.
          FileNotFoundError: it is no run.
        """
        if self.base_run is None or self.resolved is not None:
            return self
        if saved is not None and saved.base_run == self.base_run:
            return dataclasses.replace(self, resolved=saved.resolved)
        return dataclasses.replace(self, resolved=known_base(self.base_run, open_run))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a base that reads other tokens than this run."""
        if self.base_run is not None and self.resolved is not None:
            check_tokens(self.base_run, self.resolved, tokenizer)

    def build(self, setup: Setup) -> Plugs:
        """Freezes the parameters and puts factors beside them.

        Raises:
          ValueError: a rule that matches nothing, no matrix, or only some layers of a stack; a rank
            above the shorter side of a matrix; a format that does not fit.
        """
        rules = self.rules or (("blocks/.*/kernel", self.rank),)
        if self.base_run is not None:
            return self._on_a_run(self.base_run, rules, setup)
        ranks = ranks_by_path(setup.params, rules)
        chosen = trains_also(setup.params, self.also)
        if self.base is not None:
            formats_by_path(setup.params, weight_rules(setup.params, self.base))

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            # What a method before this one has put beside the model trains as it asked for.
            trained, fixed = chosen(params)
            _check_there(params, ranks)
            if self.base is not None:
                fixed = quantize_params(fixed, weight_rules(fixed, self.base))
            whole = merge(trained, fixed)
            drawn = init_adapters(jax.random.key(self.seed), whole, ranks, self.direction)
            return merge(drawn, trained), fixed

        def apply(weights: PyTree, context: Context) -> PyTree:
            return attach(weights, self.scale, self.form)

        return Plugs(transforms=(WeightTransform(self.name, apply),), split=split)

    def _on_a_run(self, spec: str, rules: tuple[tuple[str, int], ...], setup: Setup) -> Plugs:
        if self.resolved is None:
            raise ValueError("the base is not known yet: call `resolve` first")
        known: Base = self.resolved
        check_base(spec, known, setup.config)
        base = known.abstract
        ranks = ranks_by_path(base, rules)

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            kept = {name: part for name, part in params.items() if name not in base}
            # Shapes alone are asked of the base: its numbers are not here, and are not drawn.
            return merge(init_adapters(jax.random.key(self.seed), base, ranks), kept), {}

        def apply(weights: PyTree, context: Context) -> PyTree:
            return attach(merge(weights, context.frozen[BASE]), self.scale, self.form)

        frozen = {BASE: FrozenTree(base, lambda open_run: load_base(spec, known, open_run))}
        return Plugs((WeightTransform(self.name, apply),), split=split, frozen=frozen)


def _check_there(params: PyTree, paths: Iterable[str]) -> None:
    """Raises ValueError if a method before this one has taken a matrix away to freeze it."""
    for path in paths:
        place = params
        for name in path.split("/"):
            if name not in place:
                raise ValueError(
                    f"lora adapts {path}, which a method before it has frozen; give lora first"
                )
            place = place[name]
