"""What a trained model can be compressed with, after training: a table of settings.

Each is `(model, params, batches) -> (config, params)`, batches being calibration tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from compress.lowrank_params import (
    compensate_on,
    compensate_params,
    factorize_on,
    factorize_params,
    ranks_by_path,
)
from compress.pruning.mask_trees import (
    block_kernels,
    by_layer,
    check_selection,
    leaves_at,
    masked,
    nested,
    targets_of,
)
from compress.pruning.masks import Pattern, check_sparsity, magnitude, n_of_m, unstructured
from compress.pruning.sparsegpt import sparsegpt_params
from compress.pruning.wanda import by_output, wanda
from compress.quantization.awq import awq_params
from compress.quantization.formats import format_of
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.smoothquant import smooth_params
from compress.quantization.w8a8 import Activation, activation_ranges, integer_products
from experiments.compression.structured import DistilGPT2Style, MinitronStyle, Structured
from model.config import TransformerConfig
from model.transformer import Transformer

PyTree = Any
Batches = Sequence[Any]
Compressed = tuple[TransformerConfig, PyTree]
Name24 = Literal["unstructured", "2:4"]


@runtime_checkable
class Compressor(Protocol):
    """Settings that compress a model."""

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Returns config and parameters of the compressed model."""
        ...


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest number of a grid; needs no calibration.

    Attributes:
      format: of kernels, token embedding and head; see `compress.quantization.formats`.
      positions: format of the position table, None to leave it alone.
      candidates: scales tried for each group.
    """

    format: str = "q8_0"
    positions: str | None = None
    candidates: int = 1

    def __post_init__(self) -> None:
        _check_formats(self.format, self.positions)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Quantizes all matrices."""
        rules = weight_rules(params, self.format, positions=self.positions)
        return model.config, quantize_params(params, rules, candidates=self.candidates)


@dataclass(frozen=True)
class GPTQ:
    """Rounding whose errors the rows still to come make up for, see `compress.quantization.gptq`.

    Attributes:
      format: of kernels, token embedding and head.
      positions: format of the position table, None to leave it alone.
      damping: added to the diagonal, as a share of its mean.
      head: how the head is quantized.
      candidates: scales tried for each group.
    """

    format: str = "q4_0"
    positions: str | None = None
    damping: float = 0.01
    head: Literal["nearest", "gptq"] = "nearest"
    candidates: int = 1

    def __post_init__(self) -> None:
        _check_formats(self.format, self.positions)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Quantizes all matrices."""
        rules = weight_rules(params, self.format, positions=self.positions)
        settings: Any = {"damping": self.damping, "head": self.head, "candidates": self.candidates}
        return model.config, gptq_params(model, params, batches, rules, **settings)


@dataclass(frozen=True)
class AWQ:
    """Rows that meet large activations are scaled up before rounding, see `quantization.awq`.

    Attributes:
      format: of kernels, token embedding and head.
      positions: format of the position table, None to leave it alone.
      steps: exponents to try.
      candidates: scales tried for each group.
    """

    format: str = "q4_0"
    positions: str | None = None
    steps: int = 20
    candidates: int = 1

    def __post_init__(self) -> None:
        _check_formats(self.format, self.positions)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Scales and quantizes all matrices."""
        rules = weight_rules(params, self.format, positions=self.positions)
        settings = {"steps": self.steps, "candidates": self.candidates}
        return model.config, awq_params(model, params, batches, rules, **settings)


@dataclass(frozen=True)
class SmoothQuant:
    """int8 weights and int8 activations, whose outliers went into the weights before.

    Attributes:
      alpha: how much of the difficulty the weights take, 0 to 1.
      products: "integer" multiplies integers, "float" what the weights stand for.
      range: of activations, found as they come or on the calibration data.
      share: one scale for each token (dynamic only), or for all.
      offset: of activations.
    """

    alpha: float = 0.5
    products: Literal["integer", "float"] = "integer"
    range: Literal["dynamic", "static"] = "dynamic"
    share: Literal["token", "tensor"] = "token"
    offset: Literal["none", "zero_point"] = "none"

    def __post_init__(self) -> None:
        _ = self.activation

    @property
    def activation(self) -> Activation:
        """How activations are rounded."""
        return Activation(self.range, self.share, self.offset)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Smooths, quantizes, and turns products into integer products."""
        smooth = smooth_params(model, params, batches, alpha=self.alpha)
        new = quantize_params(smooth, weight_rules(smooth, "int8"))
        if self.products == "float":
            return model.config, new
        ranges = activation_ranges(model, new, batches) if self.range == "static" else None
        rules = [("kernel", True)]
        if model.config.tied_head:  # the table is multiplied with, too
            rules.append(("token_embedding/embedding", True))
        return model.config, integer_products(new, self.activation, rules=rules, ranges=ranges)


@dataclass(frozen=True)
class Magnitude:
    """Zeros where the kernels of the blocks are smallest, in each layer by itself.

    Attributes:
      sparsity: share of zeros.
      pattern: where they may lie: anywhere in a kernel, equally many in each output, or 2:4.
    """

    sparsity: float = 0.5
    pattern: Literal["unstructured", "by_output", "2:4"] = "unstructured"

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, self.sparsity)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Puts zeros into the kernels."""
        select = by_layer(_pattern(self.pattern, unstructured))
        targets = targets_of(block_kernels(self.sparsity), params)
        check_selection(select, params, targets)
        scores = {path: magnitude(w) for path, w in leaves_at(params, targets).items()}
        masks = jax.jit(select)(scores, targets)
        return model.config, masked(params, nested(masks))


@dataclass(frozen=True)
class Wanda:
    """Zeros where weight times activation is smallest, see `compress.pruning.wanda`.

    Attributes:
      sparsity: share of zeros.
      pattern: where they may lie: equally many in each output, anywhere in a kernel, or 2:4.
    """

    sparsity: float = 0.5
    pattern: Literal["unstructured", "by_kernel", "2:4"] = "unstructured"

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, self.sparsity)

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Puts zeros into the kernels of the blocks."""
        pattern = _pattern(self.pattern, by_output)
        return model.config, wanda(model, params, batches, self.sparsity, pattern)


@dataclass(frozen=True)
class SparseGPT:
    """Zeros chosen and made up for column by column, see `compress.pruning.sparsegpt`.

    Attributes:
      sparsity: share of zeros.
      pattern: anywhere, or two of every four along the contraction axis.
      format: quantizes what is kept, together with the pruning; None leaves it float.
      block: rows of a kernel that are ranked together.
      damping: added to the diagonal, as a share of its mean.
    """

    sparsity: float = 0.5
    pattern: Name24 = "unstructured"
    format: str | None = None
    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, self.sparsity)
        _check_formats(self.format)
        if self.block < 1:
            raise ValueError(f"a block of {self.block} rows holds no weight; give at least 1")

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Puts zeros into the kernels of the blocks."""
        kernels = "blocks/.*/kernel"
        formats = () if self.format is None else ((kernels, self.format),)
        group = 4 if self.pattern == "2:4" else None
        rules = ((kernels, self.sparsity),)
        settings: Any = {"group": group, "formats": formats}
        settings |= {"block": self.block, "damping": self.damping}
        return model.config, sparsegpt_params(model, params, batches, rules, **settings)


@dataclass(frozen=True)
class LowRankFactors:
    """Two thin factors in place of the blocks' kernels, see `compress.lowrank`.

    Attributes:
      share: of the weights that the factors hold, which gives each kernel its rank.
      rank: of all kernels, in place of the share.
      keep: "outputs" on the calibration text, or the "weights" themselves.
      damping: added to the diagonal of the calibration's Hessian, as a share of its mean.
    """

    share: float = 0.5
    rank: int | None = None
    keep: Literal["outputs", "weights"] = "outputs"
    damping: float = 0.01

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Factorizes the kernels of the blocks."""
        rules = [("blocks/.*/kernel", self.share if self.rank is None else self.rank)]
        if self.keep == "weights":
            return model.config, factorize_params(params, rules)
        return model.config, factorize_on(model, params, batches, rules, damping=self.damping)


@dataclass(frozen=True)
class Compensated:
    """Quantized or pruned kernels of the blocks, with low-rank factors of what they lack (LQER).

    Attributes:
      base: what is compensated: "rtn" and "gptq" quantize, "magnitude" and "wanda" prune.
      format: for "rtn" and "gptq".
      sparsity: for "magnitude" and "wanda".
      rank: of the factors.
      keep: "outputs" on the calibration text, or the "weights" themselves.
      damping: added to the diagonal of the calibration's Hessian, as a share of its mean.
    """

    base: Literal["rtn", "gptq", "magnitude", "wanda"] = "rtn"
    format: str = "q4_0"
    sparsity: float = 0.5
    rank: int = 16
    keep: Literal["outputs", "weights"] = "outputs"
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_formats(self.format)
        check_sparsity(self.sparsity, "the kernels")

    def __call__(self, model: Transformer, params: PyTree, batches: Batches) -> Compressed:
        """Compresses, then gives every kernel factors."""
        made: dict[str, Callable[[], Compressor]] = {
            "rtn": lambda: RoundToNearest(self.format),
            "gptq": lambda: GPTQ(self.format),
            "magnitude": lambda: Magnitude(self.sparsity),
            "wanda": lambda: Wanda(self.sparsity),
        }
        rules = [("blocks/.*/kernel", self.rank)]
        ranks_by_path(params, rules)  # refuses a rank before anything is computed
        _, small = made[self.base]()(model, params, batches)
        if self.keep == "weights":
            return model.config, compensate_params(params, small, rules)
        new = compensate_on(model, params, small, batches, rules, damping=self.damping)
        return model.config, new


COMPRESSORS: dict[str, Callable[[], Any]] = {
    "rtn": RoundToNearest,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "structured": Structured,
    "distilgpt2": DistilGPT2Style,
    "minitron": MinitronStyle,
    "lowrank": LowRankFactors,
    "compensated": Compensated,
}
"""The methods, by the name that a command line uses."""


def _check_formats(*names: str | None) -> None:
    for name in names:
        if name is not None:
            format_of(name)


def _check_pattern(name: str, sparsity: float) -> None:
    check_sparsity(sparsity, "the kernels")
    if name == "2:4" and sparsity != 0.5:
        raise ValueError(f"2:4 is a sparsity of 0.5, not {sparsity}; leave the sparsity out")


def _pattern(name: str, default: Pattern) -> Pattern:
    known = {"2:4": n_of_m(4), "by_output": by_output, "by_kernel": unstructured}
    return known.get(name, default)


def settings_to_json(method: Any) -> dict[str, Any]:
    """Returns the name and the fields of a method.

    >>> settings_to_json(Wanda())
    {'method': 'wanda', 'sparsity': 0.5, 'pattern': 'unstructured'}
    """
    (name,) = (name for name, kind in COMPRESSORS.items() if kind is type(method))
    return {"method": name, **dataclasses.asdict(method)}
