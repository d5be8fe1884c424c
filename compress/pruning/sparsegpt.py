"""SparseGPT: set weights to zero, and let those that are left make up for it.

The rule of GPTQ with "becomes zero" for "is rounded": when row i of a kernel [I, O] changes by e,
the rows j that are still free move by `-e * [H^-1]_ji / [H^-1]_ii`, with H = X' X restricted to the
free rows. What pruning w_io costs is `w_io^2 / [H^-1]_ii`, and a block of rows at a time gives up
its cheapest weights, as they are by then (Frantar & Alistarh 2023, arXiv:2301.00774). What is kept
may be rounded in the same pass, so that later rows make up for both errors.

Shapes: I inputs, O outputs, B rows of a block, S rows that are ranked together, M inputs padded to
whole blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from compress.calibrate import sequential
from compress.observed import ByPath
from compress.pruning.mask_trees import by_layer, check_selection, targets_of
from compress.pruning.masks import check_sparsity, keep_top, n_of_m, zeros_of
from compress.quantization.formats import Format, format_of
from compress.quantization.gptq import inverse_factor
from compress.quantization.qtensor import QTensor, to_real
from compress.quantization.quantize import formats_by_path, is_qtensor, quantize_params
from compress.quantization.rounding import Scales, assemble, check_shape, find_scales, to_numbers
from model.rules import STACK, Rules, is_stacked, path_of
from model.transformer import Transformer

PyTree = Any

BLOCK = 128  # rows that are ranked together, and rows between updates of the whole kernel
HIGHEST = jax.lax.Precision.HIGHEST


def sparsegpt(
    w: jax.Array,
    hessian: jax.Array,
    sparsity: float,
    *,
    group: int | None = None,
    format: str | Format | None = None,
    damping: float = 0.01,
    block: int = BLOCK,
) -> jax.Array | QTensor:
    """Prunes a kernel so that its products with the given inputs change little.

    Args:
      w: kernel [I, O].
      hessian: X' X [I, I], from `compress.calibrate`.
      sparsity: share of zeros. Their number in all is
        `compress.pruning.masks.zeros_of(sparsity, I * O)`.
      group: m of n:m: each m inputs in a row hold equally many zeros in every output; 4 with a
        sparsity of 0.5 is 2:4. None leaves the place of the zeros free within blocks of rows.
      format: grid that what is kept is rounded to, or its name; None rounds nothing.
      damping: what is added to the diagonal of H, as a share of its mean.
      block: rows that are ranked together where there are no groups.

    Returns:
      w with zeros, in its type, or with a format a `QTensor` whose zeros are exact.

    Raises:
      ValueError: a sparsity outside of [0, 1), shapes or groups that do not fit, a format that
        cannot hold zero, numbers that are not finite, or a Hessian that is not positive definite in
        spite of the damping.

    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jax.random.normal(
    ...     jax.random.key(1), (8, 8))
    >>> w = jax.random.normal(jax.random.key(2), (8, 4))
    >>> pruned = sparsegpt(w, x.T @ x, 0.5, group=4)
    >>> (pruned == 0).reshape(2, 4, 4).sum(axis=1).tolist()
    [[2, 2, 2, 2], [2, 2, 2, 2]]
    >>> smallest = jnp.where(n_of_m(4)(jnp.abs(w), 0.5), w, 0)
    >>> bool(jnp.square(x @ w - x @ pruned).sum() < jnp.square(x @ w - x @ smallest).sum())
    True
    """
    grid = None if format is None else format_of(format)
    check_sparsity(sparsity, f"a kernel of shape {w.shape}")
    _check(w, hessian, group, grid, block)
    pruned, positive = _sparsegpt(w, hessian, sparsity, damping, group, grid, block)
    if not isinstance(positive, jax.core.Tracer) and not bool(positive):
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}; give more calibration "
            "tokens or a larger damping"
        )
    return pruned


def _check(
    w: jax.Array, hessian: jax.Array, group: int | None, format: Format | None, block: int
) -> None:
    if w.ndim != 2 or hessian.shape != (w.shape[0],) * 2:
        raise ValueError(
            f"a kernel [I, O] is pruned with a Hessian [I, I], but their shapes are {w.shape} and "
            f"{hessian.shape}"
        )
    if block < 1:
        raise ValueError(f"a block of {block} rows holds no weight; give at least 1")
    if group is not None:
        jax.eval_shape(n_of_m(group), w, 0.0)  # raises where groups do not divide
    if format is not None:
        check_shape(w, format, -2)
        if format.offset == "minimum":
            raise ValueError(
                "pruned weights are zero, which a format with a minimum need not hold; choose one "
                "without an offset or with a zero point, as q4_0 or int8_zero_point"
            )
    for name, array in (("weight", w), ("Hessian", hessian)):
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            raise ValueError(f"a {name} of shape {array.shape} holds NaN or infinity")


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _sparsegpt(
    w_IO: jax.Array,
    hessian_II: jax.Array,
    sparsity: float | jax.Array,
    damping: float,
    group: int | None,
    format: Format | None,
    block: int,
) -> tuple[jax.Array | QTensor, jax.Array]:
    inputs = w_IO.shape[0]
    U_II = inverse_factor(hessian_II.astype(jnp.float32), damping)
    wide_IO = w_IO.astype(jnp.float32)
    positive = jnp.isfinite(U_II).all()
    if format is None:
        none = Scales(jnp.zeros((inputs, 0)), None)
        kept_IO = _prune_rows(wide_IO, U_II, none, sparsity, group, None, block)
        return kept_IO.astype(w_IO.dtype), positive
    scales = find_scales(w_IO, format, -2)
    each = inputs // format.groups(inputs)
    by_row = jax.tree.map(lambda a: jnp.repeat(a, each, axis=0), scales)
    numbers_IO = _prune_rows(wide_IO, U_II, by_row, sparsity, group, format, block)
    return assemble(numbers_IO, scales, format, -2, w_IO.dtype), positive


def _prune_rows(
    w_IO: jax.Array,
    U_II: jax.Array,
    scales_IO: Scales,
    sparsity: float | jax.Array,
    group: int | None,
    format: Format | None,
    block: int,
) -> jax.Array:
    """Returns what all rows become: a scan over blocks, over rows ranked together, over rows.

    These are weights, or with a format its numbers.
    """
    inputs, outputs = w_IO.shape
    if group is None:
        size = ranked = min(block, inputs)
    else:
        ranked = group
        size = min(max(BLOCK // group, 1) * group, inputs)
    blocks = -(-inputs // size)
    padding = blocks * size - inputs
    # Padded rows are zeros that nothing is coupled to.
    w_MO = jnp.pad(w_IO, ((0, padding), (0, 0)))
    U_MM = jnp.pad(U_II, ((0, padding), (0, padding)))
    added = jnp.arange(inputs, blocks * size)
    U_MM = U_MM.at[added, added].set(1)
    scales = jax.tree.map(
        lambda a: jnp.pad(a, ((0, padding), (0, 0)), mode="edge").reshape(
            blocks, size // ranked, ranked, -1
        ),
        scales_IO,
    )

    def select(w_SO, U_S, first):
        """Marks what is kept of the rows `first` and following."""
        score_SO = jnp.square(w_SO / U_S[:, None])
        if group is not None:
            return n_of_m(group)(score_SO, sparsity)
        there_S = first + jnp.arange(ranked) < inputs
        score_SO = jnp.where(there_S[:, None], score_SO, jnp.inf)
        # Zeros up to the end of a block less those before it: their sum over blocks is exact.
        ends = jnp.minimum(jnp.stack([first, first + ranked]), inputs) * outputs
        share = jnp.broadcast_to(jnp.asarray(sparsity, jnp.float32), (2,))
        before, after = zeros_of(share, ends)
        return keep_top([score_SO], ranked * outputs - (after - before))[0]

    def settle(w_O, scale):
        """What a row is stored as, and the weights that this stands for."""
        if format is None:
            return w_O, w_O
        number_O = to_numbers(w_O, scale.scales, scale.offsets, format)
        real_O = to_real(number_O, scale.scales, scale.offsets, format, jnp.float32)
        return number_O, real_O

    def one_row(w_BO, row):
        index, U_B, mask_O, scale = row
        w_O = w_BO[index]
        stored_O, new_O = settle(jnp.where(mask_O, w_O, jnp.float32(0)), scale)
        error_O = (w_O - new_O) / U_B[index]
        return w_BO - U_B[:, None] * error_O[None], (stored_O, error_O)

    def one_ranking(carry, rows):
        w_BO, start = carry
        first, U_SB, scales = rows
        w_SO = jax.lax.dynamic_slice_in_dim(w_BO, first, ranked)
        U_SS = jax.lax.dynamic_slice_in_dim(U_SB, first, ranked, axis=1)
        mask_SO = select(w_SO, jnp.diagonal(U_SS), start + first)
        per_row = (first + jnp.arange(ranked), U_SB, mask_SO, scales)
        w_BO, out = jax.lax.scan(one_row, w_BO, per_row)
        return (w_BO, start), out

    def one_block(w_MO, rows):
        start, U_BM, scales = rows
        w_BO = jax.lax.dynamic_slice_in_dim(w_MO, start, size)
        U_BB = jax.lax.dynamic_slice_in_dim(U_BM, start, size, axis=1)
        firsts = jnp.arange(0, size, ranked)
        per_ranking = (firsts, U_BB.reshape(-1, ranked, size), scales)
        _, (stored, errors) = jax.lax.scan(one_ranking, (w_BO, start), per_ranking)
        errors_BO = errors.reshape(size, outputs)
        # U is upper triangular: rows of earlier blocks stay, this one is done with anyway.
        return w_MO - jnp.matmul(U_BM.T, errors_BO, precision=HIGHEST), stored

    starts = jnp.arange(0, blocks * size, size)
    per_block = (starts, U_MM.reshape(blocks, size, -1), scales)
    _, stored = jax.lax.scan(one_block, w_MO, per_block)
    return stored.reshape(-1, outputs)[:inputs]


def sparsegpt_params(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    rules: Rules,
    *,
    group: int | None = None,
    formats: Rules = (),
    damping: float = 0.01,
    block: int = BLOCK,
) -> PyTree:
    """Returns the parameters with kernels of the blocks pruned, and quantized where that is asked.

    Layer by layer: each sees the inputs that the layers before it give once they are done. Kernels
    with a format and no sparsity are quantized in the same way; matrices outside of the blocks are
    rounded to nearest before the first layer.

    Args:
      model: the Transformer.
      params: plain parameters.
      batches: calibration tokens, int [B, T] each (see `compress.calibrate.windows`).
      rules: ordered (regex, sparsity), see `compress.pruning.mask_trees.targets_of`; layers may
        differ. `compress.pruning.mask_trees.block_kernels(0.5)` chooses all kernels of the blocks.
      group: see `sparsegpt`.
      formats: rules for formats, see `compress.quantization.quantize.formats_by_path`; none
        quantizes nothing.
      damping: see `sparsegpt`.
      block: see `sparsegpt`.

    Raises:
      ValueError: as `targets_of`, `formats_by_path`, `sequential` and `sparsegpt`, or a rule that
        prunes what is no kernel of a block.

    >>> from compress.pruning.mask_trees import block_kernels
    >>> from model.presets import gpt2_tiny
    >>> model, tokens = Transformer(gpt2_tiny()), jnp.arange(16).reshape(2, 8)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> pruned = sparsegpt_params(model, params, [tokens], block_kernels(0.5))
    >>> int((pruned["blocks"]["mlp"]["up"]["kernel"] == 0).sum())
    4096
    """
    targets = targets_of(rules, params)
    for path in targets:
        if not (is_stacked(path) and path.endswith("/kernel")):
            raise ValueError(
                f"{path!r} is no kernel of a block, the only weights whose inputs are known here; "
                "prune it by compress.pruning.mask_trees.masks_from, or narrow the rule"
            )
    if group is not None:
        check_selection(by_layer(n_of_m(group)), params, targets)
    by_path = formats_by_path(params, formats) if formats else {}
    settings: Any = {"group": group, "damping": damping, "block": block}

    def one_layer(number: int, layer: PyTree, seen: ByPath) -> PyTree:
        def one(key_path, leaf):
            path = path_of(key_path)
            stacked = f"{STACK}/{path}"
            sparsity = float(targets[stacked][number]) if stacked in targets else 0.0
            format = by_path.get(stacked)
            if path not in seen or (not sparsity and format is None):
                return leaf
            hessian = seen[path]["hessian"]
            try:
                return sparsegpt(leaf, hessian, sparsity, format=format, **settings)
            except ValueError as error:
                raise ValueError(f"{path!r} of layer {number}: {error}") from error

        return jax.tree_util.tree_map_with_path(one, layer, is_leaf=is_qtensor)

    outside = [(f"^{path}$", f) for path, f in by_path.items() if not is_stacked(path)]
    if outside:
        params = quantize_params(params, outside)
    inside = [p.removeprefix(f"{STACK}/") for p in {**targets, **by_path} if is_stacked(p)]
    return sequential(model, params, batches, ("hessian",), one_layer, kernels=inside).params
