"""Bytes that a device needs for a training step, by arithmetic: nothing is compiled or allocated.

    total = parameters + optimizer + gradients + saved + working

* parameters, optimizer: what the layout leaves on each device, exactly.
* gradients: one copy of the parameters in their type, laid out as they are.
* saved: what the forward pass keeps for the backward pass. It is counted by tracing the derivative
  of the model that one device runs: the layers of its stage, its heads and hidden units, its rows
  and tokens. A ring saves its queries, keys, values and outputs, and no scores, and so does cuDNN's
  fused attention, which a run takes on a GPU where it can. Where time is divided between blocks
  (`sequence`), arrays of the stream's width count a `tensor`-th. A pipeline saves at each of its
  M v + n - 1 steps what a micro-batch is in a v-th of its layers: (M v + n - 1) / M v as much.
* head: its logits are saved with them; every device has those of its own rows and tokens, whichever
  axes divide them, but every stage of a pipeline computes them all.
* working: the larger of what one block needs when its turn comes in the backward pass (what it
  keeps or recomputes; gradients take the places of what they have used up) and of the gradient of
  the logits; besides, kernels that were gathered: of two layers, one in use and one on its way, and
  the head's.

Left out: buffers of collectives, fragments, and whatever a compiler keeps or recomputes of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from experiments.plan.step import ATTENTIONS, PLAIN, abstract_batch
from experiments.runs.assemble import abstract_frozen, abstract_state, assemble
from experiments.runs.layout import Division, lay_out, of_state
from model.attention import Attention, Visibility, keeps_from
from model.config import TransformerConfig
from model.dropout import Dropout
from model.flops import abstract_params
from model.transformer import Transformer
from parallel.mesh import AXES
from parallel.pipeline import steps_of
from parallel.report import bytes_of, bytes_per_device
from parallel.vocabulary import padded_size
from train.losses import loss_function
from train.plugs import Context
from train.settings import Phase, Settings


class Memory(NamedTuple):
    """Bytes on each device; see the top of this file."""

    parameters: int
    optimizer: int
    gradients: int
    saved: int
    working: int

    @property
    def state(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.optimizer

    @property
    def activations(self) -> int:
        """What a step needs besides state and gradients."""
        return self.saved + self.working

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory_of(
    settings: Settings,
    sizes: Mapping[str, int],
    division: Division,
    platform: str = "any",
    attention: str = "mesh",
) -> Memory:
    """Returns the bytes on each device in a step of the first phase.

    Args:
      settings: of the run.
      sizes: devices by axis, all axes; they need not exist.
      division: what the mesh leaves open.
      platform: of the chips, "gpu" or "tpu"; "any" for the forms that all have.
      attention: a key of `experiments.plan.step.ATTENTIONS`.

    Raises:
      ValueError: heads, layers, batch or vocabulary that the mesh does not divide; an attention
        that there is not, there or for this model.

    >>> from model.presets import modern_tiny
    >>> from train.settings import Phase
    >>> settings = Settings(phases=(Phase(1, modern_tiny(), batch_size=8, sequence_length=16),))
    >>> one = memory_of(settings, dict.fromkeys(AXES, 1), Division())
    >>> eight = memory_of(settings, dict.fromkeys(AXES, 1) | {"fsdp": 8}, Division())
    >>> one.parameters / eight.parameters > 7
    True
    """
    mesh: Any = AbstractMesh(
        tuple(sizes[name] for name in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    phase = settings.phases[0]
    parts = assemble(settings, phase.model, sizes["data"])
    layout = lay_out(mesh, division, settings, phase, parts)
    state, frozen = abstract_state(settings, parts), abstract_frozen(settings, parts)
    shardings = of_state(layout, state)
    held = {
        name: bytes_per_device(getattr(state, name), getattr(shardings, name))
        for name in ("params", "optimizer", "extra")
    }
    form = attention_form(phase, sizes, platform, attention)
    saved, working = activation_bytes(settings, sizes, division, form)
    return Memory(
        held["params"] + bytes_of(frozen),
        held["optimizer"] + held["extra"],
        held["params"],
        saved,
        working + gathered_bytes(parts.config, sizes),
    )


def attention_form(
    phase: Phase, sizes: Mapping[str, int], platform: str, attention: str
) -> Attention:
    """Returns an attention that saves what that of a run does.

    Args: as `memory_of`.

    Raises:
      ValueError: an unknown one, or one that cannot be had there.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r} is none of {', '.join(ATTENTIONS)}")
    ring = sizes["context"]
    if ring > 1 and attention in ("plain", "fused"):
        raise ValueError(
            f"over context={ring} attention is a ring, not {attention!r}; leave --attention out, "
            "or set context=1"
        )
    if attention == "ring" or ring > 1:
        return saves_no_scores
    if attention == "plain":
        return PLAIN
    kept = keeps_from_fused(phase) if platform == "gpu" else "a chip that is no GPU"
    if attention == "fused" and kept:
        raise ValueError(f"cuDNN's fused attention cannot have {kept}; take --attention plain")
    return PLAIN if kept else saves_no_scores


def keeps_from_fused(phase: Phase) -> str | None:
    """Returns what keeps a phase's attention from cuDNN's fused kernel, or None."""
    config, time = phase.model, phase.sequence_length
    q = jax.ShapeDtypeStruct((1, time, config.heads, config.head_width_), config.dtype)
    window: Any = config.window  # of all layers, or a tuple of them: of which a scan takes one
    dropout = Dropout(config.dropout, None) if config.dropout else None  # type: ignore[arg-type]
    return keeps_from("cudnn", q, q, Visibility(window=window), dropout)  # type: ignore[arg-type]


def activation_bytes(
    settings: Settings,
    sizes: Mapping[str, int],
    division: Division,
    attention: Any,
) -> tuple[int, int]:
    """Returns the bytes that a device saves for the backward pass, and those that it works in.

    Args:
      settings: as `memory_of`, and so the next two.
      sizes: see there.
      division: see there.
      attention: from `attention_form`.
    """
    phase, t = settings.phases[0], sizes["tensor"]
    rows = phase.batch_size // (sizes["data"] * sizes["fsdp"] * settings.micro_batches)
    length = phase.sequence_length
    time = length // sizes["context"]
    local = local_config(settings, sizes)
    shares = t if "sequence" in division.strategies else 1

    chunk, positions = settings.loss_chunk, rows * time
    if chunk is not None:  # of all devices' positions; each has its part of every chunk
        chunk = max(1, chunk * positions * settings.micro_batches // (phase.batch_size * length))
        positions = min(positions, rows * max(1, chunk // rows))

    def saved_by(config: TransformerConfig) -> dict[str, int]:
        return _saved(config, rows, time, attention, chunk, shares)

    none = dataclasses.replace(local, remat="none")
    one, two = (saved_by(dataclasses.replace(none, layers=n, window=None)) for n in (1, 2))
    block = two["blocks"] - one["blocks"]  # the embedding and the norm at the end are in both
    if local.remat == "none":  # every layer saves as much as the next
        kept = one | {"blocks": one["blocks"] + (local.layers - 1) * block}
    else:
        kept = saved_by(local)
    passes = 1.0
    if (stages := sizes["pipeline"]) > 1:
        parts = division.pipeline_micro_batches or stages
        rounds = division.pipeline_rounds
        passes = steps_of(stages, parts, rounds) / (parts * rounds)
        block //= parts
    logits = positions * local.vocabulary_size * 4  # their gradient, of a chunk at a time
    return round(kept["blocks"] * passes) + kept["head"], max(block, logits)


def local_config(settings: Settings, sizes: Mapping[str, int]) -> TransformerConfig:
    """Returns the model that one device runs: its layers, heads, hidden units and words."""
    config, t = settings.phases[0].model, sizes["tensor"]
    words = padded_size(config.vocabulary_size, settings.vocabulary_multiple)
    layers = config.layers // sizes["pipeline"]
    return dataclasses.replace(
        config,
        heads=config.heads // t,
        kv_heads=config.kv_heads_ // t,
        head_width=config.head_width_,
        ffn_width=config.ffn_width_ // t,
        vocabulary_size=words // t,
        layers=layers,
        window=config.window[:layers] if isinstance(config.window, tuple) else config.window,
        scan_layers=True,
    )


def gathered_bytes(config: TransformerConfig, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of kernels that FSDP has gathered at a time; 0 without it."""
    if sizes["fsdp"] == 1:
        return 0
    shapes, item = abstract_params(config), jnp.dtype(config.dtype).itemsize
    blocks = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"])) // config.layers
    head = config.vocabulary_size * config.width
    return (2 * blocks + head) * item // sizes["tensor"]


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return q


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    return _attend(q, k, v), (q, k, v, _attend(q, k, v), q[..., 0].astype(jnp.float32))


def _backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    return saved[0] + gradient, saved[1], saved[2]


_attend.defvjp(_forward, _backward)


def saves_no_scores(q_BTHK, k_BSGK, v_BSGK, visibility, dropout) -> jax.Array:
    """Has the shapes and saves the arrays of ring or fused attention, and computes nothing."""
    return _attend(q_BTHK, k_BSGK, v_BSGK)


@functools.lru_cache(maxsize=256)
def _saved(
    config: TransformerConfig,
    rows: int,
    time: int,
    attention: Attention,
    chunk: int | None,
    shares: int,
) -> dict[str, int]:
    """Bytes that the derivative of the loss keeps, of blocks and of the rest."""
    from train.losses import cross_entropy

    model, term = Transformer(config, attention), cross_entropy()
    loss = loss_function(model, (term,), (), chunk)
    context = Context(jnp.int32(0), None, {}, {}, {term.name: jnp.float32(1)})
    if config.random:
        context = context._replace(rng=jax.random.key(0))
    params = abstract_params(config)
    batch = abstract_batch(rows, time)

    def residuals(params: Any, batch: Any) -> Any:
        return jax.vjp(lambda p: loss(p, batch, context)[0], params)[1]

    kept = jax.eval_shape(residuals, params, batch)
    # Parameters, and kernels in the type of the computation, are not activations.
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
    weights |= {(shape, jnp.dtype(config.dtype)) for shape, _ in weights}
    sums = {"blocks": 0, "head": 0}
    for leaf in jax.tree.leaves(kept):
        if (leaf.shape, leaf.dtype) in weights:
            continue
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if leaf.shape and leaf.shape[-1] == config.width:
            size //= shares
        # Logits are [B, T, V]; what blocks save is stacked, [L, B, T, ...].
        logits = leaf.ndim in (2, 3) and leaf.shape[-1] == config.vocabulary_size
        sums["head" if logits else "blocks"] += size
    return sums
