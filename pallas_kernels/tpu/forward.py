"""Attention for choices made per query, on a TPU: key-major, with a chunk of queries resident on chip.

Tiling. A chunk of some 32768 rows (a row is one query of one head) stays in VMEM together with its float32 accumulator.
The grid walks the chunk's (query, block) pairs sorted by block, `tiles_per_step` tiles a step, each tile `tile_size`
pairs of one stretch of keys. A step computes q k^T, exp2 and p [v | 1] of all its tiles, adds the results, one by one,
to the rows of the accumulator, and meanwhile fetches the next step's queries, one by one, out of the chunk. Nothing is
gathered in XLA, no partial result goes to HBM, and there is no merge. The grid has as many steps as the choice needs (a
traced number). The own block is one of the chosen ones; every tile masks, which costs a tenth of a cycle a pair.

Memory. VMEM, head_dim 128 in bfloat16, 32768 rows: queries 16 MB as words of 32 bits (`key_work`), accumulator 32 MB
(output | sum of weights, both 128 lanes), fetched rows and results of a step 0.5 and 1 MB, keys and values of a step's
tiles 2 x 0.5 MB, which the pipeline brings from HBM during the step before. SMEM: row numbers of two steps, and
three numbers a tile, prefetched for the whole chunk.

The softmax. `_kernel_fixed` computes exp2(x) of the logits x in units of log2, without subtracting a maximum: then the
parts of a query simply add up. That is exact as long as no logit leaves +-`FIXED_RANGE`, which |q| |k| tells beforehand
(Cauchy-Schwarz). Where it does not hold, `_kernel_running` takes its place: the true running maximum, kept in the last
lane of the accumulator; a tile then reads its rows of the accumulator, rescales them, and writes them back. `lax.cond`
chooses for every chunk of every key/value head.

Stages. All tiles of a step go through each stage together, in source order: all q k^T, all exp2, all p v. One tile
alone waits for the latency of each stage; eight fill each other's gaps.

Speed (estimates for a v6e, docs/tpu-report.md). Of some 4.2 cycles a pair, 2.8 go into adding a row to the accumulator
and fetching one: 8 loads at computed addresses, then 8 stores, one a cycle each, and loads may not pass stores that
might touch the same row; two scalar operations a cycle (fetch a number, form an address) leave no room beside them. The
products, exp2 and the pipeline of a step take the rest. Neither the matrix unit nor memory is near its bound.
Rows of a batch of `add_rows` are different queries, for they chose the same block: so all are loaded before any is
stored. Padding points to a spare row, where sums are lost and may be.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.config import KEY_MAJOR, KeyMajorConfig
from pallas_kernels.tpu import key_work
from pallas_kernels.tpu.cut_tiles import make_tiles
from pallas_kernels.tpu.key_work import LANES, LOG2_E, NN, NT, Tiles

# Largest |logit| * log2(e) of the kernel without a maximum. Sums of up to 2^24 weights of at most 2^80, times values up
# to 2^23, stay below the largest float32; the smallest total, 2^-80, leaves 46 binary orders above the smallest normal.
FIXED_RANGE = 80.0
# The logit of a key out of sight. Finite, so that differences are; no real logit comes near it.
_OUT_OF_SIGHT = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    *,
    block_start: jax.Array,
    block_length: jax.Array,
    key_stop: jax.Array,
    block_size: int,
    is_packed: bool,
    scale: float,
    config: KeyMajorConfig = KEY_MAJOR,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every query over the blocks it chose: softmax(scale q k^T) v.

    A query sees the keys of its blocks that stand before its key_stop. Any logits are allowed. Source: FlashMoBA (arXiv
    2511.11571), section 4, without its gather, partial results and merge.

    Args:
      query: float32 or bfloat16 `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]` of query's dtype, in block order; heads is a multiple of kv_heads.
      value: like key.
      indices: int32 `[batch, heads, queries, top_k]`, ids of blocks, none twice in a list; -1 for none. Every block
        listed has a key that the query sees.
      block_start: int32 `[batch, blocks]`, place of a block's first key, not falling.
      block_length: int32 `[batch, blocks]`, keys in the block, at most block_size.
      key_stop: int32 `[batch, queries]`, one past the last key that the query sees.
      block_size: keys in a full block.
      is_packed: whether blocks may start elsewhere than at multiples of block_size. If not, keys behind a short block
        are zero.
      scale: factor of the logits.
      config: sizes inside the kernel.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      Output like query, and the natural log-sum-exp of the logits, float32 `[batch, queries, heads]`. Zero and -inf for
      a query without blocks.

    Raises:
      NotImplementedError: a dtype, head_dim, block_size or top_k that the kernel cannot do.
    """
    key_work.check_supported(query, block_size)
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    cut = key_work.Cut.of(block_size, is_packed)
    num_rows = num_queries * num_heads // kv_heads
    pairs_per_row = indices.shape[-1] * cut.pieces_per_block
    lanes = state_lanes(head_dim)
    chunk_rows = key_work.chunk_rows(
        num_rows,
        bytes_per_row=key_work.row_bytes(key_work.words_of(head_dim, query.dtype) + 1) + key_work.row_bytes(lanes),
        pairs_per_row=pairs_per_row,
        num_pieces=block_start.shape[1] * cut.pieces_per_block,
        tile_size=config.tile_size,
        config=config,
    )
    num_chunks = -(-num_rows // chunk_rows)
    split = functools.partial(key_work.split_heads, kv_heads=kv_heads, num_chunks=num_chunks, chunk_rows=chunk_rows)
    reach = jnp.broadcast_to(key_stop[:, :, None, None], (batch, num_queries, num_heads, 1))
    # Shifted by one, so that the rows behind the last query choose nothing.
    chosen = split(indices.swapaxes(1, 2) + 1) - 1

    def attend_head(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        key_value, block_start, block_length, *chunks = arrays
        largest_key = _largest_norm(key_value[:, 0])

        def attend_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            query, indices, key_stop = chunk  # [chunk_rows, x]
            ids, pieces = key_work.make_pieces(indices, block_start, block_length, cut)
            tiles = make_tiles(
                ids, pieces, tile_size=config.tile_size, tiles_per_step=config.tiles_per_step, interpret=interpret
            )
            rows = key_work.pack_rows(query, key_stop)
            attend = functools.partial(
                attend_tiles,
                head_dim=head_dim,
                is_aligned=cut.is_aligned,
                scale=scale,
                config=config,
                interpret=interpret,
            )
            bound = _largest_norm(query) * largest_key * (abs(scale) * LOG2_E)
            state = lax.cond(
                bound <= FIXED_RANGE,
                functools.partial(attend, has_maximum=False),
                functools.partial(attend, has_maximum=True),
                *(rows, key_value, tiles),
            )
            return finish(state[:chunk_rows].reshape(chunk_rows, lanes), head_dim, query.dtype)

        return lax.map(attend_chunk, tuple(chunks))

    padded_key = jnp.pad(key, ((0, 0), (0, 0), (0, 0), (0, -head_dim % LANES)))
    key_value = [key_work.split_keys(array, cut.stretch_size) for array in (padded_key, _add_ones(value))]
    heads = (
        jnp.stack(key_value, axis=2),
        jnp.repeat(block_start, kv_heads, axis=0),
        jnp.repeat(block_length, kv_heads, axis=0),
        split(query),
        chosen,
        split(reach),
    )
    output, log_sum_exp = lax.map(jax.custom_batching.sequential_vmap(attend_head), heads)
    join = functools.partial(key_work.join_heads, batch=batch, num_queries=num_queries, num_heads=num_heads)
    return join(output), join(log_sum_exp)[..., 0]


def attend_tiles(
    rows: jax.Array,
    key_value: jax.Array,
    tiles: Tiles,
    *,
    head_dim: int,
    has_maximum: bool,
    is_aligned: bool,
    scale: float,
    config: KeyMajorConfig,
    interpret: Any = False,
) -> jax.Array:
    """One chunk: what the tiles add up to for each row.

    Args:
      rows: uint32 `[chunk_rows + 8, parts, 128]`, from `key_work.pack_rows`: query, key_stop.
      key_value: `[stretches, 2, stretch_size, lanes]`: keys, then zeros; values, then ones, last a zero.
      tiles: of the chunk.
      head_dim: of the queries.
      has_maximum: whether to take the kernel with the true running maximum.
      is_aligned: whether a tile sees no key of its stretch but those of its block, or zeros.
      scale: factor of the logits.
      config: sizes inside the kernel.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      float32 `[chunk_rows + 8, state_lanes / 128, 128]`: output (not divided), sum of weights, maximum (times log2 e).
    """
    _, _, stretch_size, key_lanes = key_value.shape
    _, num_tiles, tile_size = tiles.row.shape
    parts = state_lanes(head_dim) // LANES
    num_slots = num_tiles * tile_size

    def stretch_of(tile: int) -> Any:
        return lambda step, stretch, start, stop: (stretch[step * num_tiles + tile], 0, 0, 0)

    step_bytes = num_slots * 4 * (2 * rows.shape[1] * LANES + 3 * stretch_size + 3 * parts * LANES)
    step_bytes += 4 * num_tiles * stretch_size * key_lanes * 8
    return pl.pallas_call(
        functools.partial(
            _kernel_running if has_maximum else _kernel_fixed,
            step=_Step(num_tiles, tile_size, head_dim, stretch_size, is_aligned, scale),
        ),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], parts, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles.num_steps,),
            in_specs=[
                *(
                    pl.BlockSpec(
                        (1, num_tiles, tile_size), lambda step, *_, i=i: (step + i, 0, 0), memory_space=pltpu.SMEM
                    )
                    for i in range(2)
                ),
                pl.BlockSpec(rows.shape, lambda step, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1)),
                *(pl.BlockSpec((1, 2, stretch_size, key_lanes), stretch_of(tile)) for tile in range(num_tiles)),
            ],
            out_specs=pl.BlockSpec(
                (rows.shape[0], parts, LANES), lambda step, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1)
            ),
            scratch_shapes=[
                pltpu.VMEM((num_slots * rows.shape[1], LANES), jnp.uint32),
                pltpu.VMEM((num_slots * parts, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=config.chunk_bytes + (4 << 20) + step_bytes,
            disable_bounds_checks=True,  # they take 15 % of the time; the interpreter makes them in the tests
        ),
        name="attend_running" if has_maximum else "attend_fixed",
        interpret=interpret,
    )(tiles.stretch, tiles.start, tiles.stop, tiles.row, tiles.row, rows, *[key_value] * num_tiles)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Static sizes of a step."""

    num_tiles: int
    tile_size: int
    head_dim: int
    stretch_size: int
    is_aligned: bool
    scale: float


def _kernel_fixed(
    stretch_ref: Any,  # SMEM [tiles]
    start_ref: Any,  # SMEM [tiles]
    stop_ref: Any,  # SMEM [tiles]
    row_ref: Any,  # SMEM [1, tiles of a step, tile_size]
    next_row_ref: Any,  # SMEM, those of the next step
    rows_ref: Any,  # [chunk_rows + 8, parts, 128]
    *refs: Any,  # [1, 2, stretch_size, lanes] for each tile, then the chunk's state, fetched rows and results
    step: _Step,
) -> None:
    """Adds exp2(logits) [values | 1] to the rows; no maximum. The arguments are also those of `_kernel_running`."""
    *key_value_refs, state_ref, fetched_ref, result_ref = refs
    parts = state_ref.shape[1]

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        key_work.fill_rows(state_ref, jnp.zeros((parts, LANES), jnp.float32))
        key_work.fetch_rows(row_ref, rows_ref, fetched_ref)

    bounds = stretch_ref, start_ref, stop_ref
    all_logits = _all_logits(fetched_ref, rows_ref.shape[1], key_value_refs, bounds, step)
    weights = [jnp.exp2(logits).astype(key_value_refs[0].dtype) for logits in all_logits]
    values = [_read_values(ref, tile, bounds, step) for tile, ref in enumerate(key_value_refs)]
    results = [key_work.product(weight, value, NN) for weight, value in zip(weights, values, strict=True)]
    for tile, result in enumerate(results):
        key_work.write_rows(result_ref, tile * step.tile_size, result, parts)

    key_work.add_rows(row_ref, result_ref, state_ref, fetch=(next_row_ref, rows_ref, fetched_ref))


def _kernel_running(
    stretch_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    row_ref: Any,
    next_row_ref: Any,
    rows_ref: Any,
    *refs: Any,
    step: _Step,
) -> None:
    """Merges each tile into its rows with the true running maximum m: state exp2(m_old - m) + exp2(logits - m) [v | 1].

    Queries of different tiles may be the same, so the tiles merge one after the other.
    """
    del next_row_ref
    *key_value_refs, state_ref, fetched_ref, result_ref = refs
    parts = state_ref.shape[1]
    lanes = parts * LANES

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        place = lax.broadcasted_iota(jnp.int32, (parts, LANES), 0) * LANES
        place += lax.broadcasted_iota(jnp.int32, (parts, LANES), 1)
        key_work.fill_rows(state_ref, jnp.where(place == lanes - 1, _OUT_OF_SIGHT, 0.0))

    key_work.fetch_rows(row_ref, rows_ref, fetched_ref)
    bounds = stretch_ref, start_ref, stop_ref
    all_logits = _all_logits(fetched_ref, rows_ref.shape[1], key_value_refs, bounds, step)
    for tile, logits in enumerate(all_logits):
        for slot in range(step.tile_size):
            result_ref[pl.ds(slot * parts, parts), :] = state_ref[row_ref[0, tile, slot]]
        old = key_work.read_rows(result_ref, 0, step.tile_size, parts)  # [pairs, lanes]
        largest = jnp.maximum(old[:, -1:], logits.max(1, keepdims=True))  # [pairs, 1]
        weight = jnp.exp2(logits - largest).astype(key_value_refs[0].dtype)
        value = _read_values(key_value_refs[tile], tile, bounds, step)
        new = old * jnp.exp2(old[:, -1:] - largest) + key_work.product(weight, value, NN)
        place = lax.broadcasted_iota(jnp.int32, new.shape, 1)
        key_work.write_rows(result_ref, 0, jnp.where(place == lanes - 1, largest, new), parts)
        for slot in range(step.tile_size):
            state_ref[row_ref[0, tile, slot]] = result_ref[pl.ds(slot * parts, parts), :]


def _all_logits(
    fetched_ref: Any, parts: int, key_value_refs: list[Any], bounds: tuple[Any, Any, Any], step: _Step
) -> list[jax.Array]:
    """Logits of each tile times log2(e), float32 `[pairs, stretch_size]`."""
    dtype = key_value_refs[0].dtype
    num_words = key_work.words_of(step.head_dim, dtype)
    rows = [
        key_work.read_rows(fetched_ref, tile * step.tile_size, step.tile_size, parts) for tile in range(step.num_tiles)
    ]
    queries = [key_work.from_words(row, 0, step.head_dim, dtype) for row in rows]
    keys = [ref[0, 0, :, : step.head_dim] for ref in key_value_refs]
    products = [key_work.product(query, key, NT) for query, key in zip(queries, keys, strict=True)]
    all_logits = []
    for tile, (row, logits) in enumerate(zip(rows, products, strict=True)):
        key_stop = lax.bitcast_convert_type(row[:, num_words : num_words + 1], jnp.int32)
        stretch, start, stop = _bounds_of(tile, bounds, step)
        is_seen = key_work.is_seen(start, stop, key_stop, stretch, step.stretch_size)
        all_logits.append(jnp.where(is_seen, logits * (step.scale * LOG2_E), _OUT_OF_SIGHT))
    return all_logits


def _bounds_of(tile: int, bounds: tuple[Any, Any, Any], step: _Step) -> list[Any]:
    """Stretch, start and stop of a tile of this step, scalars."""
    index = pl.program_id(0) * step.num_tiles + tile
    return [ref[index] for ref in bounds]


def _read_values(ref: Any, tile: int, bounds: tuple[Any, Any, Any], step: _Step) -> jax.Array:
    """Values of a tile with the ones behind them, `[stretch_size, lanes]`; zero for the keys of other segments."""
    value = ref[0, 1]
    if step.head_dim % LANES == 0:
        value = jnp.concatenate([value, _ones(value.shape[:-1], value.dtype)], axis=1)
    if step.is_aligned:
        return value
    stretch, start, stop = _bounds_of(tile, bounds, step)
    return key_work.clear_outside(value, start, stop, stretch)


def state_lanes(head_dim: int) -> int:
    """Lanes of a row of the accumulator: the output, then the sum of weights repeated, last the maximum."""
    return key_work.round_up(head_dim + 2, LANES)


def _add_ones(value: jax.Array) -> jax.Array:
    """Fills `[..., head_dim]` up to whole lanes: ones, and zero in the last lane.

    Nothing for a head_dim of whole lanes: the kernel puts 128 lanes behind those.
    """
    padding = -value.shape[-1] % LANES
    if padding == 0:
        return value
    return jnp.concatenate([value, _ones(value.shape[:-1], value.dtype)[..., -padding:]], axis=-1)


def _ones(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`[*shape, 128]`, one but for the last lane, where it is zero: the maximum's."""
    is_last = lax.broadcasted_iota(jnp.int32, (*shape, LANES), len(shape)) == LANES - 1
    return jnp.where(is_last, 0.0, 1.0).astype(dtype)


def _largest_norm(array: jax.Array) -> jax.Array:
    """Largest Euclidean norm of the rows `[..., head_dim]`, scalar float32; NaN if there is one."""
    return jnp.sqrt(jnp.square(array.astype(jnp.float32)).sum(-1).max())


def finish(state: jax.Array, head_dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output `[rows, head_dim]` and log-sum-exp `[rows, 1]` from `[rows, lanes]`."""
    total, largest = state[:, head_dim : head_dim + 1], state[:, -1:]
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    log_sum_exp = jnp.where(is_empty, -jnp.inf, largest / LOG2_E + jnp.log(total))
    return jnp.where(is_empty, 0, state[:, :head_dim] / total).astype(dtype), log_sum_exp
