"""The tables of transfer learning: what a model that is there already saves a task."""

from __future__ import annotations

from experiments.ablate import (
    transfer_multi30k,
    transfer_squad_report,
    transfer_sst2_report,
    transfer_stories_report,
    transfer_stories_tuning,
)
from experiments.tables.table import Table

TABLES: tuple[Table, ...] = (
    *transfer_sst2_report.TABLES,
    transfer_multi30k.TABLE,
    transfer_squad_report.TABLE,
    transfer_stories_tuning.TABLE,
    *transfer_stories_report.TABLES,
)
