"""Hugging Face's GPT-2 with its optimizer in torch, behind the signatures of our own step.

`train.loop.train` runs either, so that a baseline's record, clocks and stops are made by the same
lines as ours. torch and transformers come with the extra `baseline`.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines.settings import TorchBaseline
from experiments.runs.assemble import initial_params
from model import huggingface
from model.config import TransformerConfig
from model.extras import from_extra
from model.huggingface_config import write_config
from train.optimizers import AdamW, learning_rate_at
from train.plugs import Metrics, PyTree, State

Batch = dict[str, Any]

EMBEDDING = "transformer.wte.weight"  # which is the head's, too


class Learner(NamedTuple):
    """A torch model that learns.

    Attributes:
      model: the `GPT2LMHeadModel`; its parameters change in place.
      step: `(state, frozen, batch) -> (state, metrics)`, one update; of the state only the number
        is used.
      measure: `(state, frozen, batch) -> {"cross_entropy": {"total", "count"}}`, without dropout.
      place: puts a batch of arrays where the model is.
      state: that of step 0.
    """

    model: Any
    step: Callable[[State, PyTree, Batch], tuple[State, Metrics]]
    measure: Callable[[State, PyTree, Batch], dict[str, dict[str, float]]]
    place: Callable[[dict[str, np.ndarray]], Batch]
    state: State


def make_learner(baseline: TorchBaseline, config: TransformerConfig) -> Learner:
    """Builds model, optimizer, step and evaluation.

    A step is what torch's users write: gradients set to none, loss, backward, clipping where it is
    asked for, the optimizer's fused kernel. A loss that is not finite is counted, but its update is
    made: torch has no guard against it.

    Args:
      baseline: what to train.
      config: of the model, with the tokenizer's vocabulary.

    Raises:
      ImportError: torch or transformers are missing.
      ValueError: the device is not there.
    """
    torch = _torch()
    if baseline.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no cuda device; leave --device at cpu")
    settings = baseline.settings
    torch.manual_seed(settings.seed)
    if baseline.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as users do
    model = make_model(baseline, config).to(baseline.device)
    optimizer = make_optimizer(model, settings.optimizer)
    rate = learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(settings.steps)))
    clip = settings.optimizer.clip_norm

    def precision() -> Any:
        if baseline.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(baseline.device, torch.bfloat16)

    def loss_of(tokens: Any, targets: Any) -> Any:
        with precision():
            logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.float().view(-1, logits.shape[-1])
        return torch.nn.functional.cross_entropy(logits, targets.view(-1))

    trained_loss = loss_of
    if baseline.mode == "compile":
        trained_loss = torch.compile(loss_of, dynamic=False)
    bad_in_a_row = 0

    def step(state: State, frozen: PyTree, batch: Batch) -> tuple[State, Metrics]:
        number = int(state.step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = float(rates[min(number, len(rates) - 1)])
        optimizer.zero_grad(set_to_none=True)
        loss = trained_loss(batch["tokens"], batch["targets"])
        loss.backward()
        metrics: Metrics = {"tokens": float(batch["targets"].numel()), "skipped": False}
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            metrics["gradient_norm"] = _Later(norm.item)
        optimizer.step()
        found = loss.detach()

        def in_a_row() -> int:
            nonlocal bad_in_a_row
            bad_in_a_row = 0 if np.isfinite(found.item()) else bad_in_a_row + 1
            return bad_in_a_row

        metrics |= {"loss": _Later(found.item), "nonfinite_in_a_row": _Later(in_a_row)}
        return dataclasses.replace(state, step=jnp.int32(number + 1)), metrics

    @torch.no_grad()
    def measure(state: State, frozen: PyTree, batch: Batch) -> dict[str, dict[str, float]]:
        model.eval()
        with precision():
            logits = model(input_ids=batch["tokens"], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().view(-1, logits.shape[-1]), batch["targets"].view(-1), reduction="none"
        )
        weights = batch["weights"].view(-1)
        total, count = (losses.double() * weights).sum(), weights.sum()
        return {"cross_entropy": {"total": total.item(), "count": count.item()}}

    def place(batch: dict[str, np.ndarray]) -> Batch:
        found = {name: torch.from_numpy(batch[name]).long() for name in ("tokens", "targets")}
        found["weights"] = torch.from_numpy(batch["weights"])
        return {name: value.to(baseline.device, non_blocking=True) for name, value in found.items()}

    state = State(jnp.int32(0), {}, (), jax.random.key(settings.seed), {})
    return Learner(model, step, measure, place, state)


def make_model(baseline: TorchBaseline, config: TransformerConfig) -> Any:
    """Returns the `GPT2LMHeadModel` of `config` with its initial weights, on the CPU, in float32.

    Attention is torch's own `scaled_dot_product_attention`, the fastest that transformers has.
    """
    _torch()
    from transformers import GPT2Config, GPT2LMHeadModel

    _, fields = write_config(config)
    no_tokens = {"bos_token_id": None, "eos_token_id": None}  # else GPT-2's, which ours lacks
    theirs = GPT2Config(**fields | no_tokens)
    model = GPT2LMHeadModel._from_config(theirs, attn_implementation="sdpa")
    if baseline.initial == "ours":
        from safetensors.torch import load_file

        params = jax.jit(lambda: initial_params(baseline.settings, config))()
        with tempfile.TemporaryDirectory() as name:
            huggingface.save(Path(name) / "model", config, params)
            stored = load_file(Path(name) / "model" / "model.safetensors")
            model.load_state_dict(stored | {"lm_head.weight": stored[EMBEDDING]})
    return model.float()


def make_optimizer(model: Any, settings: Any) -> Any:
    """Returns torch's Adam or AdamW with its fused kernel; matrices and embeddings decay."""
    torch = _torch()
    options = {"lr": settings.learning_rate, "betas": (settings.b1, settings.b2)}
    options |= {"eps": settings.eps, "fused": True}
    if not isinstance(settings, AdamW):
        return torch.optim.Adam(model.parameters(), **options)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


class _Later:
    """A number on the device, read when the loop asks for it: until then nothing waits."""

    def __init__(self, read: Callable[[], float]):
        self.read = read

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def _torch() -> Any:
    from_extra("transformers", "baseline", "the torch baseline needs")
    return from_extra("torch", "baseline", "the torch baseline needs")
