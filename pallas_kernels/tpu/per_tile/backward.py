"""Gradients of attention for choices made per query tile, on a TPU. Two kernels over the same lists, without atomics.

With P = exp(scale q k^T - log_sum_exp) and dS = P (dO v^T - delta), delta = sum(dO O) - d_log_sum_exp:
dQ = scale dS k, dK = scale dS^T q, dV = P^T dO. Both kernels recompute P; every sum runs in the order of a list, so the
same bits come out each time.

dQ. A program owns a query tile, as in the forward kernel: queries, dO, log-sum-exp, delta and dQ stay in VMEM while the
key blocks of its list pass by, 512 keys at a time. Logits lie as [keys, queries]; what is known per query is a row of
lanes. Three products: k q^T, v dO^T, k^T dS, the last one accumulated as [head_dim, queries] and turned at the end.

dK, dV. A program owns a key block: keys, values, dK and dV stay in VMEM while the query tiles that chose it pass by, of
all query heads of the key/value head, 512 queries at a time. Their list is the forward list transposed (sorted by
block, in XLA). Four products: k q^T, v dO^T, P dO, dS q, all without a transpose in this layout.

Memory. HBM: queries and dO of a tile side by side, one DMA for both; log-sum-exp, delta and key range of a tile as four
rows of one int32 array, one DMA more. VMEM, at 512 x 512, head_dim 128, bfloat16: two buffers of 256 KB, five arrays of
logits' shape about 4 MB, sums 512 KB.

Speed. Seven products against the forward's two, and the exponentials twice; at 512 x 512 the MXU bounds both kernels,
with the vector unit (about nine operations a logit) close behind.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Arrays, Blocks, Results
from pallas_kernels.numerics import LOG2_E, NN, NT, OUT_OF_SIGHT, TN, product, result
from pallas_kernels.tpu.per_tile import pipeline
from pallas_kernels.tpu.per_tile.operands import DEFAULT, TileConfig, make_operands


def attend_tiles_backward(
    arrays: Arrays,
    lists: jax.Array,
    blocks: Blocks,
    query_block_size: int,
    results: Results,
    cotangents: Results,
    *,
    scale: float,
    config: TileConfig = DEFAULT,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend_tiles_forward`. Source: FlashAttention-2 (arXiv 2307.08691), section 3.

    Args:
      arrays, lists, blocks, query_block_size, scale, config, interpret: as given to `attend_tiles_forward`.
      results: what it gave.
      cotangents: the gradients of these.

    Returns:
      Gradients of query, key and value, like them; zero where nothing was seen.

    Raises:
      NotImplementedError: as `attend_tiles_forward`.
    """
    (query, key, _), (output, log_sum_exp), (d_output, d_log_sum_exp) = arrays, results, cotangents
    operands = make_operands(arrays, lists, blocks, query_block_size, config)
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    rows, num_tiles, part, _ = operands.query.shape
    kv_rows, num_blocks, _, block, _ = operands.key_value.shape
    key_entries = max(1, config.rows_per_step // block)
    query_entries = max(1, config.rows_per_step // part)

    split = operands.query_cut.split
    query_gradient = jnp.stack([operands.query, split(d_output)], axis=2)  # [rows, tiles, 2, part, head_dim]
    delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_log_sum_exp
    # In units of log2; where a query saw nothing, so large that every probability is zero.
    log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, -OUT_OF_SIGHT, log_sum_exp * LOG2_E)
    numbers = [lax.bitcast_convert_type(split(array), jnp.int32) for array in (log_sum_exp, delta)]
    key_range = jnp.repeat(operands.key_range, heads, axis=0)  # [rows, tiles, 2, part]
    per_query = jnp.concatenate([key_range, jnp.stack(numbers, axis=2)], axis=2)  # int32 [rows, tiles, 4, part]

    tile, block_id, needs_mask = operands.pairs
    work = pipeline.make_work(tile, block_id, needs_mask, num_owners=num_tiles, entries=key_entries)
    d_query = pl.pallas_call(
        functools.partial(_query_kernel, scale=scale, group=group),
        out_shape=result(operands.query.shape, query.dtype, operands.query),
        grid=(rows, num_tiles),
        in_specs=[
            pl.BlockSpec((1, 1, 1, 3), lambda r, t: (r, t, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, 2, part, head_dim), lambda r, t: (r, t, 0, 0, 0)),
            pl.BlockSpec((1, 1, 4, part), lambda r, t: (r, t, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((1, 1, part, head_dim), lambda r, t: (r, t, 0, 0)),
        scratch_shapes=[
            *pipeline.key_scratch(key_entries, block, head_dim, key.dtype),
            pltpu.VMEM((head_dim, part), jnp.float32),
        ],
        compiler_params=pipeline.COMPILER_PARAMS,
        name="attend_tiles_d_query",
        interpret=interpret,
    )(work.span, query_gradient, per_query, work.steps, operands.key_value, operands.position)

    # The same pairs by block: tile t of head g of a group is partner g * num_tiles + t.
    owner = jnp.where(tile < 0, -1, block_id).reshape(kv_rows, -1)
    head_in_group = (jnp.arange(rows, dtype=jnp.int32) % group)[:, None]
    partner = (head_in_group * num_tiles + tile).reshape(kv_rows, -1)
    work = pipeline.make_work(
        owner, partner, needs_mask.reshape(kv_rows, -1), num_owners=num_blocks, entries=query_entries
    )
    block_spec = pl.BlockSpec((1, 1, block, head_dim), lambda r, n: (r, n, 0, 0))
    d_key, d_value = pl.pallas_call(
        functools.partial(_key_kernel, scale=scale),
        out_shape=[result((kv_rows, num_blocks, block, head_dim), key.dtype, operands.key_value)] * 2,
        grid=(kv_rows, num_blocks),
        in_specs=[
            pl.BlockSpec((1, 1, 1, 3), lambda r, n: (r, n, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, 2, block, head_dim), lambda r, n: (r, n, 0, 0, 0)),
            pl.BlockSpec((1, 1, 1, block), lambda r, n: (r, n, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[block_spec] * 2,
        scratch_shapes=[
            *pipeline.ids_scratch(),
            pltpu.VMEM((2, query_entries, 2, part, head_dim), query.dtype),
            pltpu.VMEM((2, query_entries, 4, part), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((block, head_dim), jnp.float32),
            pltpu.VMEM((block, head_dim), jnp.float32),
        ],
        compiler_params=pipeline.COMPILER_PARAMS,
        name="attend_tiles_d_key_value",
        interpret=interpret,
    )(
        work.span,
        operands.key_value,
        operands.position,
        work.steps,
        query_gradient.reshape(kv_rows, group * num_tiles, 2, part, head_dim),
        per_query.reshape(kv_rows, group * num_tiles, 4, part),
    )
    return (
        operands.query_cut.join(d_query, batch, num_queries),
        operands.key_cut.join(d_key, batch, num_keys),
        operands.key_cut.join(d_value, batch, num_keys),
    )


def _query_kernel(
    span_ref: Any,  # SMEM [1, 1, 1, 3]
    query_ref: Any,  # [1, 1, 2, queries, head_dim]: queries, dO
    per_query_ref: Any,  # int32 [1, 1, 4, queries]: key_range, and the bits of log-sum-exp and delta
    steps_hbm: Any,  # HBM [rows, lines, 1, 128]
    key_value_hbm: Any,  # HBM [kv rows, blocks, 2, block, head_dim]
    position_hbm: Any,  # HBM [kv rows, blocks, 1, block]
    d_query_ref: Any,  # [1, 1, queries, head_dim]
    ids_ref: Any,  # SMEM [3, 1, 128]
    ids_semaphore: Any,
    key_value_ref: Any,  # [2, entries, 2, block, head_dim]
    position_ref: Any,  # [2, entries, 1, block]
    semaphore: Any,
    sum_ref: Any,  # [head_dim, queries]
    *,
    scale: float,
    group: int,
) -> None:
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    keys = pipeline.KeyBuffers(key_value_hbm, position_hbm, key_value_ref, position_ref, semaphore, group)

    def differentiate(buffer: Any, is_masked: bool) -> None:
        key, value = keys.load(buffer)  # [keys, head_dim]
        per_query = per_query_ref[0, 0]
        is_seen = keys.is_seen(buffer, per_query[0:2]) if is_masked else None
        _, d_logits = _recompute(key, value, query_ref[0, 0, 0], query_ref[0, 0, 1], per_query, is_seen, scale)
        sum_ref[...] += product(key, d_logits.astype(key.dtype), TN)

    pipeline.stream(
        span_ref,
        steps_hbm,
        ids_ref,
        ids_semaphore,
        copies=keys.copies,
        mask_copies=keys.mask_copies,
        entries=key_value_ref.shape[1],
        clear=keys.clear,
        compute=differentiate,
    )
    d_query_ref[0, 0] = (sum_ref[...] * scale).T.astype(d_query_ref.dtype)


def _key_kernel(
    span_ref: Any,  # SMEM [1, 1, 1, 3]
    key_value_ref: Any,  # [1, 1, 2, block, head_dim]
    position_ref: Any,  # [1, 1, 1, block]
    steps_hbm: Any,  # HBM [kv rows, lines, 1, 128]
    query_hbm: Any,  # HBM [kv rows, group * tiles, 2, queries, head_dim]
    per_query_hbm: Any,  # HBM int32 [kv rows, group * tiles, 4, queries]
    d_key_ref: Any,  # [1, 1, block, head_dim]
    d_value_ref: Any,  # [1, 1, block, head_dim]
    ids_ref: Any,  # SMEM [3, 1, 128]
    ids_semaphore: Any,
    query_ref: Any,  # [2, entries, 2, queries, head_dim]: queries, dO
    per_query_ref: Any,  # int32 [2, entries, 4, queries]
    semaphore: Any,
    d_key_sum_ref: Any,  # [block, head_dim]
    d_value_sum_ref: Any,  # [block, head_dim]
    *,
    scale: float,
) -> None:
    d_key_sum_ref[...] = jnp.zeros(d_key_sum_ref.shape, jnp.float32)
    d_value_sum_ref[...] = jnp.zeros(d_value_sum_ref.shape, jnp.float32)
    row, (_, entries, _, _, head_dim) = pl.program_id(0), query_ref.shape

    def copies(buffer: Any, entry: Any, tile: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(hbm.at[row, tile], ref.at[buffer, entry], semaphore.at[buffer])
            for hbm, ref in ((query_hbm, query_ref), (per_query_hbm, per_query_ref))
        ]

    def clear(buffer: Any, entry: Any) -> None:
        query_ref[buffer, entry] = jnp.zeros(query_ref.shape[2:], query_ref.dtype)
        per_query_ref[buffer, entry] = jnp.zeros(per_query_ref.shape[2:], jnp.int32)  # sees nothing

    def differentiate(buffer: Any, is_masked: bool) -> None:
        key, value = key_value_ref[0, 0, 0], key_value_ref[0, 0, 1]  # [keys, head_dim]
        query = query_ref[buffer, :, 0].reshape(-1, head_dim)  # [queries, head_dim]
        d_output = query_ref[buffer, :, 1].reshape(-1, head_dim)
        per_query = jnp.concatenate([per_query_ref[buffer, entry] for entry in range(entries)], axis=1)  # [4, queries]
        is_seen = None
        if is_masked:
            position = pipeline.spread(position_ref[0, 0], query.shape[0])  # [keys, queries]
            is_seen = (per_query[0:1] <= position) & (position < per_query[1:2])
        probability, d_logits = _recompute(key, value, query, d_output, per_query, is_seen, scale)
        d_value_sum_ref[...] += product(probability.astype(query.dtype), d_output, NN)
        d_key_sum_ref[...] += product(d_logits.astype(query.dtype), query, NN)

    pipeline.stream(
        span_ref,
        steps_hbm,
        ids_ref,
        ids_semaphore,
        copies=copies,
        entries=entries,
        clear=clear,
        compute=differentiate,
    )
    d_key_ref[0, 0] = (d_key_sum_ref[...] * scale).astype(d_key_ref.dtype)
    d_value_ref[0, 0] = d_value_sum_ref[...].astype(d_value_ref.dtype)


def _recompute(
    key: jax.Array,
    value: jax.Array,
    query: jax.Array,
    d_output: jax.Array,
    per_query: jax.Array,
    is_seen: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """P and dS, float32 `[keys, queries]`. Of keys, values `[keys, head_dim]`, queries and dO `[queries, head_dim]`."""
    log_sum_exp, delta = (lax.bitcast_convert_type(per_query[i : i + 1], jnp.float32) for i in (2, 3))  # [1, queries]
    logits = product(key, query, NT) * (scale * LOG2_E)
    probability = jnp.exp2(logits - log_sum_exp)
    if is_seen is not None:
        probability = jnp.where(is_seen, probability, 0.0)
    d_probability = product(value, d_output, NT)
    return probability, probability * (d_probability - delta)
