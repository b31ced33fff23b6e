"""Attention for choices made per query, on a TPU: the kernels, with a chunk of queries resident on chip.

Tiling. A chunk of rows (a row is one query of one head; some 70000 in 128 MiB, 30000 in 64) stays in VMEM together with
its float32 accumulator. The grid walks the chunk's (query, block) pairs sorted by block, 1024 slots a step: 8 tiles of
128 pairs or 16 of 64 (`chunks`), each tile of one page of keys. A step computes q k^T, exp2 and p [v | 1] of all its
tiles, adds the results, one by one, to the rows of the accumulator, and meanwhile fetches the next step's queries, one
by one, out of the chunk. The first step begins by loading the chunk, the last one ends by dividing the sums and storing
outputs (`chunk_rows`). Nothing is gathered in XLA, no partial result goes to HBM, and there is no merge. The grid has
as many steps as the choice needs (a traced number). The own block is one of the chosen ones; every tile masks, which
costs a tenth of a cycle a pair.

Memory. VMEM, head_dim 128 in bfloat16, 32768 rows: queries 16 MB as words of 32 bits (`tiles`), accumulator 32 MB
(output | sum of weights, both 128 lanes), fetched rows and results of a step 0.5 and 1 MB, keys and values of a step's
tiles 2 x 0.5 MB, copied from HBM during the step before, queries or outputs on their way 2 x 0.5 MB. SMEM: row numbers
of two steps, and three numbers a tile, prefetched for the whole chunk.

The softmax. `kernel_fixed` computes exp2(x) of the logits x in units of log2, without subtracting a maximum: then the
parts of a query simply add up. That is exact as long as no logit leaves +-`FIXED_RANGE`, which |q| |k| tells beforehand
(Cauchy-Schwarz). Where it does not hold, `kernel_running` takes its place: the true running maximum, kept in the last
lane of the accumulator; a tile then reads its rows of the accumulator, rescales them, and writes them back. `lax.cond`
chooses for every chunk of every key/value head.

Stages. All tiles of a step go through each stage together, in source order: all q k^T, all exp2, all p v. One tile
alone waits for the latency of each stage; eight fill each other's gaps.

Speed (estimates for a v6e, docs/tpu-report.md). Of some 4 cycles a pair, 3 go into adding a row to the accumulator and
fetching one, and those are bound by the scalar unit: two operations a cycle, six a pair (one sum for the place of the
numbers, then for each of the two rows the number and its address; addresses of a batch of 8 do not all stay in the 32
registers and are formed again for the store). The products, exp2 and the copies of keys take the rest, some 35 cycles a
tile and a third of a cycle a pair. Neither the matrix unit nor memory is near its bound.
Rows of a batch of `add_rows` are different queries, for they chose the same block: so all are loaded before any is
stored. Padding points to a spare row, where sums are lost and may be.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import LOG2_E, NN, NT, OUT_OF_SIGHT, product
from pallas_kernels.tpu.per_query import chunk_rows, memory
from pallas_kernels.tpu.per_query.memory import LANES


@dataclasses.dataclass(frozen=True)
class Step:
    """Static sizes of a step."""

    num_tiles: int
    tile_size: int
    head_dim: int
    page_size: int
    is_aligned: bool
    scale: float


def kernel_fixed(
    page_ref: Any,  # SMEM [tiles]
    start_ref: Any,  # SMEM [tiles]
    stop_ref: Any,  # SMEM [tiles]
    sum_ref: Any,  # SMEM [1, tiles of a step, tile_size]: first part of each slot's row of the state
    row_ref: Any,  # SMEM, those of the queries
    next_row_ref: Any,  # SMEM, those of the queries of the next step
    query_hbm: Any,  # HBM [pieces, piece_rows, head_dim]
    key_stop_hbm: Any,  # HBM [pieces, piece_rows / 128, 128]
    key_value_hbm: Any,  # HBM [pages, 2, page_size, lanes]
    output_hbm: Any,  # HBM [pieces, piece_rows, head_dim]
    log_sum_exp_hbm: Any,  # HBM [pieces, piece_rows / 128, 128]
    rows_ref: Any,  # [(chunk_rows + 8) * parts, 128]
    state_ref: Any,  # [(chunk_rows + 8) * state_parts, 128]
    key_value_ref: Any,  # [2, tiles of a step, 2, page_size, lanes]
    semaphore: Any,  # DMA [2]
    fetched_ref: Any,  # [slots * parts, 128]
    result_ref: Any,  # [slots * state_parts, 128]
    buffers: chunk_rows.Buffers,
    *,
    step: Step,
) -> None:
    """Adds exp2(logits) [values | 1] to the rows; no maximum. The arguments are also those of `kernel_running`."""
    num_slots = step.num_tiles * step.tile_size
    state_parts = result_ref.shape[0] // num_slots

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        chunk_rows.load(query_hbm, key_stop_hbm, rows_ref, buffers)
        memory.fill_rows(state_ref, jnp.zeros((state_parts, LANES), jnp.float32))
        memory.fetch_rows(row_ref, rows_ref, fetched_ref)

    key_value_refs = _load_keys(page_ref, key_value_hbm, key_value_ref, semaphore)
    bounds = page_ref, start_ref, stop_ref
    all_logits = _all_logits(fetched_ref, key_value_refs, bounds, step)
    weights = [jnp.exp2(logits).astype(key_value_ref.dtype) for logits in all_logits]
    values = [_read_values(ref, tile, bounds, step) for tile, ref in enumerate(key_value_refs)]
    results = [product(weight, value, NN) for weight, value in zip(weights, values, strict=True)]
    for tile, result in enumerate(results):
        memory.write_rows(result_ref, tile * step.tile_size, result, state_parts)

    memory.add_rows(sum_ref, result_ref, state_ref, fetch=(next_row_ref, rows_ref, fetched_ref))

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        chunk_rows.finish(state_ref, output_hbm, log_sum_exp_hbm, buffers)


def kernel_running(
    page_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    sum_ref: Any,
    row_ref: Any,
    next_row_ref: Any,
    query_hbm: Any,
    key_stop_hbm: Any,
    key_value_hbm: Any,
    output_hbm: Any,
    log_sum_exp_hbm: Any,
    rows_ref: Any,
    state_ref: Any,
    key_value_ref: Any,
    semaphore: Any,
    fetched_ref: Any,
    result_ref: Any,
    buffers: chunk_rows.Buffers,
    *,
    step: Step,
) -> None:
    """Merges each tile into its rows with the true running maximum m: state exp2(m_old - m) + exp2(logits - m) [v | 1].

    Queries of different tiles may be the same, so the tiles merge one after the other.
    """
    del next_row_ref
    num_slots = step.num_tiles * step.tile_size
    state_parts = result_ref.shape[0] // num_slots
    lanes = state_parts * LANES

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        place = lax.broadcasted_iota(jnp.int32, (state_parts, LANES), 0) * LANES
        place += lax.broadcasted_iota(jnp.int32, (state_parts, LANES), 1)
        chunk_rows.load(query_hbm, key_stop_hbm, rows_ref, buffers)
        memory.fill_rows(state_ref, jnp.where(place == lanes - 1, OUT_OF_SIGHT, 0.0))

    memory.fetch_rows(row_ref, rows_ref, fetched_ref)
    key_value_refs = _load_keys(page_ref, key_value_hbm, key_value_ref, semaphore)
    bounds = page_ref, start_ref, stop_ref
    all_logits = _all_logits(fetched_ref, key_value_refs, bounds, step)
    for tile, logits in enumerate(all_logits):
        rows = [pl.ds(sum_ref[0, tile, slot], state_parts) for slot in range(step.tile_size)]
        places = [pl.ds(slot * state_parts, state_parts) for slot in range(step.tile_size)]
        for row, place in zip(rows, places, strict=True):
            result_ref[place, :] = state_ref[row, :]
        old = memory.read_rows(result_ref, 0, step.tile_size, state_parts)  # [pairs, lanes]
        largest = jnp.maximum(old[:, -1:], logits.max(1, keepdims=True))  # [pairs, 1]
        weight = jnp.exp2(logits - largest).astype(key_value_ref.dtype)
        value = _read_values(key_value_refs[tile], tile, bounds, step)
        new = old * jnp.exp2(old[:, -1:] - largest) + product(weight, value, NN)
        lane = lax.broadcasted_iota(jnp.int32, new.shape, 1)
        memory.write_rows(result_ref, 0, jnp.where(lane == lanes - 1, largest, new), state_parts)
        for row, place in zip(rows, places, strict=True):
            state_ref[row, :] = result_ref[place, :]

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        chunk_rows.finish(state_ref, output_hbm, log_sum_exp_hbm, buffers)


def _load_keys(page_ref: Any, key_value_hbm: Any, key_value_ref: Any, semaphore: Any) -> list[Any]:
    """Keys and values of the step's tiles, `[2, page_size, lanes]` each; begins to copy those of the next step.

    By hand, for what the pipeline of a grid does for an input takes some 40 cycles a step, and each tile would be one.
    """
    number, last = pl.program_id(0), pl.num_programs(0) - 1
    num_tiles = key_value_ref.shape[1]

    def copies(number: Any) -> list[Any]:
        place = lax.rem(number, 2)
        return [
            pltpu.make_async_copy(
                key_value_hbm.at[page_ref[number * num_tiles + tile]],
                key_value_ref.at[place, tile],
                semaphore.at[place],
            )
            for tile in range(num_tiles)
        ]

    def start(number: Any) -> None:
        for copy in copies(number):
            copy.start()

    pl.when(number == 0)(lambda: start(number))
    for copy in copies(number):
        copy.wait()
    pl.when(number < last)(lambda: start(number + 1))
    return [key_value_ref.at[lax.rem(number, 2), tile] for tile in range(num_tiles)]


def _all_logits(
    fetched_ref: Any, key_value_refs: list[Any], bounds: tuple[Any, Any, Any], step: Step
) -> list[jax.Array]:
    """Logits of each tile times log2(e), float32 `[pairs, page_size]`."""
    dtype = key_value_refs[0].dtype
    num_words = memory.words_of(step.head_dim, dtype)
    parts = memory.parts_of(num_words + 1)
    rows = [
        memory.read_rows(fetched_ref, tile * step.tile_size, step.tile_size, parts) for tile in range(step.num_tiles)
    ]
    queries = [memory.from_words(row, 0, step.head_dim, dtype) for row in rows]
    keys = [ref[0, :, : step.head_dim] for ref in key_value_refs]
    products = [product(query, key, NT) for query, key in zip(queries, keys, strict=True)]
    all_logits = []
    for tile, (row, logits) in enumerate(zip(rows, products, strict=True)):
        key_stop = lax.bitcast_convert_type(row[:, num_words : num_words + 1], jnp.int32)
        page, start, stop = _bounds_of(tile, bounds, step)
        is_seen = memory.is_seen(start, stop, key_stop, page, step.page_size)
        all_logits.append(jnp.where(is_seen, logits * (step.scale * LOG2_E), OUT_OF_SIGHT))
    return all_logits


def _bounds_of(tile: int, bounds: tuple[Any, Any, Any], step: Step) -> list[Any]:
    """Stretch, start and stop of a tile of this step, scalars."""
    index = pl.program_id(0) * step.num_tiles + tile
    return [ref[index] for ref in bounds]


def _read_values(ref: Any, tile: int, bounds: tuple[Any, Any, Any], step: Step) -> jax.Array:
    """Values of a tile with the ones behind them, `[page_size, lanes]`; zero for the keys of other segments."""
    value = ref[1]
    if step.head_dim % LANES == 0:
        value = jnp.concatenate([value, ones(value.shape[:-1], value.dtype)], axis=1)
    if step.is_aligned:
        return value
    page, start, stop = _bounds_of(tile, bounds, step)
    return memory.clear_outside(value, start, stop, page)


def ones(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`[*shape, 128]`, one but for the last lane, where it is zero: the maximum's."""
    is_last = lax.broadcasted_iota(jnp.int32, (*shape, LANES), len(shape)) == LANES - 1
    return jnp.where(is_last, 0.0, 1.0).astype(dtype)
