"""The look inside a choice."""

import numpy as np
import pytest

from sparse_attn.inspect import draw_selection, routing_entropy
from sparse_attn.selection import BlockSelection, LevelMap


def test_entropy_counts_how_evenly_blocks_are_used():
    indices = np.array([[[[0, 1], [0, 2], [0, 3], [0, -1]], [[0, -1]] * 4, [[-1, -1]] * 4]], np.int32)
    entropy = routing_entropy(BlockSelection(indices, block_size=2, num_blocks=4))
    share = np.array([4, 1, 1, 1]) / 7
    np.testing.assert_allclose(entropy, [[-(share * np.log2(share)).sum(), 0, 0]], rtol=1e-6)


def test_a_map_shows_what_was_chosen():
    levels = np.array([[[[1, 0, 0], [2, 1, 0]], [[1, 1, 0], [8, 0, 1]]]], np.int8)
    figure = draw_selection(LevelMap(levels, 16, 16))
    images = [axes.images[0].get_array() for axes in figure.axes[:2]]
    np.testing.assert_array_equal(images, levels[0])
    density, entropy = figure.axes[-1].containers
    np.testing.assert_allclose([bar.get_height() for bar in density], [2 / 6, 3 / 6])
    np.testing.assert_allclose([bar.get_height() for bar in entropy], [1 / np.log2(3), 1], rtol=1e-6)


def test_lists_are_drawn_query_by_query_and_long_ones_thinned():
    indices = np.tile(np.arange(4, dtype=np.int32), (1, 1, 600, 1))
    figure = draw_selection(BlockSelection(indices, block_size=8, num_blocks=5))
    assert figure.axes[0].images[0].get_array().shape == (300, 5)
    assert figure.axes[0].get_ylabel() == "query"


def test_a_row_outside_the_batch_is_an_error():
    with pytest.raises(ValueError, match="batch_index=1"):
        draw_selection(LevelMap(np.ones((1, 1, 2, 2), np.int8), 1, 1), batch_index=1)
