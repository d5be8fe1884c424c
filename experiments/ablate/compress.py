"""The tables of the topic "compress", in the order of its report."""

from __future__ import annotations

from experiments.ablate import (
    compress_distil,
    compress_gpt2,
    compress_outliers,
    compress_prune,
    compress_quantize,
    compress_runtimes,
    compress_sizes,
    compress_sparse_training,
    compress_structured,
    compress_training,
)
from experiments.tables.table import Table

TABLES: tuple[Table, ...] = (
    *compress_quantize.TABLES,
    *compress_outliers.TABLES,
    *compress_prune.TABLES,
    *compress_sparse_training.TABLES,
    *compress_distil.TABLES,
    *compress_structured.TABLES,
    *compress_training.TABLES,
    *compress_sizes.TABLES,
    *compress_runtimes.TABLES,
    *compress_gpt2.TABLES,
)
