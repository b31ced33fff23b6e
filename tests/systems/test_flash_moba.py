"""FlashMoBA is MoBA on keys that are convolved inside each sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.systems.flash_moba import FlashMoBA
from tests import near_ties, oracle
from tests.cases import assert_close

ATTENTION = FlashMoBA(block_size=4, top_k=2)


def convolved(key, kernel):
    """float64, one sequence [tokens, kv_heads, head_dim]."""
    key, mixture = key.astype(np.float64), np.zeros(key.shape)
    for t, lag in np.ndindex(len(key), len(kernel)):
        if lag <= t:
            mixture[t] += kernel[lag] * key[t - lag]
    return key + mixture / (1 + np.exp(-mixture))


def test_packed_and_padded_rows_equal_moba_on_convolved_keys(strict_ranks):
    """The segments of the second row are torn apart; behind the first there is padding."""
    random = np.random.default_rng(0)
    query = random.standard_normal((2, 22, 4, 8)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 22, 2, 8)).astype(np.float32)
    kernel = random.standard_normal((3, 2, 8)).astype(np.float32)
    ids, lengths = np.array([[2] * 9 + [0] * 13, random.permutation([2] * 9 + [0] * 13)]), np.array([19, 22])
    for array in (query, key, value):
        array[0, 19:] = np.nan

    @jax.jit
    def run(query, key, value, kernel, **sequences):
        attend = functools.partial(ATTENTION, query, key, value, **sequences)
        output, pull_back = jax.vjp(attend, kernel)
        return ATTENTION.select(query, key, kernel, **sequences).indices, output, *pull_back(jnp.ones_like(output))

    indices, output, d_kernel = run(query, key, value, kernel, segment_ids=ids, seq_lengths=lengths)
    sizes = {"block_size": ATTENTION.block_size, "top_k": ATTENTION.top_k}
    sequences = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    sequences |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}

    def convolve(kernel):
        """float64 key, each segment by itself; padding stays as it is."""
        result = key.astype(np.float64)
        for row, segment in np.ndindex(2, 3):
            places = np.flatnonzero(ids[row, : lengths[row]] == segment)
            result[row, places] = convolved(key[row, places], kernel)
        return result

    exact_key = convolve(kernel.astype(np.float64))
    error = 16 * near_ties.UNIT * np.nanmax(np.abs(exact_key))  # of three products, their sums and the gate
    expected, gap = oracle.route(query, exact_key, **sizes, **sequences, input_error=error)
    assert gap.min() > 0, "draw other numbers"
    np.testing.assert_array_equal(indices, expected)
    mask = oracle.attention_mask(expected, num_keys=22, block_size=4, **sequences)
    assert_close(output, oracle.attention(query, exact_key, value, mask), "float32")
    direction = random.standard_normal(kernel.shape)
    slope = oracle.slope(
        lambda kernel: oracle.attention(query, convolve(kernel), value, mask).sum(), [kernel.astype(float)], [direction]
    )
    assert_close((d_kernel * direction).sum(), slope, "float32")


def test_bad_arguments_are_named():
    query, kernel = np.zeros((1, 5, 2, 4), np.float32), np.zeros((3, 2, 4), np.float32)
    with pytest.raises(ValueError, match="top_k"):
        FlashMoBA(top_k=0)
    with pytest.raises(ValueError, match="kernel"):
        ATTENTION(query, query, query, kernel[:, 1:])
    with pytest.raises(ValueError, match="seq_lengths"):
        ATTENTION(query, query, query, kernel, seq_lengths=[5, 5])
