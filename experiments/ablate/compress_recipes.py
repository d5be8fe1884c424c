"""What the tables of quantization and of pruning do to a model: steps in turn, then one judgement.

A measurement is keyed by what every step is, defaults and grids written out, so that tables share
what they both ask for, and a default that changes is measured again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress.quantization.formats import Format, format_of, format_to_json
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import (
    contraction_axis,
    dequantize_params,
    quantize_params,
    report,
)
from experiments.ablate.subjects import judge, needs_of, open_subject
from experiments.compression.compressors import (
    Compressor,
    Magnitude,
    SparseGPT,
    Wanda,
    settings_to_json,
)
from experiments.grid import Measurement
from experiments.tables.table import Request
from model.config import TransformerConfig
from model.rules import leaf_paths, match
from model.transformer import Transformer

PyTree = Any
ALL, BLOCKS = "kernel|embedding", "blocks/.*/kernel"
"""Which matrices: all there are, or those of the blocks, as the papers have it."""


@dataclass(frozen=True)
class Rounded:
    """Matrices on a grid, each in groups where they divide it and by channel where not.

    Attributes:
      method: round to nearest, or GPTQ.
      format: of the matrices.
      matrices: which, a regex over paths.
      damping: of GPTQ, see `compress.quantization.gptq`.
      order: of GPTQ.
      head: of GPTQ.
      candidates: scales tried for each group.
    """

    method: Literal["rtn", "gptq"]
    format: Format
    matrices: str = BLOCKS
    damping: float = 0.01
    order: Literal["activation", "given"] = "activation"
    head: Literal["nearest", "gptq"] = "nearest"
    candidates: int = 1

    def __call__(
        self, model: Transformer, params: PyTree, batches: Any
    ) -> tuple[TransformerConfig, PyTree]:
        """Quantizes the matrices."""
        rules = rules_for(params, self.matrices, self.format)
        if self.method == "rtn":
            return model.config, quantize_params(params, rules, candidates=self.candidates)
        settings: Any = {name: getattr(self, name) for name in ("damping", "order", "head")}
        settings["candidates"] = self.candidates
        return model.config, gptq_params(model, params, batches, rules, **settings)


Recipe = tuple[Compressor, ...]
"""Steps, each on plain parameters; () leaves the model as it is."""


def rounded(method: Literal["rtn", "gptq"], format: str | Format, matrices: str) -> Rounded:
    """Returns the step; what GPTQ alone looks at stays at its defaults.

    >>> rounded("rtn", "q4_0", ALL).format.group
    32
    """
    return Rounded(method, format_of(format), matrices)


def rules_for(params: PyTree, matrices: str, format: Format) -> list[tuple[str, Any]]:
    """Returns rules that give every matrix a format, by channel where its groups do not divide it.

    Args:
      params: plain parameters.
      matrices: which, a regex over paths.
      format: of them.
    """
    rules: list[tuple[str, Any]] = [(matrices, format)]
    if not isinstance(format.group, int):
        return rules
    by_channel = dataclasses.replace(format, group="channel", scale_dtype="float32")
    chosen = jax.tree.leaves(match(rules, params, False))
    for path, leaf, mine in zip(leaf_paths(params), jax.tree.leaves(params), chosen, strict=True):
        if mine and leaf.shape[contraction_axis(path)] % format.group:
            rules.insert(0, (f"^{path}$", by_channel))
    return rules


def step_to_json(step: Compressor) -> dict[str, Any]:
    """Returns all fields of a step as JSON values, grids by what they are.

    >>> step_to_json(SparseGPT(format="q4_0"))["format"]["group"]
    32
    """
    fields = dataclasses.asdict(step) if isinstance(step, Rounded) else settings_to_json(step)
    if fields.get("format") is not None:
        format: Any = step.format  # type: ignore[attr-defined]
        fields["format"] = format_to_json(format_of(format))
    return fields


def measurement(
    request: Request, name: str, subject: Mapping[str, Any], recipe: Recipe
) -> Measurement:
    """Returns the measurement of a row: the recipe's quality, bytes and zeros.

    Args:
      request: where the subject lies.
      name: of the row.
      subject: settings of `experiments.ablate.subjects`.
      recipe: what is done to it.
    """
    settings = {**subject, "recipe": [step_to_json(step) for step in recipe]}
    return Measurement(
        name, settings, functools.partial(measure, request, recipe), needs_of(settings)
    )


def measure(request: Request, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Follows the recipe; returns quality, bytes and zeros, and those of the dense model."""
    subject = open_subject(request, settings)
    params = _after(request, _hashable(settings), recipe)
    dense, found = judge(subject, subject.model, params)
    return {
        **found,
        "zeros": zeros(params),
        "bytes": report(params).bytes,
        "dense perplexity": dense["perplexity"],
        "dense bytes": report(subject.params).bytes,
        "rise in %": 100 * (found["perplexity"] / dense["perplexity"] - 1),
    }


def zeros(params: PyTree) -> float:
    """Returns the share of zeros in the kernels of the blocks.

    >>> zeros({"blocks": {"up": {"kernel": jnp.array([[[0.0, 1.0]]])}}})
    0.5
    """
    blocks = dequantize_params(params["blocks"])
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    return float(sum(jnp.sum(k == 0) for k in kernels) / sum(k.size for k in kernels))


def _hashable(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in settings.items() if name != "recipe")


def _after(request: Request, subject: tuple[tuple[str, Any], ...], recipe: Recipe) -> PyTree:
    if len(recipe) == 1 and isinstance(recipe[0], Magnitude | Wanda | SparseGPT):
        return _pruned(request, subject, recipe)
    return _made(request, subject, recipe)


# One table prunes, the next goes on from there: as many as three seeds of the first.
@functools.lru_cache(maxsize=24)
def _pruned(request: Request, subject: tuple[tuple[str, Any], ...], recipe: Recipe) -> PyTree:
    return _made(request, subject, recipe)


def _made(request: Request, subject: tuple[tuple[str, Any], ...], recipe: Recipe) -> PyTree:
    opened = open_subject(request, dict(subject))
    if not recipe:
        return opened.params
    before = dequantize_params(_after(request, subject, recipe[:-1]))
    return recipe[-1](opened.model, before, opened.calibration)[1]
