"""Attention for choices made per query tile, on a TPU: each tile streams its own list of key blocks.

Tiling. A program owns one query tile of one head: the queries, the running maximum, the sum and the output stay in VMEM
while its key blocks pass by (`pipeline.stream`), 1024 keys at a time, several blocks together where blocks are short.

Layout. Logits are [keys, queries]: all that is kept per query (maximum, sum, visible keys) is one row of lanes, the
maximum and the sum over keys are elementwise but for the last eight rows, and nothing is reduced along lanes. The
output is accumulated as [head_dim, queries] = V^T P and turned once, at the end. The position of a key would be a
column; it comes as a row and is turned in the kernel, and only where it matters: the list says which steps need a mask
at all.

Memory. HBM: keys and values of a block side by side, one DMA for both; positions; lists. VMEM, at 512 queries, 1024
keys and head_dim 128 in bfloat16: two buffers of keys and values 2 x 512 KB, logits and probabilities about 3 MB,
output 256 KB. SMEM: three steps' ids. Nothing but output and log-sum-exp is written back.

Speed. The two products and the elementwise work (scale, subtract, exp2, sum, cast: about six operations a logit over
four slots) take about as long as each other, and overlap the better the more keys a step has: that is why a step takes
1024 keys rather than 512. A step's keys and values are 512 KB: the DMA is hidden where a tile has some 256 queries or
more, and bounds the kernel below that. Exponentials are exp2, with log2(e) in the scale.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Arrays, Blocks
from pallas_kernels.numerics import LOG2_E, NT, OUT_OF_SIGHT, TN, product, result
from pallas_kernels.tpu.per_tile import pipeline
from pallas_kernels.tpu.per_tile.operands import DEFAULT, TileConfig, make_operands


def attend_tiles_forward(
    arrays: Arrays,
    lists: jax.Array,
    blocks: Blocks,
    query_block_size: int,
    *,
    scale: float,
    config: TileConfig = DEFAULT,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every query tile over its own list of key blocks: softmax(scale q k^T) v.

    Tile i holds the queries i * query_block_size and on, block j the keys j * block_size and on. A query sees the keys
    of its tile's blocks whose position p has start <= p < stop. The maximum is the true running one, so any logits are
    allowed. Source: FlashAttention-2 (arXiv 2307.08691), section 3, over a list of blocks.

    Args:
      arrays: query, float32 or bfloat16; key and value, of its dtype. Padding holds finite numbers.
      lists: int32 `[batch, heads, query_tiles, list]`, ids of key blocks, none twice in a list; -1 for none, anywhere.
      blocks: the geometry of the call, of which start, stop, position and block_size count.
      query_block_size: queries in a tile; the last one may be short.
      scale: factor of the logits.
      config: sizes inside the kernel.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      Output like query, and the natural log-sum-exp of the logits, float32 `[batch, queries, heads]`. Zero and -inf for
      a query with nothing to see.

    Raises:
      NotImplementedError: query has another dtype, or a block size is below 16.
    """
    query, key, _ = arrays
    operands = make_operands(arrays, lists, blocks, query_block_size, config)
    batch, num_queries, heads, head_dim = query.shape
    rows, num_tiles, part, _ = operands.query.shape
    group = heads // key.shape[2]
    entries = max(1, config.rows_per_step // operands.key_cut.part)
    work = pipeline.make_work(
        operands.pairs.tile, operands.pairs.block, operands.pairs.needs_mask, num_owners=num_tiles, entries=entries
    )
    output, log_sum_exp = pl.pallas_call(
        functools.partial(_kernel, scale=scale, group=group),
        out_shape=(
            result(operands.query.shape, query.dtype, operands.query),
            result((rows, num_tiles, 1, part), jnp.float32, operands.query),
        ),
        grid=(rows, num_tiles),
        in_specs=[
            pl.BlockSpec((1, 1, 1, 3), lambda r, t: (r, t, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, part, head_dim), lambda r, t: (r, t, 0, 0)),
            pl.BlockSpec((1, 1, 2, part), lambda r, t: (lax.div(r, heads), t, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=(
            pl.BlockSpec((1, 1, part, head_dim), lambda r, t: (r, t, 0, 0)),
            pl.BlockSpec((1, 1, 1, part), lambda r, t: (r, t, 0, 0)),
        ),
        scratch_shapes=[
            *pipeline.key_scratch(entries, operands.key_cut.part, head_dim, key.dtype),
            pltpu.VMEM((1, part), jnp.float32),
            pltpu.VMEM((1, part), jnp.float32),
            pltpu.VMEM((head_dim, part), jnp.float32),
        ],
        compiler_params=pipeline.COMPILER_PARAMS,
        name="attend_tiles_forward",
        interpret=interpret,
    )(work.span, operands.query, operands.key_range, work.steps, operands.key_value, operands.position)
    return (
        operands.query_cut.join(output, batch, num_queries),
        operands.query_cut.join(log_sum_exp.swapaxes(2, 3), batch, num_queries)[..., 0],
    )


def _kernel(
    span_ref: Any,  # SMEM [1, 1, 1, 3]
    query_ref: Any,  # [1, 1, queries, head_dim]
    key_range_ref: Any,  # [1, 1, 2, queries]: first position seen, one past the last
    steps_hbm: Any,  # HBM [rows, lines, 1, 128]
    key_value_hbm: Any,  # HBM [kv rows, blocks, 2, block, head_dim]
    position_hbm: Any,  # HBM [kv rows, blocks, 1, block]
    output_ref: Any,  # [1, 1, queries, head_dim]
    log_sum_exp_ref: Any,  # [1, 1, 1, queries]
    ids_ref: Any,  # SMEM [3, 1, 128]
    ids_semaphore: Any,
    key_value_ref: Any,  # [2, entries, 2, block, head_dim]
    position_ref: Any,  # [2, entries, 1, block]
    semaphore: Any,
    largest_ref: Any,  # [1, queries], in units of log2
    total_ref: Any,  # [1, queries]
    sum_ref: Any,  # [head_dim, queries]
    *,
    scale: float,
    group: int,
) -> None:
    largest_ref[...] = jnp.full(largest_ref.shape, OUT_OF_SIGHT, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    keys = pipeline.KeyBuffers(key_value_hbm, position_hbm, key_value_ref, position_ref, semaphore, group)

    def attend(buffer: Any, is_masked: bool) -> None:
        key, value = keys.load(buffer)  # [keys, head_dim]
        logits = product(key, query_ref[0, 0], NT) * (scale * LOG2_E)  # [keys, queries]
        if is_masked:
            # A query that saw nothing so far has OUT_OF_SIGHT as its maximum and nonsense in its sums, which the first
            # key that it sees multiplies by exp2(OUT_OF_SIGHT - logit) = 0.
            logits = jnp.where(keys.is_seen(buffer, key_range_ref[0, 0]), logits, OUT_OF_SIGHT)
        largest = jnp.maximum(largest_ref[...], logits.max(0, keepdims=True))
        weight = jnp.exp2(logits - largest)
        decay = jnp.exp2(largest_ref[...] - largest)
        largest_ref[...] = largest
        total_ref[...] = decay * total_ref[...] + weight.sum(0, keepdims=True)
        sum_ref[...] = decay * sum_ref[...] + product(value, weight.astype(value.dtype), TN)

    pipeline.stream(
        span_ref,
        steps_hbm,
        ids_ref,
        ids_semaphore,
        copies=keys.copies,
        mask_copies=keys.mask_copies,
        entries=key_value_ref.shape[1],
        clear=keys.clear,
        compute=attend,
    )
    is_empty = largest_ref[...] == OUT_OF_SIGHT
    total = jnp.where(is_empty, 1.0, total_ref[...])
    output = jnp.where(is_empty, 0.0, sum_ref[...] / total)  # [head_dim, queries]
    output_ref[0, 0] = output.T.astype(output_ref.dtype)
    log_sum_exp_ref[0, 0] = jnp.where(is_empty, -jnp.inf, (largest_ref[...] + jnp.log2(total)) / LOG2_E)
