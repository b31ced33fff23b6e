"""How the per-query kernels cut queries into chunks and pairs into tiles: all sizes follow from shapes and the chip.

A chunk is as long as on-chip memory allows, because each chunk has its own tiles, and the last tile of each key block
in each chunk is half empty: at 524288 tokens in blocks of 128 with top_k 8, a chunk of 32768 rows has 64 pairs a block,
one of 75000 has 146. Shorter tiles waste less, but cost more a pair, for a tile's keys enter the matrix unit whatever
the tile's length: they pay below some 500 pairs a block.
"""

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.config import PerQueryConfig
from pallas_kernels.tpu.per_query.memory import SPARE_ROWS, round_up

SMALLEST_CHIP = 64 << 20  # v5p, tpu7x; v5e and v6e have twice as much
_RESERVED = 6 << 20  # for the compiler and small buffers
_LARGEST_STEP = 20 << 20
_COPIED_ROWS = 1024  # a multiple of these, where there are as many, is copied in long pieces
_FULL_TILES = 4  # so many whole tiles a piece make long tiles pay


class Chunk(NamedTuple):
    """A chunk: its rows, the pairs of a tile, the tiles of a step, and the on-chip bytes that a kernel may take."""

    rows: int
    tile_size: int
    tiles_per_step: int
    vmem_bytes: int


def plan(
    num_rows: int,
    *,
    row_bytes: int,
    row_multiple: int,
    slot_bytes: int,
    tile_bytes: int,
    pairs_per_row: int,
    num_pieces: int,
    tile_sizes: tuple[int, ...],
    slots_per_step: int,
    config: PerQueryConfig,
) -> Chunk | str:
    """As many rows as memory and tables allow, chunks about equally long; the longest tiles that pay.

    In words instead, why not even row_multiple rows fit.

    Args:
      num_rows: rows of a key/value head.
      row_bytes: on-chip bytes of a row of the chunk.
      row_multiple: a chunk has a multiple of so many rows.
      slot_bytes: on-chip bytes that a step needs for each pair.
      tile_bytes: and for each tile.
      pairs_per_row: pieces that a row may choose.
      num_pieces: pieces of the keys.
      tile_sizes: to choose from, the longest first.
      slots_per_step: pairs of a step.
      config: sizes of the kernels.
    """
    shortest = tile_sizes[-1]

    def step_bytes(tiles: int) -> int:
        return tiles * (shortest * slot_bytes + tile_bytes)

    tiles = max(slots_per_step // shortest, 1)
    while tiles > 1 and step_bytes(tiles) > _LARGEST_STEP:
        tiles //= 2
    chunk_bytes = config.chunk_bytes
    if chunk_bytes is None:
        chip = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_CHIP
        chunk_bytes = chip - _RESERVED - step_bytes(tiles)
    rows = chunk_bytes // row_bytes - SPARE_ROWS
    entries = config.table_entries
    if num_pieces <= entries // 2:  # tiles <= pairs / tile_size + pieces
        rows = min(rows, (entries - num_pieces) * shortest // pairs_per_row)
    else:  # tiles <= pairs / tile_size + pairs
        rows = min(rows, entries * shortest // ((shortest + 1) * pairs_per_row))
    if rows < row_multiple:
        return (
            f"the TPU kernels keep at least {row_multiple} queries and the numbers of their tiles on chip, got "
            f"{pairs_per_row} pairs and {row_bytes} bytes a query"
        )
    if min(rows, num_rows) >= _COPIED_ROWS:
        row_multiple = _COPIED_ROWS
    rows = round_up(-(-num_rows // -(-num_rows // (rows // row_multiple * row_multiple))), row_multiple)
    longest = tile_sizes[0]
    tile_size = longest if rows * pairs_per_row >= _FULL_TILES * longest * num_pieces else shortest
    return Chunk(rows, tile_size, max(tiles * shortest // tile_size, 1), chunk_bytes + _RESERVED + step_bytes(tiles))
