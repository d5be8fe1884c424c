"""NorMuon: Muon whose neurons move by equal amounts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.optimizers.matrix import frobenius, map_to
from train.optimizers.muon import Muon, scale_by_shape


@dataclasses.dataclass(frozen=True)
class NorMuon(Muon):
    """Muon with a second moment for each output neuron (Li et al., arXiv 2510.05491, algorithm 1).

    ::

        O = orthogonalize(M)                       Muon's, rows the inputs, columns the neurons
        v <- b2 * v + (1 - b2) * mean_in(O * O)    one number a neuron
        N = O / (sqrt(v) + eps)
        W <- W - rate * (scale * N * |O| / |N| + weight_decay * W)

    The paper has ``0.2 * sqrt(in * out) / |N|`` for the scale, that is, a root mean square of 0.2;
    ``consistent_rms = 0.2`` gives the same up to the singular values' distance from 1. The authors'
    code keeps the norm of O as here, with a rate of 0.02 and b1 = b2 = 0.95.
    """

    learning_rate: float = 0.02
    b2: float = 0.95
    eps: float = 1e-10

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return optax.chain(
            self.orthogonal(),
            normalize_neurons(self.b2, self.eps),
            scale_by_shape(self.consistent_rms),
        )


class NeuronState(NamedTuple):
    """Second moment of each neuron [..., 1, out]."""

    nu: Any


def normalize_neurons(b2: float = 0.95, eps: float = 1e-10) -> optax.GradientTransformation:
    """Divides each column by its running root mean square, and keeps the norm of the matrix.

    Args:
      b2: what an update leaves of the second moment.
      eps: added to its root.

    >>> tx = normalize_neurons()
    >>> u = jnp.array([[3.0, 0.1], [3.0, 0.1]])
    >>> columns = jnp.abs(tx.update(u, tx.init(u))[0]).sum(0)
    >>> bool(jnp.isclose(columns[0], columns[1]))
    True
    """

    def init(params):
        return NeuronState(
            jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, p.shape[-1]), jnp.float32), params)
        )

    def update(updates, state, params=None):
        def one(u, nu):
            o = u.astype(jnp.float32)
            nu = b2 * nu + (1 - b2) * jnp.square(o).mean(axis=-2, keepdims=True)
            n = o / (jnp.sqrt(nu) + eps)
            n = n * (frobenius(o) / jnp.maximum(frobenius(n), eps))
            return n.astype(u.dtype), nu

        updates, nu = map_to(2, one, updates, state.nu)
        return updates, NeuronState(nu)

    return optax.GradientTransformation(init, update)
