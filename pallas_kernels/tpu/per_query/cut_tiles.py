"""Pairs to tiles on a TPU: what `pallas_kernels.schedule` does, without a gather or scatter of single numbers in XLA.

XLA spends some ten cycles on every number it gathers or scatters, more than a kernel spends on attending to the pair.
Here a pair is one integer, (piece, row), and XLA sorts those; how many pairs each piece has is a product of two one-hot
matrices. The kernel then walks the pieces: a piece's run of sorted rows is cut into tiles, and each tile's rows, which
begin anywhere, are moved to the beginning of a row of lanes (two loads, two rotations, a select).

Memory. VMEM: all sorted rows and all tiles of a chunk, 4 bytes a slot. SMEM: counts and places of 512 pieces at a time,
and three numbers a tile. Speed: the scalar unit, some 14 cycles a tile in a straight line of code: four pieces of at
most four tiles, or eight tiles of one piece. Pieces outside the range that the chunk's queries chose from are not
visited.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import result
from pallas_kernels.tpu.per_query.memory import LANES, Pieces, Tiles, round_up

_PIECES_AT_ONCE = 4  # cut side by side, to hide latencies, where none has more tiles than these:
_FEW_TILES = 4  # of each, side by side; those past the end of a piece are overwritten by the next piece.
_MANY_TILES = 8  # cut side by side of a piece that has more


def make_tiles(
    piece_ids: jax.Array,
    pieces: Pieces,
    *,
    tile_size: int,
    tiles_per_step: int,
    pieces_per_step: int,
    fixed_batches: int | None = None,
    interpret: Any = False,
) -> Tiles:
    """Sorts the pairs of a chunk by piece and cuts every piece's run into tiles.

    Args:
      piece_ids: int32 `[pieces of a row, chunk_rows]`, none twice for a row; -1 for none.
      pieces: of this batch row.
      tile_size: pairs of a tile.
      tiles_per_step: tiles of a step.
      pieces_per_step: pieces that a step of this kernel walks, a multiple of 4.
      fixed_batches: for estimates only, which cannot know how long a loop is: batches of tiles that each piece has; 0:
        few tiles, several pieces at once.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.
    """
    num_rows, num_pieces, num_pairs = piece_ids.shape[1], pieces.start.size, piece_ids.size
    piece = jnp.where(piece_ids < 0, num_pieces, piece_ids)  # [pieces of a row, chunk_rows]
    row = _sort_rows(piece, num_pieces)
    row = jnp.pad(row, (0, -row.size % LANES + LANES + round_up(_MANY_TILES * tile_size, LANES))).reshape(-1, LANES)

    group = min(pieces_per_step, round_up(num_pieces, _PIECES_AT_ONCE))
    numbers = jnp.stack([_count(piece.reshape(-1), num_pieces), *pieces], axis=0)  # [4, pieces]
    numbers = jnp.pad(numbers, ((0, 0), (0, -num_pieces % group))).reshape(4, -1, group).swapaxes(0, 1)
    begin = piece.min() // group
    end = jnp.where(piece_ids < 0, -1, piece_ids).max() // group + 1
    max_tiles = num_pairs // tile_size + min(num_pieces, num_pairs) + _MANY_TILES
    max_tiles = round_up(max_tiles, tiles_per_step) + tiles_per_step
    width = min(LANES, tile_size)
    tile_shape = max_tiles * tile_size // width, width
    row, page, start, stop, num_tiles = pl.pallas_call(
        functools.partial(
            _kernel,
            tile_size=tile_size,
            tiles_per_step=tiles_per_step,
            num_rows=num_rows,
            fixed_batches=fixed_batches,
        ),
        out_shape=(
            result(tile_shape, jnp.int32, numbers),
            *[result((max_tiles,), jnp.int32, numbers)] * 3,
            result((2,), jnp.int32, numbers),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(end - begin, 1) if fixed_batches is None else 1,),
            in_specs=[
                pl.BlockSpec(
                    (1, 4, group),
                    lambda step, begin: (jnp.minimum(begin[0] + step, numbers.shape[0] - 1), 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec(row.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=(
                pl.BlockSpec(tile_shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
                *[pl.BlockSpec(memory_space=pltpu.SMEM)] * 4,
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=4 * (row.size + max_tiles * round_up(tile_size, LANES)) + (4 << 20),
        ),
        name="cut_tiles",
        interpret=interpret,
    )(begin[None], numbers, row)
    num_steps = -(-num_tiles[0] // tiles_per_step)
    return Tiles(row.reshape(-1, tiles_per_step, tile_size), page, start, stop, jnp.maximum(num_steps, 1))


def _sort_rows(piece: jax.Array, num_pieces: int) -> jax.Array:
    """Rows `[pairs]` in the order of their pieces `[x, chunk_rows]`; num_pieces for none, which come last."""
    num_rows = piece.shape[1]
    row = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32), piece.shape)
    if (num_pieces + 1) * num_rows > jnp.iinfo(jnp.int32).max:
        return lax.sort((piece.reshape(-1), row.reshape(-1)), num_keys=2)[1]
    pair = (piece * num_rows + row).reshape(-1)
    # XLA sorts whole arrays of 8 x 128 numbers twice as fast as others.
    pair = jnp.pad(pair, (0, -pair.size % 1024), constant_values=jnp.iinfo(jnp.int32).max)
    return jnp.sort(pair, stable=False) % num_rows


def _count(piece: jax.Array, num_pieces: int) -> jax.Array:
    """How many pairs `[pairs]` each piece has, int32 `[pieces]`."""
    low_bits = ((num_pieces - 1).bit_length() + 1) // 2
    low, high = 1 << low_bits, ((num_pieces - 1) >> low_bits) + 1
    is_low = (piece & (low - 1))[:, None] == jnp.arange(low)[None, :]
    is_high = (piece >> low_bits)[:, None] == jnp.arange(high)[None, :]
    is_low &= (piece < num_pieces)[:, None]
    count = lax.dot_general(
        is_high.astype(jnp.bfloat16),
        is_low.astype(jnp.bfloat16),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return count.reshape(-1)[:num_pieces].astype(jnp.int32)


def _kernel(
    begin_ref: Any,  # SMEM [1]
    numbers_ref: Any,  # SMEM [1, 4, pieces]: count, page, start, stop
    sorted_ref: Any,  # [pairs / 128 + 1, 128]
    row_ref: Any,  # [tiles * tile_size / width, width], width 128 or, for shorter tiles, tile_size
    page_ref: Any,  # SMEM [tiles]
    start_ref: Any,  # SMEM [tiles]
    stop_ref: Any,  # SMEM [tiles]
    total_ref: Any,  # SMEM [2]: tiles and pairs so far
    *,
    tile_size: int,
    tiles_per_step: int,
    num_rows: int,
    fixed_batches: int | None,
) -> None:
    del begin_ref
    width = row_ref.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        total_ref[0] = 0
        total_ref[1] = 0

    def write(tile: Any, first: Any, count: Any, numbers: tuple[Any, Any, Any]) -> None:
        """Writes the tile that begins at the sorted pair `first` and has `count` pairs or, if more, all it holds."""
        for ref, number in zip((page_ref, start_ref, stop_ref), numbers, strict=True):
            ref[tile] = number
        for part in range(0, tile_size, width):
            # Shifts and masks: a division of signed numbers takes twice as many operations.
            place = lax.shift_right_logical(first + part, LANES.bit_length() - 1)
            shift = (first + part) & (LANES - 1)
            rows = [pltpu.roll(sorted_ref[pl.ds(place + i, 1), :], LANES - shift, axis=1) for i in range(2)]
            row = jnp.where(lane < LANES - shift, rows[0], rows[1])
            row = jnp.where(lane < count - part, row, num_rows)
            row_ref[pl.ds(tile * (tile_size // width) + part // width, 1), :] = row[:, :width]

    def cut_piece(piece: Any, totals: tuple[Any, Any], batch: Any, size: int) -> None:
        """Writes a batch of `size` tiles of a piece; totals are the tiles and pairs before the piece."""
        count, numbers = numbers_ref[0, 0, piece], tuple(numbers_ref[0, i, piece] for i in range(1, 4))
        for i in range(size):
            tile = batch * size + i
            write(totals[0] + tile, totals[1] + tile * tile_size, count - tile * tile_size, numbers)

    def add_piece(piece: Any, totals: tuple[Any, Any]) -> tuple[Any, Any]:
        count = numbers_ref[0, 0, piece]
        return totals[0] + lax.div(count + tile_size - 1, tile_size), totals[1] + count

    def cut(group: Any, totals: tuple[Any, Any]) -> tuple[Any, Any]:
        pieces = [group * _PIECES_AT_ONCE + i for i in range(_PIECES_AT_ONCE)]
        befores = [totals]
        for piece in pieces:
            befores.append(add_piece(piece, befores[-1]))

        def cut_few() -> None:
            for piece, before in zip(pieces, befores, strict=False):
                cut_piece(piece, before, 0, _FEW_TILES)

        def cut_many() -> None:
            def cut_one(i: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
                piece = group * _PIECES_AT_ONCE + i
                tiles = lax.div(numbers_ref[0, 0, piece] + tile_size - 1, tile_size)
                batches = lax.div(tiles + _MANY_TILES - 1, _MANY_TILES) if fixed_batches is None else fixed_batches
                lax.fori_loop(0, batches, lambda batch, _: cut_piece(piece, before, batch, _MANY_TILES), None)
                return add_piece(piece, before)

            lax.fori_loop(0, _PIECES_AT_ONCE, cut_one, totals)

        if fixed_batches is None:
            largest = functools.reduce(jnp.maximum, [numbers_ref[0, 0, piece] for piece in pieces])
            are_few = largest <= _FEW_TILES * tile_size
            pl.when(are_few)(cut_few)
            pl.when(jnp.logical_not(are_few))(cut_many)
        else:
            (cut_many if fixed_batches else cut_few)()
        return befores[-1]

    num_groups = numbers_ref.shape[2] // _PIECES_AT_ONCE
    num_tiles, num_pairs = lax.fori_loop(0, num_groups, cut, (total_ref[0], total_ref[1]))
    total_ref[0], total_ref[1] = num_tiles, num_pairs

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _() -> None:
        # Tiles without pairs up to the end of the last step, which is also the first if there is no pair at all, and
        # one step more, so that kernels may look ahead.
        steps = jnp.maximum(lax.div(num_tiles + tiles_per_step - 1, tiles_per_step), 1)
        stop = (steps + 1) * tiles_per_step

        def clear(tile: Any, carry: None) -> None:
            write(tile, 0, 0, (0, 0, 0))
            return carry

        lax.fori_loop(num_tiles, stop, clear, None)
