"""What the parameter server's experiment learns: a small Transformer on bytes of text.

Driver and workers each make it for themselves, from the same settings and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.presets import modern_mini
from model.transformer import Transformer
from parallel.parameter_server_shard import flatten, unflatten
from train.corpus import build_corpus
from train.data import batches, evaluation_batches
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context
from train.text.sources import open_source, parse_mixture
from train.tokenizers.tokenizer import load_tokenizer

Gradient = Callable[[np.ndarray, int], tuple[np.ndarray, float]]
HELD_OUT = 16  # batches of the validation split that a loss is measured on


@dataclass(frozen=True)
class TaskSettings:
    """What is learned.

    Attributes:
      data: the text, read as bytes.
      layers: of the model.
      width: of the model.
      batch_size: rows of a worker's batch.
      sequence_length: bytes of a row.
      clip: largest norm of a gradient.
    """

    data: tuple[str, ...] = ("stdlib",)
    layers: int = 2
    width: int = 64
    batch_size: int = 8
    sequence_length: int = 64
    clip: float = 1.0


class Task(NamedTuple):
    """The functions of it.

    Attributes:
      start: [n] initial parameters.
      gradient: `(parameters, number of the batch) -> (gradient, loss)`, clipped.
      evaluate: parameters -> validation loss.
    """

    start: np.ndarray
    gradient: Gradient
    evaluate: Callable[[np.ndarray], float]


def make_task(settings: TaskSettings, seed: int) -> Task:
    """Opens the text and builds the model; the same in the driver and in every worker."""
    tokenizer = load_tokenizer("bytes")
    mixture = [(open_source(spec), weight) for spec, weight in parse_mixture(settings.data)]
    corpora = [(build_corpus(source, tokenizer), weight) for source, weight in mixture]
    config = modern_mini(
        vocabulary_size=tokenizer.vocabulary_size, layers=settings.layers, width=settings.width
    )
    model, terms = Transformer(config), [cross_entropy()]
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    shapes = jax.eval_shape(lambda: params)
    loss = loss_function(model, terms)

    def value(flat: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
        return loss(unflatten(flat, shapes), batch, context)[0]

    gradient_of, value_of = jax.jit(jax.value_and_grad(value)), jax.jit(value)
    length, rows = settings.sequence_length, settings.batch_size
    splits = [(corpus.split("train"), weight) for corpus, weight in corpora]
    train = batches(splits, seed=seed, sequence_length=length, batch_size=rows)
    validation = corpora[0][0].split("validation")
    whole = evaluation_batches(validation, sequence_length=length, batch_size=rows)
    held_out = list(islice(whole, HELD_OUT))

    def gradient(flat: np.ndarray, number: int) -> tuple[np.ndarray, float]:
        found, grads = jax.device_get(gradient_of(flat, train[number]))
        return clipped(grads, settings.clip), float(found)

    def evaluate(flat: np.ndarray) -> float:
        return float(np.mean([value_of(flat, batch) for batch in held_out]))

    return Task(flatten(params), gradient, evaluate)


def make_gradient(settings: TaskSettings, seed: int) -> Gradient:
    """Builds the gradient function in a worker, compiled."""
    task = make_task(settings, seed)
    task.gradient(task.start, 0)
    return task.gradient


def clipped(gradient: np.ndarray, largest: float) -> np.ndarray:
    """Returns the gradient, scaled to a norm of at most `largest`.

    >>> clipped(np.array([0.0, 4.0]), 1.0).tolist()
    [0.0, 1.0]
    """
    norm = float(np.linalg.norm(gradient))
    return gradient * np.asarray(min(1.0, largest / max(norm, 1e-30)), gradient.dtype)
