"""Gradients of attention for choices made per query, on Hopper (sm_90a): in Mosaic GPU, without atomics.

Compiled and interpreted only: nothing here has run on a GPU yet.

The formulas are those of `backward`. One kernel makes dQ of pairs, dK and dV, with five products; the sum over the
pairs of a row is that of `backward`.

Tiling. Chunks, tiles and parts of blocks as in `forward`. One program for each multiprocessor walks a run of
blocks of about equal work. It keeps the keys and values of a block in shared memory, and dK and dV, [64, head_dim] of
each warpgroup in float32, in registers, from the first tile of the block to the last. A block of at most 64 keys has
one warpgroup, a larger one two, which share its keys:

    S = K Q^T, dP = V dO^T    [64 keys, tile_size], its keys and all rows of the tile
    dV += P dO, dK += dS Q    [64 keys, head_dim]
    dQ = dS^T K               over all keys, for half of the columns (head_dim 128) or of the rows (head_dim 64)

so that the halves of dS meet in shared memory. dQ goes to the place of its pair, row by row, as the outputs of the
forward kernel do.

No warpgroup only moves data: with a third one no thread had more than 168 registers, which spilled. Instead both start
to copy their share of the next tile, queries and gradients of outputs, before they work on one (cp.async, or TMA with
`gather_in_kernel=False`).

Sums have a fixed order, that of the schedule: the same bits in every run. A block belongs to one program, however many
tiles it has: one that nearly all queries choose can keep a program longer than the others. From chunk to chunk dK and
dV are added up by XLA, in float32, or in the dtype of the keys where one chunk holds all rows of a head.

Memory. Shared, at head_dim 128 and 128 keys: two slots of tiles, 64 KiB, keys and values, 64 KiB, dS and dQ, 32 KiB.
Registers: 255 a thread, of which the two sums take 128. Global: as `backward`, and dK and dV of one chunk in float32.

Speed. Bound by memory: queries and gradients of outputs are gathered, 4.3 GB each at the sizes named in `forward`, dQ
of pairs, 4.3 GB, is written and read again. The keys and the first tile of a block are waited for. Unmeasured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import Arrays, Blocks, Results
from pallas_kernels.config import MOSAIC, TRITON, MosaicConfig
from pallas_kernels.gpu.chunks import Chunk, Plan, find_block, find_tiles, for_chunks, make_plan
from pallas_kernels.gpu.mosaic.tiles import (
    BY_COLUMN,
    ROWS,
    SWIZZLED,
    add_product,
    balance,
    close_copies,
    copy_block,
    copy_listed_rows,
    cut_blocks,
    key_size,
    list_slots,
    load_numbers,
    opaque,
    pad_head_dim,
    product,
    ranks,
    refuses,
    write_block,
    write_rows,
    zeros,
)
from pallas_kernels.gpu.triton.backward import add_up
from pallas_kernels.numerics import LOG2_E

_SLOTS = 2  # tiles in shared memory: one worked on, one on its way


def attend_backward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    results: Results,
    cotangents: Results,
    *,
    scale: float,
    config: MosaicConfig = MOSAIC,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `backward.attend_backward`, in Mosaic GPU, for Hopper. Unverified: it has not run on a GPU.

    Args:
      arrays: bfloat16 or float16, head_dim up to 128; else as there.
      indices, blocks, results, cotangents, scale: as there.
      config: sizes inside the kernels.
      interpret: False, or `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      As there.

    Raises:
      NotImplementedError: a dtype or head_dim that the kernels cannot do.
    """
    (query, key, value), (output, log_sum_exp), (d_output, d_log_sum_exp) = arrays, results, cotangents
    if (reason := refuses(query)) is not None:
        raise NotImplementedError(reason)
    shapes = query.shape, key.shape
    delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_log_sum_exp
    log2_sum = jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp * LOG2_E)  # [batch, queries, heads]
    query, key, value, d_output = (pad_head_dim(array) for array in (query, key, value, d_output))
    indices, blocks = cut_blocks(indices, blocks)
    tile_size = 2 * ROWS if query.shape[-1] == 64 and key_size(blocks) > ROWS else ROWS
    plan = make_plan(
        query,
        key,
        indices,
        num_blocks=blocks.num_blocks,
        block_size=blocks.block_size,
        scale=scale,
        tile_size=tile_size,
        arrays=4,
        config=config,
    )
    rows = tuple(x.reshape(-1, plan.head_dim) for x in (query, d_output.astype(query.dtype), key, value))
    numbers = log2_sum.reshape(-1), delta.reshape(-1)
    sizes = TRITON.for_rows(plan.columns, query.dtype.itemsize)
    is_key = jnp.arange(plan.keys)[None, :] < blocks.block_length.sum(1, keepdims=True)  # [batch, keys], in block order
    is_key = jnp.repeat(is_key, plan.kv_heads, axis=0)[..., None]

    def differentiate_chunk(chunk: Chunk, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        partial, *of_chunk = _differentiate(chunk, blocks, rows, numbers, plan, config, interpret)
        d_query = add_up(chunk, partial, gradients[0], plan, sizes, bool(interpret))

        def add(total: jax.Array, part: jax.Array) -> jax.Array:  # [batch * kv_heads, keys, head_dim], [chunk_heads...]
            of_heads, is_real = (
                lax.dynamic_slice_in_dim(x, chunk.origin[0], plan.chunk_heads) for x in (total, is_key)
            )
            new = (of_heads + jnp.where(is_real, part, 0)).astype(total.dtype)
            return lax.dynamic_update_slice_in_dim(total, new, chunk.origin[0], 0)

        return d_query, *(add(total, part) for total, part in zip(gradients[1:], of_chunk, strict=True))

    sums = key.dtype if plan.row_chunks == 1 else jnp.float32
    of_keys = jnp.zeros((plan.batch * plan.kv_heads, plan.keys, plan.head_dim), sums)
    empty = jnp.zeros_like(rows[0]), of_keys, of_keys
    d_query, *d_keys = for_chunks(plan, indices, tile_size, differentiate_chunk, empty)
    d_keys = [x.reshape(plan.batch, plan.kv_heads, *x.shape[1:]).swapaxes(1, 2).astype(key.dtype) for x in d_keys]
    d_key, d_value = (array[..., : shapes[1][-1]] for array in d_keys)
    return d_query.reshape(query.shape)[..., : shapes[0][-1]], d_key, d_value


def _differentiate(
    chunk: Chunk,
    blocks: Blocks,
    arrays: tuple[jax.Array, ...],
    numbers: tuple[jax.Array, ...],
    plan: Plan,
    config: MosaicConfig,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """dQ of pairs `[chunk_heads * chunk_pairs, head_dim]`, dK and dV of the chunk `[chunk_heads, keys, head_dim]`.

    dK and dV are float32. Entries of no pair and of no key hold anything.
    """
    query, d_output, key, value = arrays
    schedule = chunk.schedule
    tile_size = schedule.pair.shape[-1]
    slots = list_slots(chunk, blocks, plan)
    log2_sum, delta = (jnp.where(slots.row < 0, 0, x.at[slots.row].get(mode="clip")) for x in numbers)
    head = jnp.arange(plan.chunk_heads, dtype=jnp.int32)[:, None]
    number = jnp.arange(plan.num_blocks, dtype=jnp.int32)[None, :]
    numbers_of_blocks = blocks.block_start.reshape(-1), blocks.block_length.reshape(-1)
    block = find_block(chunk.origin, *numbers_of_blocks, head, number, plan)
    tiles = find_tiles(schedule, plan.num_blocks)  # [chunk_heads, blocks + 1]
    work = tiles[:, 1:] - tiles[:, :-1] + 1
    order, bounds = balance(work.reshape(-1), (block.length > 0).reshape(-1), config.num_programs)
    first_tile = head * schedule.block.shape[1] + tiles
    of_blocks = first_tile[:, :-1], first_tile[:, 1:], block.first_row, block.length, head * plan.keys + block.start
    if not config.gather_in_kernel:
        is_none = jnp.where(slots.row < 0, query.shape[0], slots.row)
        query, d_output = (x.at[is_none].get(mode="fill", fill_value=0) for x in (query, d_output))

    groups, dtype = key_size(blocks) // ROWS, query.dtype
    tile, keys = (tile_size, plan.head_dim), (1, key_size(blocks), plan.head_dim)
    of_keys = jax.ShapeDtypeStruct((plan.chunk_heads * plan.keys, plan.head_dim), jnp.float32)
    d_query, *d_keys = plgpu.kernel(
        functools.partial(_kernel, plan=plan, groups=groups, config=config),
        out_type=(
            jax.ShapeDtypeStruct((plan.chunk_heads * plan.chunk_pairs, plan.head_dim), dtype),
            of_keys,
            of_keys,
        ),
        scratch_types=(
            *(plgpu.SMEM((_SLOTS, *tile), dtype, transforms=SWIZZLED) for _ in range(2)),
            *(plgpu.SMEM(keys, dtype, transforms=SWIZZLED) for _ in range(2)),
            plgpu.SMEM((1, key_size(blocks), tile_size), dtype, transforms=SWIZZLED),
            plgpu.SMEM((groups, ROWS, plan.head_dim if groups == 1 else 64), dtype, transforms=SWIZZLED),
            *(plgpu.SMEM((_SLOTS, tile_size), x.dtype) for x in (slots.limit, slots.place, log2_sum, delta)),
            plgpu.Barrier(num_arrivals=4 if config.gather_in_kernel else 6, num_barriers=_SLOTS),  # one a TMA
            plgpu.Barrier(num_arrivals=groups),
        ),
        grid=(config.num_programs,),
        grid_names=("program",),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(
        bounds,
        order,
        *(array.reshape(-1) for array in of_blocks),
        slots.row,
        slots.limit,
        slots.place,
        log2_sum,
        delta,
        query,
        d_output,
        key,
        value,
    )
    return d_query, *(array.reshape(plan.chunk_heads, plan.keys, plan.head_dim) for array in d_keys)


def _kernel(
    bounds_ref: Any,  # [programs + 1]
    order_ref: Any,  # [blocks], of all heads of the chunk
    begin_ref: Any,  # [blocks], its first tile
    end_ref: Any,  # [blocks], one past its last tile
    first_row_ref: Any,  # [blocks], of its first key
    length_ref: Any,  # [blocks]
    target_ref: Any,  # [blocks], its first row in the gradients
    row_ref: Any,  # [slots]
    limit_ref: Any,  # [slots]
    place_ref: Any,  # [slots]
    sum_ref: Any,  # [slots], log2 of the sum of the weights
    delta_ref: Any,  # [slots]
    query_ref: Any,  # [batch * queries * heads, head_dim], or [slots, head_dim]
    d_output_ref: Any,  # like query_ref
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    d_query_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    d_key_ref: Any,  # [chunk_heads * keys, head_dim]
    d_value_ref: Any,  # [chunk_heads * keys, head_dim]
    query_tiles: Any,  # shared memory from here on: [slots, tile_size, head_dim]
    d_output_tiles: Any,  # [slots, tile_size, head_dim]
    keys: Any,  # [1, key_size, head_dim]
    values: Any,  # [1, key_size, head_dim]
    d_logits_tiles: Any,  # [1, key_size, tile_size]
    d_query_tile: Any,  # [warpgroups, rows, columns] of its share
    limits: Any,  # [slots, tile_size]
    places: Any,  # [slots, tile_size]
    sums: Any,  # [slots, tile_size]
    deltas: Any,  # [slots, tile_size]
    is_full: Any,  # what the TMA brings to a slot is there
    has_met: Any,
    *,
    plan: Plan,
    groups: int,
    config: MosaicConfig,
) -> None:
    program, group = lax.axis_index("program"), lax.axis_index("warpgroup")
    tile_size, dtype = query_tiles.shape[1], query_tiles.dtype
    my_rows = pl.ds(group * (tile_size // groups), tile_size // groups)  # of a tile, to copy and to write
    my_keys = pl.ds(group * ROWS, ROWS)
    # The share of a warpgroup in dQ of a tile.
    has_half_of_columns = groups == 2 and tile_size == ROWS
    first_column = group * 64 if has_half_of_columns else jnp.int32(0)
    d_query_rows = pl.ds(0, tile_size) if has_half_of_columns else my_rows

    def meet() -> None:
        """Every warpgroup comes here before one goes on."""
        plgpu.barrier_arrive(has_met)
        plgpu.barrier_wait(has_met)

    def load(tile: jax.Array, number: jax.Array) -> None:
        """Starts to copy a tile, the program's tile of that number."""
        slot, slots = lax.rem(number, jnp.int32(_SLOTS)), pl.ds(tile * tile_size, tile_size)
        lists = [(limit_ref, limits), (place_ref, places), (sum_ref, sums), (delta_ref, deltas)]
        rows = [(query_ref, query_tiles), (d_output_ref, d_output_tiles)]
        if config.gather_in_kernel:
            for source, target in rows:
                first = tile * tile_size + group * (tile_size // groups)
                copy_listed_rows(source, row_ref, first, target.at[slot, my_rows])
        else:
            lists += rows

        @pl.when(group == 0)
        def _() -> None:
            for source, target in lists:
                plgpu.copy_gmem_to_smem(source.at[slots], target.at[slot], is_full.at[slot])

    def differentiate_block(item: jax.Array, number: jax.Array) -> jax.Array:
        block = order_ref[item]
        begin, end, length = begin_ref[block], end_ref[block], length_ref[block]
        my_length = length - group * ROWS

        @pl.when(begin < end)
        def _() -> None:
            meet()  # nobody needs the keys of the block before any more
            first_row = first_row_ref[block] + group * (ROWS * plan.kv_heads)
            for source, target in ((key_ref, keys), (value_ref, values)):
                copy_block(source, first_row, plan.kv_heads, my_length, target.at[0, my_keys])
            load(begin, number)

        def differentiate_tile(tile: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_key, d_value = gradients
            number_of_tile = number + tile - begin
            slot = lax.rem(number_of_tile, jnp.int32(_SLOTS))
            close_copies(in_flight=0)
            plgpu.barrier_wait(is_full.at[slot])
            meet()  # the tile is there, and nobody needs the one before it any more

            @pl.when(tile + 1 < end)
            def _() -> None:
                load(tile + 1, number_of_tile + 1)

            query, d_output = query_tiles.at[slot], d_output_tiles.at[slot]
            here = opaque(jnp.int32(0))
            key, value, d_logits_tile = keys.at[here], values.at[here], d_logits_tiles.at[here]
            logits = product(key.at[my_keys], query.transpose((1, 0))) * (plan.scale * LOG2_E)  # [ROWS, tile_size]

            def of_columns(ref: Any) -> jax.Array:
                return lax.broadcast_in_dim(load_numbers(ref.at[slot], BY_COLUMN), logits.shape, [1])

            is_seen = ranks(logits.shape, 0) + group * ROWS < of_columns(limits)
            probability = jnp.where(is_seen, jnp.exp2(logits - of_columns(sums)), 0)
            d_value = add_product(d_value, probability.astype(dtype), d_output)
            d_probability = product(value.at[my_keys], d_output.transpose((1, 0)))
            d_logits = (probability * (d_probability - of_columns(deltas))).astype(dtype)
            d_logits_tile[my_keys, :] = d_logits
            plgpu.commit_smem()
            d_key = add_product(d_key, d_logits_tile.at[my_keys], query)
            meet()  # dS of all keys is there

            columns = key.at[:, pl.ds(first_column, 64)] if has_half_of_columns else key
            d_query = product(d_logits_tile.at[:, d_query_rows].transpose((1, 0)), columns)
            d_query_tile[group] = (d_query * plan.scale).astype(dtype)
            plgpu.commit_smem()
            write_rows(d_query_tile.at[group], places.at[slot, d_query_rows], d_query_ref, first_column)
            return d_key, d_value

        empty = zeros(ROWS, plan.head_dim), zeros(ROWS, plan.head_dim)
        d_key, d_value = lax.fori_loop(begin, end, differentiate_tile, empty)
        target = target_ref[block] + group * ROWS
        write_block(d_key * plan.scale, d_key_ref, target, my_length)
        write_block(d_value, d_value_ref, target, my_length)
        return number + end - begin

    lax.fori_loop(bounds_ref[program], bounds_ref[program + 1], differentiate_block, jnp.int32(0))
