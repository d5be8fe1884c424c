"""GPTQ: quantize the inputs of a kernel one by one, and let those that are left make up for it.

For inputs X [N, I] and H = X' X, rounding row i of a kernel [I, O] with the error e changes the
product least when the rows j that are still free move by `-e * [H^-1]_ji / [H^-1]_ii`, with H
restricted to the free rows. All these inverses are rows of one triangular factor of H^-1 (Frantar
et al. 2022, arXiv:2210.17323).

Shapes: I inputs, O outputs, B rows of a block, M inputs padded to whole blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress.calibrate import sequential
from compress.observed import ByPath
from compress.quantization.formats import Format, format_of
from compress.quantization.qtensor import QTensor, to_real
from compress.quantization.quantize import contraction_axis, formats_by_path, quantize_params
from compress.quantization.rounding import assemble, check_shape, find_scales, quantize, to_numbers
from model.rules import STACK, Rules, path_of
from model.transformer import Transformer

PyTree = Any
Order = Literal["activation", "given"]

BLOCK = 128  # rows between updates of the whole kernel: inside, an update touches the block only
HIGHEST = jax.lax.Precision.HIGHEST


def inverse_factor(hessian_II: jax.Array, damping: float) -> jax.Array:
    """Returns upper triangular U with U' U = (H + damping * mean(diag H) * identity)^-1.

    NaN where the damped H is not positive definite.

    >>> U = inverse_factor(jnp.array([[2.0, 1.0], [1.0, 2.0]]), 0.0)
    >>> bool(jnp.allclose(U.T @ U, jnp.array([[2.0, -1.0], [-1.0, 2.0]]) / 3, atol=1e-6))
    True
    """
    size = hessian_II.shape[0]
    identity = jnp.eye(size, dtype=hessian_II.dtype)
    H = hessian_II + damping * jnp.mean(jnp.diagonal(hessian_II)) * identity
    # With the rows in reverse, the lower factor of H is an upper one R, H = R R', and U = R^-1:
    # one factorization instead of two and an inverse.
    R = jnp.flip(jnp.linalg.cholesky(jnp.flip(H)))
    return jax.scipy.linalg.solve_triangular(R, identity)


def gptq(
    w: jax.Array,
    hessian: jax.Array,
    format: str | Format,
    axis: int = -2,
    *,
    damping: float = 0.01,
    order: Order = "activation",
    candidates: int = 1,
) -> QTensor:
    """Quantizes a matrix so that its products with the given inputs change little.

    Scales are those of `compress.quantization.rounding.quantize`, found before anything moves, so
    rows may be taken in any order and groups stay where they are: the result is an ordinary
    `QTensor`.

    Args:
      w: kernel [I, O], or table [O, I] with `axis` -1.
      hessian: X' X [I, I], from `compress.calibrate`.
      format: a format or its name.
      axis: contraction axis of w.
      damping: what is added to the diagonal of H, as a share of its mean.
      order: "activation" takes the inputs of largest square sum first, while most rows are free
        to make up for them; "given" takes them as they lie.
      candidates: scales tried for each group.

    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or a Hessian that is not
        positive definite in spite of the damping.

    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jax.random.normal(
    ...     jax.random.key(1), (8, 8))
    >>> w = jax.random.normal(jax.random.key(2), (8, 4))
    >>> error = lambda q: float(jnp.square(x @ w - x @ q).sum())
    >>> error(gptq(w, x.T @ x, "int3")) < error(quantize(w, "int3"))
    True
    """
    format = format_of(format)
    check_shape(w, format, axis)
    if w.ndim != 2 or hessian.shape != (w.shape[axis],) * 2:
        raise ValueError(
            f"a matrix of shape {w.shape} with contraction axis {axis} needs a Hessian of "
            f"{w.shape[axis] if w.ndim == 2 else 'its'} inputs, not of shape {hessian.shape}"
        )
    if order not in ("activation", "given"):
        raise ValueError(f"the order is 'activation' or 'given', not {order!r}")
    for name, array in (("weight", w), ("Hessian", hessian)):
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            raise ValueError(f"a {name} of shape {array.shape} holds NaN or infinity")
    q, positive = _gptq(w, hessian, damping, format, axis, order, candidates)
    if not isinstance(positive, jax.core.Tracer) and not bool(positive):
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}; give more calibration "
            "tokens or a larger damping"
        )
    return q


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _gptq(
    w: jax.Array,
    hessian_II: jax.Array,
    damping: float,
    format: Format,
    axis: int,
    order: Order,
    candidates: int,
) -> tuple[QTensor, jax.Array]:
    scales = find_scales(w, format, axis, candidates)
    w_IO, scales_GO, offsets_GO = (
        a if a is None or axis == -2 else a.T for a in (w.astype(jnp.float32), *scales)
    )
    assert w_IO is not None
    inputs = w_IO.shape[0]
    hessian_II = hessian_II.astype(jnp.float32)
    turn_I = jnp.arange(inputs)
    if order == "activation":
        turn_I = jnp.argsort(-jnp.diagonal(hessian_II))
    U_II = inverse_factor(hessian_II[turn_I][:, turn_I], damping)
    group_I = turn_I // (inputs // format.groups(inputs))
    by_row = [None if a is None else a[group_I] for a in (scales_GO, offsets_GO)]
    numbers_IO = _round_rows(w_IO[turn_I], U_II, by_row[0], by_row[1], format)
    numbers_IO = jnp.zeros_like(numbers_IO).at[turn_I].set(numbers_IO)
    numbers = numbers_IO if axis == -2 else numbers_IO.T
    return assemble(numbers, scales, format, axis, w.dtype), jnp.isfinite(U_II).all()


def _round_rows(
    w_IO: jax.Array,
    U_II: jax.Array,
    scales_IO: jax.Array | None,
    offsets_IO: jax.Array | None,
    format: Format,
) -> jax.Array:
    """Returns the grid numbers of all rows, in a scan over blocks of a scan over rows."""
    inputs, outputs = w_IO.shape
    size = min(BLOCK, inputs)
    blocks = -(-inputs // size)
    padding = blocks * size - inputs
    # Padded rows are zeros that nothing is coupled to.
    w_MO = jnp.pad(w_IO, ((0, padding), (0, 0)))
    U_MM = jnp.pad(U_II, ((0, padding), (0, padding)))
    U_MM = U_MM.at[jnp.arange(inputs, blocks * size), jnp.arange(inputs, blocks * size)].set(1)
    rows = jax.tree.map(
        lambda a: jnp.pad(a, ((0, padding), (0, 0)), mode="edge").reshape(blocks, size, -1),
        (scales_IO, offsets_IO),
    )

    def one_row(w_BO, row):
        index, U_B, scale_O, offset_O = row
        w_O = w_BO[index]
        number_O = to_numbers(w_O, scale_O, offset_O, format)
        error_O = (w_O - to_real(number_O, scale_O, offset_O, format, jnp.float32)) / U_B[index]
        return w_BO - U_B[:, None] * error_O[None], (number_O, error_O)

    def one_block(w_MO, block):
        index, U_BM, scales_BO, offsets_BO = block
        start = index * size
        w_BO = jax.lax.dynamic_slice_in_dim(w_MO, start, size)
        U_BB = jax.lax.dynamic_slice_in_dim(U_BM, start, size, axis=1)
        per_row = (jnp.arange(size), U_BB, scales_BO, offsets_BO)
        _, (numbers_BO, errors_BO) = jax.lax.scan(one_row, w_BO, per_row)
        # U is upper triangular: rows of earlier blocks stay, this one is done with anyway.
        return w_MO - jnp.matmul(U_BM.T, errors_BO, precision=HIGHEST), numbers_BO

    per_block = (jnp.arange(blocks), U_MM.reshape(blocks, size, -1), *rows)
    _, numbers = jax.lax.scan(one_block, w_MO, per_block)
    return numbers.reshape(-1, outputs)[:inputs]


def gptq_params(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    rules: Rules,
    *,
    damping: float = 0.01,
    order: Order = "activation",
    candidates: int = 1,
    head: Literal["nearest", "gptq"] = "nearest",
    stages: Sequence[Sequence[str]] | None = None,
) -> PyTree:
    """Returns the parameters with matrices quantized by rules, those of the blocks by GPTQ.

    Layer by layer: each sees the inputs that the layers before it give once quantized. Tables are
    rounded to nearest before the first layer, so that it sees that too.

    Args:
      model: the Transformer.
      params: plain parameters.
      batches: calibration tokens, int [B, T] each (see `compress.calibrate.windows`).
      rules: see `compress.quantization.quantize.formats_by_path`.
      damping: see `gptq`.
      order: see `gptq`.
      candidates: see `gptq`.
      head: how the head is quantized. A tied head is the embedding too, which GPTQ does not know:
        it then stays plain until the layers are done.
      stages: see `compress.calibrate.sequential`.

    Raises:
      ValueError: as `formats_by_path`, `sequential` and `gptq`.

    >>> from compress.calibrate import windows
    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> batches = windows(range(64), length=16, batch=4)
    >>> q = gptq_params(model, params, batches, [("kernel|embedding", "q4_0")])
    >>> q["blocks"]["mlp"]["up"]["kernel"].values.shape
    (2, 16, 128)
    """
    if head not in ("nearest", "gptq"):
        raise ValueError(f"the head is quantized by 'nearest' or 'gptq', not {head!r}")
    formats = formats_by_path(params, rules)
    inside = {path.removeprefix(f"{STACK}/"): f for path, f in formats.items() if STACK in path}
    at_head = "token_embedding/embedding" if model.config.tied_head else "head/kernel"
    later = {at_head} if head == "gptq" and at_head in formats else set()
    settings: Any = {"damping": damping, "order": order, "candidates": candidates}

    def one_layer(number: int, layer: PyTree, seen: ByPath) -> PyTree:
        def one(path, leaf):
            if path not in inside or path not in seen:
                return leaf
            try:
                return gptq(leaf, seen[path]["hessian"], inside[path], **settings)
            except ValueError as error:
                raise ValueError(f"{path!r} of layer {number}: {error}") from error

        return _map_paths(one, layer)

    tables = [(f"^{path}$", f) for path, f in formats.items() if path.split("/")[0] != STACK]
    if now := [(regex, f) for regex, f in tables if regex[1:-1] not in later]:
        params = quantize_params(params, now, quantize, candidates=candidates)
    out = sequential(model, params, batches, ("hessian",), one_layer, stages=stages, kernels=inside)

    def last(path, leaf):
        if path not in later:
            return leaf
        axis = contraction_axis(path)
        return gptq(leaf, out.head["hessian"], formats[path], axis, **settings)

    return _map_paths(last, out.params)


def _map_paths(function, tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: function(path_of(key_path), leaf),
        tree,
        is_leaf=lambda node: isinstance(node, QTensor),
    )
