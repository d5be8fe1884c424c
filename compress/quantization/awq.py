"""AWQ: rows that meet large activations are scaled up before rounding, so they lose less.

    s_j = mean|x_j|^alpha,    D = W - diag(1/s) Q(diag(s) W)

with the alpha of 0 to 1 that gives the least `tr(D' H D)`, H = X' X (Lin et al. 2023,
arXiv:2306.00978). The scales are folded away where the input is made, so nothing is left of them at
run time. alpha = 0 is plain rounding, so no site gets worse on the calibration data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress.calibrate import sequential
from compress.observed import ByPath
from compress.quantization.folding import Site, at_least, fold, leaf_at, sites_of
from compress.quantization.formats import Format
from compress.quantization.quantize import formats_by_path, quantize_params
from compress.quantization.rounding import quantize
from model.config import TransformerConfig
from model.rules import STACK, Rules, path_of
from model.transformer import Transformer

PyTree = Any


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def best_scales(
    kernels: tuple[jax.Array, ...],
    hessian_II: jax.Array,
    magnitude_I: jax.Array,
    formats: tuple[Format, ...],
    steps: int,
    candidates: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (scales [I], error at alpha = 0 and at each step): see the top of the file.

    Args:
      kernels: [I, O] each, all with the same inputs.
      hessian_II: X' X.
      magnitude_I: mean |x|.
      formats: of each kernel.
      steps: how many alpha above 0 to try, up to 1.
      candidates: see `compress.quantization.rounding.quantize`.
    """
    magnitude_I = at_least(magnitude_I)

    def scales(alpha):
        s_I = magnitude_I**alpha
        return s_I / jnp.sqrt(s_I.max() * s_I.min())

    def error(alpha):
        s_I1 = scales(alpha)[:, None]
        total = jnp.float32(0)
        for kernel, format in zip(kernels, formats, strict=True):
            w = kernel.astype(jnp.float32)
            rounded = quantize(w * s_I1, format, candidates=candidates).dequantize(jnp.float32)
            d = w - rounded / s_I1
            total += jnp.sum(d * jnp.matmul(hessian_II, d, precision=jax.lax.Precision.HIGHEST))
        return total

    alphas = jnp.linspace(0.0, 1.0, steps + 1, dtype=jnp.float32)
    errors = jax.lax.map(error, alphas)
    return scales(alphas[jnp.argmin(errors)]), errors


def awq_params(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    rules: Rules,
    *,
    steps: int = 20,
    candidates: int = 1,
) -> PyTree:
    """Returns the parameters with matrices quantized by rules, those of the blocks scaled before.

    Layer by layer, each on the inputs that the quantized layers before it give. Kernels without a
    site (see `compress.quantization.folding.sites_of`), tables and head are rounded to nearest.

    Args:
      model: the Transformer.
      params: plain parameters.
      batches: calibration tokens, int [B, T] each.
      rules: see `compress.quantization.quantize.formats_by_path`.
      steps: values of alpha to try.
      candidates: scales tried for each group.

    Raises:
      ValueError: as `formats_by_path` and `sequential`, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps are too few: at least alpha = 1 is tried beside 0")
    formats = formats_by_path(params, rules)
    inside = {p.removeprefix(f"{STACK}/"): f for p, f in formats.items() if p.startswith(STACK)}
    tables = [(f"^{p}$", f) for p, f in formats.items() if not p.startswith(STACK)]
    if tables:
        params = quantize_params(params, tables, quantize, candidates=candidates)

    def one(number: int, layer: PyTree, seen: ByPath) -> PyTree:
        layer = scale_layer(model.config, layer, seen, inside, steps, candidates)

        def rounded(key_path, leaf):
            format = inside.get(path_of(key_path))
            return leaf if format is None else quantize(leaf, format, candidates=candidates)

        return jax.tree_util.tree_map_with_path(rounded, layer)

    names = ("hessian", "abs_sum", "tokens")
    seen = [first[0] for site in sites_of(model.config) if (first := _formatted(site, inside))]
    return sequential(model, params, batches, names, one, kernels=seen).params


def _formatted(site: Site, formats: Mapping[str, Format]) -> list[str]:
    return [path for path in site.kernels if path in formats]


def scale_layer(
    config: TransformerConfig,
    layer: PyTree,
    seen: ByPath,
    formats: dict[str, Format],
    steps: int = 20,
    candidates: int = 1,
) -> PyTree:
    """Returns one plain block of the same function, scaled for rounding to `formats` (by path)."""
    for site in sites_of(config):
        if not (paths := _formatted(site, formats)):
            continue
        statistics = seen[paths[0]]
        scales_I, _ = best_scales(
            tuple(leaf_at(layer, path) for path in paths),
            statistics["hessian"],
            statistics["abs_sum"] / statistics["tokens"],
            tuple(formats[path] for path in paths),
            steps,
            candidates,
        )
        layer = fold(layer, site, scales_I)
    return layer
