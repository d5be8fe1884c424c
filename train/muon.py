"""Muon for the kernels of the blocks, with AdamW beside it for all other parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import optax

from model.rules import is_stacked, leaf_paths, match
from train.optimizer_settings import BoolRules, DecayingSettings, ScheduleOf, decay_mask

# Most steps that the coefficients are good for: "dion" has five sets, one for each step, while more
# than 20 rounds of "standard", which circles around 1 for ever, only cost time.
_COEFFICIENTS = {"standard": 20, "dion": 5}
_PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")


@dataclasses.dataclass(frozen=True)
class Muon(DecayingSettings):
    """Orthogonalised momentum for the kernels of the blocks, AdamW for everything else.

    Each layer of a stacked kernel is orthogonalised by itself; embeddings, head, biases and norm
    scales are AdamW's, at a rate of its own. Jordan et al., https://kellerjordan.github.io/posts/muon.
    The defaults are the tuned ones of Wen et al., arXiv 2509.02046, where clipping changed nothing.

    Attributes:
      learning_rate: Muon's rate. An update is this times a matrix whose singular values are near 1,
        times ``sqrt(max(1, out / in))``, or ``consistent_rms * sqrt(max(in, out))`` where set.
      momentum: of the gradient, before orthogonalising.
      nesterov: Nesterov's momentum for Muon; the AdamW part never has it.
      newton_schulz_steps: iterations of the orthogonalisation; the cost grows with them.
      newton_schulz_coefficients: "standard", Jordan's three for every step, which leave singular
        values between about 0.7 and 1.2, or "dion", whose five change by step and come closer to 1.
      preconditioning: scaling before the first iteration; all but "frobenius" orthogonalise better
        in as many steps, and "spectral" is much slower (Optax explains them).
      consistent_rms: 0.2 gives the updates AdamW's root mean square, so that AdamW's rate and decay
        can be used as they are (Liu et al., arXiv 2502.16982). None for Jordan's scaling.
      muon_rules: ``(regex, whether it is Muon's)`` pairs, first match wins, AdamW otherwise.
      adam_learning_rate: peak of the AdamW part's rate.
      adam_weight_decay: decay of the AdamW part, under the same ``decay_rules``.
    """

    learning_rate: float = 0.016
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: Literal["standard", "dion"] = "standard"
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius"
    consistent_rms: float | None = None
    muon_rules: BoolRules = (("blocks/.*/kernel", True),)
    adam_learning_rate: float = 3.2e-3
    adam_b1: float = 0.8
    adam_b2: float = 0.98
    adam_eps: float = 1e-8
    adam_weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newton_schulz_coefficients not in _COEFFICIENTS:
            raise ValueError(
                f"newton_schulz_coefficients must be one of {', '.join(_COEFFICIENTS)}, "
                f"not {self.newton_schulz_coefficients!r}"
            )
        if self.preconditioning not in _PRECONDITIONINGS:
            raise ValueError(
                f"preconditioning must be one of {', '.join(_PRECONDITIONINGS)}, "
                f"not {self.preconditioning!r}"
            )
        most = _COEFFICIENTS[self.newton_schulz_coefficients]
        if not 1 <= self.newton_schulz_steps <= most:
            raise ValueError(
                f"newton_schulz_steps must lie between 1 and {most} with the coefficients "
                f"{self.newton_schulz_coefficients!r}, not {self.newton_schulz_steps}"
            )

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        on_muon = match(self.muon_rules, params, default=False)
        for path, leaf, chosen in zip(
            leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(on_muon), strict=True
        ):
            if chosen and len(leaf.shape) - is_stacked(path) < 2:
                raise ValueError(
                    f"Muon orthogonalises matrices, and {path!r} of shape {leaf.shape} is none; "
                    "write muon_rules that leave it to AdamW"
                )
        # Any axes before the last two (layers, experts) are matrices of their own. Optax's default
        # would give Muon the embeddings and the head, and leave the stacked kernels to Adam.
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        # AdamW stands outside of optax.contrib.muon, whose own Adam part would take over Muon's
        # nesterov and decay biases and scales along with the embeddings.
        return optax.partition(
            {
                "muon": optax.contrib.muon(
                    schedule_of(self.learning_rate),
                    ns_coeffs=self.newton_schulz_coefficients,
                    ns_steps=self.newton_schulz_steps,
                    beta=self.momentum,
                    nesterov=self.nesterov,
                    weight_decay=self.weight_decay,
                    weight_decay_mask=decay_mask(self, self.weight_decay, params),
                    preconditioning=self.preconditioning,
                    consistent_rms=self.consistent_rms,
                    muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrix, tree),
                ),
                "adam": optax.adamw(
                    schedule_of(self.adam_learning_rate),
                    b1=self.adam_b1,
                    b2=self.adam_b2,
                    eps=self.adam_eps,
                    weight_decay=self.adam_weight_decay,
                    mask=decay_mask(self, self.adam_weight_decay, params),
                ),
            },
            jax.tree.map(lambda chosen: "muon" if chosen else "adam", on_muon),
            mask_compatible_extra_args=True,
        )
