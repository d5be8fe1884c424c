"""Distillation as a method: a trained run teaches the model of this one.

    python -m experiments.pretrain --tokenizer runs/teacher/tokenizer --model modern_mini \
        --method distil --distil.teacher runs/teacher --out runs/student

The loss becomes `hard * cross-entropy + soft * T^2 KL + hidden * ... + attention * ... +
relation * ...`. A term whose weight is 0 all along is not computed.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from compress.distillation.features import HIDDEN_LOSSES, LAYER_MAPS, semi_orthogonal
from compress.distillation.logits import DIVERGENCES, check_vocabularies
from experiments.methods.distill_terms import (
    PROJECTION,
    TEACHER,
    attention_term,
    hidden_term,
    logits_term,
    over_run,
    reads,
    relation_term,
    scaled,
)
from experiments.methods.teacher import (
    Teacher,
    check_reads_alike,
    load_teacher,
    resolve_teacher,
)
from model.config import TransformerConfig, config_from_dict
from model.flops import abstract_params
from model.transformer import Transformer
from train.methods import FrozenTree, OpenRun, Plugs, Setup
from train.plugs import Context, LossTerm, PyTree, WeightTransform
from train.tokenizers.tokenizer import Tokenizer

WEIGHTS = ("hard", "soft", "hidden", "attention", "relation")


@dataclass(frozen=True)
class Distil:
    """Trains on what a teacher says besides what the text says.

    Weights and the temperature are one number for the whole run, or several that it goes through
    in lines, evenly spaced: `1 0` falls from 1 at the first step to 0 at the last.

    Attributes:
      teacher: "RUN" or "RUN@STEP", a run with the same tokenizer.
      hard: weight of the cross-entropy with the text, or of the loss of a task's head (times its
        own).
      soft: weight of the divergence from the teacher's distribution.
      hidden: weight of the hidden states' loss.
      attention: weight of the attention maps' divergence; as many heads as the teacher's.
      relation: weight of the q-q, k-k, v-v relations' divergence.
      temperature: of the soft term; 2 as in DistilBERT (Sanh et al. 2019, arXiv:1910.01108).
      divergence: "forward", "reverse" or "jensen_shannon".
      beta: of "jensen_shannon".
      hidden_loss: "cosine" or "mse"; where the widths differ, through a projection.
      projection: of the student's hidden states: "fixed" is semi-orthogonal and only there where
        the widths differ, "learned" begins so and trains with the model (TinyBERT, Jiao et al.
        2019, arXiv:1909.10351); it is no part of what is opened later.
      layers: which layers are compared: "every" student layer with one of the teacher, evenly
        spread, or the "last" ones.
      relation_heads: into how many heads relations are cut; by default the student's.
      resolved: filled in at the start of the run, so that it does not need the teacher's folder
        to go on.
    """

    name: ClassVar[str] = "distil"
    teacher: str = ""
    hard: tuple[float, ...] = (0.5,)
    soft: tuple[float, ...] = (0.5,)
    hidden: tuple[float, ...] = (0.0,)
    attention: tuple[float, ...] = (0.0,)
    relation: tuple[float, ...] = (0.0,)
    temperature: tuple[float, ...] = (2.0,)
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    beta: float = 0.5
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    projection: Literal["fixed", "learned"] = "fixed"
    layers: Literal["every", "last"] = "every"
    relation_heads: int | None = None
    resolved: Any = None

    def __post_init__(self):
        for name in WEIGHTS:
            knots = getattr(self, name)
            if not knots or not all(0 <= knot < float("inf") for knot in knots):
                raise ValueError(f"{name} is {knots}; give one weight or several, 0 or more")
        if not self.temperature or not all(0 < T < float("inf") for T in self.temperature):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not any(any(getattr(self, name)) for name in WEIGHTS[1:]):
            raise ValueError("all weights but that of the cross-entropy are 0; raise soft, say")
        for name, known in (("divergence", DIVERGENCES), ("hidden_loss", HIDDEN_LOSSES)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"{name} is {given!r}; choose one of {', '.join(known)}")
        if self.projection not in ("fixed", "learned"):
            raise ValueError(f"projection is {self.projection!r}; choose 'fixed' or 'learned'")
        if self.projection == "learned" and not any(self.hidden):
            raise ValueError("a learned projection serves the hidden term alone; raise hidden")
        DIVERGENCES[self.divergence](self.beta)
        if self.layers not in LAYER_MAPS:
            raise ValueError(f"layers is {self.layers!r}; choose one of {', '.join(LAYER_MAPS)}")
        if isinstance(self.resolved, dict):  # from JSON
            fields = self.resolved | {"model": config_from_dict(self.resolved["model"])}
            object.__setattr__(self, "resolved", Teacher(**fields))

    def resolve(self, saved: Distil | None, open_run: OpenRun) -> Distil:
        """Returns the settings with the teacher known.

        Args:
          saved: those that the run began with, if it did; what they know of the same teacher is
            taken from them.
          open_run: see `train.methods.OpenRun`.

        Raises:
          ValueError: no teacher was named.
          FileNotFoundError: it is no run.
        """
        known = resolve_teacher(self, saved, open_run, "--distil.teacher")
        return dataclasses.replace(self, resolved=known)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a teacher that reads other tokens than the student."""
        if self.resolved is not None:
            check_reads_alike(tokenizer, self.resolved, self.teacher)

    def build(self, setup: Setup) -> Plugs:
        """Puts the teacher into `frozen` and its terms beside the cross-entropy.

        Raises:
          ValueError: a teacher with another vocabulary, or whose layers cannot be compared so.
        """
        if self.resolved is None:
            raise ValueError("the teacher is not known yet: call `resolve` first")
        config, student = self.resolved.model, setup.config
        check_vocabularies(student.vocabulary_size, config.vocabulary_size)
        self._check_maps(student, config)
        plugs = Plugs(
            terms=lambda so_far: self._terms(so_far, setup),
            frozen=self._frozen(student, config),
        )
        if self.projection == "fixed":
            return plugs

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            drawn = semi_orthogonal(jax.random.key(0), student.width, config.width)
            return {**params, PROJECTION: {"projection": drawn}}, {}

        def apply(weights: PyTree, context: Context) -> PyTree:
            if context.rng is not None:
                return weights
            return {name: part for name, part in weights.items() if name != PROJECTION}

        transform = WeightTransform("distil", apply)
        return dataclasses.replace(plugs, split=split, transforms=(transform,))

    def _check_maps(self, student: TransformerConfig, teacher: TransformerConfig) -> None:
        if any(self.attention) and student.heads != teacher.heads:
            raise ValueError(
                f"the student has {student.heads} heads and the teacher {teacher.heads}, and "
                "attention is compared head by head; use relation in place of attention"
            )
        windows = [c.window for c in (student, teacher) if c.window is not None]
        if any(self.attention) and windows:
            raise ValueError(
                f"attention under a window ({windows[0]}) cannot be compared over the whole row; "
                "use relation in place of attention"
            )
        if any(self.relation):
            heads = self._relation_heads(student)
            for c in (student, teacher):
                for width in (c.heads * c.head_width_, c.kv_heads_ * c.head_width_):
                    if heads < 1 or width % heads:
                        raise ValueError(
                            f"relation_heads is {heads}, which does not divide the {width} columns "
                            "of q, k or v; choose a number that does in both models"
                        )

    def _relation_heads(self, student: TransformerConfig) -> int:
        return student.heads if self.relation_heads is None else self.relation_heads

    def _frozen(
        self, student: TransformerConfig, teacher: TransformerConfig
    ) -> dict[str, FrozenTree]:
        spec, known = self.teacher, self.resolved
        load = functools.partial(load_teacher, spec, known)
        trees = {TEACHER: FrozenTree(abstract_params(teacher), load)}
        fixed = self.projection == "fixed"
        if fixed and any(self.hidden) and student.width != teacher.width:
            shape = jax.ShapeDtypeStruct((student.width, teacher.width), jnp.float32)
            # One draw for every seed of the run: it is part of the method, not of the model.
            key = jax.random.key(0)
            trees[PROJECTION] = FrozenTree(
                {"kernel": shape},
                lambda open_run: {"kernel": semi_orthogonal(key, student.width, teacher.width)},
            )
        return trees

    def _terms(self, so_far: tuple[LossTerm, ...], setup: Setup) -> tuple[LossTerm, ...]:
        steps, teacher = setup.steps, Transformer(self.resolved.model)
        pairs = LAYER_MAPS[self.layers](setup.config.layers, teacher.config.layers)
        weight = {name: over_run(getattr(self, name), steps) for name in WEIGHTS}
        maps = any(self.attention) or any(self.relation)
        prepare = reads(
            teacher, ("hidden",) * any(self.hidden) + ("attention",) * maps
        )  # one function for all terms: it is called once
        terms = {
            "soft": lambda: logits_term(
                teacher,
                prepare,
                DIVERGENCES[self.divergence](self.beta),
                temperature=over_run(self.temperature, steps),
                weight=weight["soft"],
            ),
            "hidden": lambda: hidden_term(
                prepare, self.hidden_loss, pairs, weight=weight["hidden"]
            ),
            "attention": lambda: attention_term(prepare, pairs, weight=weight["attention"]),
            "relation": lambda: relation_term(
                prepare, pairs, self._relation_heads(setup.config), weight=weight["relation"]
            ),
        }
        hard = tuple(scaled(term, weight["hard"]) for term in so_far)
        return hard + tuple(make() for name, make in terms.items() if any(getattr(self, name)))
