"""Attention for choices made per query, on a TPU: cuts heads into chunks and chunks into tiles, and joins the results.

Each chunk of each key/value head goes through the kernels of `forward_kernels`, one after the other. Around the kernel
a chunk costs XLA a sort of its pairs, and their cut into tiles (`cut_tiles`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Arrays, Blocks
from pallas_kernels.config import PER_QUERY, PerQueryConfig
from pallas_kernels.numerics import LOG2_E, result
from pallas_kernels.tpu.per_query import chunk_rows, chunks, forward_kernels, memory
from pallas_kernels.tpu.per_query.cut_tiles import make_tiles
from pallas_kernels.tpu.per_query.memory import LANES, SPARE_ROWS, Tiles

# Largest |logit| * log2(e) of the kernel without a maximum. Sums of up to 2^24 weights of at most 2^80, times values up
# to 2^23, stay below the largest float32; the smallest total, 2^-80, leaves 46 binary orders above the smallest normal.
FIXED_RANGE = 80.0


def attend_forward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    config: PerQueryConfig = PER_QUERY,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every query over the blocks it chose: softmax(scale q k^T) v.

    A query sees the keys of its blocks that stand before `blocks.stop`. Any logits are allowed. Source: FlashMoBA
    (arXiv 2511.11571), section 4, without its gather, partial results and merge.

    Args:
      arrays: query, float32 or bfloat16; key and value, of its dtype, in block order. In rows without segments keys
        behind a short block are zero.
      indices: int32 `[batch, heads, queries, top_k]`, ids of blocks, none twice in a list; -1 for none. Every block
        listed has a key that the query sees.
      blocks: the geometry of the call.
      scale: factor of the logits.
      config: sizes inside the kernel.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      Output like query, and the natural log-sum-exp of the logits, float32 `[batch, queries, heads]`. Zero and -inf for
      a query without blocks.

    Raises:
      NotImplementedError: a dtype, head_dim, block_size or top_k that the kernel cannot do.
    """
    (query, key, value), cut = arrays, memory.Cut.of(blocks)
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    chunk = memory.refuses(query, blocks) or plan_chunk(query, key, indices.shape[3], blocks, config)
    if isinstance(chunk, str):
        raise NotImplementedError(chunk)
    num_rows = num_queries * num_heads // kv_heads
    num_chunks = -(-num_rows // chunk.rows)
    split = functools.partial(memory.split_heads, kv_heads=kv_heads, num_chunks=num_chunks, chunk_rows=chunk.rows)
    key_stop = jnp.broadcast_to(blocks.stop[:, :, None, None], (batch, num_queries, num_heads, 1))

    def attend_head(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        key_value, block_start, block_length, *chunks = arrays
        largest_key = _largest_norm(key_value[:, 0])

        def attend_chunk(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            query, indices, key_stop = arrays  # [chunk_rows, head_dim], [top_k, chunk_rows], [chunk_rows]
            ids, pieces = memory.make_pieces(indices, block_start, block_length, cut)
            tiles = make_tiles(
                ids,
                pieces,
                tile_size=chunk.tile_size,
                tiles_per_step=chunk.tiles_per_step,
                pieces_per_step=config.pieces_per_step,
                interpret=interpret,
            )
            attend = functools.partial(
                attend_tiles,
                is_aligned=cut.is_aligned,
                scale=scale,
                vmem_bytes=chunk.vmem_bytes,
                piece_rows=config.piece_rows,
                interpret=interpret,
            )
            bound = _largest_norm(query) * largest_key * (abs(scale) * LOG2_E)
            return lax.cond(
                bound <= FIXED_RANGE,
                functools.partial(attend, has_maximum=False),
                functools.partial(attend, has_maximum=True),
                *(query, key_stop, key_value, tiles),
            )

        return lax.map(attend_chunk, tuple(chunks))

    padded_key = jnp.pad(key, ((0, 0), (0, 0), (0, 0), (0, -head_dim % LANES)))
    key_value = [memory.split_keys(array, cut.page_size) for array in (padded_key, _add_ones(value))]
    heads = (
        jnp.stack(key_value, axis=2),
        jnp.repeat(blocks.block_start, kv_heads, axis=0),
        jnp.repeat(blocks.block_length, kv_heads, axis=0),
        split(query),
        memory.split_indices(indices, kv_heads, num_chunks, chunk.rows),
        split(key_stop)[..., 0],
    )
    output, log_sum_exp = lax.map(jax.custom_batching.sequential_vmap(attend_head), heads)
    join = functools.partial(memory.join_heads, batch=batch, num_queries=num_queries, num_heads=num_heads)
    return join(output), join(log_sum_exp[..., None])[..., 0]


def plan_chunk(
    query: jax.Array, key: jax.Array, top_k: int, blocks: Blocks, config: PerQueryConfig
) -> chunks.Chunk | str:
    """The chunks of `attend_forward`, from shapes; or why there can be none."""
    head_dim, cut = query.shape[-1], memory.Cut.of(blocks)
    parts = memory.parts_of(memory.words_of(head_dim, query.dtype) + 1)
    state_parts = memory.parts_of(head_dim + 2)
    return chunks.plan(
        query.shape[1] * query.shape[2] // key.shape[2],
        row_bytes=4 * LANES * (parts + state_parts),
        row_multiple=chunk_rows.GROUP,
        # Fetched row and result, and what the compiler keeps: unpacked rows, logits and weights, results.
        slot_bytes=4 * (LANES * (2 * parts + 3 * state_parts) + 3 * cut.page_size),
        tile_bytes=4 * cut.page_size * memory.round_up(head_dim, LANES) * query.dtype.itemsize,
        pairs_per_row=top_k * cut.pieces_per_block,
        num_pieces=blocks.num_blocks * cut.pieces_per_block,
        tile_sizes=(128, 64) if config.tile_size is None else (config.tile_size,),
        slots_per_step=config.slots_per_step,
        config=config,
    )


def attend_tiles(
    query: jax.Array,
    key_stop: jax.Array,
    key_value: jax.Array,
    tiles: Tiles,
    *,
    has_maximum: bool,
    is_aligned: bool,
    scale: float,
    vmem_bytes: int,
    piece_rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One chunk: attention of each row over its tiles.

    Args:
      query: `[chunk_rows, head_dim]`, a multiple of 128 rows.
      key_stop: int32 `[chunk_rows]`.
      key_value: `[pages, 2, page_size, lanes]`: keys, then zeros; values, then ones, last a zero.
      tiles: of the chunk.
      has_maximum: whether to take the kernel with the true running maximum.
      is_aligned: whether a tile sees no key of its page but those of its block, or zeros.
      scale: factor of the logits.
      vmem_bytes: on-chip memory that the kernel may take.
      piece_rows: as in `PerQueryConfig`.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      Output like query, and log-sum-exp, float32 `[chunk_rows]`.
    """
    num_rows, head_dim = query.shape
    _, num_tiles, tile_size = tiles.row.shape
    parts = memory.parts_of(memory.words_of(head_dim, query.dtype) + 1)
    state_parts = memory.parts_of(head_dim + 2)
    num_slots = num_tiles * tile_size
    piece_rows = chunk_rows.choose_piece_rows(num_rows, head_dim, query.dtype, piece_rows)
    query = query.reshape(-1, piece_rows, head_dim)
    key_stop = key_stop.reshape(-1, piece_rows // LANES, LANES)

    def numbers(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, num_tiles, tile_size), lambda step, *_: (step + ahead, 0, 0), memory_space=pltpu.SMEM)

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    output, log_sum_exp = pl.pallas_call(
        functools.partial(
            forward_kernels.kernel_running if has_maximum else forward_kernels.kernel_fixed,
            step=forward_kernels.Step(num_tiles, tile_size, head_dim, key_value.shape[2], is_aligned, scale),
        ),
        out_shape=(
            result(query.shape, query.dtype, query),
            result(key_stop.shape, jnp.float32, query),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles.num_steps,),
            in_specs=[numbers(0), numbers(0), numbers(1), in_hbm, in_hbm, in_hbm],
            out_specs=(in_hbm, in_hbm),
            scratch_shapes=[
                pltpu.VMEM(((num_rows + SPARE_ROWS) * parts, LANES), jnp.uint32),
                pltpu.VMEM(((num_rows + SPARE_ROWS) * state_parts, LANES), jnp.float32),
                pltpu.VMEM((2, num_tiles, *key_value.shape[1:]), key_value.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((num_slots * parts, LANES), jnp.uint32),
                pltpu.VMEM((num_slots * state_parts, LANES), jnp.float32),
                chunk_rows.Buffers.allocate(query, key_stop),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,  # they take 15 % of the time; the interpreter makes them in the tests
        ),
        name="attend_running" if has_maximum else "attend_fixed",
        interpret=interpret,
    )(
        *(tiles.page, tiles.start, tiles.stop),
        *(tiles.row * state_parts, tiles.row * parts, tiles.row * parts),
        *(query, key_stop, key_value),
    )
    return output.reshape(num_rows, head_dim), log_sum_exp.reshape(num_rows)


def _add_ones(value: jax.Array) -> jax.Array:
    """Fills `[..., head_dim]` up to whole lanes: ones, and zero in the last lane.

    Nothing for a head_dim of whole lanes: the kernel puts 128 lanes behind those.
    """
    padding = -value.shape[-1] % LANES
    if padding == 0:
        return value
    return jnp.concatenate([value, forward_kernels.ones(value.shape[:-1], value.dtype)[..., -padding:]], axis=-1)


def _largest_norm(array: jax.Array) -> jax.Array:
    """Largest Euclidean norm of the rows `[..., head_dim]`, scalar float32; NaN if there is one."""
    return jnp.sqrt(jnp.square(array.astype(jnp.float32)).sum(-1).max())
