"""BlockSelection: a static description and one array of ids."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import BlockSelection

pytestmark = pytest.mark.usefixtures("strict_ranks")

INDICES = np.array([[[[1, 0, -1], [2, -1, -1]], [[-1, -1, -1], [3, 0, 2]]]], np.int32)  # [1, 2 heads, 2 queries, 3]


def make_selection(indices=INDICES):
    return BlockSelection(jnp.asarray(indices), block_size=4, num_blocks=5)


def test_to_mask_marks_the_chosen_blocks_and_no_others():
    expected = np.zeros((1, 2, 2, 5), bool)
    for row in np.ndindex(INDICES.shape):
        if INDICES[row] >= 0:
            expected[(*row[:3], INDICES[row])] = True
    np.testing.assert_array_equal(make_selection().to_mask(), expected)


def test_density_is_the_chosen_share_of_the_table_for_every_head():
    np.testing.assert_allclose(make_selection().density(), [[3 / 10, 3 / 10]], rtol=1e-6)


def test_a_selection_passes_through_jit_with_its_sizes_static():
    selection = jax.jit(lambda s: s)(make_selection())
    assert (selection.block_size, selection.num_blocks) == (4, 5)
    assert jax.tree.leaves(make_selection())[0].dtype == jnp.int32
    chex.assert_trees_all_equal(selection, make_selection())


def test_a_selection_is_frozen():
    with pytest.raises(AttributeError):
        make_selection().block_size = 8
