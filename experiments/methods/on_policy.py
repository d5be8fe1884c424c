"""On-policy distillation as a method: the student writes its batch inside the step.

    python -m experiments.pretrain --from runs/student --data text.txt \\
        --method on_policy --on-policy.teacher runs/teacher --out runs/better

Each batch keeps the beginnings of its rows; the student, as it is at that step with all weight
transforms, writes the rest, and the loss is the divergence from the teacher on what is new
(`experiments.methods.on_policy_batch`, whose loop on the host this does within one compiled step,
on any mesh). With probability 1 - share a batch stays the data's, and the loss is the divergence on
all of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from compress.distillation.logits import DIVERGENCES, check_vocabularies
from experiments.methods.distill_terms import TEACHER
from experiments.methods.on_policy_batch import OnPolicy, on_policy_term
from experiments.methods.teacher import (
    Teacher,
    check_reads_alike,
    load_teacher,
    resolve_teacher,
)
from model.config import config_from_dict
from model.flops import abstract_params
from model.generate import Sampling, continue_rows
from model.transformer import Transformer
from train.methods import Around, FrozenTree, OpenRun, Plugs, Setup
from train.plugs import Batch, Context, LossTerm, Metrics, PyTree, State, WeightTransform, merge
from train.step import Step
from train.tokenizers.tokenizer import Tokenizer

# Folded into the run's key for the draws of the text, so that they are none of the step's.
_OWN_DRAWS = 0x0509


@dataclass(frozen=True)
class OnPolicyDistil:
    """Learns from what a teacher thinks of the student's own text.

    Attributes:
      teacher: "RUN" or "RUN@STEP", a run with the same tokenizer.
      share: probability that a batch is the student's text and not the data's (GKD's lambda).
      prompt_length: tokens of the data that the student continues.
      sampling_temperature: of the student's draws; 0 is greedy.
      top_k: of the draws.
      top_p: of the draws.
      divergence: "reverse" as in MiniLLM, "forward" or "jensen_shannon" as in GKD.
      beta: of "jensen_shannon".
      resolved: filled in at the start of the run.
    """

    name: ClassVar[str] = "on_policy"
    teacher: str = ""
    share: float = 1.0
    prompt_length: int = 16
    sampling_temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    beta: float = 0.5
    resolved: Any = None

    def __post_init__(self) -> None:
        _ = self.settings
        if self.divergence not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise ValueError(f"divergence is {self.divergence!r}; choose one of {known}")
        DIVERGENCES[self.divergence](self.beta)
        if isinstance(self.resolved, dict):  # from JSON
            fields = self.resolved | {"model": config_from_dict(self.resolved["model"])}
            object.__setattr__(self, "resolved", Teacher(**fields))

    @property
    def settings(self) -> OnPolicy:
        """How the student's text is made."""
        sampling = Sampling(self.sampling_temperature, self.top_k, self.top_p)
        return OnPolicy(self.share, self.prompt_length, sampling)

    def resolve(self, saved: OnPolicyDistil | None, open_run: OpenRun) -> OnPolicyDistil:
        """Returns the settings with the teacher known; see `experiments.methods.distill.Distil`."""
        known = resolve_teacher(self, saved, open_run, "--on-policy.teacher")
        return dataclasses.replace(self, resolved=known)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a teacher that reads other tokens than the student."""
        if self.resolved is not None:
            check_reads_alike(tokenizer, self.resolved, self.teacher)

    def build(self, setup: Setup) -> Plugs:
        """Puts the teacher into `frozen`, its term in the loss, and the writing around the step.

        The cross-entropy with the text has no place here and is left out.

        Raises:
          ValueError: a teacher with another vocabulary.
        """
        if self.resolved is None:
            raise ValueError("the teacher is not known yet: call `resolve` first")
        config = self.resolved.model
        check_vocabularies(setup.config.vocabulary_size, config.vocabulary_size)
        student, teacher = Transformer(setup.config), Transformer(config)
        term = on_policy_term(student, teacher, DIVERGENCES[self.divergence](self.beta))

        def terms(so_far: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
            return (*(t for t in so_far if t.name != "cross_entropy"), term)

        def sees(transforms: tuple[WeightTransform, ...]) -> Callable[[Step], Step]:
            return lambda step: writing(step, student, transforms, self.settings)

        load = functools.partial(load_teacher, self.teacher, self.resolved)
        tree = FrozenTree(abstract_params(config), load)
        return Plugs(
            terms=terms, frozen={TEACHER: tree}, around=Around(lambda state: state, sees(()), sees)
        )


def writing(
    step: Step,
    student: Transformer,
    transforms: tuple[WeightTransform, ...],
    settings: OnPolicy,
) -> Step:
    """Returns the step with each batch written by the student first; traceable.

    What is written depends on the state and the batch alone, so a resumed run writes the same.

    Args:
      step: to be called with what was written.
      student: the model.
      transforms: of all methods.
      settings: share, prompt and sampling.
    """

    def own(weights: PyTree, key: jax.Array, batch: Batch) -> Batch:
        tokens_BT = batch["tokens"]
        T, P = tokens_BT.shape[1], settings.prompt_length
        text_BT = continue_rows(
            student, weights, tokens_BT[:, :P], key=key, length=T, sampling=settings.sampling
        )
        # The last token has no target: T is all that learned positions may hold.
        new_T = (jnp.arange(T) >= P - 1) & (jnp.arange(T) < T - 1)
        weights_BT = jnp.broadcast_to(new_T[None].astype(jnp.float32), tokens_BT.shape)
        return {
            "tokens": text_BT,
            "targets": jnp.roll(text_BT, -1, axis=1),
            "weights": weights_BT,
        }

    def around(state: State, frozen: PyTree, batch: Batch) -> tuple[State, Metrics]:
        T = batch["tokens"].shape[1]
        if settings.prompt_length >= T:
            raise ValueError(
                f"a prompt of {settings.prompt_length} tokens leaves nothing of the {T} to write; "
                "lower prompt_length"
            )
        own_key = jax.random.fold_in(jax.random.fold_in(state.rng, _OWN_DRAWS), state.step)
        choose, draw = jax.random.split(own_key)
        weights = merge(state.params, frozen.get("params", {}))
        context = Context(state.step, None, frozen, state.extra, {})
        for transform in transforms:
            weights = transform.apply(weights, context)
        # One set of fields for both kinds; a row is one text.
        data = {name: batch[name] for name in ("tokens", "targets", "weights")}
        if settings.share == 1:
            return step(state, frozen, own(weights, draw, data))
        chosen = jax.lax.cond(
            jax.random.bernoulli(choose, settings.share),
            lambda data: own(weights, draw, data),
            lambda data: data,
            data,
        )
        return step(state, frozen, chosen)

    return around
