"""Pairs to tiles on a TPU, interpreted on a CPU, against loops in NumPy."""

import numpy as np
import pytest

from pallas_kernels.tpu.per_query.cut_tiles import _sort_rows, make_tiles
from pallas_kernels.tpu.per_query.memory import Pieces

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("tile_size", [8, 128, 384])
def test_tiles_hold_each_piece_s_rows_in_order(tile_size, interpret):
    """Pieces without pairs, with a few tiles, and with several times as many as are cut side by side.

    The nine pieces take three steps. A tile of 384 pairs has three rows of lanes.
    """
    random = np.random.default_rng(0)
    rows, tiles_per_step, num_pieces = 450, 3, 9
    ids = np.stack([random.integers(1, 3, rows), random.choice([-1, 4, 5, 8], rows)], axis=1)
    ids[:400, 0] = 7  # 50 tiles of 8
    start = np.arange(num_pieces, dtype=np.int32) * 10
    pieces = Pieces(np.arange(num_pieces, dtype=np.int32)[::-1].copy(), start, start + 7)
    sizes = {"tile_size": tile_size, "tiles_per_step": tiles_per_step, "pieces_per_step": 4}
    tiles = make_tiles(ids.T.astype(np.int32), pieces, **sizes, interpret=interpret)

    expected = []
    for piece in range(num_pieces):
        chosen = np.flatnonzero((ids == piece).any(1))
        for first in range(0, chosen.size, tile_size):
            part = chosen[first : first + tile_size]
            padded = np.append(part, np.full(tile_size - part.size, rows))
            expected.append((padded, pieces.page[piece], start[piece], start[piece] + 7))
    num_steps = -(-len(expected) // tiles_per_step)
    assert tiles.num_steps == num_steps
    want_rows, *want_numbers = (np.array(numbers) for numbers in zip(*expected, strict=True))
    actual = np.asarray(tiles.row).reshape(-1, tile_size)
    np.testing.assert_array_equal(actual[: len(expected)], want_rows)
    np.testing.assert_array_equal(actual[len(expected) : (num_steps + 1) * tiles_per_step], rows)
    for numbers, want in zip((tiles.page, tiles.start, tiles.stop), want_numbers, strict=True):
        np.testing.assert_array_equal(numbers[: len(expected)], want)


def test_rows_are_sorted_alike_whether_or_not_piece_and_row_fit_one_integer():
    piece = np.random.default_rng(0).integers(0, 6, (2, 20)).astype(np.int32)
    want = np.lexsort((np.tile(np.arange(20), 2), piece.reshape(-1))) % 20
    for num_pieces in (5, 2**31 // 20):
        np.testing.assert_array_equal(_sort_rows(piece, num_pieces)[:40], want)
