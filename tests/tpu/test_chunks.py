"""Sizes of chunks and tiles of the per-query kernels: what fits, and what pays."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.config import PER_QUERY
from pallas_kernels.tpu.per_query import chunks

ROW = {"row_bytes": 1536, "row_multiple": 128, "slot_bytes": 5632, "tile_bytes": 1 << 17, "pairs_per_row": 8}
TILES = {"tile_sizes": (128, 64), "slots_per_step": 1024, "config": PER_QUERY}


@pytest.mark.parametrize("chip_bytes", [64 << 20, 128 << 20])
@pytest.mark.parametrize(("tokens", "tile_size"), [(8192, 128), (65536, 128), (524288, 64)])
def test_a_chunk_fills_the_chip_and_its_tiles_are_short_where_few_pairs_share_a_block(
    monkeypatch, chip_bytes, tokens, tile_size
):
    class Chip:
        vmem_capacity_bytes = chip_bytes

    monkeypatch.setattr(pltpu, "is_tpu_device", lambda: True)
    monkeypatch.setattr(pltpu, "get_tpu_info", Chip)
    chunk = chunks.plan(tokens, num_pieces=tokens // 128, **ROW, **TILES)
    assert chunk.tile_size == tile_size
    assert chunk.tile_size * chunk.tiles_per_step == 1024
    step_bytes = 1024 * ROW["slot_bytes"] + chunk.tiles_per_step * ROW["tile_bytes"]
    assert chunk.rows * ROW["row_bytes"] + step_bytes < chunk.vmem_bytes <= chip_bytes
    num_chunks = -(-tokens // chunk.rows)
    assert num_chunks == 1 or (tokens // (num_chunks - 1)) * ROW["row_bytes"] + step_bytes > 0.9 * chip_bytes


def test_steps_get_fewer_tiles_where_keys_are_long():
    chunk = chunks.plan(4096, num_pieces=4, **ROW | {"tile_bytes": 4 << 20}, **TILES)
    assert chunk.tile_size * chunk.tiles_per_step == 256
    assert chunk.vmem_bytes <= 64 << 20


def test_what_does_not_fit_is_refused_with_the_reason():
    refusal = chunks.plan(4096, num_pieces=4, **ROW | {"row_bytes": 40_000_000}, **TILES)
    assert "40000000 bytes a query" in refusal
