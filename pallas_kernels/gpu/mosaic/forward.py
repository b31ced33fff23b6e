"""Attention for choices made per query, on Hopper (sm_90a): one key block after another, in Mosaic GPU.

Compiled and interpreted only: nothing here has run on a GPU yet.

Tiling. Chunks of rows and tiles of pairs as in `forward`, whose merge follows this kernel too; a block of more than
128 keys is cut into parts that count as blocks. A tile is 128 pairs and the up to 128 keys of their block. One program
for each multiprocessor walks a run of tiles; the tiles of a block follow one another, and its keys stay.

A program has three warpgroups. The last one moves data: keys and values when the block changes, then the queries of a
tile, gathered row by row from `[batch, queries, heads, head_dim]` with cp.async (`tiles`), and by TMA the short
lists that belong to a tile. It is up to two tiles ahead. The other two attend, 64 rows of the tile each: logits q k^T
by wgmma, one softmax, p v by wgmma. The result takes the place of the queries in shared memory, and goes from there to
the places of the pairs, row by row. With `gather_in_kernel=False` XLA gathers the queries before, in the order of the
tiles, and the TMA takes them from there; that is one more array of chunk size, padding included.

Masks. All of them are one number a pair, how many keys of its block the query sees. Keys behind the end of a block are
zeros in shared memory.

Memory. Shared, at head_dim 128: two slots of keys and values, 128 KiB, and two of queries, 64 KiB. Registers: 232 a
thread are asked for where warps attend (logits [64, 128] and accumulator [64, head_dim] in float32), 40 where they move
data; ptxas of CUDA 13 ignores that in what Mosaic gives it and makes do with 168 for all, nothing spilled. Global: as
`forward`.

Speed. Bound by memory, as `forward`, with less in its way: no instruction of a warp that attends waits for a gather.
Unmeasured; to compare on a GPU: both ways to gather, and how long the lists of rows keep the gather waiting.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import Arrays, Blocks
from pallas_kernels.config import MOSAIC, TRITON, MosaicConfig
from pallas_kernels.gpu.chunks import Chunk, Plan, find_block, for_chunks, make_plan
from pallas_kernels.gpu.mosaic.tiles import (
    BY_ROW,
    ROWS,
    SWIZZLED,
    balance,
    close_copies,
    copy_block,
    copy_listed_rows,
    cut_blocks,
    key_size,
    list_slots,
    load_numbers,
    pad_head_dim,
    product,
    ranks,
    refuses,
    write_numbers,
    write_rows,
)
from pallas_kernels.gpu.triton.forward import merge
from pallas_kernels.numerics import LOG2_E, OUT_OF_SIGHT

_GROUPS = 2  # warpgroups that attend
_TILE_SIZE = ROWS * _GROUPS


def attend_forward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    config: MosaicConfig = MOSAIC,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `forward.attend_forward`, in Mosaic GPU, for Hopper. Unverified: it has not run on a GPU.

    Args:
      arrays: bfloat16 or float16, head_dim up to 128; else as there.
      indices, blocks, scale: as there.
      config: sizes inside the kernels.
      interpret: False, or `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      As there.

    Raises:
      NotImplementedError: a dtype or head_dim that the kernels cannot do.
    """
    query, key, value = arrays
    if (reason := refuses(query)) is not None:
        raise NotImplementedError(reason)
    shape = query.shape
    query, key, value = (pad_head_dim(array) for array in (query, key, value))
    indices, blocks = cut_blocks(indices, blocks)
    plan = make_plan(
        query,
        key,
        indices,
        num_blocks=blocks.num_blocks,
        block_size=blocks.block_size,
        scale=scale,
        tile_size=_TILE_SIZE,
        arrays=2,
        config=config,
    )
    rows, keys, values = (array.reshape(-1, plan.head_dim) for array in (query, key, value))
    sizes = TRITON.for_rows(plan.columns, query.dtype.itemsize)

    def attend_chunk(chunk: Chunk, outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        partials = _attend(chunk, blocks, rows, keys, values, plan, config, interpret)
        return merge(chunk, *partials, *outputs, plan, sizes, bool(interpret))

    empty = jnp.zeros_like(rows), jnp.zeros(rows.shape[0], jnp.float32)
    output, log_sum_exp = for_chunks(plan, indices, _TILE_SIZE, attend_chunk, empty)
    return output.reshape(query.shape)[..., : shape[-1]], log_sum_exp.reshape(shape[:3])


def _attend(
    chunk: Chunk,
    blocks: Blocks,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    plan: Plan,
    config: MosaicConfig,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Partial outputs `[chunk_heads * chunk_pairs, head_dim]` and log2 of the sum of exp2; no pair, any number."""
    schedule = chunk.schedule
    slots = list_slots(chunk, blocks, plan)
    is_used = jnp.arange(schedule.block.shape[1])[None, :] < schedule.num_tiles[:, None]  # [chunk_heads, tiles]
    order, bounds = balance(jnp.ones(is_used.size, jnp.int32), is_used.reshape(-1), config.num_programs)
    head = jnp.arange(plan.chunk_heads, dtype=jnp.int32)[:, None]
    numbers_of_blocks = blocks.block_start.reshape(-1), blocks.block_length.reshape(-1)
    block = find_block(chunk.origin, *numbers_of_blocks, head, schedule.block, plan)
    if not config.gather_in_kernel:
        query = query.at[jnp.where(slots.row < 0, query.shape[0], slots.row)].get(mode="fill", fill_value=0)

    num_pairs, dtype = plan.chunk_heads * plan.chunk_pairs, query.dtype
    keys = plgpu.SMEM((config.key_slots, key_size(blocks), plan.head_dim), dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, config=config),
        out_type=(
            jax.ShapeDtypeStruct((num_pairs, plan.head_dim), dtype),
            jax.ShapeDtypeStruct((num_pairs,), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((config.query_slots, _TILE_SIZE, plan.head_dim), dtype, transforms=SWIZZLED),
            keys,
            keys,
            plgpu.SMEM((config.query_slots, _TILE_SIZE), jnp.int32),
            plgpu.SMEM((config.query_slots, _TILE_SIZE), jnp.int32),
            plgpu.SMEM((config.query_slots, _TILE_SIZE), jnp.float32),
            # cp.async and each TMA arrive.
            plgpu.Barrier(num_arrivals=3 if config.gather_in_kernel else 4, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=config.key_slots),
        ),
        grid=(config.num_programs,),
        grid_names=("program",),
        num_threads=_GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(bounds, order, block.first_row.reshape(-1), block.length.reshape(-1), *slots, query, key, value)


def _kernel(
    bounds_ref: Any,  # [programs + 1]
    order_ref: Any,  # [tiles], of all heads of the chunk
    first_row_ref: Any,  # [tiles], of the block's first key
    length_ref: Any,  # [tiles], of the block
    row_ref: Any,  # [slots]
    limit_ref: Any,  # [slots]
    place_ref: Any,  # [slots]
    query_ref: Any,  # [batch * queries * heads, head_dim], or [slots, head_dim]
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    output_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    sum_ref: Any,  # [chunk_heads * chunk_pairs]
    query_tiles: Any,  # shared memory from here on: [query_slots, tile_size, head_dim]
    key_tiles: Any,  # [key_slots, key_size, head_dim]
    value_tiles: Any,  # [key_slots, key_size, head_dim]
    limits: Any,  # [query_slots, tile_size]
    places: Any,  # [query_slots, tile_size]
    sums: Any,  # [query_slots, tile_size]
    is_full: Any,  # a slot of queries holds a tile, and its keys are there as well
    is_free: Any,  # a slot of queries may be overwritten
    is_key_free: Any,  # a slot of keys may be overwritten
    *,
    plan: Plan,
    config: MosaicConfig,
) -> None:
    program, group = lax.axis_index("program"), lax.axis_index("warpgroup")
    begin, end = bounds_ref[program], bounds_ref[program + 1]

    def slot_of(place: jax.Array) -> jax.Array:
        return lax.rem(place - begin, jnp.int32(config.query_slots))

    def key_slot_of(number: jax.Array) -> jax.Array:
        return lax.rem(number, jnp.int32(config.key_slots))

    def walk(visit: Any) -> jax.Array:
        """`visit(place, tile, number, is_new)` for each tile; number counts the blocks. Returns how many there are."""

        def step(place: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            block, number = state
            tile = order_ref[place]
            first_row = first_row_ref[tile]
            is_new = first_row != block
            number = number + is_new.astype(jnp.int32)
            visit(place, tile, number, is_new)
            return first_row, number

        return lax.fori_loop(begin, end, step, (jnp.int32(-1), jnp.int32(-1)))[1] + 1

    @pl.when(group < _GROUPS)
    def _() -> None:
        plgpu.set_max_registers(config.compute_registers, action="increase")

        def attend(place: jax.Array, _tile: jax.Array, number: jax.Array, is_new: jax.Array) -> None:
            slot, key_slot, mine = slot_of(place), key_slot_of(number), pl.ds(group * ROWS, ROWS)

            @pl.when(is_new & (number > 0))
            def _() -> None:
                plgpu.barrier_arrive(is_key_free.at[key_slot_of(number - 1)])

            plgpu.barrier_wait(is_full.at[slot])
            tile = query_tiles.at[slot, mine]
            logits = product(tile, key_tiles.at[key_slot].transpose((1, 0)))  # [ROWS, key_size]
            limit = load_numbers(limits.at[slot, mine], BY_ROW)
            is_seen = ranks(logits.shape, 1) < lax.broadcast_in_dim(limit, logits.shape, [0])
            logits = jnp.where(is_seen, logits * (plan.scale * LOG2_E), OUT_OF_SIGHT)
            largest = logits.max(axis=1)
            weight = jnp.exp2(logits - lax.broadcast_in_dim(largest, logits.shape, [0]))
            total = weight.sum(axis=1)
            output = product(weight.astype(tile.dtype), value_tiles.at[key_slot])  # [ROWS, head_dim]
            plgpu.commit_smem()  # no warp of this group reads its queries any more
            tile[...] = (output * lax.broadcast_in_dim(1 / total, output.shape, [0])).astype(tile.dtype)
            sums[slot, mine] = largest + jnp.log2(total)
            plgpu.commit_smem()
            write_rows(tile, places.at[slot, mine], output_ref, jnp.int32(0))
            write_numbers(sums.at[slot, mine], places.at[slot, mine], sum_ref)
            plgpu.commit_smem()
            plgpu.barrier_arrive(is_free.at[slot])

        num_blocks = walk(attend)

        @pl.when(num_blocks > 0)
        def _() -> None:
            plgpu.barrier_arrive(is_key_free.at[key_slot_of(num_blocks - 1)])

    @pl.when(group == _GROUPS)
    def _() -> None:
        plgpu.set_max_registers(config.memory_registers, action="decrease")

        def load(place: jax.Array, tile: jax.Array, number: jax.Array, is_new: jax.Array) -> None:
            slot, slots = slot_of(place), pl.ds(tile * _TILE_SIZE, _TILE_SIZE)

            @pl.when(is_new)
            def _() -> None:
                key_slot = key_slot_of(number)

                @pl.when(number >= config.key_slots)
                def _() -> None:
                    plgpu.barrier_wait(is_key_free.at[key_slot])

                for source, target in ((key_ref, key_tiles), (value_ref, value_tiles)):
                    copy_block(source, first_row_ref[tile], plan.kv_heads, length_ref[tile], target.at[key_slot])

            @pl.when(place - begin >= config.query_slots)
            def _() -> None:
                plgpu.barrier_wait(is_free.at[slot])

            if config.gather_in_kernel:
                copy_listed_rows(query_ref, row_ref, tile * _TILE_SIZE, query_tiles.at[slot])
            else:
                plgpu.copy_gmem_to_smem(query_ref.at[slots], query_tiles.at[slot], is_full.at[slot])
            plgpu.copy_gmem_to_smem(limit_ref.at[slots], limits.at[slot], is_full.at[slot])
            plgpu.copy_gmem_to_smem(place_ref.at[slots], places.at[slot], is_full.at[slot])

            # The tile before is handed over only now, while this one is under way.
            close_copies(in_flight=1)

            @pl.when(place > begin)
            def _() -> None:
                plgpu.barrier_arrive(is_full.at[slot_of(place - 1)])

        num_blocks = walk(load)
        close_copies(in_flight=0)

        @pl.when(end > begin)
        def _() -> None:
            plgpu.barrier_arrive(is_full.at[slot_of(end - 1)])

        # No phase of a barrier ends unobserved.
        @pl.loop(jnp.maximum(begin, end - config.query_slots), end)
        def _(place: jax.Array) -> None:
            plgpu.barrier_wait(is_free.at[slot_of(place)])

        @pl.loop(jnp.maximum(0, num_blocks - config.key_slots), num_blocks)
        def _(number: jax.Array) -> None:
            plgpu.barrier_wait(is_key_free.at[key_slot_of(number)])
