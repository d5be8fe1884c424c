"""Optimizers by name: typed settings, and the Optax transformations that they stand for."""

from train.optimizers.first_order import (
    SGD,
    Adafactor,
    Adam,
    Adamax,
    AdamaxW,
    AdamW,
    Lion,
    NAdamW,
)
from train.optimizers.muon import Muon
from train.optimizers.table import OPTIMIZERS, build, learning_rate_at, optimizer_named

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Adamax",
    "AdamaxW",
    "Lion",
    "Muon",
    "NAdamW",
    "build",
    "learning_rate_at",
    "optimizer_named",
]
