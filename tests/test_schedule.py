"""Tiles against the pairs they must hold."""

import jax
import numpy as np
import pytest

from pallas_kernels.schedule import _sort_pairs, make_schedule

NUM_BLOCKS = 5


def draw(queries, top_k, seed, share_of_none=0.3):
    """Ids without repeats in a row, some of them -1."""
    random = np.random.default_rng(seed)
    ids = random.permuted(np.broadcast_to(np.arange(NUM_BLOCKS), (queries, NUM_BLOCKS)), axis=1)[:, :top_k]
    return np.where(random.random(ids.shape) < share_of_none, -1, ids).astype(np.int32)


@pytest.mark.parametrize("tile_size", [1, 3, 8])
@pytest.mark.parametrize("tiles_per_step", [1, 4])
@pytest.mark.parametrize("share_of_none", [0.0, 0.3, 1.0])
def test_every_pair_stands_once_in_a_tile_of_its_block(tile_size, tiles_per_step, share_of_none):
    indices = draw(queries=11, top_k=3, seed=tile_size, share_of_none=share_of_none)
    schedule = make_schedule(indices, num_blocks=NUM_BLOCKS, tile_size=tile_size, tiles_per_step=tiles_per_step)
    pair, block = np.asarray(schedule.pair), np.asarray(schedule.block)
    assert pair.shape == (block.size, tile_size)
    assert block.size % tiles_per_step == 0
    chosen = indices.reshape(-1)
    held = pair < chosen.size
    np.testing.assert_array_equal(np.sort(pair[held]), np.flatnonzero(chosen >= 0))
    tile = np.broadcast_to(np.arange(block.size)[:, None], pair.shape)
    np.testing.assert_array_equal(chosen[pair[held]], block[tile[held]])


@pytest.mark.parametrize("tile_size", [1, 3, 8])
def test_tiles_run_block_by_block_in_the_order_of_queries_and_the_rest_is_empty(tile_size):
    indices = draw(queries=11, top_k=3, seed=tile_size)
    schedule = make_schedule(indices, num_blocks=NUM_BLOCKS, tile_size=tile_size)
    used = int(schedule.num_tiles)
    counts = np.bincount(indices[indices >= 0], minlength=NUM_BLOCKS)
    assert used == (-(-counts // tile_size)).sum()
    pair, block = np.asarray(schedule.pair), np.asarray(schedule.block)
    assert (pair[used:] == indices.size).all()
    assert (np.diff(block[:used]) >= 0).all()
    for b in range(NUM_BLOCKS):
        of_block = pair[:used][block[:used] == b].reshape(-1)
        np.testing.assert_array_equal(of_block[: counts[b]], np.flatnonzero(indices.reshape(-1) == b))
        assert (of_block[counts[b] :] == indices.size).all()


def test_pairs_are_sorted_alike_whether_or_not_block_and_pair_fit_one_integer():
    """The long way is taken from 2^31 on, as by 4 million pairs of 512 blocks."""
    block = np.random.default_rng(0).integers(0, NUM_BLOCKS + 1, 40).astype(np.int32)
    for num_blocks in (NUM_BLOCKS, 2**31 // 40):
        sorted_block, pair = _sort_pairs(block, num_blocks)
        np.testing.assert_array_equal(pair, np.argsort(block, kind="stable"))
        np.testing.assert_array_equal(sorted_block, np.sort(block))


def test_the_schedule_is_the_same_under_jit_and_vmap():
    indices = np.stack([draw(11, 3, seed) for seed in range(3)])
    together = jax.jit(jax.vmap(lambda ids: make_schedule(ids, num_blocks=NUM_BLOCKS, tile_size=4)))(indices)
    for i, ids in enumerate(indices):
        alone = make_schedule(ids, num_blocks=NUM_BLOCKS, tile_size=4)
        np.testing.assert_array_equal(together.pair[i], alone.pair)
        np.testing.assert_array_equal(together.block[i], alone.block)
