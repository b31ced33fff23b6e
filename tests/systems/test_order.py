"""Orders of tokens against their definitions."""

import itertools

import numpy as np
import pytest

from sparse_attn.grammar import order

SHAPES = [*itertools.product(range(1, 7), repeat=3), (1, 37, 50), (21, 9, 16), (2, 30, 13)]


def test_the_curve_visits_every_token_once_and_steps_to_a_neighbour():
    for shape in SHAPES:
        curve = order.space_filling_curve(shape)
        np.testing.assert_array_equal(np.sort(curve), np.arange(np.prod(shape)))
        assert curve[0] == 0
        steps = np.abs(np.diff(np.stack(np.unravel_index(curve, shape)), axis=1))
        assert steps.max(initial=1) == 1, shape
        if all(size % 2 == 0 for size in shape):
            assert steps.sum(0).max() == 1, shape


def test_the_curve_keeps_lumps_together():
    """A run of 64 tokens of a cube lies in few more than 4 x 4 x 4 places: rows of a raster reach across it all."""
    position = np.stack(np.unravel_index(order.space_filling_curve((16, 16, 16)), (16, 16, 16)))
    runs = position.reshape(3, -1, 64)
    assert (runs.max(-1) - runs.min(-1) + 1).max() <= 8


def test_neighbouring_blocks_are_those_of_tokens_less_than_two_apart():
    shape, block_size = (3, 4, 5), 7
    curve = order.space_filling_curve(shape)
    position = np.stack(np.unravel_index(curve, shape), axis=1)
    expected = np.zeros((9, 9), bool)
    for one, other in itertools.product(range(60), repeat=2):
        if np.abs(position[one] - position[other]).max() <= 1:
            expected[one // block_size, other // block_size] = True
    np.testing.assert_array_equal(order.neighbouring_blocks(shape, curve, block_size), expected)


def test_bad_grids_are_named():
    for shape in ((4, 4), (4, 0, 4), (4, 2.5, 4)):
        with pytest.raises(ValueError, match="grid_shape must be"):
            order.space_filling_curve(shape)
