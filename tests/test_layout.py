"""Blocks and reach of a layout against the oracle's sets."""

import functools

import jax
import numpy as np
import pytest

from sparse_attn.layout import make_layout
from tests import cases, oracle

pytestmark = pytest.mark.usefixtures("strict_ranks")

CASES = [case for case in cases.CASES if case.dtype == "float32"]


@functools.cache
def layouts(case):
    """The library's layout as NumPy arrays, and the oracle's views."""
    _, sequences = cases.make_inputs(case)
    sizes = {"batch_size": case.batch, "block_size": case.block_size, "is_causal": case.is_causal}
    make = functools.partial(make_layout, case.queries, case.keys, **sizes)
    layout = jax.tree.map(np.asarray, jax.jit(lambda sequences: make(**sequences))(sequences))
    return layout, oracle.views(case.queries, case.keys, **sizes, **sequences)


def key_order(layout, batch_row, num_keys):
    return np.arange(num_keys) if layout.key_order is None else layout.key_order[batch_row]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_restart_at_every_segment_and_hold_its_keys_in_order_S7(case):
    layout, views = layouts(case)
    for b in range(case.batch):
        order = key_order(layout, b, case.keys)
        for view in views[b]:
            for block, keys in view.blocks.items():
                start, length = layout.block_start[b, block], layout.block_length[b, block]
                np.testing.assert_array_equal(order[start : start + length], keys)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_real_key_is_in_exactly_one_block(case):
    layout, _ = layouts(case)
    _, sequences = cases.make_inputs(case)
    lengths = sequences.get("key_value_seq_lengths", [case.keys] * case.batch)
    for b in range(case.batch):
        order = key_order(layout, b, case.keys)
        pairs = zip(layout.block_start[b], layout.block_length[b], strict=True)
        held = np.concatenate([order[start : start + length] for start, length in pairs])
        np.testing.assert_array_equal(np.sort(held), np.arange(lengths[b]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_query_sees_one_interval_up_to_its_own_block_S2_S5(case):
    layout, views = layouts(case)
    for b, t in np.ndindex(case.batch, case.queries):
        seen = key_order(layout, b, case.keys)[layout.key_start[b, t] : layout.key_stop[b, t]]
        assert set(seen.tolist()) == views[b][t].visible
        if not seen.size:
            assert layout.last_block[b, t] == layout.first_block[b, t] - 1
        else:
            assert layout.first_block[b, t] == min(views[b][t].blocks)
        if views[b][t].own_block is not None:
            assert layout.last_block[b, t] == views[b][t].own_block


@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_of_key_inverts_the_blocks(case):
    layout, _ = layouts(case)
    block_of_key = np.asarray(layout.block_of_key())
    for b, block in np.ndindex(layout.block_start.shape):
        start = layout.block_start[b, block]
        assert (block_of_key[b, start : start + layout.block_length[b, block]] == block).all()


@pytest.mark.parametrize("sequences", ["full", "mixed"])
def test_order_keys_puts_keys_in_block_order(sequences):
    case = next(case for case in CASES if case.sequences == sequences)
    layout, _ = layouts(case)
    arrays, _ = cases.make_inputs(case)
    for b in range(case.batch):
        expected = arrays["key"][b, key_order(layout, b, case.keys)]
        np.testing.assert_array_equal(layout.order_keys(arrays["key"])[b], expected)
