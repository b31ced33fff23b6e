"""Blocks and reach of a layout against the oracle's sets."""

import functools

import jax
import numpy as np
import pytest

from sparse_attn.checks import Sequences
from sparse_attn.layout import make_blocks, order_keys
from tests import cases, oracle

pytestmark = pytest.mark.usefixtures("strict_ranks")

CASES = [case for case in cases.CASES if case.dtype == "float32"]


@functools.cache
def layouts(case):
    """The library's blocks as NumPy arrays, the order of keys in every row, and the oracle's views."""
    arrays, sequences = cases.make_inputs(case)
    sizes = {"block_size": case.block_size, "is_causal": case.is_causal}
    make = functools.partial(make_blocks, arrays["query"], arrays["key"], **sizes)
    blocks, order = jax.tree.map(np.asarray, jax.jit(lambda sequences: make(Sequences(**sequences)))(sequences))
    order = np.tile(np.arange(case.keys), (case.batch, 1)) if order is None else order
    return blocks, order, oracle.views(case.queries, case.keys, batch_size=case.batch, **sizes, **sequences)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_restart_at_every_segment_and_hold_its_keys_in_order_S7(case):
    blocks, order, views = layouts(case)
    for b in range(case.batch):
        for view in views[b]:
            for block, keys in view.blocks.items():
                start, length = blocks.block_start[b, block], blocks.block_length[b, block]
                np.testing.assert_array_equal(order[b, start : start + length], keys)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_real_key_is_in_exactly_one_block(case):
    blocks, order, _ = layouts(case)
    _, sequences = cases.make_inputs(case)
    lengths = sequences.get("key_value_seq_lengths", [case.keys] * case.batch)
    for b in range(case.batch):
        pairs = zip(blocks.block_start[b], blocks.block_length[b], strict=True)
        held = np.concatenate([order[b, start : start + length] for start, length in pairs])
        np.testing.assert_array_equal(np.sort(held), np.arange(lengths[b]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_query_sees_one_interval_up_to_its_own_block_S2_S5(case):
    blocks, order, views = layouts(case)
    for b, t in np.ndindex(case.batch, case.queries):
        seen = order[b, blocks.start[b, t] : blocks.stop[b, t]]
        assert set(seen.tolist()) == views[b][t].visible
        if not seen.size:
            assert blocks.last_block[b, t] == blocks.first_block[b, t] - 1
        else:
            assert blocks.first_block[b, t] == min(views[b][t].blocks)
        if views[b][t].own_block is not None:
            assert blocks.last_block[b, t] == views[b][t].own_block


@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_of_key_inverts_the_blocks(case):
    blocks, *_ = layouts(case)
    block_of_key = np.asarray(blocks.block_of_key())
    for b, block in np.ndindex(blocks.block_start.shape):
        start = blocks.block_start[b, block]
        assert (block_of_key[b, start : start + blocks.block_length[b, block]] == block).all()


@pytest.mark.parametrize("sequences", ["full", "mixed"])
def test_order_keys_puts_keys_in_block_order(sequences):
    case = next(case for case in CASES if case.sequences == sequences)
    _, order, _ = layouts(case)
    arrays, _ = cases.make_inputs(case)
    for b in range(case.batch):
        ordered = order_keys(arrays["key"], order)[b]
        np.testing.assert_array_equal(ordered, arrays["key"][b, order[b]])
