"""8-bit weights and 8-bit activations where one feature is far larger than all others.

A small model has no such feature, so one is put in: in every norm of a block, input 0 is made 30
times larger and the rows of the kernels that read it 30 times smaller, which changes no output.

Published beside it: a Transformer of 125M on C4 (perplexity 25.65 in float32), Dettmers et al. 2022
(arXiv:2208.07339), table 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress.quantization.folding import fold, sites_of
from compress.quantization.formats import Format, format_of, format_to_json
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.smoothquant import smooth_params
from compress.quantization.w8a8 import Activation, integer_products
from experiments.ablate.subjects import base_settings, judge, needs_of, open_subject
from experiments.grid import Measurement
from experiments.tables.margins import Claim, claims
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table
from model.config import TransformerConfig

SIZE = 30.0  # times: LLM.int8() finds outliers of about 20 times the other features

# name of the row -> (format of the weights, share and offset of the activations, smoothed, outlier)
METHODS: dict[str, dict[str, Any]] = {
    "float32": {},
    "no outlier: vector-wise": {"format": "int8", "share": "token", "outlier": False},
    "per tensor": {"format": "int8_tensor", "share": "tensor"},
    "per row": {"format": "int8_tensor", "share": "token"},
    "vector-wise": {"format": "int8", "share": "token"},
    "zero point, vector-wise": {"format": "int8", "share": "token", "offset": "zero_point"},
    "SmoothQuant 0.5, vector-wise": {"format": "int8", "share": "token", "alpha": 0.5},
    "SmoothQuant 0.8, vector-wise": {"format": "int8", "share": "token", "alpha": 0.8},
}
PUBLISHED = {
    "float32": "25.65",
    "per tensor": "87.76",
    "per row": "30.93",
    "vector-wise": "35.84",
    "zero point, vector-wise": "25.72",
}
SOURCE = (
    "Published: a Transformer of 125M on C4, Dettmers et al. 2022 (arXiv:2208.07339), table 1; "
    '"vector-wise" is a scale for each token and each output.'
)
ORDER = ("per tensor", "per row", "zero point, vector-wise", "SmoothQuant 0.5, vector-wise")


def with_outlier(config: TransformerConfig, params: Any, size: float) -> Any:
    """Returns the same function with input 0 of every norm's kernels `size` times as large.

    Args:
      config: of the model.
      params: plain parameters.
      size: factor, above 0.
    """
    scales_D = jnp.ones(config.width).at[0].set(1 / size)

    def one(layer: Any) -> Any:
        for site in sites_of(config):
            if site.source.endswith("norm"):
                layer = fold(layer, site, scales_D)
        return layer

    return {**params, "blocks": jax.vmap(one)(params["blocks"])}


def in_full(how: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a row is made, as JSON values: grid and rounding of activations spelled out.

    >>> in_full({"format": "int8", "share": "token"})["activations"]["offset"]
    'none'
    """
    found = {"outlier": how.get("outlier", True), "alpha": how.get("alpha")}
    if "format" not in how:
        return found
    activation = Activation("dynamic", how["share"], how.get("offset", "none"))
    weights = format_to_json(format_of(how["format"]))
    return {**found, "weights": weights, "activations": dataclasses.asdict(activation)}


def measure(request: Request, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the outlier in, quantizes as the settings say; returns quality."""
    subject = open_subject(request, settings)
    method, model, params = settings["how"], subject.model, subject.params
    if method["outlier"]:
        params = with_outlier(model.config, params, settings["size"])
    if method["alpha"] is not None:
        params = smooth_params(model, params, subject.calibration, alpha=method["alpha"])
    if "weights" in method:
        activation = Activation(**method["activations"])
        params = quantize_params(params, weight_rules(params, Format(**method["weights"])))
        params = integer_products(params, activation, rules=[("kernel", True)])
    dense, found = judge(subject, model, params)
    return {**found, "dense perplexity": dense["perplexity"]}


def cells(request: Request) -> list[Measurement]:
    """Returns a measurement a row and seed."""
    found = []
    for seed in range(request.seeds):
        for name, how in METHODS.items():
            settings = {**base_settings(seed), "method": "w8a8", "how": in_full(how), "size": SIZE}
            function = functools.partial(measure, request)
            found.append(Measurement(name, settings, function, needs_of(settings)))
    return found


def render(results: Results) -> list[str]:
    """Returns the table and the orderings."""
    body = [
        [
            name,
            spread(results.column(name, "perplexity")),
            spread(results.column(name, "KL to the dense model"), 5),
            spread(results.column(name, "top-1 agreement"), 4),
            PUBLISHED.get(name, ""),
        ]
        for name in results.by_name
        if results.column(name, "perplexity")
    ]
    names = ["weights x activations", "perplexity", "KL to float32 (nats)", "top-1", "published"]
    lines = [
        f"One feature of every block's norms is {SIZE:g} times as large as it was; all kernels and "
        "the head take their products in integers, the scales of activations found as they come.",
        "",
        *grid(names, body, "lrrrr"),
        "",
        SOURCE,
    ]
    rows = []
    for larger, smaller in itertools.pairwise(ORDER):
        high, low = results.pair(larger, smaller, "perplexity")
        if high:
            published = [PUBLISHED.get(name, "") for name in (larger, smaller)]
            text = " > ".join(published) if all(published) else ""
            rows.append(Claim((larger, high), (smaller, low), text))
    return [*lines, "", *claims(rows)] if rows else lines


TABLES: tuple[Table, ...] = (
    Table("outliers", "Int8 products with an outlier feature", cells, render),
)
