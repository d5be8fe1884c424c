"""What models give, from one compiled program each: op by op, a test would compile a hundred."""

import functools

import jax
from jax.typing import ArrayLike

from model.transformer import features


def initial(model, key, tokens):
    """Parameters as `model.init` draws them."""
    return _init(model)(key, tokens)["params"]


def logits_of(model, params, *arguments, **named):
    """What `model.apply` gives."""
    return _apply(model)(params, *arguments, **named)


def features_of(model, params, tokens: ArrayLike, cache=None):
    """What `features` gives."""
    return _features(model)(params, tokens, cache)


@functools.cache
def _init(model):
    return jax.jit(model.init)


@functools.cache
def _apply(model):
    return jax.jit(lambda params, *a, **n: model.apply({"params": params}, *a, **n))


@functools.cache
def _features(model):
    return jax.jit(lambda params, tokens, cache: features(model, params, tokens, cache=cache))
